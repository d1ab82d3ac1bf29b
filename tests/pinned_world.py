"""Live clamps at two or three layers, and a delta at every one of them: what pinning allows, in closed form.

Blocks are linear, `h -> J h`, and every clamped feature is active wherever a delta may lead (its bias is large), so
that a clamp which scales it by `f` maps `h` to `C h + const` with `C = I + (f - 1) W_dec^T W_enc^T`, over clamped
features only; decoders are such that what it makes of the biases adds up to zero, and with it the constant.
With `x_m` the change of the state after the clamp of site `m` and `delta_m` what is added there,

    x_1 = delta_1        x_m = C_m J_m x_(m-1) + delta_m        logits change by V x_M

Every clamped pre-activation stays exactly if `A_m^T x_m = 0` at every site: `x_m = N_m y_m`, with `N_m` an orthonormal
basis of the complement of the columns of `A_m`. Such `y` may be chosen freely, so the norm of the whole delta is a
quadratic form in them, `||delta||^2 = y^T H y`, `H = B^T B` with

    B y = (N_1 y_1, N_2 y_2 - C_2 J_2 N_1 y_1, N_3 y_3 - C_3 J_3 N_2 y_2)

and the behavior `logit_t > logit_o`, lost by a gap `g`, is back exactly if `c . y > g` with
`c = (0, .., N_M^T V^T (e_t - e_o))`. The smallest norm is therefore `g / sqrt(c^T H^-1 c)`. It is not that of `y`
alone: what the first sites change has to be taken back at the later ones, and counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recover.defenses.clamps import Clamp, Defense, Scale
from recover.models.host import Model, Prompts
from recover.planted.network import Linear, Network
from recover.planted.world import Draw
from recover.saes.activations import ReLU
from recover.saes.sae import SAE
from recover.tasks.behaviors import LogitDifference
from recover.types import Float, Site, Tensor

__all__ = ["PinnedWorld", "pinned_layers"]

BIAS = 40.0
"""So large that no feature is near its threshold."""


@dataclass(frozen=True, eq=False)
class PinnedWorld:
    """A defense over several layers whose smallest pinned delta is known; every prompt is a valid flip."""

    model: Model
    defense: Defense
    prompts: Prompts
    behavior: LogitDifference
    smallest_norm: Float[Tensor, "batch"]


def pinned_layers(
    seed: int, *, n_sites: int = 2, d_model: int = 16, k: int = 3, d_sae: int = 24, vocab: int = 40, n_prompts: int = 6
) -> PinnedWorld:
    """A world with `n_sites` clamped layers, `1 < k < d_model` features at each. Derivation: this module."""
    draw = Draw(seed)
    J = [torch.eye(d_model).double() + 0.5 * draw.normal(d_model, d_model) / d_model**0.5 for _ in range(n_sites + 1)]
    V, embedding = draw.normal(vocab, d_model), draw.normal(vocab, d_model)
    clamps, C, free = [], [], []
    for m in range(n_sites):
        W_enc, W_dec = draw.normal(d_model, d_sae) / d_model**0.5, draw.normal(d_sae, d_model) / d_model**0.5
        factor, chosen = draw.number(1.3, 2.0), draw.order(d_sae)[:k]
        A, bias = W_enc[:, chosen], draw.uniform(BIAS, 1.5 * BIAS, d_sae)
        W_dec[chosen[-1]] = -(bias[chosen[:-1]] @ W_dec[chosen[:-1]]) / bias[chosen[-1]]
        D = W_dec[chosen]
        sae = SAE(W_enc.float(), bias.float(), W_dec.float(), torch.zeros(d_model), ReLU(), Site(m + 1), "standard", "")
        clamps.append(Clamp(sae, chosen.tolist(), Scale(factor)))
        C.append(torch.eye(d_model).double() + (factor - 1) * D.T @ A.T)
        free.append(torch.linalg.svd(A, full_matrices=True).U[:, k:])

    base = defended = embedding @ J[0].T
    for m in range(n_sites):
        base = base @ J[m + 1].T
        defended = defended @ C[m].T @ J[m + 1].T
    base, defended = base @ V.T, defended @ V.T
    # Of each prompt the pair of tokens that the clamps turn round most clearly, and the clearest prompts.
    before, after = (logits[:, :, None] - logits[:, None, :] for logits in (base, defended))
    clear, pair = torch.minimum(before, -after).flatten(1).max(dim=1)
    chosen_rows = clear.topk(n_prompts).indices
    target, other = pair[chosen_rows] // vocab, pair[chosen_rows] % vocab
    gap = -after[chosen_rows, target, other]

    n_free = d_model - k
    B = torch.zeros(n_sites * d_model, n_sites * n_free, dtype=torch.float64)
    for m in range(n_sites):
        here = slice(m * d_model, (m + 1) * d_model)
        B[here, m * n_free : (m + 1) * n_free] = free[m]
        if m:
            B[here, (m - 1) * n_free : m * n_free] = -C[m] @ J[m] @ free[m - 1]
    c = torch.zeros(n_prompts, n_sites * n_free, dtype=torch.float64)
    c[:, -n_free:] = (V[target] - V[other]) @ J[-1] @ free[-1]
    smallest = gap / (c * torch.linalg.solve(B.T @ B, c.T).T).sum(dim=1).sqrt()

    tokens = chosen_rows[:, None].expand(-1, 2).clone()
    network = Network(embedding, [Linear(map_) for map_ in J], V, torch.zeros(vocab)).eval().requires_grad_(False)
    prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return PinnedWorld(
        Model(network), Defense(tuple(clamps)), prompts, LogitDifference(target, other), smallest.float()
    )
