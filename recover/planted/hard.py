"""Kind 7: readouts where the gradient vanishes or lies, with a bypass that is there all the same.

Atoms: a clamped feature `a_j` for each answer, context features, and outside the dictionary, at right angles to these,
a copy `b_j` of each answer and a decoy `x`. With `y_j = a_j + gamma b_j` the readout passes `y` through something hard:

===========  ========================================================  =====================================
variant      logit of answer `j`                                       gradient in the defended state
===========  ========================================================  =====================================
`tanh`       `GAIN tanh(kappa y_j)`, `kappa` 6 to 30                   tiny, or zero in float32
`step`       `GAIN sign(y_j)`                                          zero
`decoy`      `GAIN sign(y_j) + 0.3 x`                                  along `x`, which leads nowhere
`reversed`   `GAIN sign(y_j)`, whose backward pass claims slope -1     along `b_j`, the wrong way
`topk`       `GAIN` if `y_j` is the largest of all `y` and of guards   zero: it reaches the winner only, and
             at `GUARD`, else `-GAIN`                                  the winner's value is not what is read
===========  ========================================================  =====================================

The behavior is that the answer's logit is above that of a token `none`, 0. It shows exactly if `y_t` is above a known
level: 0, or `GUARD` for `topk` (the other `y_j` are 0, and move by nothing along `b_t`), or for `decoy` 0 as long as
`0.3 x` stays below `GAIN`, which it does within the budget. As `b_t` is a unit vector orthogonal to all that is held,
the smallest norm is `(level - s - gamma beta) / gamma`.

A search must find it or say that it cannot tell: NOT_RECOVERED would be a lie, as the budget is larger than that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recover.defenses.clamps import Clamp, Set
from recover.numerics.subspaces import NullSpace
from recover.planted.network import build_network
from recover.planted.world import Atoms, Draw, Planted, Sizes, clamped, planted_sae, recoverable
from recover.tasks.behaviors import LogitDifference
from recover.types import Tensor

GAIN, GUARD, SLOPE = 3.0, 0.3, 0.3
VARIANTS = ("tanh", "step", "decoy", "reversed", "topk")


class _Reversed(torch.autograd.Function):
    """The sign, with a backward pass that claims the opposite slope."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return torch.sign(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class Hard(nn.Module):
    """The readout of a variant; the last coordinate is the decoy, the last output the token `none`."""

    def __init__(self, variant: str, kappa: float) -> None:
        super().__init__()
        self.variant, self.kappa = variant, kappa

    def forward(self, y: Tensor) -> Tensor:
        y, x = y[..., :-1], y[..., -1:]
        match self.variant:
            case "tanh":
                logits = GAIN * torch.tanh(self.kappa * y)
            case "decoy":
                logits = GAIN * torch.sign(y) + SLOPE * x
            case "reversed":
                reversed_sign: Tensor = _Reversed.apply(y)  # type: ignore[no-untyped-call]
                logits = GAIN * reversed_sign
            case "topk":
                level = torch.cat([y, torch.full_like(x, GUARD)], dim=-1).amax(dim=-1, keepdim=True)
                logits = GAIN * torch.where((y == level) & (y > GUARD), 1.0, -1.0) + 0.0 * y
            case _:
                logits = GAIN * torch.sign(y)
        return torch.cat([logits, torch.zeros_like(x)], dim=-1)


def hard_readout(seed: int, *, variant: str | None = None, **sizes: int) -> Planted:
    """Kind 7; the variant goes by the seed. Needs `d_model > 2 n_answers + n_context`."""
    draw = Draw(seed)
    size = Sizes.of(sizes, d_model=24, n_answers=4, n_context=5, d_sae=40, n_prompts=8)
    d_model, n_answers, n_context, n_prompts, d_sae, _ = size.shape
    variant = variant or VARIANTS[seed % len(VARIANTS)]
    features = n_answers + n_context
    atoms = Atoms.of(draw.blocks(d_model, [features, n_answers + 1], spread=[0.4, 0.0]))
    target, _ = draw.answers(n_prompts, n_answers)
    rows = torch.arange(n_prompts)
    codes = draw.codes(n_prompts, len(atoms.T), range(n_answers, features))
    codes[rows, target] = draw.uniform(2.0, 4.0, n_prompts)
    beta = draw.uniform(0.1, 0.4, n_prompts)
    codes[rows, features + target] = beta
    gamma, mode = draw.number(0.5, 2.0), Set(-draw.number(1.5, 3.0))
    architecture = draw.architecture()
    after = clamped(codes[rows, target], mode, architecture, only_active=True)
    sae, where = planted_sae(draw, atoms.T[:features], atoms.W[:, :features], d_sae, architecture=architecture)
    U = torch.cat([atoms.W[:, :n_answers] + gamma * atoms.W[:, features:-1], atoms.W[:, -1:]], dim=1)
    f = Hard(variant, draw.number(6.0, 30.0))
    network = build_network(draw, atoms, codes, range(n_answers, features), U, f, n_out=n_answers + 1, size=size)
    smallest = ((GUARD if variant == "topk" else 0.0) - after - gamma * beta) / gamma
    clamp = Clamp(sae, where[:n_answers].tolist(), mode, only_active=True)
    behavior = LogitDifference(target, torch.full_like(target, n_answers))
    told: dict[str, Any] = {
        "expected": ("RECOVERABLE", "INCONCLUSIVE"),
        "admissible": NullSpace.of(atoms.W[:, :n_answers]),
        "variant": variant,
    }
    return recoverable("hard_readout", draw, network, [clamp], behavior, smallest, **told)
