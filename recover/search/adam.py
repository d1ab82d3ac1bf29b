"""Projected Adam (Kingma and Ba 2015) in the null-space parametrization: another way up for `recover`.

Steepest ascent follows one gradient at a time. Adam differs in kind: it has momentum, and each coordinate has a step of
its own, about as long where the gradient is faint as where it is strong. For every example of a batch at once:

1. *Parametrize*: `delta = P v`, and Adam moves `v`. What it puts outside of the admissible space is projected away.
2. *Unit of length*: the budget or, if that is shorter, a few times the length that would reach the goal if the score
   were linear. The first step is a tenth of it, and the rate falls to nothing, so that no choice depends on units, and
   an infinite budget is no special case. Gradients are in units of the first one.
3. *Clip* to the budget.
4. *Retire* examples that reached the goal, and those that cannot move.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange

from recover.numerics.metrics import norm
from recover.search.ascent import Delta, Feasible, Objective, Schedule, Solution, Status, clip, evaluate

STEPS, RATE, LENGTHS = 40, 0.1, 4.0
MOMENTUM, MEMORY = 0.9, 0.99
FLOOR = 0.01


def climb(
    objective: Objective,
    start: Delta,
    feasible: Feasible,
    budget: float,
    schedule: Schedule,
    on_step: Callable[[int, int], None] | None,
) -> Solution:
    """One start of projected Adam; the arguments of `recover`, in their order, and at most 40 of the schedule's steps.

    Returns:
        For each example the delta with the largest slack met, never worse than `start`.
    """
    last, tiny = min(schedule.steps, STEPS), torch.finfo(start.dtype).tiny
    best, best_score = start.clone(), start.new_full((len(start),), -torch.inf)
    best_slack, steps = best_score.clone(), torch.zeros(len(start), dtype=torch.long, device=start.device)
    status = [Status.EXHAUSTED] * len(start)
    # Of the examples still active: the next point, the moments of the gradient, its first size, the unit of length.
    active, delta, mean, square = torch.arange(len(start), device=start.device), start, 0 * start, 0 * start
    size = unit = best_score
    for step in range(last + 1):
        score, slack, gradient = evaluate(objective, delta, feasible)
        steps[active] = step
        finite = torch.isfinite(score) & torch.isfinite(slack) & torch.isfinite(norm(gradient))
        better = finite & (slack > best_slack[active])
        rows = active[better]
        best[rows], best_score[rows], best_slack[rows] = delta[better], score[better], slack[better]
        if step == 0:
            size = norm(gradient).clamp(min=tiny)
            unit = (LENGTHS * (2 * schedule.goal - slack) / size).clamp(max=budget)
        # In units of the first gradient, so that the squares of small ones do not vanish.
        gradient = gradient / rearrange(size, "batch -> batch 1 1")
        mean = MOMENTUM * mean + (1 - MOMENTUM) * gradient
        square = MEMORY * square + (1 - MEMORY) * gradient.square()

        solved = best_slack[active] >= schedule.goal
        ends = {
            Status.RECOVERED: solved,
            Status.NON_FINITE: best_slack[active] == -torch.inf,
            Status.NO_GRADIENT: ~solved & (norm(mean) == 0),
        }
        for reason, where in ends.items():
            for row in active[where].tolist():
                status[row] = reason
        going = finite & ~torch.stack(list(ends.values())).any(dim=0)
        if on_step is not None:
            on_step(step, int((~solved).sum()))
        if step == last or not going.any():
            break
        width = (square / (1 - MEMORY ** (step + 1))).sqrt()
        # A floor relative to other coordinates: where only rounding is left of a gradient, its sign means nothing.
        floor = FLOOR * width.square().mean(dim=(1, 2), keepdim=True).sqrt()
        toward = mean / (1 - MOMENTUM ** (step + 1)) / (width + floor).clamp(min=tiny)
        if step == 0:
            unit = unit / norm(feasible.project(toward)).clamp(min=tiny)
        rate = rearrange(RATE * (1 - step / last) * unit, "batch -> batch 1 1")
        delta = clip(feasible.project(delta + rate * toward), budget)
        active, delta, mean, square, size, unit = (
            values[going] for values in (active, delta, mean, square, size, unit)
        )
        if not going.all():
            rows = going.nonzero().flatten()
            objective, feasible = objective.select(rows), feasible.select(rows)
    return Solution(best, best_score, best_slack, steps, tuple(status))
