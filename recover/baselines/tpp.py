"""SAEBench's targeted probe perturbation, on mean activations: its choice of features, its ablation and its score.

A probe of the mean residual is linear, and so is ablation: with `z` the mean activation of a feature over a text and
`d` its decoder row, setting the features S to zero wherever they are active takes `sum_S z d` from the mean residual.

1. *Effect* of a feature on a class's probe: mean `z` over texts of the class minus that over the others, where that is
   positive, times `d` on the probe's weight. The `top` largest are ablated.
2. *Drop* of a probe: its accuracy, the class and the rest of the same weight, before minus after.
3. *Score*: over classes, the mean of the drop of the ablated class's own probe (*intended*) minus the mean drop of the
   others (*unintended*).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum

from recover.tasks.probe_heads import Probes
from recover.types import Float, Int, Tensor


@dataclass(frozen=True)
class Score:
    """Drops of accuracy by ablated class, and their means.

    Attributes:
        intended: of each class's own probe, when its features are ablated.
        unintended: the mean over the other probes, by the class that is ablated.
    """

    intended: tuple[float, ...]
    unintended: tuple[float, ...]

    @property
    def total(self) -> float:
        """Mean intended minus mean unintended."""
        return (sum(self.intended) - sum(self.unintended)) / len(self.intended)


def effect(
    activation: Float[Tensor, "batch d_sae"],
    own: Int[Tensor, "batch"] | Tensor,
    W_dec: Float[Tensor, "d_sae d_model"],
    weight: Float[Tensor, "d_model"],
) -> Float[Tensor, "d_sae"]:
    """Effect of each feature on one probe, in logits.

    Args:
        activation: mean over each text.
        own: bool, whether a text is of the class.
        W_dec: of the SAE.
        weight: of the probe.
    """
    more = activation[own].mean(dim=0) - activation[~own].mean(dim=0)
    return more.clamp(min=0) * einsum(W_dec, weight, "d_sae d_model, d_model -> d_sae")


def ablated(
    logits: Float[Tensor, "batch choice"],
    activation: Float[Tensor, "batch d_sae"],
    features: Sequence[int],
    W_dec: Float[Tensor, "d_sae d_model"],
    weight: Float[Tensor, "choice d_model"],
) -> Float[Tensor, "batch choice"]:
    """The probes' logits with these features set to zero."""
    rows = torch.as_tensor(features, device=logits.device)
    taken = einsum(activation[:, rows], W_dec[rows], "batch k, k d_model -> batch d_model")
    return logits - einsum(taken, weight, "batch d_model, choice d_model -> batch choice")


def score(probes: Probes, clean: Float[Tensor, "batch choice"], under: Sequence[Tensor], label: Tensor) -> Score:
    """The official score: mean intended minus mean unintended drop of accuracy.

    Args:
        probes: one for each class.
        clean: logits without ablation.
        under: `[batch choice]` with the features of each class ablated, in the order of the classes.
        label: the class of each text.
    """
    before = probes.accuracy(clean, label)
    drops = [(before - probes.accuracy(logits, label)).tolist() for logits in under]
    intended = tuple(drop[own] for own, drop in enumerate(drops))
    others = [[value for number, value in enumerate(drop) if number != own] for own, drop in enumerate(drops)]
    return Score(intended, tuple(sum(values) / len(values) for values in others))
