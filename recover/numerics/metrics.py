"""The measures of the reference page (Definitions), as pure functions of features and residuals.

Two groups:

- *of a recovery*, one figure an example. Features are `[batch *pos k]`, residuals `[batch *pos d_model]`, with or
  without positions. Norms are over everything but `batch`: give the positions that were searched. A share of 0 is 0
  where the part is 0 too, and infinite otherwise.
- *of an SAE's fit*, one figure for all tokens. Leave out BOS and other outlying first tokens: they outweigh the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, reduce

from recover.types import Bool, Float, Int, PerExample, Tensor


@dataclass(frozen=True, eq=False)
class Reactivation:
    """Clamped features (at each position) inactive after the clamp, and those that recovery activates."""

    count: Int[Tensor, "batch"]
    inactive: Int[Tensor, "batch"]

    @property
    def share(self) -> PerExample:
        """`count / inactive`; 0 where nothing was inactive, as then nothing was reactivated."""
        return self.count / self.inactive.clamp(min=1)


def valid_flips(base: Bool[Tensor, "batch"], defended: Bool[Tensor, "batch"]) -> Bool[Tensor, "batch"]:
    """Where the base model shows the behavior and the defended one does not.

    >>> import torch
    >>> from recover.numerics import valid_flips
    >>> valid_flips(torch.tensor([True, True]), torch.tensor([True, False]))
    tensor([False,  True])
    """
    return base & ~defended


def norm(values: Float[Tensor, "batch *pos n"]) -> PerExample:
    """The Frobenius norm of each example, summed in float64 and returned in the dtype of `values`.

    >>> import torch
    >>> from recover.numerics import norm
    >>> norm(torch.tensor([[[3.0, 4.0]]]))
    tensor([5.])
    """
    flat = rearrange(values, "batch ... n -> batch (... n)")
    length: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    return length.to(values.dtype)


def by_example(values: Tensor) -> Tensor:
    """Values `[batch]` as factors or masks of deltas, `[batch 1 1]`."""
    return rearrange(values, "batch -> batch 1 1")


def activation_drift(z_rec: Float[Tensor, "batch *pos k"], z_def: Float[Tensor, "batch *pos k"]) -> PerExample:
    """`||z_S(h_rec) - z_S(h_def)||`, in units of activation."""
    return norm(z_rec - z_def)


def relative_drift(z_rec: Float[Tensor, "batch *pos k"], z_def: Float[Tensor, "batch *pos k"]) -> PerExample:
    """The activation drift as a share of `||z_S(h_def)||`.

    >>> import torch
    >>> from recover.numerics import activation_drift, norm, relative_drift
    >>> relative_drift(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor([0.5000])
    """
    return _ratio(activation_drift(z_rec, z_def), norm(z_def))


def decode_drift(
    z_rec: Float[Tensor, "batch *pos k"], z_def: Float[Tensor, "batch *pos k"], decoder: Float[Tensor, "k d_model"]
) -> PerExample:
    """`||(z_S(h_rec) - z_S(h_def)) W_dec[S]||`, in residual units."""
    return norm(einsum(z_rec - z_def, decoder, "batch ... k, k d_model -> batch ... d_model"))


def clamp_floor_violation(z_rec: Float[Tensor, "batch *pos k"], z_def: Float[Tensor, "batch *pos k"]) -> PerExample:
    """`||relu(z_S(h_def) - z_S(h_rec))|| / ||z_S(h_def)||`: how far raised features have sunk."""
    return _ratio(norm(torch.relu(z_def - z_rec)), norm(z_def))


def reactivation(z_rec: Float[Tensor, "batch *pos k"], z_def: Float[Tensor, "batch *pos k"]) -> Reactivation:
    """Which clamped features that were `<= 0` after the clamp are `> 0` after recovery."""
    inactive = z_def <= 0
    return Reactivation(
        count=reduce((inactive & (z_rec > 0)).long(), "batch ... -> batch", "sum"),
        inactive=reduce(inactive.long(), "batch ... -> batch", "sum"),
    )


def relative_norm(delta: Float[Tensor, "batch *pos d_model"], h_def: Float[Tensor, "batch *pos d_model"]) -> PerExample:
    """`||delta||_F / ||h_def||_F`."""
    return _ratio(norm(delta), norm(h_def))


def explained_variance(x: Float[Tensor, "*batch d_model"], x_hat: Float[Tensor, "*batch d_model"]) -> float:
    """`1 - sum ||x - x_hat||^2 / sum ||x - mean||^2` over tokens, in float64; NaN where `x` does not vary."""
    tokens, reconstructed = (rearrange(t.double(), "... d_model -> (...) d_model") for t in (x, x_hat))
    total = (tokens - reduce(tokens, "token d_model -> d_model", "mean")).square().sum().item()
    missed = (tokens - reconstructed).square().sum().item()
    return 1 - missed / total if total > 0 else math.nan


def l0(features: Float[Tensor, "*batch d_sae"]) -> float:
    """How many features are active on a token, on average.

    >>> import torch
    >>> from recover.numerics import l0
    >>> l0(torch.tensor([[0.0, 1.5, 2.0]]))
    2.0
    """
    return reduce((features != 0).double(), "... d_sae -> ...", "sum").mean().item()


def loss_recovered(ce_clean: float, ce_sae: float, ce_mean: float) -> float:
    """`(ce_mean - ce_sae) / (ce_mean - ce_clean)`, of cross-entropies: clean, with the SAE, with the mean.

    1 where the SAE costs nothing, 0 where it does no better than the mean; NaN where the mean costs nothing.
    """
    return (ce_mean - ce_sae) / (ce_mean - ce_clean) if ce_mean > ce_clean else math.nan


def _ratio(part: PerExample, whole: PerExample) -> PerExample:
    return torch.where(part == 0, 0.0, part / whole)
