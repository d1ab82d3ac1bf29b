"""Laws of null-space projectors: they project, encoders are blind to them, and only the span of the columns counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from property_tests.guards import guards
from property_tests.rounding import assert_within, eps
from property_tests.strategies import (
    DTYPES,
    EPS64,
    SEEDS,
    ResidualCase,
    Scene,
    randn,
    residual_cases,
    scenes,
)
from recover.numerics.subspaces import NullSpace, NullSpaces, row_space


@dataclass(frozen=True)
class MatrixCase:
    """`independent` random columns, then copies, multiples, sums and zeros of them: the rank is known.

    `exponents` are powers of ten by which the independent columns are scaled.
    """

    d_model: int
    independent: int
    copies: int
    zeros: int
    seed: int
    exponents: tuple[int, ...]

    @property
    def rank(self) -> int:
        return min(self.d_model, self.independent)

    @property
    def columns(self) -> int:
        return self.independent + self.copies + self.zeros

    def base(self) -> Tensor:
        """The independent columns, of norms of order 1."""
        return randn(self.d_model, self.independent, seed=self.seed, dtype=torch.float64)

    def tensor(self) -> Tensor:
        """In float64; copies are multiples by powers of 2, which rounding does not make independent."""
        base = self.base()
        scaled = base * torch.tensor([10.0**e for e in self.exponents], dtype=torch.float64)
        source = [index % self.independent for index in range(self.copies)] if self.independent else []
        factor = torch.tensor([(-2.0) ** (index % 5) for index in range(len(source))], dtype=torch.float64)
        zero = torch.zeros(self.d_model, self.zeros + self.copies - len(source), dtype=torch.float64)
        return torch.cat([scaled, scaled[:, source] * factor, zero], dim=1)

    @property
    def condition(self) -> float:
        """Of the independent columns, normalized: how strongly rounding of a column turns their span."""
        if not self.independent:
            return 1.0
        base = self.base()
        singular = torch.linalg.svdvals(base / base.norm(dim=0))
        return float(singular[0] / singular[-1])

    @property
    def tolerance(self) -> float:
        """On an entry of the projector.

        Householder reflections and an SVD of `n` columns of length `d` answer exactly for a matrix off by
        `O(d n) eps`; its span is off by `condition` times that.
        """
        return 4 * self.d_model * max(self.d_model, self.columns) * EPS64 * self.condition


EXPONENTS = st.sampled_from([-12, 12]) | st.integers(-12, 12)
"""Norms may differ by more than the digits of float64 hold: without normalizing, the shortest columns would be lost."""


@st.composite
def matrices(draw: st.DrawFn, columns: int = 8) -> MatrixCase:
    independent = draw(st.integers(0, columns))
    return MatrixCase(
        d_model=draw(st.integers(1, 10)),
        independent=independent,
        copies=draw(st.integers(0, 4)),
        zeros=draw(st.integers(0, 2)),
        seed=draw(SEEDS),
        exponents=tuple(draw(st.lists(EXPONENTS, min_size=independent, max_size=independent))),
    )


def clear_of_singular(case: MatrixCase) -> bool:
    """Square and wide random matrices may be nearly singular; their numerical rank is then ill-defined."""
    return case.condition < 1e6


def projector(space: NullSpace) -> Tensor:
    return space.project(torch.eye(space.basis.shape[0], dtype=torch.float64))


@guards(row_space, "basis: Tensor = left[:,", "basis: Tensor = 1.01 * left[:,")
@given(matrices())
def test_a_projector_is_symmetric_and_projecting_twice_is_projecting_once(case: MatrixCase) -> None:
    """Whatever the condition: the basis is orthonormal up to `O(d n) eps` in any case."""
    P = projector(NullSpace.of(case.tensor()))
    tolerance = 4 * case.d_model * max(case.d_model, case.columns, 1) * EPS64
    assert_within(P @ P, P, tolerance)
    assert_within(P, P.mT, tolerance)


@guards(row_space, "wide = wide / norms.where(norms > 0, 1.0)", "pass")
@given(matrices())
def test_rank_and_dimension_add_up_and_are_as_constructed(case: MatrixCase) -> None:
    """However many columns are copies, multiples or zero, and however their norms differ."""
    assume(clear_of_singular(case))
    space = NullSpace.of(case.tensor())
    assert space.rank == case.rank
    assert space.rank + space.dimension == case.d_model
    assert_within(projector(space).trace(), torch.tensor(float(space.dimension)), case.d_model * case.tolerance)


@guards(row_space, "(rtol * singular[:1])", "(0.1 * singular[:1])")
@given(matrices())
def test_the_projector_is_the_one_of_the_pseudo_inverse(case: MatrixCase) -> None:
    """`I - A A^+`, by another route of linear algebra, on the independent columns alone."""
    assume(clear_of_singular(case))
    base = case.base()
    expected = torch.eye(case.d_model, dtype=torch.float64) - base @ torch.linalg.pinv(base)
    # The pseudo-inverse errs by the condition once more.
    assert_within(projector(NullSpace.of(case.tensor())), expected, 4 * case.tolerance * case.condition)


@guards(row_space, "wide = A.detach().double()", "wide = A.detach()[:, :2].double()")
@given(matrices(), SEEDS)
def test_only_the_span_counts(case: MatrixCase, seed: int) -> None:
    """Permuted, rescaled by any factor, duplicated: one projector."""
    assume(clear_of_singular(case) and case.columns > 0)
    A = case.tensor()
    order = torch.randperm(case.columns, generator=torch.Generator().manual_seed(seed))
    factors = 10.0 ** (4 * randn(case.columns, seed=seed, dtype=torch.float64)) * (-1.0) ** torch.arange(case.columns)
    P = projector(NullSpace.of(A))
    for changed in (A[:, order], A * factors, torch.cat([A, A[:, order] * factors], dim=1)):
        assert_within(projector(NullSpace.of(changed)), P, 8 * case.tolerance)


@guards(NullSpace.project, "for _ in range(2):", "for _ in range(1):")
@given(
    matrices(),
    residual_cases(),
    st.sampled_from([*DTYPES, "float64", "float64", "float64"]),
    st.sampled_from([1.0, 1e-4, 1e-8]),
    SEEDS,
)
def test_the_encoder_is_blind_to_what_is_projected(
    case: MatrixCase, x: ResidualCase, dtype: str, share: float, seed: int
) -> None:
    """`||A^T P v|| <= (eps of the dtype + rounding in float64) ||A|| ||P v||`: relative to what is *left* of `v`.

    Where `share` is small, so is what is left: then `v` lies that near to the span of what is held. Two projections
    leave of it what rounding leaves of rounding, if there is nothing else.
    """
    A = case.tensor()
    A = A / A.norm(dim=0).where(A.norm(dim=0) > 0, 1.0)
    v = x.tensor(case.d_model, DTYPES[dtype])
    if share < 1:
        within = randn(*x.shape, case.columns, seed=seed, dtype=torch.float64) @ A.mT
        v = (within + share * v.double()).to(v.dtype)
    assume(v.isfinite().all())  # float16 ends at 65504
    projected = NullSpace.of(A).project(v).double()
    seen = (projected @ A).norm(dim=-1)
    inside = 4 * case.d_model * max(case.d_model, case.columns, 1) * EPS64
    # Rounding to the dtype moves each entry by eps / 2 of itself, or, below the smallest normal, by as much of that.
    floor = torch.finfo(DTYPES[dtype]).smallest_normal * eps(DTYPES[dtype]) * case.d_model**0.5
    bound = (eps(DTYPES[dtype]) + inside) * projected.norm(dim=-1) + inside**2 * v.double().norm(dim=-1) + floor
    assert_within(seen, torch.zeros_like(seen), bound * A.norm())


@guards(NullSpace.project, "free = free - einsum(seen,", "free = free - 2 * einsum(seen,")
@given(matrices(), residual_cases(), SEEDS)
def test_projecting_never_lengthens_and_gives_the_nearest_point(case: MatrixCase, x: ResidualCase, seed: int) -> None:
    """Pythagoras: `||v||^2 = ||P v||^2 + ||v - P v||^2`, and any other admissible point is farther from `v`.

    `P v` is admissible itself; the others are found by Householder reflections, of which no rank need be told.
    """
    A, v = case.tensor(), x.tensor(case.d_model, torch.float64)
    near = NullSpace.of(A).project(v)
    tolerance = 4 * case.d_model * max(case.d_model, case.columns, 1) * EPS64
    columns = A / A.norm(dim=0).where(A.norm(dim=0) > 0, 1.0)
    seen = (near @ columns).norm(dim=-1)
    assert_within(seen, torch.zeros_like(seen), tolerance * v.norm(dim=-1) * columns.norm())
    length = v.norm(dim=-1)
    assert (near.norm(dim=-1) <= length * (1 + tolerance)).all()
    assert_within(near.square().sum(-1) + (v - near).square().sum(-1), v.square().sum(-1), tolerance * length**2)
    free = torch.linalg.qr(case.base(), mode="complete").Q[:, case.independent :]
    other = near + randn(*v.shape, seed=seed, dtype=torch.float64) @ free @ free.mT
    assert ((v - near).norm(dim=-1) <= (v - other).norm(dim=-1) + tolerance * length).all()


FACTORS = st.floats(-8, 8, width=32, allow_subnormal=False)


@guards(NullSpace.project, "free = v.double()\n", "free = v.double()\n        free = free + (free - free.detach())\n")
@given(matrices(), residual_cases(kinds=("normal",)), SEEDS, FACTORS, FACTORS)
def test_projecting_is_linear_and_its_own_transpose_under_autograd(
    case: MatrixCase, x: ResidualCase, seed: int, a: float, b: float
) -> None:
    space, v = NullSpace.of(case.tensor()), x.tensor(case.d_model, torch.float64)
    w = randn(*v.shape, seed=seed, dtype=torch.float64)
    tolerance = 4 * case.d_model * max(case.d_model, case.columns, 1) * EPS64
    sizes = (abs(a) * v.norm(dim=-1) + abs(b) * w.norm(dim=-1))[..., None]
    assert_within(space.project(a * v + b * w), a * space.project(v) + b * space.project(w), tolerance * sizes)
    leaf = v.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(space.project(leaf), leaf, w)
    assert_within(gradient, space.project(w), tolerance * w.norm(dim=-1, keepdim=True))


@guards(NullSpace.project, "if self.dimension == 0:", "if False:")
@given(st.integers(1, 10), st.integers(0, 6), SEEDS, residual_cases())
def test_holding_every_direction_leaves_nothing_and_holding_none_leaves_everything(
    d_model: int, extra: int, seed: int, x: ResidualCase
) -> None:
    """Exactly: a remainder that is rounding would be scaled up to the budget by a search."""
    v = x.tensor(d_model)
    rotation = torch.linalg.qr(randn(d_model, d_model, seed=seed, dtype=torch.float64)).Q
    full = torch.cat([rotation, randn(d_model, extra, seed=seed + 1, dtype=torch.float64)], dim=1)
    assert NullSpace.of(full).project(v).count_nonzero() == 0
    none = NullSpace.of(torch.zeros(d_model, extra))
    assert none.rank == 0
    assert torch.equal(none.project(v), v)


@guards(NullSpaces.select, "return NullSpaces(self.bases[rows])", "return NullSpaces(self.bases[: len(rows)])")
@guards(
    NullSpaces.project,
    "nothing = rearrange(self.ranks == v.shape[1],",
    "nothing = rearrange(self.ranks >= self.ranks.max(),",
)
@given(st.integers(1, 8), st.lists(st.integers(0, 5), min_size=1, max_size=4), SEEDS)
def test_a_batch_of_null_spaces_is_that_of_each_example(d_model: int, ranks: list[int], seed: int) -> None:
    """Ranks may differ between examples; neither order nor the rest of the batch matters."""
    A = torch.zeros(len(ranks), d_model, 5, dtype=torch.float64)
    for row, rank in enumerate(ranks):
        A[row, :, :rank] = randn(d_model, rank, seed=seed + row, dtype=torch.float64)
    assume(all(clear_of_singular(MatrixCase(d_model, n, 0, 0, seed + row, ())) for row, n in enumerate(ranks)))
    spaces, v = NullSpaces.of(A, atol=1e-9), randn(len(ranks), d_model, seed=seed + 9, dtype=torch.float64)
    together = spaces.project(v)
    assert spaces.ranks.tolist() == [min(rank, d_model) for rank in ranks]
    for row in range(len(ranks)):
        # Unlike there, columns are taken as they are, so that the span of random ones is less well determined.
        tolerance = MatrixCase(d_model, ranks[row], 0, 5 - ranks[row], seed + row, ()).tolerance
        assert_within(together[row], NullSpace.of(A[row]).project(v[row]), 8 * tolerance * v[row].norm())
    order = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(seed))[: 1 + seed % len(ranks)]
    assert_within(spaces.select(order).project(v[order]), together[order], 4 * d_model**2 * EPS64 * v.norm())


@guards(
    "recover.defenses.clamps.Clamp.encoder",
    "return self.sae.W_enc[:, self.indices]",
    "return self.sae.W_dec[self.indices].mT",
)
@given(scenes(dtypes=("float64",), kinds=("normal",)))
def test_the_null_space_of_the_jacobian_is_that_of_the_encoder_at_one_site(scene: Scene) -> None:
    """Of the clamped pre-activations; and of the features, that of the columns of the active ones."""
    sae, clamp = scene.sae.sae(), scene.clamp
    x = scene.residual()[0, 0]
    tolerance = 4 * sae.d_model * max(sae.d_model, sae.d_sae) * EPS64
    jacobian: Tensor = torch.autograd.functional.jacobian(clamp.pre_activations, x)  # type: ignore[no-untyped-call]
    assert_within(jacobian.mT, clamp.encoder, eps(torch.float64) * clamp.encoder.abs())
    ours, theirs = NullSpace.of(clamp.encoder), NullSpace.of(jacobian.mT)
    assert_within(projector(ours), projector(theirs), tolerance * conditioned(clamp.encoder))
    features: Tensor = torch.autograd.functional.jacobian(clamp.read, x)  # type: ignore[no-untyped-call]
    active = clamp.read(x) != 0
    ours, theirs = NullSpace.of(clamp.encoder[:, active]), NullSpace.of(features.mT)
    assert ours.rank == theirs.rank
    assert_within(projector(ours), projector(theirs), tolerance * conditioned(clamp.encoder[:, active]))


def conditioned(A: Tensor) -> float:
    """The condition of the span that `row_space` finds."""
    if not A.numel() or not A.any():
        return 1.0
    singular = torch.linalg.svdvals(A / A.norm(dim=0).where(A.norm(dim=0) > 0, 1.0))
    kept = singular[: row_space(A).shape[1]]
    condition = float(kept[0] / kept[-1])
    assume(condition < 1e6)
    return condition
