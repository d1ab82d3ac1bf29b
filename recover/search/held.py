"""The climb of a search that holds features by restoring them: what is held, and how, is someone else's.

From a start, for every example of a batch at once:

1. *Step* along the part of the score's gradient that may be followed, as `recover.search` does: by the length that
   would reach the goal if the slack were linear, no longer than the budget.
2. *Restore* what that moved.
3. *Judge*: a point counts if its drift is within the tolerance, its norm within the budget and its score higher;
   otherwise the stride is halved. The best slack among those that count is kept, so that no result breaks either bound.
4. *Retire* solved examples and those that stall; what is unsolved begins again at the next start, and at last at random
   points, restored as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange

from recover.defenses.defended import Delta
from recover.numerics.metrics import norm
from recover.search.ascent import Schedule, better, scale_to
from recover.types import Bool, InputError, Int, PerExample, Tensor

__all__ = ["Held", "Point", "RestoredSolution", "each", "search_held"]

HALVINGS = 6
"""Of a random start that cannot be restored."""


@dataclass(frozen=True, eq=False)
class Point:
    """What is known at one delta.

    Attributes:
        drift: of what is held, relative.
        gradient: the part of the score's that may be followed from there.
    """

    score: PerExample
    slack: PerExample
    drift: PerExample
    gradient: Delta


@runtime_checkable
class Held(Protocol):
    """What is held in a batch of examples, and how."""

    def look(self, delta: Delta) -> Point:
        """What is known at `delta`."""

    def free(self, delta: Delta, along: Delta) -> Delta:
        """The part of a direction that may be followed from `delta`."""

    def within(self, delta: Delta) -> Delta:
        """Restored and within the budget; where both cannot be had at once, what came nearest."""

    def select(self, rows: Int[Tensor, "rows"]) -> Held:
        """The same for the examples `rows`."""


@dataclass(frozen=True, eq=False)
class RestoredSolution:
    """The best delta found for each example, by the solver's own account.

    Attributes:
        drift: of what is held over all sites and positions, relative: clamped features, or what they write.
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


def search_held(
    held: Held,
    starts: Sequence[Delta],
    budget: float,
    tolerance: float,
    schedule: Schedule,
    on_step: Callable[[int, int], None] | None = None,
) -> RestoredSolution:
    """The best that is met from any start: those given, and as many random ones as the schedule says.

    Args:
        held: what must stay.
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
    search = _Search(budget, schedule, tolerance, on_step)
    generator = torch.Generator().manual_seed(schedule.seed)
    best = search.ascend(held, starts[0])
    for at in range(1, len(starts) + schedule.restarts):
        unsolved = (best.slack < schedule.goal).nonzero().flatten()
        if len(unsolved) == 0:
            break
        part = held.select(unsolved)
        if at < len(starts):
            start = starts[at][unsolved]
        else:
            # One draw for all examples: a result must not depend on which others are in the batch.
            noise = torch.randn(starts[0].shape[1:], generator=generator).to(starts[0])
            start = search.drawn(part, noise.expand_as(starts[0][unsolved]))
        best = better(best, search.ascend(part, start), unsolved)
    return best


@dataclass(frozen=True, eq=False)
class _Search:
    budget: float
    schedule: Schedule
    tolerance: float
    on_step: Callable[[int, int], None] | None

    def ascend(self, held: Held, start: Delta) -> RestoredSolution:
        """One start; see the module's docstring."""
        schedule, batch = self.schedule, start.shape[0]
        best = torch.zeros_like(start)
        best_score = start.new_full((batch,), -torch.inf)
        best_slack, best_drift = best_score.clone(), torch.zeros_like(best_score)
        steps = torch.zeros(batch, dtype=torch.long, device=start.device)
        active = torch.arange(batch, device=start.device)
        # Of the examples still active: the next point, the highest so far, score and gradient there, and the stride.
        delta, here, slope = start, start, torch.zeros_like(start)
        height, stride = best_score.clone(), start.new_full((batch,), schedule.stride)
        for step in range(schedule.steps + 1):
            point = held.look(delta)
            steps[active] = step
            counts = torch.isfinite(point.score) & torch.isfinite(point.slack) & torch.isfinite(norm(point.gradient))
            counts &= (point.drift <= self.tolerance) & (norm(delta) <= self.budget)
            better = counts & (point.slack > best_slack[active])
            rows = active[better]
            best[rows], best_drift[rows] = delta[better], point.drift[better]
            best_score[rows], best_slack[rows] = point.score[better], point.slack[better]

            higher = counts & (point.score > height)
            here = torch.where(each(higher), delta, here)
            slope = torch.where(each(higher), point.gradient, slope)
            height = torch.where(higher, point.score, height)
            stride = torch.where(higher, (stride * 1.5).clamp(max=schedule.stride), stride / 2)
            # The length that reaches the goal if the slack were linear; aimed past it, as slacks are mostly concave.
            newton = (2 * schedule.goal - best_slack[active]) / norm(slope).clamp(min=torch.finfo(slope.dtype).tiny)
            solved = best_slack[active] >= schedule.goal
            going = ~solved & (norm(slope) > 0)
            if self.on_step is not None:
                self.on_step(step, int((~solved).sum()))
            if step == schedule.steps or not bool(going.any()):
                break
            delta = here + scale_to(slope, stride * newton.clamp(max=self.budget))
            active, delta, here, slope, height, stride = (
                values[going] for values in (active, delta, here, slope, height, stride)
            )
            if not bool(going.all()):
                held = held.select(going.nonzero().flatten())
            delta = held.within(delta)
            moving = norm(delta - here) > schedule.still * norm(here)
            if not bool(moving.any()):
                break
            if not bool(moving.all()):
                active, delta, here, slope, height, stride = (
                    values[moving] for values in (active, delta, here, slope, height, stride)
                )
                held = held.select(moving.nonzero().flatten())
        return RestoredSolution(best, best_score, best_slack, best_drift, steps)

    def drawn(self, held: Held, noise: Delta) -> Delta:
        """A random start at the budget, or as near to it as it can be restored."""
        size = self.budget if math.isfinite(self.budget) else 1.0
        start = scale_to(held.free(torch.zeros_like(noise), noise), size)
        good = torch.zeros_like(norm(start), dtype=torch.bool)
        found = torch.zeros_like(start)
        for halving in range(HALVINGS):
            trial = held.within(start / 2**halving)
            fits = ~good & (held.look(trial).drift <= self.tolerance) & (norm(trial) <= self.budget)
            found, good = torch.where(each(fits), trial, found), good | fits
            if bool(good.all()):
                break
        return found


def each(values: Tensor) -> Tensor:
    """As a factor of deltas."""
    return rearrange(values, "batch -> batch 1 1")
