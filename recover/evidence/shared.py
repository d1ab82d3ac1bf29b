"""Transfer in one call: a shared perturbation fitted on half of the examples, read on the other half, with its control.

1. *Split*: halves by a seeded hash of the ids (`halves`).
2. *Fit*, side by side: one perturbation for the own targets, one for targets shuffled across examples (`derangement`).
3. *Read* both on the examples that neither was fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recover.defenses.defended import Defended
from recover.evidence.transfer import FitSchedule, Pool, Problem, Shared, derangement, fit_shared, halves
from recover.search.ascent import Feasible


@dataclass(frozen=True, eq=False)
class Transferred:
    """How many unseen examples one shared perturbation brings back.

    Attributes:
        deltas: fitted to the own targets, and to shuffled ones, `[2 n_pos d_model]`.
        n: unseen examples.
        own, shuffled: how many of them show the behavior under each.
    """

    deltas: Shared
    n: int
    own: int
    shuffled: int


def fit_and_read(
    defended: Defended, ids: Sequence[str], feasible: Feasible, budget: float, schedule: FitSchedule | None = None
) -> Transferred:
    """Fit one perturbation for half of the examples, and read it on the others; beside it the shuffled control.

    The examples are valid flips by a predicate whose chance level is low; they are split by their `ids`.

    Raises:
        InputError: the behavior names no target, so that none can be shuffled.
    """
    schedule, pool = schedule or FitSchedule(), Pool((defended,))
    fitted, unseen = halves(ids, schedule.seed)
    half, targets = pool.select(fitted), pool.select(fitted).targets
    other = None if targets is None else derangement(targets, [ids[row] for row in fitted.tolist()], schedule.seed)
    deltas = fit_shared(half, [Problem(feasible, budget), Problem(feasible, budget, other)], schedule)
    own, shuffled = (pool.select(unseen).slack(deltas) > 0).sum(dim=1).tolist()
    return Transferred(deltas, len(unseen), own, shuffled)
