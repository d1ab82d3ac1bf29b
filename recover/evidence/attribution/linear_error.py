"""How much of an SAE's error is a linear function of the residual: ridge regression on held-out activations.

1. *Activations* of text of its own, after the clamps, each text's first token left out.
2. *Fit* on two thirds of the tokens: `M` with `error - mean about (h - mean) M`, for each of some penalties.
3. *Read* on the other third; the penalty that predicts best there is kept, with how much it predicts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, rearrange

from recover.defenses.clamps import Defense
from recover.defenses.defended import clamp_edits
from recover.models.host import Edit, Model, Prompts
from recover.saes.sae import SAE
from recover.types import Float, InputError, Residual, Site, Tensor, TokenIds, widened

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Penalties of the ridge regression, as shares of the mean variance of the residual's dimensions."""


@dataclass(frozen=True, eq=False)
class LinearError:
    """The linear map from the residual to the error of its SAE, at one site.

    Attributes:
        M: of a residual `h`, as a row: the error is about `(h - mean) M`, and a change of the residual's `delta M`.
        penalty: of those tried, the one that predicts best what was not fitted on.
        r2: share of the error's variance that it predicts there; at most 1, negative where it predicts nothing.
    """

    M: Float[Tensor, "d_model d_model"]
    penalty: float
    r2: float

    def predicted(self, delta: Residual) -> Residual:
        """By how much the error changes where the residual does by `delta`, in the dtype of that."""
        moved = einsum(delta.double(), self.M.double(), "batch pos d_model, d_model out -> batch pos out")
        return moved.to(delta.dtype)


def error_activations(
    model: Model, defense: Defense, prompts: Prompts, sites: tuple[Site, ...], batch_size: int | None = None
) -> dict[Site, Float[Tensor, "token d_model"]]:
    """The defended residual after each clamp on prompts of their own, the first token of each left out."""
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    defense = defense.to(torch.promote_types(model.dtype, torch.float32))
    edits = clamp_edits(defense)

    def watched(site: Site) -> Edit:
        def edit(h: Tensor, positions: TokenIds) -> Tensor:
            h = edits[site](h, positions)
            seen[site].append(h[positions >= max(1, defense.skip_first)])
            return h

        return edit

    run = {site: watched(site) if site in seen else edits[site] for site in edits}
    for rows in torch.split(torch.arange(len(prompts)), batch_size or len(prompts)):
        with torch.no_grad():
            model.run(prompts.select(rows), edits=run)
    return {site: torch.cat(states) for site, states in seen.items()}


def fit_linear_error(sae: SAE, states: Float[Tensor, "token d_model"], seed: int = 0) -> LinearError:
    """Ridge regression of the SAE's error on the residual: fitted on two thirds of the tokens, read on the others.

    Raises:
        InputError: fewer than 3 tokens.
    """
    if len(states) < 3:
        raise InputError(f"linear part of the error: {len(states)} tokens to fit it on; give at least 3")
    states = widened(states)
    error = (states - sae.decode(sae.encode(states))).double()
    x = states.double()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    kept, fitted = torch.tensor_split(order, [len(x) // 3])
    mean_x, mean_e = x[fitted].mean(dim=0), error[fitted].mean(dim=0)
    centered, target = x - mean_x, error - mean_e
    gram = einsum(centered[fitted], centered[fitted], "token a, token b -> a b")
    cross = einsum(centered[fitted], target[fitted], "token a, token b -> a b")
    values, vectors = torch.linalg.eigh(gram)
    turned = vectors.mT @ cross
    spread = target[kept].square().sum()
    found = []
    for penalty in PENALTIES:
        level = penalty * values.mean().clamp(min=torch.finfo(values.dtype).tiny)
        M = vectors @ (turned / rearrange(values.clamp(min=0) + level, "a -> a 1"))
        missed = (target[kept] - centered[kept] @ M).square().sum()
        found.append(LinearError(M, penalty, float(1 - missed / spread.clamp(min=torch.finfo(spread.dtype).tiny))))
    return max(found, key=lambda one: one.r2)


def fit_linear_errors(
    model: Model,
    defense: Defense,
    prompts: Prompts,
    sites: tuple[Site, ...],
    batch_size: int | None = None,
    seed: int = 0,
) -> dict[Site, LinearError]:
    """Fit the linear part of the SAE's error at each of these sites, on prompts of their own under the defense."""
    states = error_activations(model, defense, prompts, sites, batch_size)
    return {site: fit_linear_error(defense.at(site)[0].sae, states[site], seed) for site in sites}
