"""The search that restores what must stay: each point it judges has been put right first.

It is the ascent of `recover.search.ascent` with another rule. For every example of a batch at once:

1. *Step* as steepest ascent does, and *restore* what that moved.
2. *Judge*: a point counts if its drift is within the tolerance, its norm within the budget and its score higher;
   otherwise the stride is halved. No result breaks either bound.
3. *Start again* where unsolved: at the next start, and at last at random points, restored as well.

What must stay, and how it is restored, is the business of a `Restoration`: `recover.search.restored` has
that of clamped features at several sites, `recover.search.stable` that of C2 and C3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from recover.numerics.metrics import by_example, norm
from recover.search.ascent import (
    Best,
    Ends,
    Mask,
    OnStep,
    Point,
    Schedule,
    Status,
    Steepest,
    Terrain,
    ascend,
    from_each_start,
    scale_to,
)
from recover.types import Delta, InputError, PerExample

HALVINGS = 6
"""How often a random start that cannot be restored is halved."""


@runtime_checkable
class Restoration(Terrain, Protocol):
    """What must stay in a batch of examples, and how it is restored."""

    def free(self, delta: Delta, along: Delta) -> Delta:
        """The part of a direction that may be followed from `delta`."""

    def within(self, delta: Delta) -> Delta:
        """`delta` restored and within the budget; where both cannot be had at once, what came nearest."""


@dataclass(frozen=True, eq=False)
class RestoredSolution(Best):
    """The best delta found for each example.

    Attributes:
        drift: of what must stay, over all sites and positions, relative: clamped features, or what they write.
    """

    drift: PerExample


class RestoredSteps(Steepest[Restoration]):
    """Steepest ascent whose every point is restored before it is judged."""

    def __init__(self, start: Delta, budget: float, schedule: Schedule, tolerance: float) -> None:
        super().__init__(start, budget, schedule)
        self.tolerance = tolerance

    def counts(self, point: Point) -> Mask:
        return super().counts(point) & (point.drift <= self.tolerance) & (norm(point.delta) <= self.budget)

    def step(
        self, terrain: Restoration, point: Point, counts: Mask, best: PerExample, number: int
    ) -> tuple[Delta, Ends]:
        return self._uphill(point, counts, best), {Status.NO_GRADIENT: norm(self.slope) == 0}

    def settle(self, terrain: Restoration, delta: Delta) -> tuple[Delta, Mask]:
        delta = terrain.within(delta)
        return delta, norm(delta - self.here) > self.schedule.still * norm(self.here)


def search_restoring(
    restoration: Restoration,
    starts: Sequence[Delta],
    budget: float,
    tolerance: float,
    schedule: Schedule,
    on_step: OnStep,
) -> RestoredSolution:
    """Search from the given starts, and from as many random ones as the schedule says.

    A start, each of all examples, that is not within the bounds leads nowhere. `budget` is the largest
    Frobenius norm of an example's delta, `tolerance` the largest relative drift of a result.

    Raises:
        InputError: the budget or the tolerance is not a positive number.
    """
    if not (budget > 0 and tolerance > 0):
        raise InputError(f"budget and tolerance must be positive, got {budget} and {tolerance}")

    def climb(part: Restoration, start: Delta) -> RestoredSolution:
        rule = RestoredSteps(start, budget, schedule, tolerance)
        found, drift = ascend(part, start, rule, on_step, otherwise=torch.zeros_like(start))
        return RestoredSolution(found.delta, found.score, found.slack, found.steps, drift)

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
