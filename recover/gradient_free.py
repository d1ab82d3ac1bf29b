"""A second opinion on what a gradient search did not solve, from the score's values alone.

"Not recovered" says something only if the search could have seen a way. A gradient that is zero may mean that nothing
admissible matters (a true bottleneck) or that a readout is flat where the search began (a step, a saturated unit, a
competition that is lost): the first is an answer, the second a failure. Values tell them apart:

1. *Probe*. Random admissible directions, each and its opposite, at three lengths: the budget, and `1` and `3 sqrt(n)`
   times the budget with `n` the dimension of the admissible space, so that along every single direction some probes go
   as far as the budget allows, and further.
2. *Walk*. Where some probe, of any length, reaches the goal, start there and come closer: find the edge on the ray
   to zero by bisection, estimate the edge's normal from which of many small steps stay across it, turn toward the
   normal, repeat (after HopSkipJump: Chen, Jordan and Wainwright 2020). What ends within the budget is a solution.
3. *Judge* what is still unsolved, example by example:

   `NOTHING_ADMISSIBLE`  the constraint leaves no direction
   `UNMOVED`             no probe of any length changed the slack by more than rounding, and neither did the search
   `NO_GRADIENT`         the gradient is zero, but probes do change it: the gradient hides something
   `OUTDONE`             a probe within the budget is better than what the gradient search found
   `MISLED`              slopes do not account for values: a small step along the gradient does not change the slack as
                         the gradient says; or the walk ended not far outside the budget, across a rise that would need
                         slopes several times as steep as any that the search met

   The first two are answers; the other three are reasons to believe neither answer. Everything else stays as it was.

No rule looks at anything but scores and norms. Draws are seeded and the same for every example, so that a result does
not depend on which others are in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat

from recover.metrics import norm
from recover.minimum import closer, edge
from recover.search import ROUNDING, Delta, Feasible, Objective, Schedule, Solution, Status, scale_to
from recover.types import Bool, Float, PerExample, Tensor

ELEMENTS_AT_ONCE = 2**16
"""Numbers in the perturbations of one forward pass; small models take many probes at once, large ones few."""
ADDED_UP = 32 * torch.finfo(torch.float32).eps
NEAR_MISS, STEEPER = 2.0, 4.0


@dataclass(frozen=True)
class Effort:
    """How much to try.

    Args:
        draws: probes at each length, half of them the opposites of the other half.
        rounds: turns of a walk.
        around: small steps that estimate a normal.
    """

    draws: int = 128
    rounds: int = 8
    around: int = 128


def reexamined(
    objective: Objective,
    solution: Solution,
    feasible: Feasible,
    budget: float,
    schedule: Schedule | None = None,
    effort: Effort | None = None,
) -> Solution:
    """`solution`, with its unsolved examples solved without gradients where that works, and judged where not.

    Args:
        objective: the one that was searched.
        solution: what a gradient search made of it.
        feasible: the constraint that it kept.
        budget: largest norm; where infinite, lengths are counted from 1.
        schedule: for its goal and its seed.
        effort: how much to try.

    Returns:
        The same examples; no slack is lower than it was.
    """
    schedule, effort = schedule or Schedule(), effort or Effort()
    open_ = (~solution.recovered & torch.isfinite(solution.slack).cpu()).nonzero().flatten().to(solution.slack.device)
    if len(open_) == 0:
        return solution
    part = objective.select(open_)
    delta, slack = solution.delta[open_], solution.slack[open_]
    reach = budget if math.isfinite(budget) else 1.0
    directions = _directions(delta, feasible, effort.draws, schedule.seed)
    if directions is None:
        return _judged(solution, open_.tolist(), delta, slack, [Status.NOTHING_ADMISSIBLE] * len(open_))

    slopes = _slopes(part, delta, feasible)
    probes = _probe(part, directions, reach, slopes)
    nearest = _nearest(probes, delta, schedule.goal, len(open_))
    found = (norm(nearest) > 0).nonzero().flatten()
    if len(found):
        walked = _walk(part.select(found), nearest[found], feasible, budget, schedule, effort)
        nearest = nearest.index_copy(0, found, walked)
    near = norm(nearest)
    solved = (near > 0) & (near <= budget)

    better, value = probes.best()
    outdone = value > slack + torch.maximum(torch.full_like(slack, schedule.goal), 0.1 * (slack - slopes.slack))
    rise = schedule.goal - slopes.slack
    jump = (near > 0) & (near <= NEAR_MISS * reach) & (rise > STEEPER * slopes.steepest * near)
    lies = ~slopes.hold(part, reach)
    moved = probes.moved | (slack > slopes.slack + probes.rounding)
    verdicts: list[Status] = []
    for row, index in enumerate(open_.tolist()):
        status = solution.status[index]
        if solved[row]:
            status = Status.RECOVERED
        elif not moved[row]:
            status = Status.UNMOVED
        elif status is Status.NO_GRADIENT:
            pass
        elif outdone[row]:
            status = Status.OUTDONE
        elif jump[row] or lies[row]:
            status = Status.MISLED
        verdicts.append(status)
    take = rearrange(outdone & ~solved, "batch -> batch 1 1")
    delta = torch.where(take, better, delta)
    delta = torch.where(rearrange(solved, "batch -> batch 1 1"), nearest, delta)
    with torch.no_grad():
        _, now = part(delta)
    changed = solved | outdone
    return _judged(solution, open_.tolist(), delta, torch.where(changed, now, slack), verdicts, part)


def _judged(
    solution: Solution,
    rows: list[int],
    delta: Delta,
    slack: PerExample,
    status: list[Status],
    objective: Objective | None = None,
) -> Solution:
    """`solution` with these rows replaced."""
    deltas, slacks, scores = solution.delta.clone(), solution.slack.clone(), solution.score.clone()
    statuses = list(solution.status)
    deltas[rows], slacks[rows] = delta, slack
    if objective is not None:
        with torch.no_grad():
            scores[rows] = objective(delta)[0]
    for row, one in zip(rows, status, strict=True):
        statuses[row] = one
    return replace(solution, delta=deltas, slack=slacks, score=scores, status=tuple(statuses))


def _directions(like: Delta, feasible: Feasible, draws: int, seed: int) -> Tensor | None:
    """Random admissible directions `[draws pos d_model]`, of unit variance along each, and opposites; None if none."""
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(max(draws // 2, 1), *like.shape[1:], generator=generator).to(like)
    admissible = feasible.project(noise)
    if bool((norm(admissible) <= 1e-6 * norm(noise)).all()):
        return None
    return torch.cat([admissible, -admissible])


@dataclass(frozen=True, eq=False)
class _Slopes:
    """The slack where the search began, and gradients there: admissible, of the whole, and the steepest met."""

    slack: PerExample
    gradient: Delta
    whole: PerExample
    steepest: PerExample

    def hold(self, objective: Objective, reach: float) -> Bool[Tensor, "batch"]:
        """Whether small steps along the gradient and back change the slack about as it says; true where it is zero."""
        length = norm(self.gradient)
        agrees = length == 0
        for share in (0.1, 0.01, 0.001):
            step = scale_to(self.gradient, share * reach)
            with torch.no_grad():
                change = objective(step)[1] - objective(-step)[1]
            predicted = 2 * share * reach * length
            unseen = predicted <= 1e-4 * (1 + self.slack.abs())
            agrees = agrees | unseen | ((change - predicted).abs() <= 0.5 * predicted)
        return agrees


def _slopes(objective: Objective, end: Delta, feasible: Feasible) -> _Slopes:
    steepest: list[Tensor] = []
    start = torch.zeros_like(end)
    for point in (end, start):
        leaf = point.detach().requires_grad_(True)
        _, slack = objective(leaf)
        (whole,) = torch.autograd.grad(slack.sum(), leaf)
        gradient = feasible.project(whole)
        gradient = torch.where(rearrange(norm(gradient) > ROUNDING * norm(whole), "batch -> batch 1 1"), gradient, 0.0)
        steepest.append(norm(gradient))
    return _Slopes(slack.detach(), gradient, norm(whole), torch.maximum(*steepest))


@dataclass(frozen=True, eq=False)
class _Probes:
    """Slacks of all probes.

    Attributes:
        deltas: `[draws pos d_model]` at each length, the same for all examples.
        slacks: `[batch draws]` at each length.
        moved: whether any probe changed the slack by more than `rounding`.
    """

    deltas: list[Tensor]
    slacks: list[Tensor]
    moved: Bool[Tensor, "batch"]
    rounding: PerExample

    def best(self) -> tuple[Delta, PerExample]:
        """The best probe within the budget, by example, and its slack."""
        value, index = self.slacks[0].max(dim=1)
        return self.deltas[0][index], value


def _probe(objective: Objective, directions: Tensor, reach: float, slopes: _Slopes) -> _Probes:
    freedom = norm(directions).square().mean().sqrt()  # the root of the dimension of the admissible space
    deltas, slacks = [], []
    moved = torch.zeros_like(slopes.slack, dtype=torch.bool)
    rounding = torch.zeros_like(slopes.slack)
    for times in (1.0 - 1e-6, float(freedom), 3 * float(freedom)):
        probes = scale_to(directions, times * reach)
        values = _values(objective, repeat(probes, "draws pos d -> batch draws pos d", batch=len(slopes.slack)))
        rounding = 1e-3 * (1 + slopes.slack.abs()) + ADDED_UP * times * reach * slopes.whole
        change = (values - slopes.slack[:, None]).abs()
        moved = moved | (torch.isfinite(change) & (change > rounding[:, None])).any(dim=1)
        deltas.append(probes)
        slacks.append(torch.where(torch.isfinite(values), values, -torch.inf))
    return _Probes(deltas, slacks, moved, rounding)


def _nearest(probes: _Probes, like: Delta, goal: float, batch: int) -> Delta:
    """For each example the shortest probe that reaches the goal; zero where none does."""
    nearest = torch.zeros_like(like)
    for deltas, slacks in reversed(list(zip(probes.deltas, probes.slacks, strict=True))):
        value, index = slacks.max(dim=1)
        nearest = torch.where(rearrange(value >= goal, "batch -> batch 1 1"), deltas[index], nearest)
    return nearest


def _walk(
    objective: Objective, start: Delta, feasible: Feasible, budget: float, schedule: Schedule, effort: Effort
) -> Delta:
    """Come closer to zero along the edge of where the goal is reached; never further away than `start`."""
    goal, steps = schedule.goal, _directions(start, feasible, effort.around, schedule.seed + 1)
    assert steps is not None
    here = edge(objective, start, goal)
    normal = torch.zeros_like(start)
    for turn in range(effort.rounds):
        length = norm(here)
        if bool((length <= budget).all()) or (turn > 3 and bool((length > 4 * budget).all())):
            break
        radius = 0.3 * length / 2 ** (turn % 3)
        spin = steps.roll(7 * turn, dims=-1) if turn else steps
        spin = scale_to(feasible.project(spin), 1.0)
        around = here[:, None] + rearrange(radius, "batch -> batch 1 1 1") * spin[None]
        across = torch.where(_values(objective, around) >= goal, 1.0, -1.0).to(start)
        weights = across - across.mean(dim=1, keepdim=True)
        normal = normal + torch.tensordot(weights, spin, dims=1)
        here = edge(objective, closer(objective, here, normal, goal), goal)
    return here


def _values(objective: Objective, deltas: Float[Tensor, "batch draws pos d_model"]) -> Float[Tensor, "batch draws"]:
    """The slack of every probe of every example, as many at once as is cheap."""
    batch, draws = deltas.shape[:2]
    flat = rearrange(deltas, "batch draws pos d -> (batch draws) pos d")
    rows = torch.arange(batch, device=deltas.device).repeat_interleave(draws)
    at_once = max(batch, ELEMENTS_AT_ONCE // (flat.shape[1] * flat.shape[2]))
    slacks = []
    with torch.no_grad():
        for some, where in zip(torch.split(flat, at_once), torch.split(rows, at_once), strict=True):
            slacks.append(objective.select(where)(some)[1])
    return rearrange(torch.cat(slacks), "(batch draws) -> batch draws", batch=batch)
