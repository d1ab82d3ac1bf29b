"""Progress on stderr: one bar a phase on a terminal, and a few plain lines where stderr is a file or a CI log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from recover.types import Progress

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def shown() -> Iterator[Progress]:
    """A progress function that suits stderr."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    bars = _Bars()
    try:
        yield bars
    finally:
        bars.close()


class _Bars:
    """A bar for each phase, one below the other."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.closed = ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase == self.closed and done == total:
            return  # what is at its end may be told so again
        if self.bar is None or self.bar.desc != phase:
            self.close()
            self.bar = tqdm(total=total, desc=phase, bar_format="{desc} {elapsed}" if total == 1 else None)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.close()
            self.closed = phase

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


def _lines() -> Progress:
    """At most one line in ten seconds: a short run, and one that is refused, print none."""
    last = time.monotonic()

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if total > 1 and now - last >= SECONDS_BETWEEN_LINES:
            print(f"recover: {phase} {done} of {total}", file=sys.stderr, flush=True)
            last = now

    return progress
