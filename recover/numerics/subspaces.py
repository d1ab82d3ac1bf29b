"""The residual directions to which clamped features are blind, and the projector onto them.

With `A = W_enc[:, S]` the admissible deltas under C1 are the linear space `{delta : A^T delta = 0}`. From an
orthonormal basis `Q` of the columns of `A`,

    P = I - Q Q^T        P P = P,  P^T = P,  A^T P = 0

- Columns are normalized first, so that a feature with a small encoder is kept as exactly as the others.
- Rank is revealed by an SVD, as feature sets do hold duplicate, dependent and zero columns.
- The tolerance is the rounding of the columns: a rounded sum of two float32 columns points out of their plane by 1e-8
  of its length, and to exclude that would cost a real dimension; dropped, it leaks less than 1e-6.
- `P` is applied twice: once leaves an error relative to the *input*, which matters when little is left.

Where what must be excluded differs between examples (rows of a Jacobian), each has a basis of its own: `NullSpaces`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import einsum, rearrange

from recover.types import Float, Int, Rows, Tensor


def row_space(A: Float[Tensor, "d_model k"], rtol: float | None = None) -> Float[Tensor, "d_model rank"]:
    """An orthonormal float64 basis of the span of the columns of `A`, which is what `A^T` sees.

    >>> import torch
    >>> from recover.numerics import row_space
    >>> row_space(torch.tensor([[2.0, 4.0], [0.0, 0.0]])).abs().round().tolist()
    [[1.0], [0.0]]

    Args:
        A: any number of columns, of any norms and however dependent.
        rtol: singular values (of `A` with normalized columns) up to this share of the largest count as zero; by default
            `max(d_model, k)` roundings of float64, and for narrower dtypes four of float32 of a column as well.
    """
    wide = A.detach().double()
    norms = torch.linalg.vector_norm(wide, dim=0)
    wide = wide / norms.where(norms > 0, 1.0)
    floor = 0.0 if rtol is not None or A.dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    rtol = max(wide.shape) * torch.finfo(torch.float64).eps if rtol is None else rtol
    if wide.shape[1] > wide.shape[0]:
        # A triangular factor of A^T spans the same space in d_model columns.
        wide = torch.linalg.qr(wide.mT, mode="r").R.mT
    left, singular, _ = torch.linalg.svd(wide, full_matrices=False)
    basis: Tensor = left[:, singular > (rtol * singular[:1]).clamp(min=floor)]
    return basis


@dataclass(frozen=True, eq=False)
class NullSpace:
    """The orthogonal complement of an orthonormal `basis` (float64) of the directions that are excluded.

    >>> import torch
    >>> from recover.numerics import NullSpace
    >>> NullSpace.of(torch.tensor([[1.0], [0.0]])).project(torch.tensor([3.0, 4.0]))
    tensor([0., 4.])
    """

    basis: Float[Tensor, "d_model rank"]

    @classmethod
    def of(cls, A: Float[Tensor, "d_model k"], rtol: float | None = None) -> NullSpace:
        """The null space of `A^T`, on the device of `A`."""
        return cls(row_space(A, rtol))

    @property
    def rank(self) -> int:
        """How many directions are excluded."""
        return int(self.basis.shape[1])

    @property
    def dimension(self) -> int:
        """How many directions are left free."""
        return int(self.basis.shape[0]) - self.rank

    def project(self, v: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The nearest point of the null space, computed in float64 and returned in the dtype of `v`.

        Differentiable; exactly zero where nothing is free. For float32 `||A^T P v|| <= 1e-6 ||A|| ||P v||`; a
        narrower dtype rounds more than that away, so keep deltas in float32 at least.
        """
        if self.dimension == 0:
            return v * 0
        free = v.double()
        for _ in range(2):
            seen = einsum(free, self.basis, "... d_model, d_model rank -> ... rank")
            free = free - einsum(seen, self.basis, "... rank, d_model rank -> ... d_model")
        return free.to(v.dtype)

    def select(self, rows: Rows) -> NullSpace:
        """Itself: all examples share one null space."""
        return self


@dataclass(frozen=True, eq=False)
class NullSpaces:
    """For each example the complement of its own orthonormal basis (float64), padded with zeros to the largest rank."""

    bases: Float[Tensor, "batch d_model rank"]

    @classmethod
    def of(cls, A: Float[Tensor, "batch d_model k"], atol: float) -> NullSpaces:
        """The null space of each `A^T`.

        Args:
            A: columns as they are: bring them to one scale before, as their lengths say how much each counts.
            atol: singular values up to this count as zero.
        """
        left, singular, _ = torch.linalg.svd(A.detach().double(), full_matrices=False)
        kept = singular > atol
        widest = int(kept.sum(dim=1).max()) if len(kept) else 0
        # Singular values fall, so what is kept of every example stands in the first columns.
        return cls(left[..., :widest] * rearrange(kept[:, :widest], "batch rank -> batch 1 rank"))

    @cached_property
    def ranks(self) -> Int[Tensor, "batch"]:
        """How many directions are excluded in each example."""
        return self.bases.any(dim=1).sum(dim=1)

    def project(self, v: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_model"]:
        """The nearest point of each example's null space; precision as in `NullSpace.project`."""
        free = v.double()
        for _ in range(2):
            seen = einsum(free, self.bases, "batch d_model, batch d_model rank -> batch rank")
            free = free - einsum(seen, self.bases, "batch rank, batch d_model rank -> batch d_model")
        nothing = rearrange(self.ranks == v.shape[1], "batch -> batch 1")
        return torch.where(nothing, 0.0, free).to(v.dtype)

    def select(self, rows: Rows) -> NullSpaces:
        return NullSpaces(self.bases[rows])


def leading(rows: Float[Tensor, "n d_model"], share: float) -> Float[Tensor, "d_model r"]:
    """An orthonormal basis of the fewest directions that hold this share of the rows' squared length; none for none.

    Rows that are not finite are left out.

    >>> leading(torch.tensor([[3.0, 0.0], [0.0, 1e-3]]), 0.999).abs()
    tensor([[1.],
            [0.]])
    """
    rows = rows[rows.isfinite().all(dim=1)]
    if not rows.any():
        return rows.new_zeros(rows.shape[1], 0)
    values, directions = torch.linalg.eigh(rows.double().T @ rows.double())
    held = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    kept = int((held < share).sum()) + 1
    basis: Tensor = directions.flip(1)[:, :kept].to(rows)
    return basis
