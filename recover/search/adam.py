"""Projected Adam (Kingma and Ba 2015) in the null-space parametrization: another rule to step by.

Steepest ascent follows one gradient at a time. Adam differs in kind: it has momentum, and each coordinate has a step of
its own, about as long where the gradient is faint as where it is strong. For every example of a batch at once:

1. *Parametrize*: `delta = P v`, and Adam moves `v`. What it puts outside of the admissible space is projected away.
2. *Unit of length*: the budget or, if that is shorter, a few times the length that would reach the goal if the score
   were linear. The first step is a tenth of it, and the rate falls to nothing, so that no choice depends on units, and
   an infinite budget is no special case. Gradients are in units of the first one.
3. *Clip* to the budget.
"""

from __future__ import annotations

import torch

from recover.numerics.metrics import by_example, norm
from recover.search.ascent import Ends, Mask, Plain, Point, Schedule, Status, StepRule, clip
from recover.types import Delta, PerExample

STEPS, RATE, LENGTHS = 40, 0.1, 4.0
MOMENTUM, MEMORY = 0.9, 0.99
FLOOR = 0.01


class ProjectedAdam(StepRule[Plain]):
    """At most 40 of the schedule's steps by projected Adam; for `find_perturbation(..., rule=ProjectedAdam)`."""

    def __init__(self, start: Delta, budget: float, schedule: Schedule) -> None:
        super().__init__(start, budget, schedule)
        self.steps = min(schedule.steps, STEPS)
        # The moments of the gradient, its first size, and the unit of length.
        self.mean, self.square = 0 * start, 0 * start
        self.size = self.unit = torch.zeros_like(norm(start))

    def step(self, terrain: Plain, point: Point, counts: Mask, best: PerExample, number: int) -> tuple[Delta, Ends]:
        tiny = torch.finfo(point.delta.dtype).tiny
        if number == 0:
            self.size = norm(point.gradient).clamp(min=tiny)
            self.unit = (LENGTHS * (2 * self.schedule.goal - point.slack) / self.size).clamp(max=self.budget)
        # In units of the first gradient, so that the squares of small ones do not vanish.
        gradient = point.gradient / by_example(self.size)
        self.mean = MOMENTUM * self.mean + (1 - MOMENTUM) * gradient
        self.square = MEMORY * self.square + (1 - MEMORY) * gradient.square()
        ends = {
            Status.NO_GRADIENT: norm(self.mean) == 0,
            Status.NON_FINITE: best == -torch.inf,
            Status.EXHAUSTED: ~counts,
        }
        width = (self.square / (1 - MEMORY ** (number + 1))).sqrt()
        # A floor relative to other coordinates: where only rounding is left of a gradient, its sign means nothing.
        floor = FLOOR * width.square().mean(dim=(1, 2), keepdim=True).sqrt()
        toward = self.mean / (1 - MOMENTUM ** (number + 1)) / (width + floor).clamp(min=tiny)
        if number == 0:
            self.unit = self.unit / norm(terrain.feasible.project(toward)).clamp(min=tiny)
        rate = by_example(RATE * (1 - number / max(self.steps, 1)) * self.unit)
        return clip(terrain.feasible.project(point.delta + rate * toward), self.budget), ends
