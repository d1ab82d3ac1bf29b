"""The search on objectives whose best point is known in closed form, and the laws that any search must keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recover.search.ascent import Schedule, Solution, Status, find_perturbation, scale_to
from recover.search.constraints.linear import EncoderOrthogonal
from recover.types import InputError
from tests.landscapes import Own

D, K, POS = 12, 5, 2


@dataclass
class Landscape:
    """An objective from a function of `delta [batch pos d_model]` and one row of parameters an example; remembers."""

    function: Callable[[Tensor, Tensor], Tensor]
    rows: Tensor
    seen: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    slack_of: Callable[[Tensor], Tensor] = torch.clone

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.extend(delta.detach().clone())
        self.sizes.append(len(delta))
        score = self.function(delta, self.rows)
        return score, self.slack_of(score)

    def select(self, rows: Tensor) -> Landscape:
        return Landscape(self.function, self.rows[rows], self.seen, self.sizes, self.slack_of)


class Anything:
    """No constraint."""

    def project(self, delta: Tensor) -> Tensor:
        return delta

    def select(self, rows: Tensor) -> Anything:
        return self


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projector(A: Tensor) -> Tensor:
    """`I - A A^+` in float64, by the pseudo-inverse: another way than the code's."""
    wide = A.double()
    return torch.eye(len(A), dtype=torch.float64) - wide @ torch.linalg.pinv(wide)


A = draw(D, K, seed=9)
C1 = EncoderOrthogonal(A)
P = projector(A)


def linear(delta: Tensor, rows: Tensor) -> Tensor:
    """`<g, delta> - offset`, `g` in the first `POS * D` parameters, the offset last."""
    return torch.einsum("bpd,bpd->b", delta, rows[:, :-1].reshape(-1, POS, D)) - rows[:, -1]


def linear_rows(batch: int, offset: float, seed: int = 1) -> Tensor:
    return torch.cat([draw(batch, POS * D, seed=seed), torch.full((batch, 1), offset)], dim=1)


def projected_gradient(rows: Tensor) -> Tensor:
    return (rows[:, :-1].reshape(-1, POS, D).double() @ P).float()


def origin(batch: int) -> Tensor:
    return torch.zeros(batch, POS, D)


def length(delta: Tensor) -> Tensor:
    return delta.double().flatten(1).norm(dim=1).float()


UNREACHABLE = Schedule(goal=1e6, restarts=0)


def test_a_linear_score_is_raised_to_its_closed_form_maximum() -> None:
    rows, budget = linear_rows(4, offset=100.0), 3.0
    found = find_perturbation(Landscape(linear, rows), origin(4), C1, budget, UNREACHABLE)
    slope = projected_gradient(rows)
    assert_close(found.delta, budget * slope / length(slope)[:, None, None], atol=1e-4, rtol=0)
    assert_close(found.score, budget * length(slope) - 100.0, atol=1e-3, rtol=0)
    assert set(found.status) <= {Status.EXHAUSTED, Status.STALLED}
    assert not found.recovered.any()


@pytest.mark.parametrize("budget", [50.0, math.inf])
def test_a_linear_threshold_is_crossed_with_hardly_more_than_the_smallest_norm(budget: float) -> None:
    rows, offset = linear_rows(4, offset=2.0), 2.0
    found = find_perturbation(Landscape(linear, rows), origin(4), C1, budget)
    smallest = offset / length(projected_gradient(rows))
    assert found.recovered.all()
    assert (length(found.delta) >= smallest).all()
    assert (length(found.delta) <= 1.03 * smallest).all()
    assert (found.steps <= 2).all()


def test_one_example_out_of_reach_does_not_stop_the_others() -> None:
    """Reachable exactly where `budget * ||P g||` exceeds the offset."""
    rows, budget = linear_rows(6, offset=0.0), 2.0
    best = budget * length(projected_gradient(rows))
    rows[:, -1] = best + torch.tensor([-0.5, 0.5, -0.5, 0.5, 0.1, -0.1])
    found = find_perturbation(Landscape(linear, rows), origin(6), C1, budget)
    assert found.recovered.tolist() == [True, False, True, False, False, True]
    assert [s is Status.RECOVERED for s in found.status] == found.recovered.tolist()


def quadratic(delta: Tensor, rows: Tensor) -> Tensor:
    """`-(delta - t)^T H (delta - t) / 2` with `H = diag(1..4)`, `t` the parameters."""
    curvature = torch.linspace(1, 4, POS * D, dtype=delta.dtype)
    off = delta.flatten(1) - rows
    return -(off.square() * curvature).sum(dim=1) / 2


def test_a_concave_quadratic_is_raised_to_its_maximum_in_the_null_space() -> None:
    target = draw(3, POS * D, seed=4)
    schedule = Schedule(goal=1e6, steps=200, restarts=0, still=1e-6)
    found = find_perturbation(Landscape(quadratic, target), origin(3), C1, 100.0, schedule)
    # On a basis N of the null space: (N^T H N) v = N^T H t.
    values, vectors = torch.linalg.eigh(P)
    free = torch.block_diag(*[vectors[:, values > 0.5]] * POS)
    H = torch.diag(torch.linspace(1, 4, POS * D, dtype=torch.float64))
    v = torch.linalg.solve(free.T @ H @ free, free.T @ H @ target.double().T)
    best = (free @ v).T.float()
    assert_close(found.score, quadratic(best, target), atol=1e-3, rtol=1e-3)
    assert_close(found.delta.flatten(1), best, atol=0.05, rtol=0)


def test_a_round_hill_inside_the_ball_is_climbed_from_the_origin() -> None:
    """`1 - ||delta - t||^2` is above 0 within 1 of its center: the Newton step must not be lost in overshooting."""

    def hill(delta: Tensor, rows: Tensor) -> Tensor:
        return 1 - (delta.flatten(1) - rows).square().sum(dim=1)

    target = scale_to(C1.project(draw(5, POS, D, seed=3)), 4.0).flatten(1)
    found = find_perturbation(Landscape(hill, target), origin(5), C1, 20.0)
    assert found.recovered.all()
    assert (length(found.delta) >= 3.0).all()


def bumps(delta: Tensor, rows: Tensor) -> Tensor:
    """Curved, several hills, bounded; `rows` turns it another way for each example."""
    x = torch.einsum("bpd,bpd->bp", delta, rows.reshape(-1, POS, D))
    far = 0.01 * delta.flatten(1).square().sum(dim=1)
    return torch.sin(x).sum(dim=1) + torch.tanh(delta[:, :, 0] - 1).sum(dim=1) - far


@pytest.mark.parametrize("function", [bumps, quadratic], ids=["bumps", "quadratic"])
def test_every_delta_ever_tried_is_admissible_and_within_the_budget(function: Callable[..., Tensor]) -> None:
    budget, landscape = 1.5, Landscape(function, draw(6, POS * D, seed=5))
    found = find_perturbation(landscape, origin(6), C1, budget, Schedule(goal=1.9, restarts=2))
    tried = torch.stack(landscape.seen)
    assert len(tried) > 50
    assert (length(tried) <= budget).all()
    assert length(tried).max() > 0.99 * budget
    seen = (tried.double() @ A.double()).flatten(1).norm(dim=1)
    assert (seen <= 1e-6 * A.double().norm() * length(tried)).all()
    assert any((delta == tried).all(dim=(1, 2)).any() for delta in found.delta)


def test_the_result_is_the_best_point_met_and_never_worse_than_the_start() -> None:
    rows = draw(8, POS * D, seed=6)
    start = scale_to(C1.project(draw(8, POS, D, seed=7)), 1.0)
    for steps in (0, 1, 3, 40):
        landscape = Landscape(bumps, rows)
        found = find_perturbation(landscape, start, C1, 1.5, Schedule(steps=steps, goal=1e6, restarts=0))
        assert (found.score >= bumps(start, rows)).all()
        assert_close(found.score, bumps(found.delta, rows))
        assert_close(found.slack, found.score)
        assert (found.steps <= steps).all()
    assert (found.score > bumps(start, rows)).all()


def lowered_bumps(delta: Tensor, rows: Tensor) -> Tensor:
    """`bumps`, lowered by the last parameter: by -9 they are above any goal at once, and by 9 below it everywhere."""
    return bumps(delta, rows[:, :-1]) - rows[:, -1]


def mixed_rows(batch: int, seed: int) -> Tensor:
    """Of every four one solved at the start, one out of reach, two to be searched; in float64.

    There a rounding stays one, over as many steps as are taken here: what is found does not hang on the order of sums.
    """
    lowered = torch.tensor([-9.0, 9.0, 0.0, 0.0]).repeat(batch // 4)
    return torch.cat([draw(batch, POS * D, seed=seed), lowered[:, None]], dim=1).double()


def test_each_example_keeps_to_its_own_space_and_gets_what_it_gets_alone() -> None:
    """Some are retired early, others start again; whoever is left must not be given a neighbor's space."""
    spaces = tuple(EncoderOrthogonal(draw(D, K + row % 3, seed=20 + row).double()) for row in range(12))
    schedule, rows = Schedule(goal=1.8, restarts=2), mixed_rows(12, seed=8)
    landscape = Landscape(lowered_bumps, rows)
    found = find_perturbation(landscape, origin(12).double(), Own(spaces), 2.5, schedule)
    assert found.recovered[0::4].all()
    assert not found.recovered[1::4].any()
    assert landscape.sizes[:2] == [12, 9]
    for row, space in enumerate(spaces):
        here = found.delta[row : row + 1]
        assert space.violation(here) <= 1e-5
        if row % 4:
            assert spaces[row - 1].violation(here) > 1e-3
        alone = find_perturbation(Landscape(lowered_bumps, rows[row : row + 1]), 0 * here, space, 2.5, schedule)
        assert alone.status[0] is found.status[row]
        assert_close(alone.delta, here, atol=1e-4, rtol=1e-4)


def test_a_solved_start_is_returned_as_it_is() -> None:
    rows = linear_rows(2, offset=-1.0)
    landscape = Landscape(linear, rows)
    found = find_perturbation(landscape, origin(2), C1, 1.0)
    assert found.delta.abs().max() == 0
    assert found.status == (Status.RECOVERED,) * 2
    assert found.steps.tolist() == [0, 0]
    assert landscape.sizes == [2]


def test_examples_that_are_done_are_not_evaluated_again() -> None:
    rows = linear_rows(4, offset=2.0)
    rows[3, -1] = -1.0
    landscape = Landscape(linear, rows)
    find_perturbation(landscape, origin(4), C1, 20.0)
    assert landscape.sizes == [4, 3]


def test_slack_and_not_score_says_when_to_stop() -> None:
    rows = linear_rows(3, offset=0.0)
    landscape = Landscape(linear, rows, slack_of=lambda score: score - 7.0)
    found = find_perturbation(landscape, origin(3), C1, 50.0)
    assert (found.slack >= Schedule().goal).all()
    assert_close(found.score, found.slack + 7.0)


def test_a_slack_that_must_fall_before_it_rises_is_no_obstacle() -> None:
    """The score is what is climbed: `x`, with a slack of `-1 - x` up to 2 and `x - 4` beyond."""

    def slack_of(score: Tensor) -> Tensor:
        return torch.where(score < 2, -1 - score, score - 4)

    def first_entry(delta: Tensor, rows: Tensor) -> Tensor:
        return delta[:, 0, 0]

    landscape = Landscape(first_entry, torch.zeros(1, 1), slack_of=slack_of)
    found = find_perturbation(landscape, origin(1), Anything(), 20.0, Schedule(restarts=0))
    assert found.status == (Status.RECOVERED,)
    stopped = Landscape(first_entry, torch.zeros(1, 1), slack_of=slack_of)
    best = find_perturbation(stopped, origin(1), Anything(), 20.0, Schedule(restarts=0, steps=1))
    assert best.slack.item() == -1  # the best of what was met, not the last
    assert best.delta.abs().max() == 0


def test_a_zero_gradient_ends_with_its_name() -> None:
    flat = Landscape(lambda delta, rows: (delta * 0).sum(dim=(1, 2)) - 1.0, torch.zeros(3, 1))
    found = find_perturbation(flat, origin(3), C1, 1.0)
    assert found.status == (Status.NO_GRADIENT,) * 3
    blind = torch.cat([(A[:, 0] @ torch.eye(D)).repeat(POS), torch.tensor([5.0])])[None]
    assert projected_gradient(blind).abs().max() < 1e-5
    exact = EncoderOrthogonal(torch.eye(D)[:, :4])
    seen_only = torch.cat([torch.eye(D)[2].repeat(POS), torch.tensor([5.0])])[None]
    assert find_perturbation(Landscape(linear, seen_only), origin(1), exact, 9.0).status == (Status.NO_GRADIENT,)


def test_a_constraint_that_leaves_nothing_ends_with_its_name() -> None:
    whole = EncoderOrthogonal(draw(D, D + 3, seed=2))
    found = find_perturbation(Landscape(linear, linear_rows(2, offset=1.0)), origin(2), whole, 9.0)
    assert found.status == (Status.NO_GRADIENT,) * 2
    assert found.delta.abs().max() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_end_with_their_name_and_leave_the_others(bad: float) -> None:
    rows = linear_rows(3, offset=1.0)
    rows[1, -1] = bad
    found = find_perturbation(Landscape(linear, rows), origin(3), C1, 9.0)
    assert found.status == (Status.RECOVERED, Status.NON_FINITE, Status.RECOVERED)
    assert found.delta[1].abs().max() == 0
    assert found.delta.isfinite().all()


def test_a_gradient_that_is_not_finite_is_not_followed() -> None:
    """`sqrt(|x|)` is finite at 0, its slope is not."""
    root = Landscape(lambda delta, rows: delta.flatten(1).norm(dim=1).sqrt() - 1, torch.zeros(2, 1))
    found = find_perturbation(root, origin(2), Anything(), 9.0, Schedule(restarts=0))
    assert found.status == (Status.NON_FINITE,) * 2
    assert found.delta.isfinite().all()


def test_a_cliff_beyond_a_good_point_is_backed_away_from() -> None:
    """The Newton step lands where nothing is finite; half of it, or a quarter, does not."""

    def cliff(delta: Tensor, rows: Tensor) -> Tensor:
        x = delta[:, 0, 0]
        return torch.where(x < 4.0, x * (1 + x) - 9, torch.nan)

    found = find_perturbation(Landscape(cliff, torch.zeros(1, 1)), origin(1), Anything(), 20.0, Schedule(restarts=0))
    assert found.status == (Status.RECOVERED,)
    assert 2.54 < found.delta[0, 0, 0] < 4.0


def test_a_plateau_beyond_a_good_point_is_backed_away_from() -> None:
    """A long step lands where the gradient is zero and the score low; that is not the end."""

    def plateau(delta: Tensor, rows: Tensor) -> Tensor:
        x = delta[:, 0, 0]
        return torch.where(x < 4.0, x * (1 + x) - 9, -20.0)

    found = find_perturbation(Landscape(plateau, torch.zeros(1, 1)), origin(1), Anything(), 20.0, Schedule(restarts=0))
    assert found.status == (Status.RECOVERED,)


def solve(rows: Tensor, budget: float = 2.5, **schedule: float) -> Solution:
    settings = {"goal": 1.6, "restarts": 2, **schedule}
    start, space = origin(len(rows)).double(), EncoderOrthogonal(A.double())
    return find_perturbation(Landscape(lowered_bumps, rows), start, space, budget, Schedule(**settings))  # type: ignore[arg-type]


ROWS = mixed_rows(16, seed=8)


def test_a_restart_solves_what_the_start_cannot_leave() -> None:
    """On a plateau around zero, with a goal that every point of half the sphere of starts meets."""

    def plateau(delta: Tensor, rows: Tensor) -> Tensor:
        far = delta.flatten(1).norm(dim=1) > 1
        return torch.where(far, delta.sum(dim=(1, 2)).sign(), delta.sum(dim=(1, 2)) * 0 - 0.5)

    landscape = Landscape(plateau, torch.zeros(1, 1))
    settings = {"goal": 0.5, "steps": 1}
    assert not find_perturbation(
        landscape, origin(1), Anything(), 2.0, Schedule(restarts=0, **settings)
    ).recovered.any()
    assert find_perturbation(landscape, origin(1), Anything(), 2.0, Schedule(restarts=20, **settings)).recovered.all()


def test_a_batch_gives_what_each_example_alone_gives() -> None:
    together = solve(ROWS)
    for index in (0, 3, 7, 12, 15):
        alone = solve(ROWS[index : index + 1])
        assert_close(alone.delta[0], together.delta[index], atol=1e-4, rtol=1e-4)
        assert alone.status[0] is together.status[index]
        assert alone.steps[0] == together.steps[index]


def test_permuting_the_batch_permutes_the_result() -> None:
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(3))
    together, permuted = solve(ROWS), solve(ROWS[order])
    assert_close(permuted.delta, together.delta[order], atol=1e-4, rtol=1e-4)
    assert permuted.status == tuple(together.status[i] for i in order.tolist())


def test_the_seed_decides_everything_and_the_global_one_nothing() -> None:
    first = solve(ROWS, seed=1)
    torch.manual_seed(123)
    torch.rand(7)
    again, other = solve(ROWS, seed=1), solve(ROWS, seed=2)
    assert torch.equal(first.delta, again.delta)
    assert first.status == again.status
    assert not torch.equal(first.delta, other.delta)


@pytest.mark.parametrize("function", [linear, quadratic], ids=["linear", "quadratic"])
def test_a_larger_budget_never_recovers_fewer(function: Callable[..., Tensor]) -> None:
    """On concave scores, where it is true of the problem itself."""
    rows = linear_rows(12, offset=4.0) if function is linear else draw(12, POS * D, seed=5)
    if function is linear:
        rows[:, -1] *= torch.linspace(0.2, 3, 12)

    def slack_of(score: Tensor) -> Tensor:
        return score if function is linear else score + 22.0

    before = torch.zeros(12, dtype=torch.bool)
    rates = []
    for budget in (0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 6.0, 50.0, math.inf):
        landscape = Landscape(function, rows, slack_of=slack_of)
        recovered = find_perturbation(landscape, origin(12), C1, budget, Schedule(restarts=0)).recovered
        assert (recovered | ~before).all(), budget
        before = recovered
        rates.append(int(recovered.sum()))
    assert rates[0] < rates[4] < rates[-1]


def test_no_budget_at_all_reaches_far_goals() -> None:
    rows = linear_rows(3, offset=1e4)
    found = find_perturbation(Landscape(linear, rows), origin(3), C1, math.inf)
    assert found.recovered.all()
    assert_close(length(found.delta), 1e4 / length(projected_gradient(rows)), atol=0, rtol=1e-3)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan])
def test_a_budget_that_is_not_positive_is_refused(budget: float) -> None:
    with pytest.raises(InputError, match="budget"):
        find_perturbation(Landscape(linear, linear_rows(1, 1.0)), origin(1), C1, budget)


def test_on_step_tells_steps_and_what_is_left() -> None:
    rows, told = linear_rows(4, offset=2.0), []
    rows[3, -1] = 1e4
    find_perturbation(
        Landscape(linear, rows), origin(4), C1, 20.0, Schedule(restarts=0), lambda *args: told.append(args)
    )
    assert told[:2] == [(0, 4), (1, 1)]
    assert [step for step, _ in told] == list(range(len(told)))


def test_scale_to_sets_norms_and_leaves_zero() -> None:
    delta = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])
    assert_close(scale_to(delta, 10.0), torch.tensor([[[6.0, 8.0]], [[0.0, 0.0]]]))
    assert_close(scale_to(delta, torch.tensor([1.0, 2.0])), torch.tensor([[[0.6, 0.8]], [[0.0, 0.0]]]))


def test_what_is_below_all_normal_numbers_is_zero_to_a_scale() -> None:
    """1e-40 is subnormal in float32: 10 / 1e-40 is infinite, and infinity times zero is no number."""
    tiny = torch.tensor([[[1e-40, 0.0]]])
    assert_close(scale_to(tiny, 10.0), tiny, rtol=0, atol=1e-38)
