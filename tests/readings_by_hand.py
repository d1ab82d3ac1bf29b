"""Tables of readings made by hand: every prompt is read in every draw, and each has a known answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from recover.evidence.readings import NONE, Other, Reading, Table

DRAWS, ANSWERS = 4, 6


def table(n: int = 24, kept: int = 6, *, back: int | None = None, still: int | None = None, **changes: Any) -> Table:
    """`n` flips, of which the first `back` are right again in every draw, and `kept` others, `still` of them right."""
    total = n + kept
    own = np.arange(total) % ANSWERS
    right = np.zeros(total, dtype=bool)
    right[: n if back is None else back] = True
    right[n : n + (kept if still is None else still)] = True
    shown = np.tile(np.where(right, own, NONE), (DRAWS, 1))
    norms = np.where(right, 1.0, np.inf) * np.ones((DRAWS, 1))
    made = Table(
        own=own,
        flips=np.arange(total) < n,
        clusters=np.arange(total),
        shown=shown,
        below=shown,
        norms=norms,
        best_norms=norms,
        others=(other("another rule", own, 2.0),),
        strata={},
        dealt=Reading(2, 100),
        trained=(1.0,) * DRAWS,
        planted=Reading(8, 8),
    )
    return replace(made, **changes)


def other(name: str, own: np.ndarray[Any, Any], norms: float | Sequence[float]) -> Other:
    """A rule that answers the next answer, at one norm for all prompts, or at one for each draw."""
    by_draw = np.broadcast_to(np.asarray(norms, dtype=np.float64), (DRAWS,))
    return Other(name, (own + 1) % ANSWERS, np.tile(by_draw[:, None], (1, len(own))))
