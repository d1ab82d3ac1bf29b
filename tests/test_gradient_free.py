"""The second opinion, on landscapes where it is plain what should be said."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from recover.numerics.subspaces import NullSpace
from recover.search.ascent import Schedule, Solution, Status, find_perturbation
from recover.search.gradient_free import projected, reexamined
from tests.landscapes import Anything, Claimed, D, Landscape, Nothing, Own, landscape

STEPS = Schedule(steps=30)


def second(objective: Landscape, budget: float, feasible: Any = None) -> tuple[Solution, Solution]:
    feasible = feasible or Anything()
    first = find_perturbation(objective, objective.zero, feasible, budget, STEPS)
    return first, reexamined(objective, first, feasible, budget, STEPS)


def step(x: Tensor, at: Tensor) -> Tensor:
    """-1 up to `x_0 = at`, 1 beyond."""
    return torch.sign(x[:, 0] - at) + 0 * x.sum(dim=1)


def linear(x: Tensor, at: Tensor) -> Tensor:
    return x[:, 0] - at


def test_a_step_within_the_budget_is_climbed() -> None:
    at = (1.2, 1.5, 1.8)
    first, again = second(landscape(step, *at), 2.0)
    assert first.status == (Status.NO_GRADIENT,) * 3
    assert again.status == (Status.RECOVERED,) * 3
    lengths = again.delta.flatten(1).norm(dim=1)
    assert (lengths <= 2.0).all()
    assert (again.delta[:, 0, 0] >= torch.tensor(at)).all()
    assert (again.slack == 1).all()
    assert (again.score == 1).all()


def test_a_step_beyond_the_budget_is_no_answer() -> None:
    _, again = second(landscape(step, 8.0), 2.0)
    assert again.status == (Status.NO_GRADIENT,)


def test_what_nothing_moves_is_an_answer() -> None:
    for constant in (lambda x, at: -at + 0 * x.sum(dim=1), lambda x, at: -at + x[:, 0]):
        _, again = second(landscape(constant, 1.0, 3.0), 5.0, NullSpace.of(torch.eye(D)[:, :1]))
        assert again.status == (Status.UNMOVED,) * 2


def test_no_direction_at_all_is_an_answer() -> None:
    _, again = second(landscape(linear, 1.0), 5.0, Nothing())
    assert again.status == (Status.NOTHING_ADMISSIBLE,)
    assert not again.delta.any()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize(
    "slack",
    [
        linear,
        lambda x, at: torch.tanh(x[:, 0]) - torch.tanh(at),
        lambda x, at: torch.nn.functional.softplus(x[:, 0]) - torch.nn.functional.softplus(at),
        lambda x, at: torch.minimum(x[:, 0] - at, 3 * x[:, 0] - 3 * at),
        lambda x, at: at / 2 - (x - at[:, None] * 1.5 * torch.eye(D)[0]).norm(dim=1),
    ],
    ids=["linear", "concave", "convex", "kink", "ball"],
)
def test_a_healthy_search_that_falls_short_stays_believed(slack: Any, share: float) -> None:
    """The goal is at norm `at`, and the budget is a share of it."""
    _, again = second(landscape(slack, 1.5), share * 1.5)
    assert again.status[0] in (Status.STALLED, Status.EXHAUSTED)
    assert (again.slack < 0).all()


def test_a_gradient_that_claims_the_opposite_is_found_out() -> None:
    reverse = landscape(lambda x, at: Claimed.apply(x[:, 0] - at, -x[:, 0]), 3.0)  # type: ignore[no-untyped-call]
    first, again = second(reverse, 1.0)
    assert first.status != (Status.NO_GRADIENT,)
    assert again.status[0] in (Status.MISLED, Status.OUTDONE)
    _, reached = second(reverse, 5.0)
    assert reached.status == (Status.RECOVERED,)


def test_a_slope_that_is_only_claimed_is_found_out() -> None:
    """Flat as far as the budget goes and twice as far again, while the gradient claims a way up."""
    plateau = landscape(lambda x, at: Claimed.apply((x[:, 0] - at).clamp(min=-1), x[:, 1]), 6.0)  # type: ignore[no-untyped-call]
    assert second(plateau, 1.0)[1].status == (Status.MISLED,)


def test_a_jump_that_slopes_do_not_account_for_is_found_out() -> None:
    """A faint slope leads along `x_1`; the jump is at `x_0 = 2.2`, a little outside the budget."""
    cliff = landscape(lambda x, at: torch.sign(x[:, 0] - at) + 0.01 * x[:, 1], 2.2)
    assert second(cliff, 2.0)[1].status == (Status.MISLED,)
    assert second(cliff, 3.0)[1].status == (Status.RECOVERED,)


def test_a_random_draw_that_does_better_is_found_out() -> None:
    """Stairs along `x_0`, of which the gradient sees nothing but a faint slope along `x_1`."""
    stairs = landscape(lambda x, at: torch.floor(4 * x[:, 0]) / 4 - at + 1e-3 * x[:, 1], 50.0)
    first, again = second(stairs, 2.0)
    assert again.status == (Status.OUTDONE,)
    assert (again.slack >= first.slack + 0.25 - 1e-6).all()


def test_what_is_solved_is_left_alone_and_nothing_gets_worse() -> None:
    mixed = landscape(lambda x, at: torch.where(at > 1.2, torch.sign(x[:, 0] - at), x[:, 0] - at), 0.5, 1.5, 0.8, 8.0)
    first, again = second(mixed, 2.0)
    assert [s is Status.RECOVERED for s in first.status] == [True, False, True, False]
    for row in (0, 2):
        assert torch.equal(again.delta[row], first.delta[row])
    assert (again.slack >= first.slack).all()
    assert again.status == (Status.RECOVERED, Status.RECOVERED, Status.RECOVERED, Status.NO_GRADIENT)
    assert torch.equal(again.steps, first.steps)


def test_an_example_is_judged_as_it_would_be_alone() -> None:
    at = (0.5, 1.2, 1.6, 8.0)
    together = second(landscape(step, *at), 2.0)[1]
    for row, one in enumerate(at):
        alone = second(landscape(step, one), 2.0)[1]
        assert alone.status[0] is together.status[row]
        torch.testing.assert_close(alone.delta[0], together.delta[row])


def test_deltas_stay_admissible_and_within_the_budget() -> None:
    tilted = NullSpace.of(torch.eye(D)[:, :3] + 0.2)
    for budget in (1.0, 2.0, 4.0):
        _, again = second(landscape(step, 0.5, 1.0, 2.0), budget, tilted)
        torch.testing.assert_close(again.delta, tilted.project(again.delta), atol=1e-5, rtol=0)
        assert (again.delta.flatten(1).norm(dim=1) <= budget).all()


def test_each_example_keeps_to_its_own_space_and_is_judged_in_it() -> None:
    """Steps at `x_0 = at`, a slope, and ramps; where `x_0` is held nothing matters, and one is left no direction."""

    def terrain(x: Tensor, at: Tensor) -> Tensor:
        step, slope, ramp = torch.sign(x[:, 0] - at) + 0 * x.sum(dim=1), x[:, 0] + x[:, 1], (x[:, 0] - 1).relu()
        return torch.where(at < 0, slope + at, torch.where(at < 100, step, ramp - (at - 100)))

    at = (1.9, 1.8, 1.9, 1.9, -9.0, 8.0, 1.0, 100.7, 100.7)
    tilted = [NullSpace.of(torch.eye(D)[:, n : n + 2] + 0.2 * (n % 3)) for n in range(1, 8)]
    blind = NullSpace.of(torch.eye(D)[:, :1])
    sets: list[Any] = [*tilted[:2], blind, Nothing(), *tilted[2:4], Anything(), *tilted[4:6]]
    first, again = second(landscape(terrain, *at), 2.0, Own(tuple(sets)))
    assert again.status == (
        Status.RECOVERED,
        Status.RECOVERED,
        Status.UNMOVED,
        Status.NOTHING_ADMISSIBLE,
        first.status[4],
        Status.NO_GRADIENT,
        *(Status.RECOVERED,) * 3,
    )
    assert first.status[4] is Status.STALLED
    for row, own in enumerate(sets):
        here = again.delta[row : row + 1]
        torch.testing.assert_close(here, own.project(here), atol=1e-5, rtol=0)
        assert here.norm() <= 2.0
        alone = second(landscape(terrain, at[row]), 2.0, own)[1]
        assert alone.status[0] is again.status[row]
        torch.testing.assert_close(alone.delta, here, atol=1e-4, rtol=1e-4)
    assert (again.delta[1] - tilted[0].project(again.delta[1])).norm() > 0.1


def test_a_set_that_is_the_same_for_all_is_projected_onto_once() -> None:
    """The draws of all examples are then one; where each has its own set, they are projected for each."""
    sizes: list[int] = []

    class Counted(Anything):
        def project(self, delta: Tensor) -> Tensor:
            sizes.append(len(delta))
            return delta

    for feasible, expected in ((Counted(), 64), (Own((Counted(),) * 5), 64 * 5)):
        sizes.clear()
        directions = projected(feasible, torch.randn(64, 1, D).expand(5, 64, 1, D))
        assert sum(sizes) == expected
        assert torch.equal(directions[0], directions[4])


def test_without_a_budget_any_length_will_do() -> None:
    _, again = second(landscape(step, 3.0), math.inf)
    assert again.status == (Status.RECOVERED,)


def test_values_that_are_not_finite_are_left_to_their_gate() -> None:
    broken = landscape(lambda x, at: x[:, 0] * torch.nan, 1.0)
    first, again = second(broken, 2.0)
    assert first.status == again.status == (Status.NON_FINITE,)


class Seen(Landscape):
    """A landscape that also tells `x_3` of what is computed downstream, and constants beside it."""

    def select(self, rows: Tensor) -> Landscape:
        return Seen(self.slack, self.numbers[rows])

    def downstream(self, delta: Tensor) -> Tensor:
        return torch.stack([torch.full_like(delta[:, 0, 0], 7.0), delta[:, 0, 3]], dim=1)


def test_unmoved_is_said_only_where_nothing_downstream_moves() -> None:
    """The score follows nothing that is drawn; downstream `x_3` moves, unless it is held too."""
    still = Seen(lambda x, at: -at + 0 * x.sum(dim=1), torch.tensor([1.0, 3.0]))
    assert second(still, 5.0)[1].status == (Status.UNREAD,) * 2
    assert second(still, 5.0, NullSpace.of(torch.eye(D)[:, 3:4]))[1].status == (Status.UNMOVED,) * 2
    moved = Seen(lambda x, at: torch.tanh(x[:, 0]) - at, torch.tensor([3.0, 4.0]))
    assert Status.UNREAD not in second(moved, 5.0)[1].status
