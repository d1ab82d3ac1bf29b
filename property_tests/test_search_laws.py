"""Laws of the search, over objectives without a model: feasible, monotone, deterministic, blind to its neighbors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from property_tests.guards import guards
from property_tests.rounding import assert_within, eps, projection_leak
from property_tests.strategies import DTYPES, EPS64, SEEDS, costly, randn
from recover.numerics.metrics import norm
from recover.search.ascent import Schedule, Solution, Status, find_perturbation, scale_to
from recover.search.constraints.linear import EncoderOrthogonal
from recover.search.gradient_free import Effort, reexamined
from recover.search.minimum import smallest_perturbation


@dataclass(frozen=True, eq=False)
class Landscape:
    """An objective of a drawn kind, one row of parameters an example; it remembers every delta it is asked about.

    `cliff` is linear and stops being a number past a score of 1; `ratchet` has a slack that saturates before its score.
    """

    kind: str
    rows: Tensor
    offset: float
    unit: float = 1.0
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.extend(delta.detach().clone())
        x, rows = delta.flatten(1) * self.unit, self.rows
        along = (x * rows).sum(dim=1)
        if self.kind == "linear":
            score = along
        elif self.kind == "bowl":
            score = -(x - rows).square().sum(dim=1) / 2
        elif self.kind == "waves":
            score = torch.sin(3 * x * rows).sum(dim=1) - 0.01 * x.square().sum(dim=1)
        elif self.kind == "cliff":
            score = along.where(along <= 1, torch.nan)
        elif self.kind == "ratchet":
            return along - self.offset, torch.tanh(along) - self.offset
        else:
            score = 0 * along
        return score - self.offset, score - self.offset

    def select(self, rows: Tensor) -> Landscape:
        return replace(self, rows=self.rows[rows])


KINDS = ("linear", "bowl", "waves", "cliff", "ratchet", "flat")


@dataclass(frozen=True)
class SearchCase:
    """A whole search as plain values; `columns` directions are held."""

    kind: str
    batch: int
    pos: int
    d_model: int
    columns: int
    seed: int
    offset: float
    budget: float
    steps: int = 6
    restarts: int = 1
    dtype: str = "float32"
    started: bool = False

    @property
    def feasible(self) -> EncoderOrthogonal:
        return EncoderOrthogonal(randn(self.d_model, self.columns, seed=self.seed + 1, dtype=DTYPES[self.dtype]))

    def landscape(self, unit: float = 1.0) -> Landscape:
        rows = randn(self.batch, self.pos * self.d_model, seed=self.seed, dtype=DTYPES[self.dtype])
        return Landscape(self.kind, rows, self.offset, unit)

    def start(self) -> Tensor:
        """Zero, or an admissible delta of half the budget."""
        noise = randn(self.batch, self.pos, self.d_model, seed=self.seed + 2, dtype=DTYPES[self.dtype])
        half = scale_to(self.feasible.project(noise), min(self.budget, 10.0) / 2)
        return half if self.started else torch.zeros_like(half)

    @property
    def schedule(self) -> Schedule:
        return Schedule(steps=self.steps, restarts=self.restarts, seed=self.seed)

    def run(self, **changes: object) -> Solution:
        case = replace(self, **changes)  # type: ignore[arg-type]
        return find_perturbation(case.landscape(), case.start(), case.feasible, case.budget, case.schedule)


@st.composite
def searches(
    draw: st.DrawFn,
    kinds: tuple[str, ...] = KINDS,
    dtypes: tuple[str, ...] = ("float32", "float64"),
    restarts: tuple[int, ...] = (0, 1, 2),
    budgets: tuple[float, ...] = (0.01, 0.5, 2.0, 30.0, math.inf),
    offsets: tuple[float, ...] = (-1.0, 0.0, 0.3, 1.0, 5.0),
    least_batch: int = 1,
) -> SearchCase:
    d_model = draw(st.integers(1, 8))
    return SearchCase(
        kind=draw(st.sampled_from(kinds)),
        batch=draw(st.integers(least_batch, 4)),
        pos=draw(st.integers(1, 3)),
        d_model=d_model,
        columns=draw(st.integers(0, d_model)),
        seed=draw(SEEDS),
        offset=draw(st.sampled_from(offsets)),
        budget=draw(st.sampled_from(budgets)),
        steps=draw(st.integers(0, 8)),
        restarts=draw(st.sampled_from(restarts)),
        dtype=draw(st.sampled_from(dtypes)),
        started=draw(st.booleans()),
    )


def slack_at(case: SearchCase, delta: Tensor) -> Tensor:
    slack: Tensor = case.landscape()(delta)[1]
    return slack


def evaluation_error(case: SearchCase, delta: Tensor) -> float:
    """Bound on the rounding of a score: sums over positions and dimensions of terms with slopes of 3 at most."""
    terms = case.pos * case.d_model + 4
    x, rows = delta.double().abs().flatten(1), case.landscape().rows.double().abs()
    sizes = {
        "bowl": (x + rows).square().sum(dim=1),
        "waves": x.square().sum(dim=1) + terms + 9 * (x * rows).sum(dim=1),
    }.get(case.kind, (x * rows).sum(dim=1))
    return float(terms * eps(delta.dtype) * (sizes.max() + abs(case.offset)))


@guards(
    "recover.search.ascent.clip",
    "return Budget(budget * (1 - 1e-6)).project(delta) if math.isfinite(budget) else delta",
    "return delta",
)
@given(searches())
def test_every_delta_ever_tried_is_admissible_and_within_the_budget(case: SearchCase) -> None:
    """Steps and restarts included, and the result is one of them or the start."""
    landscape = case.landscape()
    found = find_perturbation(landscape, case.start(), case.feasible, case.budget, case.schedule)
    tried = torch.stack([*landscape.seen, *found.delta])
    assert (norm(tried).double() <= case.budget).all()
    A = case.feasible.directions.double()
    # Each step adds two projected vectors and rounds: an error of eps of their sizes, which the budget bounds; where it
    # does not, the longest delta does. A stride can be many times what is left, so count every step.
    longest = norm(tried).double().max() * (case.steps + 2)
    tightly = 4 * projection_leak(case.d_model, tried.dtype) * longest * A.norm()
    seen = (tried.double() @ A).flatten(1).norm(dim=1)
    assert (seen <= tightly).all(), (seen.max(), tightly)
    assert all((delta == torch.stack(landscape.seen)).all(dim=(1, 2)).any() for delta in found.delta)


@guards("recover.search.ascent.ascend", "better = counts & (point.slack > best_slack[active])", "better = counts")
@given(searches())
def test_a_search_is_never_worse_than_its_start_and_reports_what_it_found(case: SearchCase) -> None:
    found = case.run()
    start = slack_at(case, case.start())
    known = start.isfinite()
    assert (found.slack[known] >= start[known] - evaluation_error(case, case.start())).all()
    assert found.delta.isfinite().all()
    told = found.slack.isfinite()
    assert_within(found.slack[told], slack_at(case, found.delta)[told], evaluation_error(case, found.delta))
    assert found.recovered.tolist() == [status is Status.RECOVERED for status in found.status]
    assert (found.slack[found.recovered] >= case.schedule.goal).all()
    assert not (found.slack[~found.recovered] >= case.schedule.goal).any()
    assert (found.steps <= case.steps * (1 + case.restarts)).all()


@guards("recover.search.ascent.ascend", "better = counts & (point.slack > best_slack[active])", "better = counts")
@given(searches(), st.sampled_from([1.0, 1.5, 4.0, 100.0]))
def test_a_larger_budget_from_what_the_smaller_one_found_is_never_worse(case: SearchCase, factor: float) -> None:
    """For any objective: the feasible sets are nested, so a search may go on from the smaller budget's best."""
    assume(math.isfinite(case.budget))
    small = case.run()
    large = find_perturbation(case.landscape(), small.delta, case.feasible, factor * case.budget, case.schedule)
    known = small.slack.isfinite()
    error = evaluation_error(case, small.delta)
    assert (large.slack[known] >= small.slack[known] - error).all()
    assert (large.recovered | ~small.recovered | (small.slack <= case.schedule.goal + error)).all()


@guards("recover.search.ascent.Steepest._uphill", "newton.clamp(max=self.budget)", "newton.clamp(max=0.3)")
@given(searches(kinds=("linear",), restarts=(0,)), st.sampled_from([1.0, 1.01, 2.0, 50.0]))
def test_for_a_linear_score_a_larger_budget_never_recovers_less_nor_ends_lower(case: SearchCase, factor: float) -> None:
    """From nothing, and to the closed form: recovered just where `budget ||P g||` reaches offset and goal."""
    assume(math.isfinite(case.budget) and case.steps >= 2 and case.columns < case.d_model)
    small, large = case.run(started=False), case.run(started=False, budget=factor * case.budget)
    slopes = norm(case.feasible.project(case.landscape().rows.reshape(case.start().shape))).double()
    goal = case.schedule.goal
    for found, budget in ((small, case.budget), (large, factor * case.budget)):
        # A budget is aimed at 1e-6 low; and scores are rounded.
        error = 2e-6 * budget * slopes + evaluation_error(case, found.delta) + 8 * case.d_model * eps(found.delta.dtype)
        best = budget * slopes - case.offset
        clear = (best - goal).abs() > error
        assert torch.equal(found.recovered[clear], (best > goal)[clear])
        missed = ~found.recovered
        assert_within(found.slack[missed], best[missed], error[missed])
    error = 4e-6 * factor * case.budget * slopes + evaluation_error(case, large.delta)
    capped = [found.slack.double().clamp(max=goal) for found in (small, large)]
    assert (capped[1] >= capped[0] - error).all()


@guards("recover.search.ascent.ascend", "better = counts & (point.slack > best_slack[active])", "better = counts")
@given(searches(restarts=(0,)), st.integers(0, 8))
def test_more_steps_are_never_worse(case: SearchCase, more: int) -> None:
    """To the bit: the longer search begins as the shorter one."""
    assert (case.run(steps=case.steps + more).slack >= case.run().slack).all()


@guards("recover.search.ascent.better", "& (second.slack > first.slack[rows])", "& (second.slack == second.slack)")
@given(searches(), st.integers(0, 2))
def test_more_restarts_are_never_worse(case: SearchCase, more: int) -> None:
    assert (case.run(restarts=case.restarts + more).slack >= case.run().slack).all()


@guards(
    "recover.search.ascent.from_each_start",
    "torch.randn(like.shape[1:], generator=generator)",
    "torch.randn(like.shape[1:])",
)
@given(searches())
def test_the_same_seed_gives_the_same_result(case: SearchCase) -> None:
    """To the bit, whatever was drawn from torch's own generator in between."""
    first = case.run()
    torch.rand(7)
    second = case.run()
    assert torch.equal(first.delta, second.delta)
    assert torch.equal(first.slack, second.slack)
    assert (first.status, first.steps.tolist()) == (second.status, second.steps.tolist())


stable = searches(kinds=("linear", "bowl", "waves"), dtypes=("float64",)) | searches(
    kinds=("waves",), dtypes=("float64",), restarts=(1, 2), offsets=(1.0, 5.0), least_batch=3
)
"""Searches in which a rounding stays one. In float64 and eight steps, each of which multiplies an error by at most the
curvature (9) times the longest step (the budget, 30, or a Newton step): half of the digits are left in any case. Half
of them have several examples that start again, to which a neighbor might matter."""
HALF_THE_DIGITS = EPS64**0.5


def assert_same_search(first: Solution, second: Solution, rows: list[int]) -> None:
    size = norm(first.delta)[rows].max() + 1
    assert_within(second.delta, first.delta[rows], HALF_THE_DIGITS * size)
    assert_within(second.slack, first.slack[rows], 100 * HALF_THE_DIGITS * size)
    assert torch.equal(second.recovered, first.recovered[rows])


def not_on_an_edge(found: Solution, case: SearchCase) -> bool:
    """Whether the goal was not met or missed by a rounding; then the last digit would tell recovered from not."""
    return bool(((found.slack - case.schedule.goal).abs() > 1e3 * HALF_THE_DIGITS * (1 + norm(found.delta))).all())


@guards(
    "recover.search.ascent.from_each_start",
    "torch.randn(like.shape[1:], generator=generator).to(like).expand_as(like[unsolved])",
    "torch.randn(like[unsolved].shape, generator=generator).to(like)",
)
@given(stable)
def test_a_batch_gives_what_its_examples_give_one_by_one(case: SearchCase) -> None:
    """Restarts included: one draw serves all examples, so a result does not depend on its neighbors."""
    together = case.run()
    assume(not_on_an_edge(together, case))
    for row in range(case.batch):
        rows = torch.tensor([row])
        alone = find_perturbation(
            case.landscape().select(rows), case.start()[rows], case.feasible, case.budget, case.schedule
        )
        assert_same_search(together, alone, [row])


@guards(
    "recover.search.ascent.from_each_start",
    "torch.randn(like.shape[1:], generator=generator).to(like).expand_as(like[unsolved])",
    "torch.randn(like[unsolved].shape, generator=generator).to(like)",
)
@given(stable, SEEDS)
def test_the_order_of_examples_does_not_matter(case: SearchCase, seed: int) -> None:
    together = case.run()
    assume(not_on_an_edge(together, case))
    order = torch.randperm(case.batch, generator=torch.Generator().manual_seed(seed))
    shuffled = find_perturbation(
        case.landscape().select(order), case.start()[order], case.feasible, case.budget, case.schedule
    )
    assert_same_search(together, shuffled, order.tolist())


@guards(
    "recover.search.ascent.Steepest._uphill", "newton.clamp(max=self.budget)", "newton.clamp(max=min(self.budget, 1.0))"
)
@given(searches(kinds=("linear", "bowl", "waves")), st.integers(-6, 6))
def test_the_unit_of_the_residual_does_not_matter(case: SearchCase, power: int) -> None:
    """To the bit, for powers of 2: residuals twice as large take a delta and a budget twice as large, and no more."""
    assume(math.isfinite(case.budget))
    unit = 2.0**power
    one = case.run()
    other = find_perturbation(
        case.landscape(1 / unit), case.start() * unit, case.feasible, case.budget * unit, case.schedule
    )
    assert torch.equal(other.delta, one.delta * unit)
    assert torch.equal(other.slack, one.slack)
    assert (other.status, other.steps.tolist()) == (one.status, one.steps.tolist())


@guards(
    "recover.search.ascent.Steepest.step",
    "Status.NO_GRADIENT: norm(self.slope) == 0",
    "Status.NO_GRADIENT: norm(self.slope) < 0",
)
@given(searches(kinds=("linear", "flat"), restarts=(0, 1)))
def test_a_missing_gradient_is_distinguished_from_failure(case: SearchCase) -> None:
    """A flat score, or no free direction, is a search that could not be, not one that found nothing."""
    found = case.run(columns=case.d_model if case.kind == "linear" else case.columns, started=False)
    solved = slack_at(case, torch.zeros_like(found.delta)) >= case.schedule.goal
    assert [status is Status.NO_GRADIENT for status in found.status] == (~solved).tolist()
    assert found.delta.count_nonzero() == 0


beyond = searches(kinds=("linear", "waves", "bowl"), budgets=(0.5, 2.0), offsets=(1.0, 5.0))
"""Where the goal is often within reach of a probe that is longer than the budget allows, and not of a shorter one."""


@guards(reexamined, "torch.where((near[some] <= budget)[:, None, None], walked, delta[some])", "walked")
@costly(20)
@given(beyond | searches())
def test_a_second_look_keeps_what_was_found_and_is_never_worse(case: SearchCase) -> None:
    """Without gradients: within the budget, admissible, and what was solved stays as it is, to the bit."""
    found, landscape = case.run(), case.landscape()
    again = reexamined(landscape, found, case.feasible, case.budget, case.schedule, Effort(draws=8, rounds=2, around=8))
    known = found.slack.isfinite()
    assert (again.slack[known] >= found.slack[known] - evaluation_error(case, found.delta)).all()
    assert torch.equal(again.delta[found.recovered], found.delta[found.recovered])
    assert not (found.recovered & ~again.recovered).any()
    assert (norm(again.delta).double() <= case.budget).all()
    longest = max(float(norm(again.delta).max()), *(float(norm(delta[None])) for delta in landscape.seen), 0.0, 0.0)
    A = case.feasible.directions.double()
    tightly = 4 * projection_leak(case.d_model, again.delta.dtype) * 2 * (case.steps + 16) * longest * A.norm()
    assert ((again.delta.double() @ A).flatten(1).norm(dim=1) <= tightly).all()
    told = again.slack.isfinite()
    assert_within(again.slack[told], slack_at(case, again.delta)[told], evaluation_error(case, again.delta))


@guards(smallest_perturbation, "MARGIN * slack.abs()", "0.1 * slack.abs()")
@costly(15)
@given(searches(kinds=("linear",), restarts=(0,), budgets=(math.inf,)))
def test_the_smallest_norm_of_a_linear_score_is_its_closed_form(case: SearchCase) -> None:
    """`offset / ||P g||`: infinite where nothing is admissible, 0 where the behavior shows without any delta."""
    case = replace(case, started=False, steps=20)
    assume(case.columns < case.d_model)
    slopes = norm(case.feasible.project(case.landscape().rows.reshape(case.start().shape))).double()
    assume(bool((slopes > 1e-2).all()))
    found = smallest_perturbation(case.landscape(), case.start(), case.feasible, case.schedule)
    expected = case.offset / slopes if case.offset > 0 else torch.zeros_like(slopes)
    # A behavior with a slack of 0 does not show, and nothing need be added for it to be at its edge; beyond that the
    # goal lies 1e-4 of the slack past the edge, and 16 halvings of the ray come within 2^-16 of the first delta.
    goal = case.schedule.goal * 4 / slopes
    assert_within(found.norm, expected, 2e-4 * expected + 2.0**-15 * (2 * expected + goal) + 1e-30)
    assert_within(norm(found.delta), found.norm.double(), 4 * eps(found.norm.dtype) * found.norm.double())
    held = EncoderOrthogonal(torch.eye(case.d_model, dtype=DTYPES[case.dtype]))
    nothing = smallest_perturbation(case.landscape(), case.start(), held, case.schedule)
    unreachable = torch.tensor(case.offset >= 0).expand(case.batch)
    assert torch.equal(nothing.norm == torch.inf, unreachable & (expected > 0))


@guards("recover.search.minimum.edge", "return outer * by_example(high)", "return 0.5 * outer * by_example(high)")
@costly(15)
@given(searches(kinds=("linear", "bowl", "waves"), budgets=(math.inf,)))
def test_a_smallest_norm_is_no_longer_than_what_a_search_found_and_reaches_the_edge(case: SearchCase) -> None:
    case = replace(case, started=False)
    found = case.run()
    smallest = smallest_perturbation(case.landscape(), case.start(), case.feasible, case.schedule)
    reached = smallest.norm.isfinite()
    assert (reached | ~found.recovered).all()
    rounding = 1 + 8 * eps(found.delta.dtype)
    assert (smallest.norm <= norm(found.delta) * rounding)[found.recovered].all()
    slack = slack_at(case, smallest.delta)
    assert (slack[reached] >= -evaluation_error(case, smallest.delta)).all()
    assert smallest.delta[~reached].count_nonzero() == 0
