"""Searches past flat pieces: values stay, gradients leak, and what no gradient shows is found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from recover.search.ascent import Schedule, Status, find_perturbation
from recover.search.solvers import SOLVERS, worst_case
from recover.search.surrogate import LEAK, Leaking, Momentum, Surrogate
from tests.landscapes import Anything

UNITS, KNEE = 8, 0.2
BY_TRUE_GRADIENT = [name for name in SOLVERS if name not in ("surrogate", "random")]


@dataclass(frozen=True, eq=False)
class Conjunction:
    """Opens where eight orthonormal units pass their knees by 0.8 together, 0.11 each at most: at `0.3 sqrt 8`."""

    units: Tensor

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        on = torch.relu(delta[:, 0] @ self.units - KNEE).clamp(max=0.11)
        value = torch.relu(on.sum(dim=1) - 0.7) - 0.1
        return value, value

    def select(self, rows: Tensor) -> Conjunction:
        return self


@dataclass(frozen=True, eq=False)
class DeadUnit:
    """One of 2,048 dead units opens at a norm of 0.77; a line along the last axis leads there at 3."""

    rows: Tensor
    weights: Tensor

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        x = delta[:, 0]
        value = x[:, -1] / 3 - 1 + F.relu(x @ self.rows.T - 0.7) @ self.weights
        return value, value

    def select(self, rows: Tensor) -> DeadUnit:
        return self


def orthonormal(d: int, n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, n, generator=torch.Generator().manual_seed(seed))).Q


FLAT = {
    "relu": (torch.relu, [0.0, 0.5, 3.0], [LEAK, 1.0, 1.0]),
    "module": (nn.ReLU(), [0.0, 0.5, 3.0], [LEAK, 1.0, 1.0]),
    "method": (lambda x: x.relu(), [0.0, 0.5, 3.0], [LEAK, 1.0, 1.0]),
    "clamp": (lambda x: x.clamp(0.0, 1.0), [0.0, 0.5, 1.0], [LEAK, 1.0, LEAK]),
    "lower": (lambda x: torch.clamp(x, min=0.0), [0.0, 0.5, 3.0], [LEAK, 1.0, 1.0]),
    "hardtanh": (nn.Hardtanh(0.0, 1.0), [0.0, 0.5, 1.0], [LEAK, 1.0, LEAK]),
    "sign": (torch.sign, [-1.0, 1.0, 1.0], [LEAK, LEAK, LEAK]),
    "another": (torch.tanh, [math.tanh(x) for x in (-1, 0.5, 3)], [1 - math.tanh(x) ** 2 for x in (-1, 0.5, 3)]),
}


@pytest.mark.parametrize("name", FLAT)
def test_values_stay_and_a_share_of_the_gradient_passes_where_a_piece_is_flat(name: str) -> None:
    function, values, slopes = FLAT[name]
    x = torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
    with Leaking():
        y = function(x)  # type: ignore[operator]
    assert_close(y.detach(), torch.tensor(values))
    assert_close(torch.autograd.grad(y.sum(), x)[0], torch.tensor(slopes))
    plain = function(x)  # type: ignore[operator]
    assert_close(plain.detach(), y.detach())


@pytest.mark.parametrize("seed", range(3))
def test_a_conjunction_of_inactive_units_is_found_at_its_closed_form(seed: int) -> None:
    world, start = Conjunction(orthonormal(200, UNITS, seed)), torch.zeros(2, 1, 200)
    known = 0.3 * UNITS**0.5
    blind = find_perturbation(world, start, Anything(), known / 0.77)
    assert blind.status == (Status.NO_GRADIENT,) * 2
    found = worst_case(world, start, Anything(), known / 0.77, Schedule())
    assert found.status == (Status.RECOVERED,) * 2
    assert_close(found.norm, torch.full((2,), known), rtol=0.05, atol=0.0)
    assert (found.norm >= known * (1 - 1e-4)).all()


@pytest.mark.parametrize("seed", range(3))
def test_one_dead_unit_beside_a_far_line_is_found_within_the_budget(seed: int) -> None:
    """What follows true gradients ends at 3, which is beyond the budget."""
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(2048, 64, generator=generator), dim=1)
    weights = torch.zeros(2048)
    weights[7] = 1 / 0.07
    rows[:, -1] = 0.0
    world, start = DeadUnit(F.normalize(rows, dim=1), weights), torch.zeros(1, 1, 64)
    found = worst_case(world, start, Anything(), 1.0, Schedule())
    for name in BY_TRUE_GRADIENT:
        assert float(found.by_solver[name]) > 2.9
    assert float(found.by_solver["surrogate"]) <= 1.0
    assert found.status == (Status.RECOVERED,)
    assert float(found.norm) == pytest.approx(0.77, rel=0.05)


def test_momentum_goes_straight_where_the_gradient_does_not_turn() -> None:
    """A plane: every step lies along its normal, within the budget."""
    normal = torch.tensor([3.0, 4.0, 0.0]) / 5

    class Plane:
        def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
            value = delta[:, 0] @ normal - 1.0
            return value, value

        def select(self, rows: Tensor) -> Plane:
            return self

    found = find_perturbation(Surrogate(Plane()), torch.zeros(1, 1, 3), Anything(), 1.5, rule=Momentum)
    assert found.recovered.all()
    assert_close(F.normalize(found.delta[0, 0], dim=0), normal)
    assert float(found.delta.norm()) <= 1.5
