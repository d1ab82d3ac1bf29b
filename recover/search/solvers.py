"""Several solvers that differ in kind, and for each example the best over them: the worst case for the defense.

A defense is charged with whatever *any* solver finds, as in AutoAttack (Croce and Hein 2020):

1. *Solve* every example by each of

   ===============  ===========================================================================================
   `ascent`         `find_perturbation`: steepest ascent with Newton lengths, within the budget
   `adam`           projected Adam within the budget: it has momentum, and a step of its own for each coordinate
   `surrogate`      Adam along gradients that pass flat pieces (`surrogate`), within the budget; true values count
   `smallest_norm`  `smallest_perturbation`: without a budget, to the edge of the goal, toward the edge's normal
   `random`         random admissible draws at the budget's norm; from the best a walk closer; no gradients
   ===============  ===========================================================================================

2. *Pull* what each found to the edge of the goal on its ray, so that norms can be compared.
3. *Doubt*. What none solved within the budget is looked at again without gradients (`gradient_free`), which also says
   what the failure is worth. What that solves counts as found by `random`.
4. *Turn*. Where another came closer than `smallest_norm`, that goes on from there.
5. *Keep* for each example the smallest norm; and within the budget a delta that is clear of the edge, if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from types import MappingProxyType

import torch

from recover.numerics.metrics import by_example, norm
from recover.search.adam import ProjectedAdam
from recover.search.ascent import (
    Feasible,
    Objective,
    Rule,
    Schedule,
    Solution,
    Status,
    better,
    clip,
    find_perturbation,
)
from recover.search.gradient_free import (
    ELEMENTS_AT_ONCE,
    Effort,
    projected_each,
    put,
    reexamined,
    scaled,
    slacks_of,
    walk,
)
from recover.search.minimum import MARGIN, Minimum, edge, smallest_perturbation
from recover.search.surrogate import LEAK, WIDE, Momentum, Surrogate
from recover.types import Bool, Delta, InputError, PerExample, Rows, Tensor

FURTHER = (1.0, 1.01, 1.05, 1.3, 2.0)
"""How many times as far as the edge to look for a delta that is clear of it."""
TIE = 0.01


@dataclass(frozen=True, eq=False)
class Found(Minimum):
    """What one solver found: the shortest delta that reaches the edge of the goal, whatever the budget, and its norm.

    Attributes:
        within: the best within the budget, never worse than the start.
        share: of random draws at the budget's norm, those that reached the goal; None where the solver does not draw.
    """

    within: Solution
    share: PerExample | None = None


Solver = Callable[[Objective, Delta, Feasible, float, Schedule], Found]
"""A function of an objective, a start, the admissible deltas, a budget and a schedule."""


@dataclass(frozen=True, eq=False)
class WorstCase(Solution):
    """The best over several solvers within the budget, and the smallest, by example.

    `delta` is that of the first solver that reached the schedule's goal, else of the largest slack met.

    Attributes:
        smallest: the shortest delta that reaches the edge of the goal, whatever the budget; zero where none was found.
        norm: of `smallest`, no larger than any solver's; infinite where none was found, 0 where none is needed.
        winner: the first solver whose norm is within 1 % of the least; None where none was found.
        by_solver: the norm that each solver found.
        draws_reached: the share of random draws at the budget's norm that reached the goal; NaN where none were drawn.
    """

    smallest: Delta
    norm: PerExample
    winner: tuple[str | None, ...]
    by_solver: Mapping[str, PerExample]
    draws_reached: PerExample

    @property
    def unbounded(self) -> Bool[Tensor, "batch"]:
        """Where some solver brings the behavior back, at any norm."""
        return torch.isfinite(self.norm)


def by_ascent(
    objective: Objective, start: Delta, feasible: Feasible, budget: float, schedule: Schedule, rule: Rule | None = None
) -> Found:
    """An ascent within the budget, steepest by default."""
    within = find_perturbation(objective, start, feasible, budget, schedule, rule=rule)
    return Found(*_pulled(objective, within.delta), within)


def past_flats(objective: Objective, start: Delta, feasible: Feasible, budget: float, schedule: Schedule) -> Found:
    """An ascent along surrogate gradients within the budget; what it finds is pulled to the edge by true values."""
    once = replace(schedule, restarts=0)
    within = find_perturbation(Surrogate(objective), start, feasible, budget, once, rule=ProjectedAdam)
    for leak in (LEAK, WIDE):
        if len(rows := (within.slack < schedule.goal).nonzero().flatten()):
            rough = Surrogate(objective.select(rows), leak)
            again = find_perturbation(rough, start[rows], feasible.select(rows), budget, once, rule=Momentum)
            within = better(within, again, rows, schedule.goal)
    return Found(*_pulled(objective, within.delta), within)


def without_budget(objective: Objective, start: Delta, feasible: Feasible, budget: float, schedule: Schedule) -> Found:
    """The nearest point of the edge of the goal; for within the budget, what lies on its ray."""
    shortest = smallest_perturbation(objective, start, feasible, schedule)
    tries = [start, *(clip(further * shortest.delta, budget) for further in FURTHER)]
    return Found(shortest.delta, shortest.norm, first_reaching(objective, tries, schedule.goal))


def random_draws(
    objective: Objective,
    start: Delta,
    feasible: Feasible,
    budget: float,
    schedule: Schedule,
    *,
    draws: int = 1000,
    effort: Effort | None = None,
    keys: Sequence[int] | None = None,
) -> Found:
    """`draws` random directions at the budget's norm (1 without one), and a walk from the best; without gradients.

    Each example has draws of its own, so that more examples explore more. They follow from the schedule's seed and the
    example's key alone, its place by default: give `keys` for a result that does not depend on the batch.
    """
    keys = range(len(start)) if keys is None else keys
    each, length = start[0:1].numel(), budget * (1 - 1e-6) if math.isfinite(budget) else 1.0
    best, slack = start.clone(), _slack(objective, start)
    reached = torch.zeros_like(slack)
    for rows in torch.split(torch.arange(len(start)), max(1, ELEMENTS_AT_ONCE // max(draws * each, 1))):
        generators = [torch.Generator().manual_seed(schedule.seed + 3 + keys[row]) for row in rows.tolist()]
        noise = torch.stack([torch.randn(draws, *start.shape[1:], generator=one) for one in generators])
        at = rows.to(start.device)
        part, inside = objective.select(at), feasible.select(at)
        for some in torch.split(noise, max(1, ELEMENTS_AT_ONCE // (len(rows) * each)), dim=1):
            drawn = some.to(start)
            free = projected_each(inside, drawn)
            lengths = torch.linalg.vector_norm(free, dim=(2, 3), keepdim=True)
            # Where nothing is admissible, what a projection leaves is rounding.
            free = free.where(lengths > 1e-6 * torch.linalg.vector_norm(drawn, dim=(2, 3), keepdim=True), 0.0)
            tried = scaled(free, length)
            slacks = _told(slacks_of(part, tried))
            reached[at] += (slacks >= schedule.goal).sum(dim=1)
            value, index = slacks.max(dim=1)
            higher = value > slack[at]
            best[at[higher]] = tried[torch.arange(len(rows), device=at.device), index][higher]
            slack[at] = torch.maximum(slack[at], value)
    within = first_reaching(objective, [start, best], schedule.goal)
    return Found(*_near(objective, best, feasible, schedule, effort or Effort()), within, reached / draws)


SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        "ascent": by_ascent,
        "adam": partial(by_ascent, rule=ProjectedAdam),
        "surrogate": past_flats,
        "smallest_norm": without_budget,
        "random": random_draws,
    }
)
"""In the order in which ties are decided. With other arguments: `{**SOLVERS, "random": partial(random_draws, ...)}`."""


def worst_case(
    objective: Objective,
    start: Delta,
    feasible: Feasible,
    budget: float,
    schedule: Schedule | None = None,
    solvers: Mapping[str, Solver] = SOLVERS,
    on_solver: Callable[[str, int], None] | None = None,
) -> WorstCase:
    """Find for each example the best that any solver finds.

    Args:
        objective: score and slack of a delta.
        start: as in `find_perturbation`.
        feasible: as in `find_perturbation`.
        budget: largest Frobenius norm of an example's `delta`, `inf` for none; `smallest` may be longer.
        schedule: how hard each solver searches.
        solvers: by name, in the order in which ties are decided.
        on_solver: called with (name, examples not solved yet) after each.

    Raises:
        InputError: the budget is not a positive number, or there are no solvers.
    """
    if not budget > 0 or not solvers:
        raise InputError(f"worst case: budget {budget} and {len(solvers)} solvers; give a positive number, and one")
    schedule, found = schedule or Schedule(), dict[str, Found]()
    for name, solver in solvers.items():
        found[name] = solver(objective, start, feasible, budget, schedule)
        if on_solver is not None:
            slacks = torch.stack([one.within.slack for one in found.values()])
            on_solver(name, int((slacks < schedule.goal).all(dim=0).sum()))

    # Whether gradients are to be believed is judged by what they found, and draws are compared with that.
    climbed = [one.within for one in found.values() if one.share is None]
    drawn = [one.within for one in found.values() if one.share is not None]
    best = _first_to(schedule.goal, climbed or drawn)
    probes = _first_to(schedule.goal, drawn) if drawn else None
    again = reexamined(objective, best, feasible, budget, schedule, drawn=probes)
    if len(rows := ((again.slack > best.slack) & (again.slack > 0)).nonzero().flatten()):
        none = Found(torch.zeros_like(start), torch.full_like(best.slack, torch.inf), again)
        late = _near(objective.select(rows), again.delta[rows], feasible.select(rows), schedule, Effort())
        found["random"] = _shorter(found.get("random", none), rows, *late)

    norms, deltas = (torch.stack([getattr(one, name) for one in found.values()]) for name in ("norm", "delta"))
    least, index = norms.min(dim=0)
    least_of = Found(deltas[index, torch.arange(len(start), device=start.device)], least, again)
    bound = found["smallest_norm"].norm if "smallest_norm" in found else least
    if len(rows := ((least > 0) & ((1 + TIE) * least < bound)).nonzero().flatten()):
        turned = smallest_perturbation(objective.select(rows), least_of.delta[rows], feasible.select(rows), schedule)
        least_of = _shorter(least_of, rows, turned.delta, turned.norm)
    if len(rows := (again.slack < schedule.goal).nonzero().flatten()):
        # Draws that were not better by enough to be searched from, or that found values where gradients found none.
        tries, status = [one.delta[rows] for one in (again, *drawn)], [again.status[row] for row in rows.tolist()]
        last = first_reaching(objective.select(rows), tries, schedule.goal, status)
        again = put(again, rows, last.delta, last.score, last.slack, list(last.status))
    names, first = list(found), (norms > (1 + TIE) * least).long().cumprod(dim=0).sum(dim=0)
    return WorstCase(
        **vars(again),
        smallest=least_of.delta,
        norm=least_of.norm,
        winner=tuple(names[at] if size < math.inf else None for at, size in zip(first, least, strict=True)),
        by_solver={name: one.norm for name, one in found.items()},
        draws_reached=next((one.share for one in found.values() if one.share is not None), least * torch.nan),
    )


def _pulled(objective: Objective, outer: Delta) -> tuple[Delta, PerExample]:
    """`outer`, pulled to the edge of the goal on its ray, and its norm; as `Found` has them."""
    level = _slack(objective, torch.zeros_like(outer))
    goal = MARGIN * level.abs()
    delta, size = torch.zeros_like(outer), torch.where(level > 0, 0.0, torch.full_like(level, torch.inf))
    if len(rows := ((level <= 0) & (_slack(objective, outer) >= goal)).nonzero().flatten()):
        nearest = edge(objective.select(rows), outer[rows], goal[rows])
        delta, size = delta.index_copy(0, rows, nearest), size.index_copy(0, rows, norm(nearest))
    return delta, size


def _near(
    objective: Objective, outer: Delta, feasible: Feasible, schedule: Schedule, effort: Effort
) -> tuple[Delta, PerExample]:
    """`outer`, walked as close as the effort allows where it reaches the goal, and pulled; no gradients."""
    reaching = (_slack(objective, outer) >= schedule.goal) & (norm(outer) > 0)
    if len(rows := reaching.nonzero().flatten()):
        walked = walk(objective.select(rows), outer[rows], feasible.select(rows), 0.0, schedule, effort)
        outer = outer.index_copy(0, rows, walked)
    return _pulled(objective, outer)


def _shorter(found: Found, rows: Rows, delta: Delta, size: PerExample) -> Found:
    """`found`, with `delta` in place of the rows where it is shorter."""
    kept = torch.where(by_example(size < found.norm[rows]), delta, found.delta[rows])
    least = torch.minimum(size, found.norm[rows])
    return replace(found, delta=found.delta.index_copy(0, rows, kept), norm=found.norm.index_copy(0, rows, least))


def _first_to(goal: float, found: Sequence[Solution]) -> Solution:
    """For each example the first that reaches the goal, else the one of largest slack; steps add up."""
    every = torch.arange(len(found[0].slack), device=found[0].slack.device)
    return reduce(lambda one, other: better(one, other, every, goal), found)


def first_reaching(
    objective: Objective, tries: Sequence[Delta], goal: float, status: Sequence[Status] = ()
) -> Solution:
    """For each example the first try that reaches the goal, else of the largest slack; `status` where none does."""
    steps = torch.zeros(len(tries[0]), dtype=torch.long, device=tries[0].device)
    given = tuple(status) or (Status.EXHAUSTED,) * len(steps)
    with torch.no_grad():
        each = [(delta, *objective(delta)) for delta in tries]
    best = _first_to(goal, [Solution(delta, score, _told(slack), steps, given) for delta, score, slack in each])
    reached = (best.slack >= goal).tolist()
    return replace(best, status=tuple(Status.RECOVERED if r else was for r, was in zip(reached, given, strict=True)))


def _slack(objective: Objective, delta: Delta) -> PerExample:
    with torch.no_grad():
        return _told(objective(delta)[1])


def _told(slack: Tensor) -> Tensor:
    """The slack, with minus infinity where it is not finite."""
    return slack.where(torch.isfinite(slack), -torch.inf)
