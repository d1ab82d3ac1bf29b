"""How far apart rounding may drive two ways of computing one thing: tolerances that are derived, not tuned.

With `eps` the spacing of floats at 1, one operation errs by at most `eps / 2` of its result, and a sum of `n` products
by at most `n eps / 2 / (1 - n eps / 2)` of the sum of their sizes, in whatever order it is taken (Higham, *Accuracy and
Stability of Numerical Algorithms*, section 3.1). The bounds here take `eps` for `eps / 2`, which covers the difference
of two computations, each with its own error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recover.saes.activations import Activation, Gated, JumpReLU
from recover.saes.sae import SAE


def eps(dtype: torch.dtype) -> float:
    """Spacing of the floats at 1."""
    return torch.finfo(dtype).eps


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """`|actual - expected| <= bound`, entry by entry."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    apart = (actual.double() - expected.double()).abs()
    worst = (apart - torch.as_tensor(bound, dtype=torch.float64)).max() if apart.numel() else torch.tensor(0.0)
    assert worst <= 0, f"apart by up to {apart.max():.3e}, {worst:.3e} more than rounding explains (bound {bound})"


def product_error(x: Tensor, W: Tensor, b: Tensor | float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """Bound on the error of `x @ W + b` computed in `dtype`: `n + 1` terms, so `(n + 1) eps` of their sizes."""
    sizes = x.double().abs() @ W.double().abs() + torch.as_tensor(b).double().abs()
    return (x.shape[-1] + 1) * eps(dtype or W.dtype) * sizes


def projection_leak(d_model: int, dtype: torch.dtype) -> float:
    """Bound on `|a . P v|` as a share of `||a|| ||P v||`, for a column `a` that is held.

    The result is rounded to its dtype; of columns in float32, directions of up to four roundings count as dependent,
    `d_model` of them at most; and an SVD and two projections in float64 err by `O(d_model^2) eps`.
    """
    dependent = 0.0 if dtype == torch.float64 else 4 * eps(torch.float32) * d_model**0.5
    return eps(dtype) + dependent + 64 * d_model**2 * eps(torch.float64)


def reading_error(sae: SAE, x: Tensor, features: Tensor) -> Tensor:
    """Bound on the rounding of the pre-activations of `features` at `x`, `[... k]`."""
    return product_error(x, sae.W_enc[:, features], sae.b_enc[features])


def slope(activation: Activation, features: Tensor) -> Tensor:
    """How steep each feature is in its pre-activation, wherever it is smooth."""
    return activation.scale[features].double() if isinstance(activation, Gated) else torch.ones(len(features)).double()


def jump(activation: Activation, features: Tensor) -> Tensor:
    """How far each feature jumps where it wakes: a ReLU by 0, a JumpReLU to its threshold, a gate to its offset."""
    if isinstance(activation, JumpReLU):
        return activation.thresholds[features].double().clamp(min=0)
    if isinstance(activation, Gated):
        return activation.offset[features].double().clamp(min=0)
    return torch.zeros(len(features)).double()


def activation_error(sae: SAE, pre: Tensor, features: Tensor) -> Tensor:
    """Bound on the rounding of the activation itself: a gate multiplies and adds, the others copy."""
    activation = sae.activation
    if not isinstance(activation, Gated):
        return torch.zeros_like(pre).double()
    sizes = (activation.scale[features] * pre).double().abs() + activation.offset[features].double().abs()
    return 2 * eps(sae.dtype) * sizes


def settled(sae: SAE, x: Tensor, features: Tensor, moved: Tensor | float = 0.0) -> Tensor:
    """Bool `[... k]`: where neither rounding nor a move of pre-activations by `moved [... d_sae]` wakes or silences.

    A pointwise feature is settled if its pre-activation stands farther from its threshold than that; competing ones all
    are if the rank that decides is clear by twice that.
    """
    everything = torch.arange(sae.d_sae)
    pre = sae.pre_activations(x).double()
    reach = reading_error(sae, x, everything) + torch.as_tensor(moved).double()
    if sae.pointwise:
        gap = (pre - sae.activation.threshold(everything).double()).abs()
        # The threshold of a gate is itself a rounded quotient.
        return (gap > reach + 2 * eps(sae.dtype) * sae.activation.threshold(everything).double())[..., features]
    rank = pre.abs() if sae.architecture == "abstopk" else pre
    k: int = sae.activation.k  # type: ignore[attr-defined]
    ordered = rank.sort(dim=-1, descending=True).values
    clear = torch.full(pre.shape[:-1], True)
    if k < sae.d_sae:
        clear = ordered[..., k - 1] - ordered[..., k] > 2 * reach.amax(dim=-1)
    # An active feature at 0 would be told from an inactive one by its sign alone.
    return (clear[..., None] & (pre.abs() > reach))[..., features]
