"""The points of a sweep in a folder: each is written when it is finished, and read back by a later start."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recover.protocol.folder import write_whole
from recover.types import InputError

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Points:
    """A folder of points that were all computed under the same settings; open one with `Points.open`.

    >>> from tempfile import mkdtemp
    >>> points = Points.open(Path(mkdtemp()), {"seed": 0})
    >>> points.get("budget-5", lambda: {"rate": 0.5})  # computed once; a later start reads it back
    {'rate': 0.5}
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Points:
        """Open a new folder, or one that an earlier start left.

        Raises:
            InputError: the folder cannot be written, or holds points computed under other settings.
        """
        wanted, path = json.loads(json.dumps(settings)), folder / SETTINGS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                if any(folder.iterdir()):
                    raise InputError(f"--out {folder}: holds something else; give a new or an empty folder")
                write_whole(path, json.dumps(wanted, indent=1).encode())
            there = json.loads(path.read_text(encoding="utf-8"))
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"--out {folder}: cannot be used ({error}); give another folder") from None
        if there != wanted:
            raise InputError(f"--out {folder}: holds points made under other settings; give another folder")
        return cls(folder)

    def get(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Read a point back, or compute it with `make` and keep it. A point is plain JSON values."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_whole(path, (json.dumps(make()) + "\n").encode())
        return dict(json.loads(path.read_text(encoding="utf-8")))
