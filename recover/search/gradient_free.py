"""A second opinion on what a gradient search did not solve, from the score's values alone.

"Not recovered" says something only if the search could have seen a way. A gradient that is zero may mean that nothing
admissible matters (an answer) or that a readout is flat where the search began (a failure). Values tell them apart:

1. *Probe*. Random admissible directions, each and its opposite, at three lengths: the budget, and `1` and `3 sqrt(n)`
   times the budget with `n` the dimension of the example's admissible space, so that along every single direction some
   probes go as far as the budget allows, and further.
2. *Walk*. Where some probe reaches the goal, start there and come closer: find the edge on the ray to zero, estimate
   its normal from which of many small steps stay across it, turn toward the normal, repeat (after HopSkipJump: Chen,
   Jordan and Wainwright 2020). What ends within the budget is a solution. A probe within the budget that beats the
   search is first given to the search, as a place to begin.
3. *Judge* what is still unsolved, example by example:

   `NOTHING_ADMISSIBLE`  the constraint leaves no direction
   `UNMOVED`             no probe of any length changed the slack by more than rounding, and neither did the search; nor
                         did one change anything else that is computed downstream, where the objective can tell
   `UNREAD`              the same, but probes do change what is computed downstream: only the score does not follow
   `NO_GRADIENT`         the gradient is zero, but probes do change it: the gradient hides something
   `OUTDONE`             a probe within the budget beats both what the search found and a search that starts there
   `MISLED`              slopes do not account for values: a small step along the gradient does not change the slack as
                         the gradient says; or the walk ended not far outside the budget, across a rise several times as
                         steep as any slope that the search met

   The first two are answers. So is the third, as far as the search is known to find what is hidden: random draws do not
   meet a conjunction of inactive units. The others are reasons to believe neither answer. Everything else stays as it
   was.

Draws are seeded and the same for every example, so that a result does not depend on which others are in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from einops import einsum, rearrange, repeat

from recover.numerics.metrics import by_example, norm
from recover.search.ascent import ROUNDING, Feasible, Objective, Schedule, Solution, Status, find_perturbation, scale_to
from recover.search.minimum import OnSlack, closer, edge
from recover.types import Bool, Delta, Float, PerExample, Tensor

Draws = Float[Tensor, "batch draws pos d_model"]
ELEMENTS_AT_ONCE = 2**16
"""Numbers in the perturbations of one forward pass; small models take many probes at once, large ones few."""
ADDED_UP = 32 * torch.finfo(torch.float32).eps
NEAR_MISS, STEEPER = 2.0, 4.0
WATCHED = 8
"""Probes of each length under which everything downstream is looked at, where none moves the slack."""


@runtime_checkable
class Watched(Objective, Protocol):
    """An objective that can tell more than its score."""

    def downstream(self, delta: Tensor) -> Tensor:
        """What is computed from a perturbed state, `[batch n]`, in which `delta` itself does not show."""

    def select(self, rows: Tensor) -> Watched:
        """The objective of the examples `rows` alone."""


@dataclass(frozen=True)
class Effort:
    """How much to try.

    Args:
        draws: probes at each length, half of them the opposites of the other half.
        rounds: turns of a walk.
        around: small steps that estimate a normal.
    """

    draws: int = 64
    rounds: int = 8
    around: int = 64


def reexamined(
    objective: Objective,
    solution: Solution,
    feasible: Feasible,
    budget: float,
    schedule: Schedule | None = None,
    effort: Effort | None = None,
    drawn: Solution | None = None,
) -> Solution:
    """`solution`, with its unsolved examples solved without gradients where that works, and judged where not.

    Args:
        objective: the one that was searched.
        solution: what a gradient search made of it.
        feasible: the constraint that it kept.
        budget: largest norm; where infinite, lengths are counted from 1.
        schedule: for its goal and its seed.
        effort: how much to try.
        drawn: the best of other random draws within the budget, if any were made: they count as probes.

    Returns:
        The same examples; no slack is lower than it was.
    """
    schedule, effort = schedule or Schedule(), effort or Effort()
    rows = (~solution.recovered & torch.isfinite(solution.slack).cpu()).nonzero().flatten()
    if not len(rows):
        return solution
    at = rows.to(solution.slack.device)
    directions = _directions(solution.delta[at], feasible.select(at), effort.draws, schedule.seed)
    able = norm(directions) > 0
    shut, at, directions = at[~able], at[able], directions[able]
    judged = [Status.NOTHING_ADMISSIBLE] * len(shut)
    solution = put(solution, shut, solution.delta[shut], solution.score[shut], solution.slack[shut], judged)
    if not len(at):
        return solution
    part, allowed, delta, slack = objective.select(at), feasible.select(at), solution.delta[at], solution.slack[at]
    status = [solution.status[row] for row in at.tolist()]
    reach = budget if math.isfinite(budget) else 1.0

    slopes = _slopes(part, delta, allowed)
    probes = _probe(part, directions, reach, slopes)
    lies = ~slopes.hold(part, reach)

    better, value = probes.best()
    if drawn is not None:
        ahead = by_example(drawn.slack[at] > value)
        better, value = torch.where(ahead, drawn.delta[at], better), torch.maximum(drawn.slack[at], value)
    moved = probes.moved | (torch.maximum(slack, value) > slopes.slack + probes.rounding)
    outdone = value > slack + _margin(slack, slopes.slack, schedule.goal)
    if len(some := outdone.nonzero().flatten()):
        # Where the probe is, a gradient may be of use.
        rising, inside = OnSlack(part.select(some)), allowed.select(some)
        again = find_perturbation(rising, better[some], inside, budget, replace(schedule, restarts=0))
        useful = again.slack > value[some] + _margin(again.slack, slopes.slack[some], schedule.goal)
        delta, slack = delta.index_copy(0, some, again.delta), slack.index_copy(0, some, again.slack)
        outdone = outdone.index_copy(0, some, ~useful)

    near, start = torch.full_like(slack, torch.inf), _nearest(probes, delta, schedule.goal)
    if len(some := ((slack < schedule.goal) & (norm(start) > 0)).nonzero().flatten()):
        walked = walk(part.select(some), start[some], allowed.select(some), budget, schedule, effort)
        walked = _inside(part.select(some), walked, budget, schedule.goal)
        near = near.index_copy(0, some, norm(walked))
        delta = delta.index_copy(0, some, torch.where((near[some] <= budget)[:, None, None], walked, delta[some]))
    with torch.no_grad():
        score, slack = part(delta)
    rise = schedule.goal - slopes.slack
    jump = (near <= NEAR_MISS * reach) & (rise > STEEPER * slopes.steepest * near)
    elsewhere = torch.zeros_like(moved)
    if isinstance(part, Watched) and len(some := (~moved).nonzero().flatten()):
        elsewhere[some] = _moved_elsewhere(part.select(some), probes.of(some), slopes.whole[some])
    for row in range(len(at)):
        if slack[row] >= schedule.goal:
            status[row] = Status.RECOVERED
        elif not moved[row]:
            status[row] = Status.UNREAD if elsewhere[row] else Status.UNMOVED
        elif status[row] is not Status.NO_GRADIENT and (outdone[row] or jump[row] or lies[row]):
            status[row] = Status.OUTDONE if outdone[row] else Status.MISLED
    return put(solution, at, delta, score, slack, status)


def put(
    solution: Solution, rows: Tensor, delta: Delta, score: PerExample, slack: PerExample, status: list[Status]
) -> Solution:
    """`solution` with these rows replaced."""
    given = dict(zip(rows.tolist(), status, strict=True))
    new = {"delta": delta, "score": score, "slack": slack}
    values = {name: getattr(solution, name).index_copy(0, rows, value) for name, value in new.items()}
    return replace(solution, **values, status=tuple(given.get(row, one) for row, one in enumerate(solution.status)))


def _margin(slack: PerExample, start: PerExample, goal: float) -> PerExample:
    """By how much one slack must be above another to count as better: a tenth of what was gained, the goal at least."""
    return (0.1 * (slack - start)).clamp(min=goal)


def _directions(like: Delta, feasible: Feasible, draws: int, seed: int) -> Draws:
    """Random admissible directions of each example, of unit variance along each, and opposites; zero where is none."""
    generator = torch.Generator().manual_seed(seed + 1)
    half = torch.randn(max(draws // 2, 1), *like.shape[1:], generator=generator).to(like)
    noise = repeat(torch.cat([half, -half]), "draws pos d -> batch draws pos d", batch=len(like))
    admissible = projected(feasible, noise)
    nothing = norm(admissible) <= 1e-6 * norm(noise)
    return admissible.masked_fill(rearrange(nothing, "batch -> batch 1 1 1"), 0.0) if nothing.any() else admissible


def projected(feasible: Feasible, draws: Draws) -> Draws:
    """Every draw, onto the set of its own example; where that is the same for all, so must the draws be."""
    if feasible.select(torch.arange(len(draws), device=draws.device)) is feasible:
        return feasible.project(draws[0]).expand_as(draws)
    return torch.stack([feasible.project(draw) for draw in draws.unbind(dim=1)], dim=1)


def projected_each(feasible: Feasible, draws: Draws) -> Draws:
    """Every draw, onto the set of its own example; each example has draws of its own."""
    if feasible.select(torch.arange(len(draws), device=draws.device)) is feasible:
        flat = feasible.project(rearrange(draws, "batch draws pos d -> (batch draws) pos d"))
        return rearrange(flat, "(batch draws) pos d -> batch draws pos d", batch=len(draws))
    return torch.stack([feasible.project(draw) for draw in draws.unbind(dim=1)], dim=1)


def scaled(draws: Draws, length: float | PerExample) -> Draws:
    """`draws` with the norm of each set to the length of its example; zero stays zero."""
    flat = rearrange(draws, "batch draws pos d -> (batch draws) pos d")
    lengths = length if isinstance(length, float) else length.repeat_interleave(draws.shape[1])
    return rearrange(scale_to(flat, lengths), "(batch draws) pos d -> batch draws pos d", batch=len(draws))


@dataclass(frozen=True, eq=False)
class _Slopes:
    """The slack where the search began, and gradients there: admissible, of the whole, and the steepest met."""

    slack: PerExample
    gradient: Delta
    whole: PerExample
    steepest: PerExample

    def hold(self, objective: Objective, reach: float) -> Bool[Tensor, "batch"]:
        """Whether a small step along the gradient, or back, changes the slack about as it says; or it is zero."""
        length = norm(self.gradient)
        agrees = length == 0
        for share in (0.1, 0.01, 0.001):
            step = scale_to(self.gradient, share * reach)
            with torch.no_grad():
                ahead, behind = objective(step)[1] - self.slack, self.slack - objective(-step)[1]
            predicted = share * reach * length
            agrees = agrees | (predicted <= 1e-4 * (1 + self.slack.abs()))
            for change in (ahead, behind):  # at a kink the gradient is that of one side
                agrees = agrees | ((change - predicted).abs() <= 0.5 * predicted)
        return agrees


def _slopes(objective: Objective, end: Delta, feasible: Feasible) -> _Slopes:
    steepest = list[Tensor]()
    for point in (end, torch.zeros_like(end)):
        leaf = point.detach().requires_grad_(True)
        _, slack = objective(leaf)
        (whole,) = torch.autograd.grad(slack.sum(), leaf)
        gradient = feasible.project(whole)
        gradient = torch.where(by_example(norm(gradient) > ROUNDING * norm(whole)), gradient, 0.0)
        steepest.append(norm(gradient))
    return _Slopes(slack.detach(), gradient, norm(whole), torch.maximum(*steepest))


@dataclass(frozen=True, eq=False)
class _Probes:
    """Slacks of all probes.

    Attributes:
        lengths: how far along them, `[batch]` each.
        slacks: `[batch draws]` at each length.
        moved: whether any probe changed the slack by more than `rounding`.
    """

    directions: Draws
    lengths: list[Tensor]
    slacks: list[Tensor]
    moved: Bool[Tensor, "batch"]
    rounding: PerExample

    def best(self, which: int = 0) -> tuple[Delta, PerExample]:
        """For each example the best probe of a length (the first is the budget), and its slack."""
        value, index = self.slacks[which].max(dim=1)
        rows = torch.arange(len(index), device=index.device)
        return scale_to(self.directions[rows, index], self.lengths[which]), value

    def of(self, rows: Tensor) -> list[Draws]:
        """A few of the probes of these examples, at each length."""
        return [scaled(self.directions[rows, :WATCHED], length[rows]) for length in self.lengths]


def _moved_elsewhere(objective: Watched, probes: list[Draws], whole: PerExample) -> Bool[Tensor, "batch"]:
    """Whether a probe changes anything that is computed downstream, by more than rounding."""
    with torch.no_grad():
        before = objective.downstream(torch.zeros_like(probes[0][:, 0]))
        moved = torch.zeros(len(before), dtype=torch.bool, device=before.device)
        for some in probes:
            rounding = 1e-3 * (1 + before.abs().amax(dim=1)) + ADDED_UP * norm(some[:, 0]) * whole.clamp(min=1)
            for probe in some.unbind(dim=1):
                change = (objective.downstream(probe) - before).abs()
                moved = moved | (change > rounding[:, None]).any(dim=1)
    return moved


def _probe(objective: Objective, directions: Draws, reach: float, slopes: _Slopes) -> _Probes:
    freedom = norm(directions) / directions.shape[1] ** 0.5  # the root of the dimension of each admissible space
    lengths, slacks, rounding = [], [], torch.zeros_like(slopes.slack)
    moved = torch.zeros_like(slopes.slack, dtype=torch.bool)
    for times in (torch.full_like(freedom, 1.0 - 1e-6), freedom, 3 * freedom):
        values = slacks_of(objective, scaled(directions, times * reach))
        rounding = 1e-3 * (1 + slopes.slack.abs()) + ADDED_UP * times * reach * slopes.whole
        change = (values - slopes.slack[:, None]).abs()
        moved = moved | (torch.isfinite(change) & (change > rounding[:, None])).any(dim=1)
        lengths.append(times * reach)
        slacks.append(torch.where(torch.isfinite(values), values, -torch.inf))
    return _Probes(directions, lengths, slacks, moved, rounding)


def _nearest(probes: _Probes, like: Delta, goal: float) -> Delta:
    """For each example the shortest probe that reaches the goal; zero where none does."""
    nearest = torch.zeros_like(like)
    for probe, value in map(probes.best, reversed(range(len(probes.lengths)))):
        nearest = torch.where(by_example(value >= goal), probe, nearest)
    return nearest


def _inside(objective: Objective, delta: Delta, budget: float, goal: float) -> Delta:
    """A point on an edge, moved a little further from it where the budget allows: a step must survive rounding."""
    length = norm(delta)
    further = scale_to(delta, torch.minimum(length * 1.01, (length + budget) / 2).where(length < budget, length))
    with torch.no_grad():
        return torch.where(by_example(objective(further)[1] >= goal), further, delta)


def walk(
    objective: Objective, start: Delta, feasible: Feasible, budget: float, schedule: Schedule, effort: Effort
) -> Delta:
    """Come closer to zero along the edge of where the goal is reached; never further away than `start`.

    It ends within the budget, or where that is out of reach; with a budget of 0, with the effort.
    """
    goal, steps = schedule.goal, _directions(start, feasible, effort.around, schedule.seed + 1)
    here, normal = edge(objective, start, goal), torch.zeros_like(start)
    for turn in range(effort.rounds):
        length = norm(here)
        going = (length > budget) & ((length <= 4 * budget) if turn > 3 and budget > 0 else True)
        if not bool(going.any()):
            break
        radius = 0.3 * length / 2 ** (turn % 3)
        spin = scaled(projected(feasible, steps.roll(7 * turn, dims=-1) if turn else steps), 1.0)
        around = here[:, None] + rearrange(radius, "batch -> batch 1 1 1") * spin
        across = torch.where(slacks_of(objective, around) >= goal, 1.0, -1.0).to(start)
        weights = across - across.mean(dim=1, keepdim=True)
        normal = normal + einsum(weights, spin, "batch draws, batch draws pos d -> batch pos d")
        here = torch.where(by_example(going), closer(objective, here, normal, goal), here)
    return here


def slacks_of(objective: Objective, deltas: Draws) -> Float[Tensor, "batch draws"]:
    """The slack of every probe of every example."""
    return values_of(objective, deltas)[1]


def values_of(objective: Objective, deltas: Draws) -> Float[Tensor, "value batch draws"]:
    """Score and slack of every probe of every example, as many at once as is cheap."""
    batch, draws = deltas.shape[:2]
    flat = rearrange(deltas, "batch draws pos d -> (batch draws) pos d")
    rows = torch.arange(batch, device=deltas.device).repeat_interleave(draws)
    at_once = max(batch, ELEMENTS_AT_ONCE // (flat.shape[1] * flat.shape[2]))
    parts = zip(torch.split(flat, at_once), torch.split(rows, at_once), strict=True)
    with torch.no_grad():
        found = [torch.stack(objective.select(where)(some)) for some, where in parts]
    return rearrange(torch.cat(found, dim=1), "value (batch draws) -> value batch draws", batch=batch)
