"""Search for a pinned delta within a budget, and for a short one; its norm is that of the whole, corrections included.

*Within a budget* (`find_pinned`): search among the free parts with the budget as their bound. A find whose whole delta
is longer is shortened to fit; where that misses the goal, the search goes on from there with a smaller bound.

*Short* (`shorten`). The nearest point is where the free parts `v` are parallel to the gradient of `||delta(v)||^2 / 2`,
as the whole delta has another metric than `v`. From a find:

1. step against the part of that gradient which leaves the slack as it is, to first order;
2. step back along the gradient of the slack to the edge of the goal;
3. keep what reaches the goal and is shorter; a step that gets no shorter halves the next one's length.

In linear models this ends at the closed form: the readout projected onto the pinned space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recover.numerics.metrics import by_example, norm
from recover.search.ascent import Best, Rule, Schedule, better, clip, find_perturbation
from recover.search.constraints.pinned import Pinned
from recover.search.minimum import MARGIN, dot
from recover.types import Delta, InputError, PerExample, Residual, Tensor

ROUNDS = 4
TIGHTER = 0.85
"""How much smaller the bound of the free parts is from round to round."""


@dataclass(frozen=True, eq=False)
class PinnedSolution(Best):
    """The best found for each example; `delta` is the whole, which is saved and replayed.

    Attributes:
        free: the free parts, `[batch (site pos) d_model]`.
        budget: the largest norm of the whole.
    """

    free: Residual
    budget: float

    @property
    def norm(self) -> PerExample:
        """The norm of the whole delta."""
        return norm(self.delta)


def find_pinned(
    pinned: Pinned,
    budget: float,
    schedule: Schedule | None = None,
    *,
    start: Delta | None = None,
    rule: Rule | None = None,
) -> PinnedSolution:
    """Search for pinned deltas of norm at most `budget` that bring the behavior back.

    Args:
        pinned: the objective.
        budget: largest Frobenius norm of a whole delta, corrections included, in units of the residual.
        schedule: how hard each round searches.
        start: free parts to begin from, within the budget (`two_stage.opened` gives such); zero by default.
        rule: how to step, as in `find_perturbation`.

    Raises:
        InputError: the budget is not a positive number.
    """
    if not budget > 0:
        raise InputError(f"budget must be positive, got {budget}")
    schedule = schedule or Schedule()
    best = _measured(pinned, pinned.zero_delta, budget)
    rows = torch.arange(len(best.slack), device=best.slack.device)
    start, bound = pinned.zero_delta if start is None else start, budget
    for _ in range(ROUNDS):
        part = pinned.select(rows)
        found = find_perturbation(part, start, part.free, bound, schedule, rule=rule)
        free = part.within(found.delta, budget * (1 - 1e-6))
        best = better(best, _measured(part, free, budget, found.steps), rows)
        # What fits into the budget as it was found has had its search; a smaller bound is for what had to be cut.
        cut = (norm(free) < norm(found.delta)) & (best.slack[rows] < schedule.goal)
        if not bool(cut.any()):
            break
        rows, bound = rows[cut], bound * TIGHTER
        start = clip(free[cut], bound)
    return best


def shorten(pinned: Pinned, free: Residual, goal: float | None = None, steps: int = 40) -> Residual:
    """Find free parts of a shorter whole delta that still reaches the goal; where `free` does not reach it, `free`.

    Args:
        pinned: the objective.
        free: free parts of a find.
        goal: slack to be reached; by default the edge itself, a little past 0 on the scale of the slack without delta.
        steps: gradient steps.
    """
    with torch.no_grad():
        least = torch.full_like(norm(free), goal) if goal is not None else MARGIN * pinned(0 * free)[1].abs()
    best, size = free, torch.full_like(norm(free), torch.inf)
    here, stride = free, torch.full_like(size, 0.5)
    for _ in range(steps):
        leaf = here.detach().requires_grad_(True)
        logits, delta = pinned.run(leaf)
        slack, length = pinned.defended.behavior.slack(logits.float()), norm(delta)
        (steep,) = torch.autograd.grad(slack.sum(), leaf, retain_graph=True)
        (outward,) = torch.autograd.grad((length.square() / 2).sum(), leaf)
        steep, outward = pinned.free.project(steep), pinned.free.project(outward)
        slack, length = slack.detach(), length.detach()
        shorter = (slack >= least) & (length < size)
        stride = torch.where(shorter, stride, stride / 2)
        moved = by_example(shorter)
        best, size = torch.where(moved, here, best), torch.where(shorter, length, size)
        square = norm(steep).square().clamp(min=torch.finfo(steep.dtype).tiny)
        level = dot(outward, steep) / square
        back = (2 * least - slack) / square  # past the edge, so that rounding cannot undo it
        step = by_example(back + stride * level) * steep - by_example(stride) * outward
        here = here + step.nan_to_num(0.0, 0.0, 0.0)
    return best


def _measured(pinned: Pinned, free: Residual, budget: float, steps: Tensor | None = None) -> PinnedSolution:
    with torch.no_grad():
        logits, delta = pinned.run(free)
    behavior, logits = pinned.defended.behavior, logits.float()
    taken = torch.zeros(len(free), dtype=torch.long, device=free.device) if steps is None else steps
    return PinnedSolution(delta, behavior.score(logits), behavior.slack(logits), taken, free, budget)
