"""Several solvers and the best over them, where geometry says what there is to find."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from scipy.stats import beta
from torch import Tensor
from torch.testing import assert_close

from recover.defenses.defended import defend
from recover.numerics.subspaces import NullSpace
from recover.planted import KINDS
from recover.search.adam import ProjectedAdam
from recover.search.ascent import Schedule, Solution, Status, find_perturbation
from recover.search.constraints.linear import EncoderOrthogonal
from recover.search.gradient_free import Effort, reexamined
from recover.search.minimum import edge
from recover.search.solvers import SOLVERS, Found, Solver, WorstCase, random_draws, worst_case
from recover.types import InputError
from tests.landscapes import Anything, Claimed, D, Landscape, Nothing, Own, landscape

A, B, C = torch.eye(D)[:3]
SCHEDULE = Schedule(steps=40)
BY_GRADIENT = {name: solver for name, solver in SOLVERS.items() if name != "random"}


def size(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


def step(x: Tensor, at: Tensor) -> Tensor:
    """-1 up to `x_0 = at`, 1 beyond; its gradient is zero, and no surrogate knows of a comparison."""
    return torch.where(x[:, 0] > at, 1.0, -1.0) + 0 * x.sum(dim=1)


def half_space(x: Tensor, at: Tensor) -> Tensor:
    return 2 * (x @ A + x @ B) - at


def worst(objective: Any, budget: float, feasible: Any = None, **options: Any) -> WorstCase:
    return worst_case(objective, objective.zero, feasible or Anything(), budget, SCHEDULE, **options)


SIMPLE = {
    # The slack, and the norm of the nearest point of its goal.
    "half space": (half_space, lambda at: at / 8**0.5),
    "ball": (lambda x, at: 3 * at - (x - 3.5 * at[:, None] * A).norm(dim=1), lambda at: at / 2),
    "squashed": (lambda x, at: torch.tanh(x @ A) - torch.tanh(at / 2), lambda at: at / 2),
}


@pytest.mark.parametrize("where", SIMPLE)
@pytest.mark.parametrize(
    ("name", "excess"), [("ascent", 0.01), ("adam", 0.5), ("smallest_norm", 0.01), ("random", 0.25)]
)
def test_each_solver_solves_what_is_simple(name: str, excess: float, where: str) -> None:
    """By closed form no norm is less than `nearest`; and each solver comes as close as its kind allows."""
    slack, nearest = SIMPLE[where]
    numbers = (0.5, 1.0, 1.5)
    world, held = landscape(slack, *numbers), NullSpace.of(C[:, None])
    known = torch.tensor([nearest(at) for at in numbers])
    budget = 2 * float(known.max())
    found = SOLVERS[name](world, world.zero, held, budget, SCHEDULE)
    assert found.within.recovered.all()
    assert (found.within.slack >= SCHEDULE.goal).all()
    assert_close(world(found.within.delta)[1], found.within.slack)
    assert (size(found.within.delta) <= budget).all()
    for delta in (found.delta, found.within.delta):
        assert (delta[..., 2].abs() <= 1e-6).all()
    assert (world(found.delta)[1] > 0).all()
    assert_close(size(found.delta), found.norm)
    assert (found.norm >= known * (1 - 1e-5)).all()
    assert (found.norm <= known * (1 + excess) + 1e-4).all(), found.norm / known


@pytest.mark.parametrize("name", SOLVERS)
def test_each_solver_keeps_to_directions_that_are_not_those_of_coordinates(name: str) -> None:
    """Of the normal `u = 2 (1, 1, 0)` the complement of `(1, 2, 2) / 3` leaves `u - (2, 4, 4) / 3`, of length `2`."""
    held, world = NullSpace.of((A + 2 * B + 2 * C)[:, None]), landscape(half_space, 0.5, 1.0)
    found = SOLVERS[name](world, world.zero, held, 1.0, SCHEDULE)
    assert found.within.recovered.all()
    for delta in (found.delta, found.within.delta):
        assert ((delta @ (A + 2 * B + 2 * C)).abs() <= 1e-6).all()
    assert (found.norm >= torch.tensor([0.25, 0.5]) * (1 - 1e-5)).all()
    assert (found.norm <= torch.tensor([0.25, 0.5]) * 1.3).all()


def test_adam_is_another_way_up() -> None:
    world = landscape(half_space, 0.5, 1.0)
    by_adam = SOLVERS["adam"](world, world.zero, Anything(), 1.0, SCHEDULE).within
    assert torch.equal(
        by_adam.delta, find_perturbation(world, world.zero, Anything(), 1.0, SCHEDULE, rule=ProjectedAdam).delta
    )
    assert not torch.equal(by_adam.steps, SOLVERS["ascent"](world, world.zero, Anything(), 1.0, SCHEDULE).within.steps)


@pytest.mark.parametrize("name", SOLVERS)
def test_no_solver_needs_a_budget(name: str) -> None:
    world = landscape(half_space, 0.1, 0.3)
    found = SOLVERS[name](world, world.zero, Anything(), math.inf, SCHEDULE)
    assert found.within.recovered.all()
    assert (found.norm >= torch.tensor([0.1, 0.3]) / 8**0.5 * (1 - 1e-5)).all()


def test_a_flat_landscape_is_won_by_draws_alone() -> None:
    numbers = (1.2, 1.5)
    world = landscape(step, *numbers)
    found = worst(world, 2.0)
    assert found.winner == ("random",) * 2
    assert found.status == (Status.RECOVERED,) * 2
    for name in BY_GRADIENT:
        assert torch.isinf(found.by_solver[name]).all()
    known = torch.tensor(numbers)
    assert (found.norm >= known).all()
    assert (found.norm <= 1.05 * known).all()
    assert (world(found.smallest)[1] == 1).all()


def test_what_only_the_second_look_finds_counts_as_found_by_random() -> None:
    """No draw is made but those of `reexamined`; and it is walked as close as a draw would be."""
    world = landscape(step, 1.2)
    found = worst_case(world, world.zero, Anything(), 4.0, replace(SCHEDULE, restarts=0), BY_GRADIENT)
    assert found.status == (Status.RECOVERED,)
    assert found.winner == ("random",)
    assert 1.2 <= found.norm <= 1.15 * 1.2
    assert_close(found.norm, found.by_solver["random"])
    assert torch.isnan(found.draws_reached).all()


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_the_share_of_draws_is_that_of_the_sphere(share: float) -> None:
    """`(1 + u_0) / 2` of a uniform unit vector has a Beta distribution with both parameters `(d - 1) / 2`."""
    draws, held = 4000, NullSpace.of(torch.stack([B, C], dim=1))
    world = landscape(lambda x, at: x @ A - at, share * 3 - SCHEDULE.goal)
    found = random_draws(world, world.zero, held, 3.0, SCHEDULE, draws=draws)
    free = D - 2
    expected = float(beta.sf((1 + share) / 2, (free - 1) / 2, (free - 1) / 2))
    assert found.share is not None
    assert abs(float(found.share) - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


class Fused(torch.autograd.Function):
    """A value that no gradient may be asked of."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("a gradient was asked for")


def test_random_asks_for_no_gradients() -> None:
    fused = landscape(lambda x, at: Fused.apply(half_space(x, at)), 1.0, 1.5)  # type: ignore[no-untyped-call]
    with pytest.raises(AssertionError, match="a gradient"):
        SOLVERS["ascent"](fused, fused.zero, Anything(), 1.0, SCHEDULE)
    found = random_draws(fused, fused.zero, Anything(), 1.0, SCHEDULE)
    assert found.within.recovered.all()
    detached = landscape(lambda x, at: half_space(x.detach(), at), 1.0, 1.5)
    assert_close(random_draws(detached, detached.zero, Anything(), 1.0, SCHEDULE).delta, found.delta)


def test_the_norm_is_no_larger_than_any_solvers_and_ties_go_to_the_first() -> None:
    world = landscape(half_space, 0.5, 1.0, 1.5)
    found = worst(world, 1.0)
    assert list(found.by_solver) == list(SOLVERS)
    for norms in found.by_solver.values():
        assert (found.norm <= norms).all()
    assert_close(found.norm, torch.tensor([0.5, 1.0, 1.5]) / 8**0.5, rtol=1e-3, atol=0)
    assert found.winner == ("ascent",) * 3
    turned = worst(world, 1.0, solvers=dict(reversed(SOLVERS.items())))
    assert turned.winner == ("smallest_norm",) * 3


def test_what_is_within_a_hundredth_of_the_least_is_a_tie() -> None:
    world = landscape(half_space, 1.0, 1.0, 1.0)

    def claiming(*norms: float) -> Solver:
        def solver(*arguments: Any) -> Found:
            return replace(SOLVERS["ascent"](*arguments), norm=torch.tensor(norms))

        return solver

    found = worst(world, 1.0, solvers={"a": claiming(1.009, 1.011, math.inf), "b": claiming(1.0, 1.0, math.inf)})
    assert found.winner == ("a", "b", None)
    assert found.norm.tolist() == [1.0, 1.0, math.inf]


def test_what_another_solver_found_is_turned_closer() -> None:
    """Gradients lead to `x_0 = 4`. Where `x_1 > 0.9`, which only draws see, `x_1 + 0.3 x_2 = 1` is nearer: 0.958."""
    hidden = landscape(lambda x, at: torch.where(x @ B > 0.9, x @ B + 0.3 * (x @ C) - at, x @ A - 4), 1.0)
    found = worst(hidden, 2.0)
    assert found.winner == ("random",)
    assert_close(found.by_solver["smallest_norm"], torch.tensor([4.0]), rtol=1e-3, atol=0)
    assert found.by_solver["random"] > 1.01 * 1.09**-0.5
    assert_close(found.norm, torch.tensor([1.09**-0.5]), rtol=1e-3, atol=0)
    assert_close(size(found.smallest), found.norm)


def test_the_delta_within_the_budget_is_the_first_solvers_and_clear_of_the_edge() -> None:
    world = landscape(half_space, 0.5, 1.0)
    found, first = worst(world, 1.0), find_perturbation(world, world.zero, Anything(), 1.0, SCHEDULE)
    assert torch.equal(found.delta, first.delta)
    assert (found.slack >= SCHEDULE.goal).all()
    assert (found.steps > first.steps).all()  # those of Adam are counted too


def test_a_budget_too_small_leaves_the_norm_known() -> None:
    """Of the slack `2 (x_0 + x_1) - at` a budget of 0.3 gains `0.3 sqrt 8`."""
    world = landscape(half_space, 0.5, 1.0, 2.0)
    found = worst(world, 0.3)
    assert [status is Status.RECOVERED for status in found.status] == [True, False, False]
    assert_close(found.norm, torch.tensor([0.5, 1.0, 2.0]) / 8**0.5, rtol=1e-3, atol=0)
    assert found.unbounded.all()
    assert (size(found.delta) <= 0.3).all()
    assert_close(found.slack[1:], 0.3 * 8**0.5 - torch.tensor([1.0, 2.0]), rtol=1e-3, atol=1e-4)
    assert found.draws_reached[0] > 0
    assert not found.draws_reached[1:].any()


def test_where_the_norm_is_within_the_budget_the_delta_shows_it() -> None:
    """The goal of 0.02 is out of reach, the edge is not."""
    found = worst(landscape(lambda x, at: x @ A - at, 1.0), 1.01)
    assert found.norm <= 1.01
    assert found.status != (Status.RECOVERED,)
    assert_close(found.slack, torch.tensor([0.01]), rtol=0.01, atol=0)


def test_what_cannot_be_reached_is_infinite() -> None:
    world = landscape(lambda x, at: torch.tanh(x @ A) - at, 0.5, 2.0)
    found = worst(world, 1.0)
    assert_close(found.norm, torch.tensor([math.atanh(0.5), math.inf]), rtol=2e-3, atol=0)
    assert found.winner[1] is None
    assert found.unbounded.tolist() == [True, False]
    assert not found.smallest[1].any()
    assert worst(world, 1.0, Nothing()).status == (Status.NOTHING_ADMISSIBLE,) * 2
    assert worst(world, 1.0, NullSpace.of(A[:, None])).status == (Status.UNMOVED,) * 2


def test_where_nothing_is_admissible_no_draw_is_what_rounding_leaves() -> None:
    class Rounding(Nothing):
        def project(self, delta: Tensor) -> Tensor:
            return 1e-8 * delta

    world = landscape(half_space, 0.5)
    found = random_draws(world, world.zero, Rounding(), 1.0, SCHEDULE)
    assert found.share == 0
    assert not found.within.delta.any()


def test_what_shows_already_needs_nothing() -> None:
    found = worst(landscape(half_space, -1.0, 1.0), 1.0)
    assert_close(found.norm, torch.tensor([0.0, 8**-0.5]), rtol=1e-3, atol=0)
    assert all(norms[0] == 0 for norms in found.by_solver.values())
    assert not found.smallest[0].any()
    assert not found.delta[0].any()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_start_that_hides_the_behavior_is_not_where_it_is_asked_for(name: str) -> None:
    """It shows up to `x_0 = 2`, and the start is beyond, where it is flat."""
    world = landscape(lambda x, at: -step(x, at), 2.0)
    found = SOLVERS[name](world, 3 * A[None, None], Anything(), 3.0, replace(SCHEDULE, restarts=0))
    assert found.norm == 0
    assert not found.delta.any()


def test_values_that_are_not_finite_are_left_to_their_gate() -> None:
    found = worst(landscape(lambda x, at: x @ A - at.where(at < 1, torch.nan), 2.0, 0.5), 1.0)
    assert found.status == (Status.NON_FINITE, Status.RECOVERED)
    assert found.norm.tolist() == [math.inf, pytest.approx(0.5, rel=1e-3)]


def test_a_draw_may_solve_what_gradients_cannot_begin() -> None:
    """The slack at zero is not a number, so nothing is known of an edge; within the budget the behavior is back."""
    nowhere = landscape(lambda x, at: x @ A - at + 0 / x.norm(dim=1), 0.5)
    schedule = Schedule(restarts=0)
    assert find_perturbation(nowhere, nowhere.zero, Anything(), 1.0, schedule).status == (Status.NON_FINITE,)
    found = worst_case(nowhere, nowhere.zero, Anything(), 1.0, schedule)
    assert found.status == (Status.RECOVERED,)
    assert found.slack >= schedule.goal


def test_an_infinite_slack_is_no_success() -> None:
    endless = landscape(lambda x, at: (x @ A - at).where(x @ A < 0.1, torch.inf), 2.0)
    found = random_draws(endless, endless.zero, Anything(), 1.0, SCHEDULE)
    assert found.share == 0
    assert found.within.status == (Status.EXHAUSTED,)
    assert found.within.slack.isfinite()


def test_draws_are_held_against_a_gradient_that_leads_astray() -> None:
    """Stairs along `x_0`, of which the gradient sees but a faint slope along `x_1`; two probes see nothing of them."""
    stairs = landscape(lambda x, at: torch.floor(2 * x[:, 0]) / 2 - at + 1e-3 * x[:, 1], 50.0)
    first = find_perturbation(stairs, stairs.zero, Anything(), 2.0, replace(SCHEDULE, restarts=0))
    few = Effort(draws=2)
    drawn = Solution(2 * A[None, None], *stairs(2 * A[None, None]), torch.zeros(1).long(), (Status.EXHAUSTED,))
    alone = reexamined(stairs, first, Anything(), 2.0, SCHEDULE, few)
    assert alone.slack < drawn.slack
    again = reexamined(stairs, first, Anything(), 2.0, SCHEDULE, few, drawn)
    assert again.status == (Status.OUTDONE,)
    assert_close(again.slack, drawn.slack, rtol=0, atol=0.01)

    # A thousand draws see a step that the probes miss, and that only a few hundredths of a sphere lie beyond.
    hidden = landscape(lambda x, at: torch.floor(x[:, 0] / 1.3) - at + 1e-3 * x[:, 1], 50.0)
    assert worst(hidden, 2.0, solvers=BY_GRADIENT).status == (Status.STALLED,)
    found = worst(hidden, 2.0)
    assert found.status == (Status.OUTDONE,)
    assert found.slack > -49.1


def test_the_same_seed_gives_the_same_result_and_another_one_others() -> None:
    world = landscape(step, 1.2, 1.5)
    first = worst(world, 2.0)
    torch.rand(3)
    again = worst(world, 2.0)
    assert torch.equal(first.smallest, again.smallest)
    assert torch.equal(first.draws_reached, again.draws_reached)
    other = worst_case(world, world.zero, Anything(), 2.0, replace(SCHEDULE, seed=1))
    assert not torch.equal(first.draws_reached, other.draws_reached)


def test_each_example_has_draws_of_its_own_by_its_place_or_its_key() -> None:
    """With a few draws the best of four equal examples differ; the same key gives the same draws wherever it stands."""
    world = landscape(half_space, 9.0, 9.0, 9.0, 9.0)
    by_place = random_draws(world, world.zero, Anything(), 1.0, SCHEDULE, draws=6).within.delta
    for row in range(3):
        assert (by_place[row] - by_place[row + 1]).norm() > 0.1
    keyed = random_draws(world, world.zero, Anything(), 1.0, SCHEDULE, draws=6, keys=[2, 7, 2, 0]).within.delta
    assert torch.equal(keyed[0], keyed[2])
    assert_close(keyed[0], by_place[2])
    assert_close(keyed[3], by_place[0])
    assert (keyed[1] - keyed[0]).norm() > 0.1


def test_more_examples_explore_more() -> None:
    """A draw in fifty reaches the goal: with four draws each, some of sixty examples and not others."""
    world = landscape(lambda x, at: x @ A - at, *[0.55 - SCHEDULE.goal] * 60)
    reached = random_draws(world, world.zero, Anything(), 1.0, SCHEDULE, draws=4).share
    assert reached is not None
    assert 0 < int((reached > 0).sum()) < 30


def terrain(x: Tensor, at: Tensor) -> Tensor:
    """A step above 1, else a half space."""
    return torch.where(at > 1, step(x, at), x @ A + x @ B - at)


def test_an_example_is_solved_as_it_would_be_alone_and_in_any_order() -> None:
    """Each in an admissible set of its own, and with the draws of its own key."""

    def solvers(*rows: int) -> dict[str, Solver]:
        return {**SOLVERS, "random": partial(random_draws, keys=[10 * row for row in rows])}

    at = (0.5, 1.2, 0.9, 1.6, 8.0, 0.7)
    sets: list[Any] = [NullSpace.of(torch.eye(D)[:, n : n + 2] + 0.2 * (n % 3)) for n in range(1, 7)]
    together = worst(landscape(terrain, *at), 2.0, Own(tuple(sets)), solvers=solvers(*range(6)))
    order = [3, 0, 5, 1, 4, 2]
    turned = landscape(terrain, *(at[row] for row in order))
    shuffled = worst(turned, 2.0, Own(tuple(sets[row] for row in order)), solvers=solvers(*order))
    alone = [worst(landscape(terrain, at[row]), 2.0, own, solvers=solvers(row)) for row, own in enumerate(sets)]
    for place, row in enumerate(order):
        for other, index in ((shuffled, place), (alone[row], 0)):
            assert other.winner[index] == together.winner[row]
            assert other.status[index] is together.status[row]
            assert other.draws_reached[index] == together.draws_reached[row]
            assert_close(other.norm[index], together.norm[row], rtol=1e-4, atol=0)
            assert_close(other.delta[index], together.delta[row], rtol=1e-4, atol=1e-4)
    for row, own in enumerate(sets):
        for delta in (together.delta[row : row + 1], together.smallest[row : row + 1]):
            assert_close(delta, own.project(delta), rtol=0, atol=1e-5)


@dataclass(frozen=True, eq=False)
class Watched(Landscape):
    """Counts how many examples are asked about."""

    sizes: list[int] = field(default_factory=list)

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        self.sizes.append(len(delta))
        return super().__call__(delta)

    def select(self, rows: Tensor) -> Watched:
        return Watched(self.slack, self.numbers[rows], self.sizes)


def test_adam_retires_what_reached_the_goal() -> None:
    watched = Watched(lambda x, at: x @ A - at, torch.tensor([0.02, 0.5, 9.0]))
    found = recover_with_adam(watched, 1.0)
    assert found.recovered.tolist() == [True, True, False]
    assert watched.sizes == sorted(watched.sizes, reverse=True)
    assert set(watched.sizes) == {3, 2, 1}
    assert found.steps[0] < found.steps[1] < found.steps[2] == 40
    assert_close(found.slack[2], torch.tensor(-8.0), rtol=1e-3, atol=0)


def recover_with_adam(objective: Any, budget: float) -> Solution:
    return find_perturbation(objective, objective.zero, Anything(), budget, Schedule(restarts=0), rule=ProjectedAdam)


def test_adam_tells_what_stopped_it() -> None:
    assert recover_with_adam(landscape(step, 1.0), 2.0).status == (Status.NO_GRADIENT,)
    assert recover_with_adam(landscape(lambda x, at: x[:, 0] * torch.nan, 1.0), 2.0).status == (Status.NON_FINITE,)
    cliff = recover_with_adam(landscape(lambda x, at: (x @ A - at).where(x @ A < 0.3, torch.nan), 1.0), 2.0)
    assert cliff.status == (Status.EXHAUSTED,)
    assert -1 < cliff.slack < -0.7
    assert cliff.steps < 40


def test_adam_does_not_care_for_units_nor_for_how_faint_a_gradient_is() -> None:
    """The score in another unit, to where squares of gradients vanish, and the residual in another."""

    def path(unit: float, faint: float) -> Tensor:
        def slack(x: Tensor, at: Tensor) -> Tensor:
            walked.append(x.detach() / unit)
            return Claimed.apply(0 * x[:, 0] - at, faint * torch.tanh((x @ A + 2 * x @ B) / unit))  # type: ignore[no-untyped-call, no-any-return]

        walked: list[Tensor] = []
        recover_with_adam(landscape(slack, 5.0), unit)
        return torch.cat(walked)

    one = path(1.0, 1.0)
    assert_close(path(8.0, 1.0), one, rtol=1e-5, atol=1e-6)
    assert_close(path(1.0, 1e-30), one, rtol=1e-4, atol=1e-5)
    assert_close(one[1].norm(), torch.tensor(0.1))
    assert_close(one[1, 0], one[1, 1], rtol=0.05, atol=0)  # a step of its own for each coordinate
    assert 0.9 <= one[-1].norm() <= 1


@pytest.mark.parametrize(
    ("slack", "most"),
    [
        (half_space, 10),
        (lambda x, at: torch.tanh(x @ A) - torch.tanh(at), 11),
        (lambda x, at: (x @ A) ** 5 - at**5, 16 + 3),
        (step, 16 + 3),
        (lambda x, at: torch.where(x @ A > at, 1e6, -1e-6), 16 + 3),
    ],
    ids=["straight", "bent", "sharply bent", "step", "uneven step"],
)
def test_an_edge_takes_few_points(slack: Any, most: int) -> None:
    """To within `2^-16` of the ray; those at its ends are counted."""
    for at in (0.001, 0.1, 0.7, 1.1, 1.9, 1.999):
        watched = Watched(slack, torch.tensor([at]))
        share = float(edge(watched, 2 * A[None, None], 0.0).norm()) / 2
        known = at / 4 if slack is half_space else at / 2
        assert -1e-6 <= share - known <= 2.0**-16 + 1e-6
        assert len(watched.sizes) <= most


def test_unusable_input_is_refused() -> None:
    world = landscape(half_space, 1.0)
    for budget in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="budget"):
            worst(world, budget, solvers={"random": SOLVERS["random"]})
    with pytest.raises(InputError, match="0 solvers"):
        worst(world, 1.0, solvers={})


def test_it_says_how_far_it_is_after_each_solver() -> None:
    said: list[tuple[str, int]] = []
    worst(landscape(terrain, 0.5, 1.2, 8.0), 2.0, on_solver=lambda name, left: said.append((name, left)))
    assert said == [("ascent", 2), ("adam", 2), ("surrogate", 2), ("smallest_norm", 2), ("random", 1)]


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "complete_bottleneck"])
def test_planted_worlds_have_the_smallest_norm_of_their_closed_form(kind: str) -> None:
    """Within 1 %; where gradients lie, within a fifth, found by draws, and nothing that is there is missed."""
    world, solvers = KINDS[kind](0), SOLVERS
    target = defend(world.model, world.defense, world.examples.prompts, world.examples.behavior)
    held = world.admissible if len(world.defense.sites) > 1 else EncoderOrthogonal.of(*world.defense.clamps)
    found = worst_case(target, target.zero_delta, held, world.budget, solvers=solvers)
    assert world.smallest_norm is not None
    known = world.smallest_norm
    assert_close(found.norm, known, rtol=0.2 if kind == "hard_readout" else 0.01, atol=0)
    assert [status is Status.RECOVERED for status in found.status] == torch.isfinite(known).tolist()
