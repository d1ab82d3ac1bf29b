"""Conjugate gradients against singular values, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recover.numerics.least_squares import LeastSquares, cgls


def solved(A: Tensor, b: Tensor, tolerance: float = 1e-12, steps: int = 100) -> LeastSquares:
    return cgls(
        lambda x: torch.einsum("bmn,bn->bm", A, x),
        lambda r: torch.einsum("bmn,bm->bn", A, r),
        b,
        tolerance=tolerance,
        steps=steps,
    )


@pytest.mark.parametrize(("m", "n", "rank"), [(5, 9, 5), (9, 5, 5), (7, 8, 3), (6, 6, 1)])
def test_each_example_has_its_shortest_least_squares_solution(m: int, n: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(m * n)
    left, right = (torch.randn(4, size, rank, generator=generator).double() for size in (m, n))
    A, b = left @ right.mT, torch.randn(4, m, generator=generator).double()
    found = solved(A, b)
    expected = torch.linalg.pinv(A, rtol=1e-9) @ b[..., None]
    assert_close(found.x, expected[..., 0], rtol=1e-7, atol=1e-9)
    assert_close(found.residual, b - (A @ expected)[..., 0], rtol=1e-7, atol=1e-9)
    assert bool(found.converged.all())


def test_two_steps_by_hand() -> None:
    """Singular values 2 and 1, `b = (2, 1)`: solved in two steps; after one, `s = (4, 1)` has been gone along 17/65."""
    A, b = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]).double(), torch.tensor([[2.0, 1.0]])
    assert_close(solved(A, b, steps=1).x, torch.tensor([[4.0, 1.0]]).double() * 17 / 65)
    assert not bool(solved(A, b, steps=1).converged.any())
    whole = solved(A, b)
    assert_close(whole.x, torch.tensor([[1.0, 1.0]]).double())
    assert whole.steps == 2


def test_examples_stop_on_their_own() -> None:
    """Nothing to solve, nothing that can be reached, and nothing finite change neither themselves nor the others."""
    A = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    b = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()
    alone = solved(A[4:], b[4:])
    b[0], A[1], b[2], A[3, 0, 0] = 0, 0, torch.nan, torch.inf
    found = solved(A, b)
    assert found.x[:2].count_nonzero() == 0
    assert_close(found.residual[1], b[1])
    assert_close(found.x[4:], alone.x)
    assert bool(found.converged.all())


def test_a_direction_passed_on_with_less_than_the_tolerance_is_left() -> None:
    A = torch.diag(torch.tensor([1.0, 1e-6])).double()[None]
    assert_close(solved(A, torch.ones(1, 2), tolerance=1e-3).x[0, 0].item(), 1.0, rtol=1e-6, atol=0)
    assert solved(A, torch.ones(1, 2), tolerance=1e-3).x[0, 1] < 1
    assert_close(solved(A, torch.ones(1, 2), tolerance=1e-9).x[0, 1].item(), 1e6, rtol=1e-3, atol=0)
