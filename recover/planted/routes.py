"""Kinds 1 to 3: the readout reads the clamped features, and a copy that lies nowhere, in the error, or in features.

Atoms: `a_j`, one clamped feature for each answer `j`; `b_j`, a copy of each; context features. Example `i` with answer
`t` has `a_t = alpha_i`, `a_j = 0` elsewhere. The logits are `f(y)` with

    kind 1    y_j = a_j                     f any function: linear plus a bounded random network
    kind 2    y_j = a_j + gamma b_j         `b_j` an atom outside the dictionary: the SAE's error
    kind 3    y_j = a_j + gamma b_j         `b_j` a feature that is not clamped

and the behavior is `logit_t > logit_o`. The clamp makes `a_t` negative: `a_t = s`.

*Kind 1.* `y_j = w_j . h` with `w_j` the encoder column of a clamped feature, so `w_j . delta = 0` for every admissible
delta: `y`, and with it every logit, stays as it is, at any budget and for any `f`. No norm suffices. The clamped slack
is at most `s + 2 SWING < 0`, the slack at base at least `alpha - 2 SWING > 0`.

*Kinds 2 and 3.* `f` is the same strictly increasing function for every answer, so the behavior shows exactly if
`y_t > y_o`, and `y_t - y_o = s + gamma (b_t - b_o) + u . delta` with `u = gamma (v_t - v_o) + (w_t - w_o)`, `v_j` the
dual of the copy. The second part of `u` is not admissible, so the smallest norm is
`-(s + gamma (b_t - b_o)) / (gamma ||P (v_t - v_o)||)`.

Where it is: in kind 2 `v_j` reads nothing that the SAE decodes, as `v_j . t_i = 0` for every feature `i`; so the part
of a delta that the readout sees is in the error, all of it. In kind 3 `v_j` is a feature's encoder, and reads of a
delta what that feature changes by, as long as it stays above its threshold: the copies stand at `base + beta` and
`base`, with `base` above what the smallest delta takes off, so that the change shows in features, all of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from recover.defenses.clamps import Clamp, Defense, Mode, Scale, Set
from recover.numerics.subspaces import NullSpace
from recover.planted.network import Monotone, build_network
from recover.planted.world import (
    Architecture,
    Atoms,
    Draw,
    Planted,
    Sizes,
    clamped,
    distance,
    numbered,
    planted_sae,
    recoverable,
)
from recover.tasks.behaviors import LogitDifference
from recover.types import Float, Int, Tensor

SWING = 0.4


class Tangled(nn.Module):
    """`y` plus a bounded random network of it: each output moves by at most `SWING`."""

    def __init__(self, draw: Draw, n: int) -> None:
        super().__init__()
        self.first = nn.Parameter(draw.normal(n, 4 * n).float())
        self.second = nn.Parameter(torch.nn.functional.normalize(draw.normal(4 * n, n), p=1, dim=0).float())

    def forward(self, y: Tensor) -> Tensor:
        return y + SWING * torch.tanh(3 * y @ self.first) @ self.second


def complete_bottleneck(seed: int, *, extra: int = 2, **sizes: int) -> Planted:
    """Kind 1. `extra` context features are clamped as well. Needs `d_model > n_answers + n_context`."""
    draw = Draw(seed)
    size = Sizes.of(sizes, d_model=24, n_answers=5, d_sae=40, n_prompts=10)
    d_model, n_answers, n_context, n_prompts, d_sae, _ = size.shape
    features = n_answers + n_context
    atoms = Atoms.draw(draw, features, d_model)
    target, other = draw.answers(n_prompts, n_answers)
    codes = _codes(draw, target, features, range(n_answers, features))
    mode, architecture = _clamp(draw)
    sae, where = planted_sae(draw, atoms.T, atoms.W, d_sae, architecture=architecture)
    held = range(n_answers + min(extra, n_context))
    U, f = atoms.W[:, :n_answers], Tangled(draw, n_answers)
    model, prompts = build_network(draw, atoms, codes, range(n_answers, features), U, f, n_out=n_answers, size=size)
    return Planted(
        "complete_bottleneck",
        model,
        Defense((Clamp(sae, where[held].tolist(), mode, only_active=True),), skip_first=draw.below(2)),
        numbered(prompts, LogitDifference(target, other)),
        budget=10 ** draw.number(0.0, 3.0),
        smallest_norm=torch.full((n_prompts,), torch.inf),
        admissible=NullSpace.of(atoms.W[:, held]),
        expected=("NOT_RECOVERED_AT_BUDGET",),
        bypass=None,
    )


def error_bypass(seed: int, *, extra: int = 2, **sizes: int) -> Planted:
    """Kind 2. Needs `d_model >= 2 n_answers + n_context`."""
    return _bypass("error_bypass", seed, extra, sizes, known=False)


def feature_bypass(seed: int, *, extra: int = 2, **sizes: int) -> Planted:
    """Kind 3. Needs `d_model >= 2 n_answers + n_context`."""
    return _bypass("feature_bypass", seed, extra, sizes, known=True)


def _bypass(name: str, seed: int, extra: int, sizes: Mapping[str, int], *, known: bool) -> Planted:
    """A copy of each answer in an atom that the dictionary knows, or does not."""
    draw = Draw(seed)
    size = Sizes.of(sizes, d_model=24, n_answers=5, d_sae=40, n_prompts=10)
    d_model, n_answers, n_context, n_prompts, d_sae, _ = size.shape
    first_copy = n_answers + n_context
    n = first_copy + n_answers
    atoms = Atoms.draw(draw, n, d_model)
    target, other = draw.answers(n_prompts, n_answers)
    codes = _codes(draw, target, n, range(n_answers, first_copy))
    mode, architecture = _clamp(draw)
    gamma = draw.number(0.5, 2.0)
    rows = torch.arange(n_prompts)
    after = clamped(codes[rows, target], mode, architecture, only_active=True)
    beta = torch.minimum(-draw.uniform(0.1, 0.6, n_prompts) * after / gamma, torch.tensor(0.4, dtype=torch.float64))
    base = 1.0 + 1.5 * float(-after.min()) / gamma if known else 0.0
    codes[:, first_copy:] = base
    codes[rows, first_copy + target] = base + beta
    sae_atoms = n if known else first_copy
    sae, where = planted_sae(draw, atoms.T[:sae_atoms], atoms.W[:, :sae_atoms], d_sae, architecture=architecture)
    held, copies = range(n_answers + min(extra, n_context)), atoms.W[:, first_copy:]
    U, f = atoms.W[:, :n_answers] + gamma * copies, Monotone.drawn(draw)
    network = build_network(draw, atoms, codes, range(n_answers, first_copy), U, f, n_out=n_answers, size=size)
    u = gamma * (copies[:, target] - copies[:, other]).T
    smallest = distance(after + gamma * beta, u, atoms.W[:, held])
    return recoverable(
        name,
        draw,
        network,
        [Clamp(sae, where[held].tolist(), mode, only_active=True)],
        LogitDifference(target, other),
        smallest,
        bypass="features" if known else "error",
        admissible=NullSpace.of(atoms.W[:, held]),
    )


def _codes(draw: Draw, target: Int[Tensor, "batch"], n: int, context: range) -> Float[Tensor, "batch n"]:
    """Coordinates: the answer's feature, and about half of the context features."""
    alpha = draw.uniform(2.0, 4.0, len(target))
    codes = draw.codes(len(target), n, context)
    codes[torch.arange(len(target)), target] = alpha
    return codes


def _clamp(draw: Draw) -> tuple[Mode, Architecture]:
    """A clamp that makes active features clearly negative, and the architecture of the SAE."""
    architecture: Architecture = "standard" if draw.below(2) else "jumprelu"
    mode: Mode = Set(-draw.number(1.5, 3.0)) if draw.below(2) else Scale(-draw.number(0.8, 1.5))
    return mode, architecture
