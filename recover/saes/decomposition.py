"""A residual and its parts: features, their reconstruction, and the error that the SAE leaves.

    h = D(E(h)) + e        e = h - D(E(h))

Both are functions of `h`, so a gradient that stops at either is wrong: through the reconstruction alone flows
`J = dD(E(h))/dh`, through the error `I - J`, and together the identity. sae_lens computes its error term
under `no_grad`, which leaves only `J`.
"""

from __future__ import annotations

from dataclasses import dataclass

from recover.saes.sae import SAE
from recover.types import Float, Tensor


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Features, reconstruction and error of a residual; the last two add up to it, up to one rounding."""

    features: Float[Tensor, "*batch d_sae"]
    reconstruction: Float[Tensor, "*batch d_model"]
    error: Float[Tensor, "*batch d_model"]


def decompose(sae: SAE, x: Float[Tensor, "*batch d_model"]) -> Decomposition:
    """Split `x` into features, reconstruction and error (reference: Definitions), each with its gradient."""
    features = sae.encode(x)
    reconstruction = sae.decode(features)
    return Decomposition(features, reconstruction, x - reconstruction)


def recompose(sae: SAE, decomposition: Decomposition) -> Float[Tensor, "*batch d_model"]:
    """Rebuild a residual `[*batch d_model]` from features, edited or not, and an error: the inverse of `decompose`."""
    return sae.decode(decomposition.features) + decomposition.error
