"""The points of a sweep in a folder: each written as soon as it is there, and found again by a later start."""

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
    """A folder of points that were all made under the same settings."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Points:
        """Open a new folder, or one of an earlier start.

        Raises:
            InputError: it cannot be written, or holds points made under other settings.
        """
        wanted = json.loads(json.dumps(settings))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / SETTINGS).exists():
                there = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            elif any(folder.iterdir()):
                raise InputError(f"--out {folder}: holds something else; give a new or an empty folder")
            else:
                write_whole(folder / SETTINGS, json.dumps(wanted, indent=1).encode())
                there = wanted
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"--out {folder}: cannot be used ({error}); give another folder") from None
        if there != wanted:
            raise InputError(f"--out {folder}: holds points made under other settings; give another folder")
        return cls(folder)

    def get(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """A point: from the folder, or made now and kept there."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_whole(path, (json.dumps(make()) + "\n").encode())
        return dict(json.loads(path.read_text(encoding="utf-8")))
