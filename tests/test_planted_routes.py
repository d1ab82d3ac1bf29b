"""Planted routes open at their closed-form norm and nowhere closer; the search is asked for them, and says so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from scipy.optimize import NonlinearConstraint, minimize
from torch import Tensor
from torch.testing import assert_close

from recover.numerics.subspaces import NullSpace
from recover.search.ascent import Schedule
from recover.search.planted_routes import ROUTE_KINDS, UNITS, Route, Routed, RouteKind, plant, routes_found
from recover.search.solvers import SOLVERS, Solver, random_draws
from recover.search.surrogate import Surrogate
from tests.landscapes import Anything, Landscape, landscape

WIDTH, NORM = 40, 3.0
HELD = NullSpace.of(torch.randn(WIDTH, 6, generator=torch.Generator().manual_seed(1)))


def planted(kind: RouteKind, n: int = 4, held: NullSpace = HELD) -> Route:
    heights = torch.linspace(0.5, 2.0, n)
    return plant(
        kind,
        torch.zeros(n, 1, WIDTH),
        held,
        seeds=range(n),
        size=lambda direction: torch.full((n,), NORM),
        height=heights,
    )


@dataclass(frozen=True, eq=False)
class Slope:
    """A line along the first axis that reaches the goal at `far`."""

    far: Tensor

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        value = delta[:, 0, 0] / self.far - 1
        return value, value

    def select(self, rows: Tensor) -> Slope:
        return Slope(self.far[rows])


@pytest.mark.parametrize("kind", ROUTE_KINDS)
def test_a_route_opens_at_its_nearest_point_whose_norm_is_the_closed_form(kind: RouteKind) -> None:
    route = planted(kind)
    assert_close(route.point.flatten(1).norm(dim=1), torch.full((4,), NORM))
    assert_close(HELD.project(route.point), route.point, atol=1e-5, rtol=0)
    assert (route.slack(route.point * (1 + 1e-4)) > 0).all()
    assert (route.slack(route.point * (1 - 1e-4)) < 0).all()
    assert_close(route.slack(torch.zeros(4, 1, WIDTH)), -route.height)


@pytest.mark.parametrize("kind", ROUTE_KINDS)
def test_no_point_that_is_closer_opens_it_as_another_solver_has_it(kind: RouteKind) -> None:
    """SLSQP in the coordinates along the axes, from points that open it, where it is at most the nearest."""
    route = planted(kind, 2).select(torch.tensor([1]))
    axes = route.axes[0, : int(route.units), 0].double()
    m = len(axes)
    exact = Route(kind, axes[None, :, None], route.norm.double(), route.height.double())

    def slack(x: object) -> float:
        return float(exact.slack((torch.as_tensor(x) @ axes)[None, None]))

    nearest = []
    for seed in range(6):
        noise = 0.005 * torch.randn(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        start = (NORM * 1.02 / m**0.5) * (1 + noise)
        found = minimize(
            lambda x: float(x @ x), start.numpy(), constraints=NonlinearConstraint(slack, 0.0, float("inf"))
        )
        if slack(found.x) >= -1e-6:
            nearest.append(found.fun**0.5)
    assert nearest
    assert min(nearest) == pytest.approx(NORM, rel=1e-3)


def test_no_unit_of_a_conjunction_can_be_spared() -> None:
    """At twice the norm with all units but one: closed, whichever is left out."""
    route = planted("conjunction", 6)
    assert set(route.units.tolist()) == set(map(float, UNITS))
    for row, units in enumerate(route.units.long().tolist()):
        for spared in range(units):
            weights = torch.ones(units)
            weights[spared] = 0.0
            delta = 2 * NORM / units**0.5 * torch.einsum("u,upd->pd", weights, route.axes[row, :units])[None]
            assert route.select(torch.tensor([row])).slack(delta) < 0


@pytest.mark.parametrize("kind", ["rectified", "conjunction", "narrow"])
def test_where_a_route_is_off_it_has_no_gradient_and_rectifiers_leak(kind: RouteKind) -> None:
    route, start = planted(kind), torch.zeros(4, 1, WIDTH, requires_grad=True)
    flat = landscape(lambda x, at: -at + 0 * x.sum(dim=1), 1.0, 1.0, 1.0, 1.0)
    routed = Routed(flat, route)
    for value in routed(start):
        assert not torch.autograd.grad(value.sum(), start, retain_graph=True)[0].any()
    leaked = torch.autograd.grad(Surrogate(routed)(start)[0].sum(), start)[0]
    assert bool(leaked.any()) is (kind != "narrow")


def test_together_the_behavior_shows_where_either_does() -> None:
    route = planted("rectified")
    routed = Routed(Slope(torch.full((4,), 5.0)), route)
    along = torch.zeros(4, 1, WIDTH)
    along[:, 0, 0] = 5.1
    along = along - torch.einsum("bupd,bpd->bu", route.axes[:, :1], along)[:, :, None] * route.axes[:, 0]
    along[:, 0, 0] += 0.5
    assert (routed.objective(along)[1] > 0).tolist() == (routed(along)[1] > 0).tolist()
    assert (routed(route.point * 1.01)[1] > 0).all()
    assert_close(routed(torch.zeros(4, 1, WIDTH))[0], -torch.ones(4))
    part = torch.tensor([2, 2, 0])
    assert_close(routed.select(part)(route.point[part])[1], routed(route.point)[1][part])


def test_a_space_with_fewer_directions_has_as_many_units() -> None:
    narrow = NullSpace.of(torch.eye(WIDTH)[:, 3:])
    route = planted("conjunction", 3, narrow)
    assert route.units.tolist() == [3.0] * 3
    gram = torch.einsum("bupd,bvpd->buv", route.axes[:, :3], route.axes[:, :3])
    assert_close(gram, torch.eye(3).expand(3, 3, 3), atol=1e-5, rtol=0)
    assert (route.slack(route.point * 1.001) > 0).all()


def test_routes_follow_from_their_seeds_alone() -> None:
    whole = planted("conjunction", 4)
    one = plant(
        "conjunction", torch.zeros(1, 1, WIDTH), HELD, seeds=[2], size=lambda _: torch.ones(1), height=torch.ones(1)
    )
    assert_close(one.axes[0], whole.axes[2], atol=1e-5, rtol=0)
    assert (whole.axes[0] - whole.axes[2]).norm() > 1


def found(kind: RouteKind, objective: Landscape | Slope, names: list[str]) -> int:
    """How many of four such routes at 0.75 of the budget these solvers find."""
    n, schedule = 4, Schedule(steps=60)
    route = plant(
        kind,
        torch.zeros(n, 1, WIDTH),
        HELD,
        seeds=range(100, 100 + n),
        size=lambda _: torch.full((n,), NORM),
        height=torch.ones(n),
    )
    solvers: dict[str, Solver] = {name: SOLVERS[name] for name in names}
    if "random" in solvers:
        solvers["random"] = partial(random_draws, draws=100)
    best = routes_found(
        Routed(objective, route), torch.zeros(n, 1, WIDTH), HELD, NORM / 0.75, schedule, lambda rows: solvers
    )
    assert (best.delta.flatten(1).norm(dim=1) <= NORM / 0.75).all()
    return int((route.slack(best.delta) > 0).sum())


def test_beside_a_slope_that_leads_elsewhere_all_but_narrow_routes_are_found() -> None:
    """And without gradients that leak no conjunction is."""
    slope = Slope(torch.full((4,), 4.5))
    for kind in ("linear", "rectified", "conjunction"):
        assert found(kind, slope, list(SOLVERS)) == 4
    assert found("narrow", slope, list(SOLVERS)) == 0
    blind = [name for name in SOLVERS if name != "surrogate"]
    assert found("conjunction", slope, blind) == 0
    assert found("linear", slope, blind) == 4


def test_a_solver_is_asked_for_what_is_left_alone() -> None:
    asked: list[tuple[str, int]] = []

    def told(name: str) -> Solver:
        def solver(objective, start, *rest, **named):  # type: ignore[no-untyped-def]
            asked.append((name, len(start)))
            return SOLVERS[name](objective, start, *rest, **named)

        return solver

    flat = landscape(lambda x, at: -at + 0 * x.sum(dim=1), *[1.0] * 4)
    linear = planted("linear")
    zero = torch.zeros(4, 1, WIDTH)
    routes_found(
        Routed(flat, linear), zero, HELD, 4.0, Schedule(), lambda _: {"ascent": told("ascent"), "adam": told("adam")}
    )
    assert asked == [("ascent", 4)]
    asked.clear()
    mixed = Routed(flat, replace(linear, norm=torch.tensor([3.0, 9.0, 3.0, 9.0])))
    routes_found(mixed, zero, HELD, 4.0, Schedule(), lambda _: {"ascent": told("ascent"), "adam": told("adam")})
    assert asked == [("ascent", 4), ("adam", 2)]


def test_anything_goes_without_a_constraint() -> None:
    route = plant(
        "linear", torch.zeros(2, 3, 5), Anything(), seeds=[0, 1], size=lambda _: torch.ones(2), height=torch.ones(2)
    )
    assert route.point.shape == (2, 3, 5)
    assert_close(route.point.flatten(1).norm(dim=1), torch.ones(2))
