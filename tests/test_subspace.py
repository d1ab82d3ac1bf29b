from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recover.numerics.subspaces import NullSpace, NullSpaces, row_space

D = 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dependent() -> Tensor:
    """Eight columns of rank 3: a zero, a duplicate, a negative, a multiple, and two combinations."""
    a, b, c = normal(3, D)
    return torch.stack([a, torch.zeros(D, dtype=torch.float64), b, a, -b, 1e-3 * c, a + 2 * b, b - c], dim=1)


MATRICES = {
    "generic": (normal(D, 5), 5),
    "dependent": (dependent(), 3),
    "zero": (torch.zeros(D, 4, dtype=torch.float64), 0),
    "no columns": (torch.zeros(D, 0, dtype=torch.float64), 0),
    "one column": (normal(D, 1), 1),
    "square": (normal(D, D), D),
    "more columns than dimensions": (normal(D, 3 * D), D),
    "more columns, low rank": (normal(D, 4) @ normal(4, 2 * D, seed=1), 4),
    "columns of all sizes": (normal(D, 5) * torch.logspace(-12, 12, 5, dtype=torch.float64), 5),
}
EACH = pytest.mark.parametrize(("A", "rank"), MATRICES.values(), ids=MATRICES.keys())


def test_projection_by_hand() -> None:
    """The first axis, and the diagonal of the other two, are held: of (5, 3, 1) remains (0, 1, -1)."""
    A = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    projected = NullSpace.of(A).project(torch.tensor([5.0, 3.0, 1.0]))
    torch.testing.assert_close(projected, torch.tensor([0.0, 1.0, -1.0]))


@EACH
def test_rank_is_revealed(A: Tensor, rank: int) -> None:
    null_space = NullSpace.of(A)
    assert (null_space.rank, null_space.dimension) == (rank, D - rank)


@EACH
def test_basis_is_orthonormal_and_spans_the_columns(A: Tensor, rank: int) -> None:
    Q = row_space(A)
    assert Q.dtype == torch.float64
    torch.testing.assert_close(Q.mT @ Q, torch.eye(rank, dtype=torch.float64))
    scaled = A / A.norm(dim=0).clamp(min=1e-300)
    torch.testing.assert_close(Q @ (Q.mT @ scaled), scaled)


@EACH
def test_projection_laws(A: Tensor, rank: int) -> None:
    """The projector of the reference page, P = I - A (A^T A)^+ A^T; P P = P, P^T = P, A^T P = 0, trace d - rank."""
    eye = torch.eye(D, dtype=torch.float64)
    P = NullSpace.of(A).project(eye)
    columns = A / A.norm(dim=0).clamp(min=1e-300)  # the same space, in numbers that pinv can take
    exact = {"rtol": 0.0, "atol": 1e-12}
    torch.testing.assert_close(P, eye - columns @ torch.linalg.pinv(columns, rtol=1e-10), **exact)
    torch.testing.assert_close(P @ P, P, **exact)
    torch.testing.assert_close(P.mT, P, **exact)
    torch.testing.assert_close(columns.mT @ P, torch.zeros_like(columns.mT), **exact)
    assert P.trace().item() == pytest.approx(D - rank)


@pytest.mark.parametrize("A", [normal(D, D), normal(D, 3 * D)])
def test_nothing_is_left_of_an_empty_null_space(A: Tensor) -> None:
    v = normal(2, 3, D).requires_grad_()
    projected = NullSpace.of(A).project(v)
    assert torch.equal(projected, torch.zeros(2, 3, D, dtype=torch.float64))
    projected.sum().backward()  # still part of the graph
    assert v.grad is not None


def test_everything_is_left_without_constraints() -> None:
    v = normal(2, D).float()
    assert torch.equal(NullSpace.of(torch.zeros(D, 2)).project(v), v)


def nearly_dependent(spread: float, dtype: torch.dtype) -> Tensor:
    """Sixty-four columns that differ from one direction by `spread` of its size."""
    return (normal(256, 1) + spread * normal(256, 64, seed=1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-5, 1e-6, 1e-8, 1e-12])
def test_encoders_are_blind_to_a_float32_delta(spread: float, dtype: torch.dtype) -> None:
    """However close the columns are to dependent: each sees at most float32 rounding of the delta.

    The deltas point where the columns differ, which is where a rank judged too low would leak.
    """
    A = nearly_dependent(spread, dtype)
    towards = normal(256, 64, seed=1).mT + normal(64, 256, seed=2)
    delta = NullSpace.of(A).project(towards.float())
    assert delta.dtype == torch.float32
    A, delta = A.double(), delta.double()
    assert ((A.mT @ delta.mT).norm(dim=0) <= 1e-6 * A.norm() * delta.norm(dim=1)).all()
    assert ((delta @ A).abs() <= 1e-6 * A.norm(dim=0) * delta.norm(dim=1, keepdim=True)).all()


def test_features_with_small_encoders_are_held_as_exactly_as_others() -> None:
    A = normal(256, 8) * torch.logspace(-9, 9, 8, dtype=torch.float64)
    delta = NullSpace.of(A).project(normal(256, seed=2).float()).double()
    assert ((delta @ A).abs() <= 1e-6 * A.norm(dim=0) * delta.norm()).all()


def test_float32_deltas_are_projected_in_float64() -> None:
    null_space, v = NullSpace.of(normal(256, 64)), normal(7, 256, seed=1).float()
    assert torch.equal(null_space.project(v), null_space.project(v.double()).float())


def test_what_little_is_left_is_blind_too() -> None:
    """A delta that lies in the held space but for 1e-10 of it: the residual is relative to what is left."""
    A = normal(256, 64)
    delta = NullSpace.of(A).project(A @ normal(64, seed=1) + 1e-10 * normal(256, seed=2))
    assert delta.norm() < 1e-7
    assert (A.mT @ delta).norm() <= 1e-12 * A.norm() * delta.norm()


def test_tolerance_can_be_given() -> None:
    A = nearly_dependent(1e-3, torch.float64)
    assert NullSpace.of(A).rank == 64
    assert NullSpace.of(A, rtol=0.1).rank == 1


def test_projection_is_differentiable() -> None:
    null_space = NullSpace.of(normal(D, 5).requires_grad_())
    v = normal(3, D, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(null_space.project, (v,))
    assert not null_space.basis.requires_grad


def test_narrow_deltas_keep_their_dtype() -> None:
    v = normal(3, D).bfloat16()
    projected = NullSpace.of(normal(D, 5)).project(v)
    assert projected.dtype == torch.bfloat16
    torch.testing.assert_close(projected, NullSpace.of(normal(D, 5)).project(v.double()).bfloat16())


def test_null_spaces_hold_for_each_example_what_is_its_own() -> None:
    """One direction, two, and none: the bases are padded to the same width, and the padding holds nothing."""
    eye = torch.eye(4)
    A = torch.stack([eye[:, [0, 0]], eye[:, [1, 3]], 0 * eye[:, :2]])
    spaces = NullSpaces.of(A, atol=1e-9)
    assert spaces.ranks.tolist() == [1, 2, 0]
    expected = torch.tensor([[0.0, 2.0, 3.0, 4.0], [1.0, 0.0, 3.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    v = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(spaces.project(v.expand(3, 4)), expected)
    rows = torch.tensor([2, 1, 1])
    torch.testing.assert_close(spaces.select(rows).project(v.expand(3, 4)), expected[rows])
    assert spaces.select(torch.tensor([2])).ranks.tolist() == [0]


def test_null_spaces_count_what_is_up_to_the_tolerance_as_zero() -> None:
    A = torch.tensor([[[1.0, 1.0], [0.0, 1e-4]], [[1.0, 1.0], [0.0, 1e-6]]])
    assert NullSpaces.of(A, atol=1e-5).ranks.tolist() == [2, 1]


def test_null_spaces_leave_exactly_nothing_where_everything_is_held() -> None:
    A = normal(2, 3, 5, seed=6)
    A[1] = 0
    projected = NullSpaces.of(A, atol=1e-9).project(normal(2, 3, seed=7))
    assert projected[0].count_nonzero() == 0
    torch.testing.assert_close(projected[1], normal(2, 3, seed=7)[1])
