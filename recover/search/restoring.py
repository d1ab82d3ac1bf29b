"""The search that restores what must stay: each point it judges has been put right first.

From each start, the ascent of `recover.search.ascent` with this rule. For every example of a batch at once:

1. *Step* along the part of the score's gradient that may be followed, by the length that would reach the goal if the
   slack were linear, no longer than the budget.
2. *Restore* what that moved.
3. *Judge*: a point counts if its drift is within the tolerance, its norm within the budget and its score higher;
   otherwise the stride is halved. The best slack among those that count is kept, so that no result breaks either bound.
4. *Retire* solved examples and those that stall; what is unsolved begins again at the next start, and at last at random
   points, restored as well.

What must stay, and how it is restored, is the business of a `Restoration`: `recover.search.restored` has
that of clamped features at several sites, `recover.search.stable` that of C2 and C3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from recover.numerics.metrics import by_example, norm
from recover.search.ascent import Ends, Point, Schedule, Seen, Status, Steepest, ascend, from_each_start, scale_to
from recover.types import Bool, Delta, InputError, Int, PerExample, Rows, Tensor

__all__ = ["Restoration", "RestoredSolution", "search_restoring"]

HALVINGS = 6
"""How often a random start that cannot be restored is halved."""


@runtime_checkable
class Restoration(Protocol):
    """What must stay in a batch of examples, and how it is restored."""

    def look(self, delta: Delta) -> Point:
        """What there is to know at `delta`."""

    def free(self, delta: Delta, along: Delta) -> Delta:
        """The part of a direction that may be followed from `delta`."""

    def within(self, delta: Delta) -> Delta:
        """`delta` restored and within the budget; where both cannot be had at once, what came nearest."""

    def select(self, rows: Rows) -> Restoration:
        """The restoration of the examples `rows` alone."""


@dataclass(frozen=True, eq=False)
class RestoredSolution:
    """The best delta found for each example, by the solver's own account.

    Attributes:
        drift: of what must stay, over all sites and positions, relative: clamped features, or what they write.
        steps: gradient steps.
    """

    delta: Delta
    score: PerExample
    slack: PerExample
    drift: PerExample
    steps: Int[Tensor, "batch"]

    @property
    def recovered(self) -> Bool[Tensor, "batch"]:
        """Where the behavior is back."""
        return self.slack > 0


class RestoredSteps(Steepest[Restoration]):
    """Steepest ascent whose every point is restored before it is judged."""

    def __init__(self, start: Delta, budget: float, schedule: Schedule, tolerance: float) -> None:
        super().__init__(start, budget, schedule)
        self.tolerance = tolerance

    def counts(self, delta: Delta, point: Point) -> Bool[Tensor, "batch"]:
        return super().counts(delta, point) & (point.drift <= self.tolerance) & (norm(delta) <= self.budget)

    def step(self, terrain: Restoration, seen: Seen) -> tuple[Delta, Ends]:
        return self._uphill(seen), {Status.NO_GRADIENT: norm(self.slope) == 0}

    def settle(self, terrain: Restoration, delta: Delta) -> tuple[Delta, Bool[Tensor, "batch"]]:
        delta = terrain.within(delta)
        return delta, norm(delta - self.here) > self.schedule.still * norm(self.here)


def search_restoring(
    restoration: Restoration,
    starts: Sequence[Delta],
    budget: float,
    tolerance: float,
    schedule: Schedule,
    on_step: Callable[[int, int], None] | None = None,
) -> RestoredSolution:
    """Search from the given starts, and from as many random ones as the schedule says.

    Args:
        restoration: what must stay.
        starts: one at least, each of all examples; a start that is not within the bounds leads nowhere.
        budget: largest Frobenius norm of an example's delta; `inf` for none.
        tolerance: largest drift of a result, relative.
        schedule: how hard to search.
        on_step: called with (steps done, examples still being searched) after every step.

    Raises:
        InputError: the budget or the tolerance is not a positive number.
    """
    if not (budget > 0 and tolerance > 0):
        raise InputError(f"budget: {budget}, or tolerance: {tolerance}, is not a positive number")

    def climb(part: Restoration, start: Delta) -> RestoredSolution:
        rule = RestoredSteps(start, budget, schedule, tolerance)
        found, drift = ascend(part, start, rule, on_step, otherwise=torch.zeros_like(start))
        return RestoredSolution(found.delta, found.score, found.slack, drift, found.steps)

    def drawn(part: Restoration, noise: Delta) -> Delta:
        """A random start at the budget, or as near to it as it can be restored."""
        size = budget if math.isfinite(budget) else 1.0
        start = scale_to(part.free(torch.zeros_like(noise), noise), size)
        good, found = torch.zeros_like(norm(start), dtype=torch.bool), torch.zeros_like(start)
        for halving in range(HALVINGS):
            trial = part.within(start / 2**halving)
            fits = ~good & (part.look(trial).drift <= tolerance) & (norm(trial) <= budget)
            found, good = torch.where(by_example(fits), trial, found), good | fits
            if bool(good.all()):
                break
        return found

    return from_each_start(restoration, starts, schedule, climb, drawn)
