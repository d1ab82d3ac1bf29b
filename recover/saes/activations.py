"""From pre-activations to features, for every sae_lens architecture with a linear encoder.

With `pre = x @ W_enc + b_enc`, feature by feature:

==========  ===================================================  ============================
`ReLU`      `pre` where it is above 0                            standard
`JumpReLU`  `pre` where it is above 0 and above a threshold      jumprelu; batchtopk, matryoshka
`Gated`     `scale * pre + offset` where both it and `pre` are   gated
            above 0
`TopK`      `pre` where above 0 and among the k largest          topk
`AbsTopK`   `pre` where its size is among the k largest          abstopk
==========  ===================================================  ============================

The first three are *pointwise*: a feature depends on its own pre-activation alone, so selected features can
be read alone, and a delta that leaves their pre-activations as they are leaves them as they are. In the last
two all features compete, and neither holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch

from recover.types import Float, Int, Tensor


@dataclass(frozen=True, eq=False)
class Activation(ABC):
    """A function from pre-activations to features: pure, and differentiable where it is smooth."""

    pointwise: ClassVar[bool]

    @abstractmethod
    def __call__(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Compute the features `[*batch k]` of pre-activations `[*batch k]`."""

    def threshold(self, features: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
        """Pre-activation `[k]` at or below which each of `features` is zero; NaN where features compete."""
        return torch.full(features.shape, torch.nan, device=features.device)

    def select(self, features: Int[Tensor, "k"]) -> Activation:
        """Restrict the activation to `features`.

        Raises:
            ValueError: the activation is not pointwise.
        """
        if not self.pointwise:
            raise ValueError(f"{type(self).__name__} ranks all features: encode them all, then select")
        return self._map(lambda parameter: parameter[features])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Activation:
        return self._map(lambda parameter: parameter.to(device=device, dtype=dtype))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Activation:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(v) for name, v in values.items() if isinstance(v, Tensor)})


@dataclass(frozen=True, eq=False)
class ReLU(Activation):
    pointwise: ClassVar[bool] = True

    def __call__(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu(pre)

    def threshold(self, features: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
        return torch.zeros(features.shape, device=features.device)


@dataclass(frozen=True, eq=False)
class JumpReLU(Activation):
    """Zero at or below the threshold and the identity above it; a negative threshold counts as 0."""

    thresholds: Float[Tensor, "d_sae"]
    pointwise: ClassVar[bool] = True

    def __call__(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu(pre) * (pre > self.thresholds)

    def threshold(self, features: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
        return self.thresholds[features].clamp(min=0)


@dataclass(frozen=True, eq=False)
class Gated(Activation):
    """A gate on `pre` and a magnitude along the same direction, `scale * pre + offset` with `scale > 0`.

    sae_lens keeps a bias for each path: `pre` here is the gate's, so `scale = exp(r_mag)` and
    `offset = b_mag - scale * b_gate`.
    """

    scale: Float[Tensor, "d_sae"]
    offset: Float[Tensor, "d_sae"]
    pointwise: ClassVar[bool] = True

    def __call__(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu(self.scale * pre + self.offset) * (pre > 0)

    def threshold(self, features: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
        return (-self.offset[features] / self.scale[features]).clamp(min=0)


@dataclass(frozen=True, eq=False)
class TopK(Activation):
    """Keep the positive ones among the `k` largest pre-activations, and set all others to zero."""

    k: int
    pointwise: ClassVar[bool] = False

    def __call__(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        top = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, top.indices, torch.relu(top.values))


@dataclass(frozen=True, eq=False)
class AbsTopK(Activation):
    """Keep the `k` pre-activations of largest absolute value, so that features may be negative."""

    k: int
    pointwise: ClassVar[bool] = False

    def __call__(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        top = pre.abs().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(pre).scatter(-1, top, pre.gather(-1, top))
