"""Progress on stderr: a bar for each phase on a terminal, a few plain lines where stderr is a file or a CI log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from recover.types import Progress

SECONDS_BETWEEN_LINES = 10.0
TITLES = {
    "loading": "loading the model",
    "asking": "asking the model",
    "all 24 orders": "asking the model in all 24 orders",
    "residuals": "reading residuals for the probe",
    "accounting": "finding valid flips",
    "search": "searching for perturbations",
    "certificates": "certifying perturbations",
    "attribution": "attributing effects to parts",
    "placebo": "searching for an unrelated target",
    "write_orthogonal": "searching under C1+",
    "undoing": "comparing with lifting the clamp",
    "budgets": "searching at each budget",
    "undefended": "searching with the clamp off",
    "power": "searching for planted routes",
    "placebo_features": "clamping random features",
    "transfer": "fitting one shared perturbation",
}
"""Titles of phases, by the part of their names before a comma."""


@contextlib.contextmanager
def shown() -> Iterator[Progress]:
    """Give a progress function for stderr, to be called with a phase, how much of it is done, and its total."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    bars = _Bars()
    try:
        yield bars
    finally:
        bars.close()


def title(phase: str) -> str:
    """The title of a phase.

    >>> title("write_orthogonal"), title("transfer, fold 1 of 2")
    ('searching under C1+', 'fitting one shared perturbation, fold 1 of 2')
    """
    name, comma, rest = phase.partition(",")
    return TITLES.get(name, name) + comma + rest


class _Bars:
    """Bars below each other, one for each phase."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.closed = ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase == self.closed and done == total:
            return  # the end of a phase may be reported again
        if self.bar is None or self.bar.desc != title(phase):
            self.close()
            self.bar = tqdm(total=total, desc=title(phase), bar_format="{desc} {elapsed}" if total == 1 else None)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.close()
            self.closed = phase

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


def _lines() -> Progress:
    """Print at most one line every ten seconds, so that a short run or a refused one prints none."""
    last = time.monotonic()

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if total > 1 and now - last >= SECONDS_BETWEEN_LINES:
            print(f"recover: {title(phase)}: {done} of {total}", file=sys.stderr, flush=True)
            last = now

    return progress
