"""The folder of a run: what is in it, and how an interrupted run finds its place.

==================== ===============================================================================
`config.yaml`         the configuration as resolved; can be given to `recover check` again
`run.json`            what the run fixed at its start: see `RunState`
`units/`              the values of each finished unit of work, a phase of a batch, as JSON; while the run lasts, beside
                      them the deltas that they speak of
`deltas.safetensors`  deltas `[n_pos d_model]`, float32: by example id the one within the budget, and with `/smallest`
                      behind it the smallest one; `transfer/fold/constraint/budget/draw` the shared ones; gathered from
                      those of the units when all are finished
`examples.jsonl`      one record a line, an example each; written when all of them are finished
`verdict.json`        the answer
`report.html`         the same for people
`report.md`           the same in short, for a pull request
==================== ===============================================================================

Every file is written to a temporary name and renamed, so that it is there whole or not at all. Deltas are written
before the unit that speaks of them: whenever a run is killed, what its units say is true, and the rest is done again.

Several workers may share a run in one folder. One of them holds it and writes what is written once; each writes the
units that it finishes.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from recover.protocol.records import ExampleRecord
from recover.types import InputError, Tensor

CONFIG, RUN, DELTAS, EXAMPLES = "config.yaml", "run.json", "deltas.safetensors", "examples.jsonl"
VERDICT, REPORT, MARKDOWN = "verdict.json", "report.html", "report.md"
UNITS, LOCK, TEMPORARY = "units", ".lock", ".recover-"
SEEDS = "seeds.json"
"""In the folder above those of several seeds: how often each verdict came."""


class RunState(BaseModel):
    """The settings that a run fixes at its start, so that a later start goes on in the same way.

    Attributes:
        config: the configuration as resolved.
        keep_text: whether prompts may appear in the artifacts.
        fingerprint: of everything that can change a result, the weights included.
        batch_size: examples at once.
        features: of each clamp, as listed or as its rule selected them.
        values: of each clamp, one for all of its features or one each.
        threads: of torch on the CPU, on whose number rounding depends.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    config: dict[str, Any]
    keep_text: bool
    fingerprint: str
    batch_size: int
    features: list[list[int]]
    values: list[float | list[float]]
    threads: int = 1


class _Unit(BaseModel):
    """A finished unit of work, as its file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    unit: str
    deltas: list[str]
    values: Any


class RunFolder:
    """A run's folder; a `Store` of finished units. It is this process's, and its workers', alone until `close`.

    Args:
        path: a folder that is new, empty or holds a run.
        holds: whether this process holds it, or another worker of the run does, which has opened it before.

    Raises:
        InputError: the folder cannot be written, holds something else, is in use by another process, or its `run.json`
            is damaged.
    """

    def __init__(self, path: Path | str, *, holds: bool = True) -> None:
        self.path, self.name = Path(path), f"--out {path}"
        self.state: RunState | None = None
        self._units: dict[str, str] = {}
        self._at: dict[str, Path] = {}
        self._made, self._lock = False, FileLock(self.path / LOCK)
        if holds:
            self._hold()

    def _hold(self) -> None:
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            names = sorted(entry.name for entry in self.path.iterdir())
        except OSError as error:
            raise InputError(f"{self.name}: cannot be written ({error.strerror}); give another folder") from None
        strangers = [name for name in names if name != LOCK and not name.startswith(TEMPORARY)]
        if strangers and RUN not in names:
            raise InputError(f"{self.name}: holds {strangers[0]!r} and no run of recover; give a new or empty folder")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{self.name}: another recover is at work there; wait for it or stop it") from None
        try:
            for leftover in [*self.path.glob(f"{TEMPORARY}*"), *self.path.glob(f"{UNITS}/{TEMPORARY}*")]:
                leftover.unlink(missing_ok=True)  # a worker of an earlier start may just be renaming it
            self.state = self._read_state()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others use the folder. One that was made here and never written to goes away."""
        with contextlib.suppress(OSError):
            if self._made and all(entry.name == LOCK for entry in self.path.iterdir()):
                (self.path / LOCK).unlink(missing_ok=True)
                self.path.rmdir()
        self._lock.release()

    def begin(self, state: RunState) -> None:
        """Record what a new run fixes."""
        self.write(RUN, (state.model_dump_json() + "\n").encode())
        (self.path / UNITS).mkdir(exist_ok=True)
        self.state = state

    def resume(self) -> None:
        """Read what an earlier start has finished.

        Raises:
            InputError: a file is damaged.
        """
        (self.path / UNITS).mkdir(exist_ok=True)  # a run may have died before it made it
        for path in [*self.path.glob(DELTAS), *sorted((self.path / UNITS).glob("*.safetensors"))]:
            with self._damage(path.relative_to(self.path).as_posix()):
                self._at |= dict.fromkeys(_names(path), path)
        for path in sorted((self.path / UNITS).glob("*.json")):
            with self._damage(f"{UNITS}/{path.name}"):
                self._read(path.read_text(encoding="utf-8"))

    def load(self, unit: str) -> Any | None:
        """The values of a finished unit; None where it is not finished."""
        return json.loads(self._units[unit])["values"] if unit in self._units else None

    def keep(self, unit: str, values: Any, deltas: Mapping[str, Tensor]) -> None:
        """Keep a unit's deltas, and then its values: from here on it is finished."""
        file = f"{UNITS}/{unit.replace('/', '-')}"
        if deltas:
            self.write(f"{file}.safetensors", save({name: d.float().contiguous() for name, d in deltas.items()}))
            self._at |= dict.fromkeys(deltas, self.path / f"{file}.safetensors")
        text = json.dumps({"unit": unit, "deltas": sorted(deltas), "values": values}, allow_nan=False)
        self.write(f"{file}.json", (text + "\n").encode())
        self._units[unit] = text

    def delta(self, name: str) -> Tensor:
        """A delta, read back from the file."""
        with safe_open(self._at[name], framework="pt") as file:
            delta: Tensor = file.get_tensor(name)
        return delta

    def given(self, unit: str) -> str:
        """Give the part of a unit that another worker needs; its deltas lie in the folder, under the unit's name."""
        return self._units[unit]

    def take(self, unit: str, given: str) -> None:
        """Take in a unit that another worker finished, and wrote."""
        path = self.path / UNITS / f"{unit.replace('/', '-')}.safetensors"
        self._at |= dict.fromkeys(json.loads(given)["deltas"], path if path.exists() else self.path / DELTAS)
        self._units[unit] = given

    @property
    def units(self) -> dict[str, str]:
        """Give that part of every finished unit."""
        return dict(self._units)

    def finish(self, records: Sequence[ExampleRecord]) -> None:
        """Write `examples.jsonl`, and gather the deltas into one file."""
        self.write(EXAMPLES, "".join(record.to_json() + "\n" for record in records).encode())
        if self._at:
            self.write(DELTAS, save({name: self.delta(name) for name in sorted(self._at)}))
            parts, self._at = set(self._at.values()) - {self.path / DELTAS}, dict.fromkeys(self._at, self.path / DELTAS)
            for part in parts:
                part.unlink(missing_ok=True)

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of these files are there."""
        return all((self.path / name).is_file() for name in names)

    def read(self, name: str) -> str:
        """The text of a file of the run."""
        return (self.path / name).read_text(encoding="utf-8")

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the run, whole or not at all.

        Raises:
            InputError: the disk is full, or the folder has gone.
        """
        try:
            write_whole(self.path / name, content)
        except OSError as error:
            raise InputError(
                f"{self.name}: {name} cannot be written ({error.strerror}); mend that, and the same command goes on"
            ) from None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file of the run."""
        self.write(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def _read(self, text: str) -> None:
        """Take in a unit, as its file has it."""
        unit = _Unit.model_validate_json(text)
        if missing := [name for name in unit.deltas if name not in self._at]:
            raise ValueError(f"{len(missing)} deltas that it speaks of are not there, the first {missing[0]}")
        self._units[unit.unit] = text

    def _read_state(self) -> RunState | None:
        if not (self.path / RUN).exists():
            return None
        with self._damage(RUN):
            return RunState.model_validate_json(self.read(RUN))

    @contextlib.contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        """Tell of a file that cannot be read back in one line."""
        try:
            yield
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            if isinstance(error, ValidationError):
                first = error.errors(include_url=False)[0]
                reason = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
            told = f"{self.name}: {what} is damaged ({reason:.120}); remove the folder or give another"
            raise InputError(told) from None


def _names(path: Path) -> list[str]:
    """Names of the deltas in a file."""
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
