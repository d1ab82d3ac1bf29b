"""The ledger of a check: which units of work are finished, and which worker does the rest.

Each phase of each batch is a *unit*: its values are handed to a `Store` as soon as it is finished, its deltas before
that. Values pass through JSON in every store, and batches are fixed, so that a run that was interrupted goes on with
the same arithmetic and reaches the same verdict.

So does one that several workers share. All hold the same finished units, and deal out in the same order what is left;
each runs its part in a stage, at whose end it is told to the others (`shared`).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from recover.protocol.phases import Done
from recover.protocol.records import without_nan
from recover.protocol.workers import ALONE, Workers
from recover.types import Tensor

Part = tuple[str, int]
"""Units that one worker runs in order, such as `("batch", 3)`."""


@runtime_checkable
class Store(Protocol):
    """Where finished units go, and where an interrupted run finds them again."""

    def load(self, unit: str) -> Any | None:
        """The values of a finished unit; None where it is not finished."""

    def keep(self, unit: str, values: Any, deltas: Mapping[str, Tensor]) -> None:
        """Keep a unit's deltas, and then its values: from here on it is finished."""

    def delta(self, name: str) -> Tensor:
        """A saved delta `[n_pos d_model]`, read back."""

    def given(self, unit: str) -> Any:
        """Give the part of a finished unit that another worker's store needs."""

    def take(self, unit: str, given: Any) -> None:
        """Take in a unit that another worker finished, from what its store gave."""


class InMemoryStore:
    """A store that lasts as long as the object."""

    def __init__(self) -> None:
        self.units: dict[str, str] = {}
        self.deltas: dict[str, Tensor] = {}
        self._of: dict[str, list[str]] = {}

    def load(self, unit: str) -> Any | None:
        return json.loads(self.units[unit]) if unit in self.units else None

    def keep(self, unit: str, values: Any, deltas: Mapping[str, Tensor]) -> None:
        self.deltas |= deltas
        self.units[unit], self._of[unit] = json.dumps(values, allow_nan=False), list(deltas)

    def delta(self, name: str) -> Tensor:
        return self.deltas[name]

    def given(self, unit: str) -> tuple[Any, dict[str, Tensor]]:
        return self.load(unit), {name: self.deltas[name].cpu() for name in self._of[unit]}

    def take(self, unit: str, given: tuple[Any, dict[str, Tensor]]) -> None:
        self.keep(unit, *given)


@dataclass(eq=False)
class Ledger:
    """Runs each unit once, whatever start and whatever worker it was in."""

    store: Store
    workers: Workers = ALONE
    _new: list[str] = field(init=False, default_factory=list)
    _seconds: dict[str, float] = field(init=False, default_factory=dict)

    def run(self, phase: str, number: int | None, work: Callable[[], Done | Any]) -> None:
        """Run a unit, unless it is finished."""
        unit = _name(phase, number)
        if self.store.load(unit) is not None:
            return
        started = time.perf_counter()
        done = work()
        values, deltas = (done.values, done.deltas) if isinstance(done, Done) else (done, {})
        seconds = time.perf_counter() - started
        self.store.keep(unit, {"seconds": seconds, "values": without_nan(values)}, deltas)
        self._new.append(unit)

    def values(self, phase: str, number: int | None = None) -> Any:
        """Values of a finished unit."""
        unit = _name(phase, number)
        kept: Any = self.store.load(unit)
        self._seconds.pop(unit, None)  # they are told in the order in which they were asked for last
        self._seconds[unit] = kept["seconds"]
        return kept["values"]

    def finished(self, units: Sequence[str]) -> bool:
        """Whether all of these units are finished."""
        return all(self.store.load(unit) is not None for unit in units)

    def mine(self, parts: Mapping[Part, Sequence[str]]) -> set[Part]:
        """Deal out the unfinished parts, given by their units, and give this worker's share."""
        return set(self.workers.deal([part for part, units in parts.items() if not self.finished(units)]))

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """A stage, at whose end each worker tells the others what it finished in it.

        Raises:
            InputError, SystemExit: as `Workers.together`; what was finished is kept.
        """
        with self.workers.together():
            yield
        new = self._new if self.workers.size > 1 else []
        told = self.workers.gather({unit: self.store.given(unit) for unit in new})
        for rank, units in enumerate(told):
            for unit, given in units.items() if rank != self.workers.rank else ():
                self.store.take(unit, given)
        self._new = []

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, summed over units, workers and starts."""
        total: dict[str, float] = {}
        for unit, seconds in self._seconds.items():
            phase = unit.partition("/")[0]
            total[phase] = total.get(phase, 0.0) + seconds
        return total


def _name(phase: str, number: int | None) -> str:
    return phase if number is None else f"{phase}/{number}"
