"""Smallest norms, where geometry gives them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from recover.numerics.subspaces import NullSpace
from recover.search.ascent import Schedule
from recover.search.minimum import closer, edge, smallest_perturbation
from tests.landscapes import Anything, D, Nothing, Own, landscape

A, B, C = torch.eye(D)[:3]


@pytest.mark.parametrize(
    ("slack", "norm"),
    [
        (lambda x, at: 2 * (x @ (A + B)) - at, lambda at: at / 8**0.5),
        (lambda x, at: (x @ A) ** 3 + 0.1 * (x @ A) - at**3 - 0.1 * at, lambda at: at),
        (lambda x, at: at / 2 - (x - at[:, None] * (A + B)).norm(dim=1), lambda at: at * (2**0.5 - 0.5)),
        (lambda x, at: x @ A + 0.2 * (x @ B) ** 2 - at, lambda at: at),
        (lambda x, at: torch.tanh(x @ A) - torch.tanh(x @ B + at), lambda at: at / 2**0.5),
    ],
    ids=["half space", "monotone", "ball", "parabola", "two squashed"],
)
def test_the_nearest_point_of_a_smooth_edge(slack: Any, norm: Any) -> None:
    """Parabola: on `x = at - 0.2 y^2` the squared distance to 0 is least at `y = 0` as long as `at <= 2.5`."""
    numbers = (0.3, 1.0, 2.0)
    world = landscape(slack, *numbers)
    found = smallest_perturbation(world, world.zero, Anything())
    assert_close(found.norm, torch.tensor([norm(at) for at in numbers]), rtol=2e-3, atol=0)
    assert_close(found.delta.flatten(1).norm(dim=1), found.norm)
    assert (world(found.delta)[1] > 0).all()


def test_within_a_constraint() -> None:
    """Of the normal (1, 1, 1) the constraint leaves (0, 1, 1): `x.u = at` is met at `at / sqrt 2`."""
    world = landscape(lambda x, at: x @ (A + B + C) - at, 1.0, 3.0)
    found = smallest_perturbation(world, world.zero, NullSpace.of(A[:, None]))
    assert_close(found.norm, torch.tensor([1.0, 3.0]) / 2**0.5, rtol=1e-3, atol=0)
    assert found.delta[:, 0, 0].abs().max() < 1e-6


def test_within_constraints_that_differ() -> None:
    """Of the normal (1, 1, 1) each constraint leaves another part: none, three, two, or one of its entries."""
    world = landscape(lambda x, at: x @ (A + B + C) - at, 1.0, 3.0, 3.0, 2.0, 5.0)
    axes = torch.eye(D)
    held = (axes[:0], axes[:1], axes[1:2], axes[1:3])
    found = smallest_perturbation(world, world.zero, Own((Nothing(), *(NullSpace.of(some.T) for some in held))))
    assert_close(found.norm, torch.tensor([torch.inf, 3 / 3**0.5, 3 / 2**0.5, 2 / 2**0.5, 5.0]), rtol=1e-3, atol=0)
    assert not found.delta[0].any()
    for delta, some in zip(found.delta[1:], held, strict=True):
        assert (delta[0] @ some.T).abs().sum() < 1e-6


def test_a_corner_is_not_missed_by_much() -> None:
    """Both halves are needed: the nearest point is (1, 1), where the edge has no normal."""
    world = landscape(lambda x, at: torch.minimum(x @ A, x @ B) - at, 1.0)
    found = smallest_perturbation(world, world.zero, Anything())
    assert_close(found.norm, torch.tensor([2**0.5]), rtol=0.01, atol=0)


def test_what_cannot_be_reached_is_infinite() -> None:
    world = landscape(lambda x, at: torch.tanh(x @ A) - at, 0.5, 2.0)
    found = smallest_perturbation(world, world.zero, Anything())
    assert_close(found.norm, torch.tensor([math.atanh(0.5), math.inf]), rtol=2e-3, atol=0)
    assert not found.delta[1].any()
    closed = smallest_perturbation(world, world.zero, Nothing())
    assert torch.isinf(closed.norm).all()


def test_what_shows_already_needs_nothing() -> None:
    world = landscape(lambda x, at: x @ A - at, -1.0, 1.0)
    found = smallest_perturbation(world, world.zero, Anything())
    assert_close(found.norm, torch.tensor([0.0, 1.0]), rtol=1e-3, atol=0)
    assert not found.delta[0].any()


def test_a_score_that_leads_astray_is_not_the_only_guide() -> None:
    """The score falls along the way on which the slack rises."""

    class Astray:
        zero = torch.zeros(1, 1, D)

        def __call__(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return delta[:, 0] @ B - delta[:, 0] @ A, delta[:, 0] @ A - 1

        def select(self, rows: torch.Tensor) -> Astray:
            return self

    found = smallest_perturbation(Astray(), Astray.zero, Anything(), Schedule(steps=30))
    assert_close(found.norm, torch.ones(1), rtol=1e-3, atol=0)


def test_edge_by_hand() -> None:
    """On the ray to (6, 8) the half space `x >= 3` begins at (3, 4)."""
    world = landscape(lambda x, at: x @ A - at, 3.0)
    outer = (6 * A + 8 * B)[None, None]
    assert_close(edge(world, outer, 0.0), (3 * A + 4 * B)[None, None], rtol=1e-4, atol=0)
    assert world(edge(world, outer, 0.0))[1] >= 0


def test_closer_turns_as_far_as_helps_and_never_away() -> None:
    world = landscape(lambda x, at: x @ A - at, 3.0)
    here = (3 * A + 4 * B)[None, None]
    assert_close(closer(world, here, A[None, None], 0.0), 3 * A[None, None], rtol=1e-3, atol=0)
    assert torch.equal(closer(world, here, -A[None, None], 0.0), here)
    assert torch.equal(closer(world, here, torch.zeros_like(here), 0.0), here)
