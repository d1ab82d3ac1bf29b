"""Laws of every solver, and of the best over them, over objectives without a model."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from property_tests.guards import guards
from property_tests.rounding import eps, projection_leak
from property_tests.strategies import costly
from property_tests.test_search_laws import SearchCase, evaluation_error, searches, slack_at
from recover.numerics.metrics import norm
from recover.search.ascent import Status
from recover.search.gradient_free import Effort
from recover.search.minimum import edge
from recover.search.solvers import SOLVERS, Found, Solver, random_draws, worst_case

FEW: dict[str, Solver] = {
    **SOLVERS,
    "random": partial(random_draws, draws=40, effort=Effort(draws=8, rounds=3, around=8)),
}


def solved(case: SearchCase) -> list[Found]:
    """What each solver finds for a case."""
    return [each(case.landscape(), case.start(), case.feasible, case.budget, case.schedule) for each in FEW.values()]


def assert_admissible(case: SearchCase, delta: Tensor, longest: Tensor) -> None:
    """Each of some 100 steps at most, none longer than `longest`, adds what a projection leaves and a rounding."""
    A = case.feasible.directions.double()
    seen = (delta.double() @ A).flatten(1).norm(dim=1)
    allowed = 4 * projection_leak(case.d_model, delta.dtype) * 100 * longest.double() * A.norm()
    assert (seen <= allowed).all(), (seen.max(), allowed)


@guards(
    "recover.search.adam.ProjectedAdam.step",
    "clip(terrain.feasible.project(point.delta + rate * toward), self.budget)",
    "clip(point.delta + rate * toward, self.budget)",
)
@guards(random_draws, "tried = scaled(free, length)", "tried = scaled(free, 1.01 * length)")
@costly(20)
@given(searches())
def test_what_a_solver_finds_is_admissible_and_as_reported(case: SearchCase) -> None:
    """The find at the budget is within it; the shortest find has the norm reported and lies at the edge of the goal."""
    for solver in FEW.values():
        landscape = case.landscape()
        found = solver(landscape, case.start(), case.feasible, case.budget, case.schedule)
        for delta in (found.delta, found.within.delta):
            assert delta.isfinite().all()
            assert_admissible(case, delta, norm(torch.stack(landscape.seen)).max())
        assert (norm(found.within.delta).double() <= case.budget).all()
        reached, rounding = found.norm.isfinite(), 8 * eps(found.norm.dtype)
        assert ((norm(found.delta) - found.norm).abs() <= rounding * found.norm)[reached].all()
        assert (slack_at(case, found.delta) >= -evaluation_error(case, found.delta))[reached].all()
        assert found.delta[~reached].count_nonzero() == 0
        assert (found.norm <= norm(found.within.delta) * (1 + rounding))[found.within.recovered].all()


@guards("recover.search.ascent.ascend", "Status.RECOVERED: solved,", "Status.RECOVERED: better,")
@costly(20)
@given(searches())
def test_no_solver_is_worse_than_its_start_and_it_reports_what_it_found(case: SearchCase) -> None:
    start, error = slack_at(case, case.start()), evaluation_error(case, case.start())
    for within in (found.within for found in solved(case)):
        assert (within.slack >= start - error)[start.isfinite()].all()
        told = within.slack.isfinite()
        assert ((within.slack - slack_at(case, within.delta)).abs() <= evaluation_error(case, within.delta))[told].all()
        reached = within.slack >= case.schedule.goal
        assert [status is Status.RECOVERED for status in within.status] == reached.tolist()


@guards(
    "recover.search.adam.ProjectedAdam.step",
    "/ self.size).clamp(max=self.budget)",
    "/ self.size).clamp(max=1 / self.budget)",
)
@guards(edge, "return outer * by_example(high)", "return 0.5 * outer * by_example(high)")
@costly(20)
@given(searches(kinds=("linear",), restarts=(0,)), st.sampled_from([1.0, 1.01, 2.0, 50.0]))
def test_a_larger_budget_never_recovers_less(case: SearchCase, factor: float) -> None:
    """Where the score is linear, from nothing; and no solver's smallest norm is below the closed form."""
    case = replace(case, started=False, steps=40)
    assume(math.isfinite(case.budget) and case.columns < case.d_model)
    slopes = norm(case.feasible.project(case.landscape().rows.reshape(case.start().shape))).double()
    for small, large in zip(solved(case), solved(replace(case, budget=factor * case.budget)), strict=True):
        error = evaluation_error(case, large.within.delta)
        clear = small.within.slack >= case.schedule.goal + error + 4e-6 * factor * case.budget
        assert (large.within.recovered | ~clear).all()
        for found in (small, large):
            if case.offset > 0:
                assert (found.norm * slopes >= case.offset - evaluation_error(case, found.delta)).all()


@guards(worst_case, "least, index = norms.min(dim=0)", "least, index = norms.max(dim=0)")
@guards(worst_case, "best = _first_to(schedule.goal, climbed or drawn)", "best = drawn[0]")
@costly(25)
@given(searches())
def test_the_best_over_solvers_is_no_longer_than_any_and_solves_what_any_does(case: SearchCase) -> None:
    landscape = case.landscape()
    best = worst_case(landscape, case.start(), case.feasible, case.budget, case.schedule, FEW)
    solvable = torch.tensor([status is Status.RECOVERED for status in best.status])
    for name, found in zip(FEW, solved(case), strict=True):
        assert (best.norm <= found.norm).all()
        assert (best.by_solver[name] <= found.norm).all()
        assert (solvable | ~found.within.recovered).all()
        error = evaluation_error(case, found.within.delta)
        assert (solvable | (best.slack >= found.within.slack - error)).all()
    assert (norm(best.delta).double() <= case.budget).all()
    reached = best.unbounded
    assert (slack_at(case, best.smallest) >= -evaluation_error(case, best.smallest))[reached].all()
    longest = norm(torch.stack(landscape.seen)).max()
    for delta in (best.delta, best.smallest):
        assert_admissible(case, delta, longest)
    least = torch.stack(list(best.by_solver.values())).min(dim=0).values
    for row, winner in enumerate(best.winner):
        assert (winner is None) == (not reached[row])
        assert winner is None or best.by_solver[winner][row] <= 1.0100001 * least[row]


@guards(edge, "rows[high[rows] - low[rows] > fine]", "rows[high[rows] - low[rows] > 8 * fine]")
@given(searches(kinds=("linear", "bowl", "ratchet"), dtypes=("float64",)), st.floats(0.01, 0.99))
def test_an_edge_is_where_the_goal_begins(case: SearchCase, share: float) -> None:
    """On a ray up which the slack rises, the goal set at some share of the way: found to `2^-16`, and reached."""
    outer = case.feasible.project(case.landscape().rows.reshape(case.start().shape)) / 2
    along = [slack_at(case, part * outer) for part in torch.linspace(0, 1, 20).tolist()]
    assume(all(bool((after > before).all()) for before, after in pairwise(along)))
    goal = slack_at(case, share * outer)
    found = edge(case.landscape(), outer, goal)
    assert (slack_at(case, found) >= goal).all()
    shares = norm(found) / norm(outer)
    assert ((shares - share).abs() <= 2.0**-16 * (1 + 1e-6)).all()
