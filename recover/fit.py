"""Does the SAE describe this model, here, on these prompts? A bad fit means a wrong model or a wrong hook point.

1. Explained variance and L0 at the clamped site, over all real tokens but the first of each prompt (its norm can be a
   hundred times that of the others, and would be all that is seen).
2. Loss recovered: cross-entropy with the reconstruction put in the residual's place, between the clean model (1) and
   the mean residual in its place (0); the first token is left alone.
3. Explained variance at every other site: nothing stops an SAE being used at a wrong hook point, and neighboring
   layers look alike, but an SAE fits best where it was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch.nn import functional as F

from recover import metrics
from recover.model import Edit, Model, Prompts
from recover.sae import SAE
from recover.types import Residual, Site, Tensor, TokenIds

TOKENS_BY_SITE = 512


@dataclass(frozen=True)
class Fit:
    """Figures of one SAE at one site.

    Attributes:
        better_site: the place in the same model that the SAE explains best; `site` itself, when all is well.
        better_by: how much more variance it explains there.
    """

    site: str
    explained_variance: float
    l0: float
    loss_recovered: float
    better_site: str
    better_by: float
    tokens: int


def measure_fit(model: Model, sae: SAE, site: Site, prompts: Prompts) -> Fit:
    """Measure the fit of `sae` at `site` on prompts (one batch).

    Explained variance needs tokens that differ; give as many prompts as a batch holds.
    """
    counted = prompts.positions > 0
    sites = [Site(layer) for layer in range(model.n_layers)]
    here = sites[site.index] if site.index < model.n_layers else site
    with torch.no_grad():
        residuals = model.run(prompts, read=[*sites, *([] if here in sites else [here])]).residuals
        x = residuals[here].float()
        features = sae.encode(x[counted])
        sample = {place: values.float()[counted][:TOKENS_BY_SITE] for place, values in residuals.items()}
        variances = {
            place: metrics.explained_variance(values, sae.decode(sae.encode(values)))
            for place, values in sample.items()
        }
        best = max(variances, key=lambda place: variances[place])
        mean = x[counted].mean(dim=0)
        losses = [
            next_token_loss(model, prompts, {} if edit is None else {here: edit})
            for edit in (
                None,
                _replace_by(lambda h: sae.decode(sae.encode(h))),
                _replace_by(lambda h: mean.expand_as(h)),
            )
        ]
    return Fit(
        site=here.hook_name,
        explained_variance=metrics.explained_variance(x[counted], sae.decode(features)),
        l0=metrics.l0(features),
        loss_recovered=metrics.loss_recovered(*losses),
        better_site=best.hook_name,
        better_by=variances[best] - variances[here],
        tokens=int(counted.sum()),
    )


def next_token_loss(model: Model, prompts: Prompts, edits: dict[Site, Edit]) -> float:
    """Mean cross-entropy of each real token after the first given those before it, in nats."""
    with torch.no_grad():
        logits = model.run(prompts, edits=edits, every_position=True).logits[:, :-1].float()
    counted = (prompts.positions > 0)[:, 1:]
    losses = F.cross_entropy(
        rearrange(logits, "batch pos vocab -> (batch pos) vocab"),
        rearrange(prompts.ids[:, 1:], "batch pos -> (batch pos)"),
        reduction="none",
    )
    return losses[rearrange(counted, "batch pos -> (batch pos)")].double().mean().item()


def _replace_by(what: Callable[[Tensor], Tensor]) -> Edit:
    """An edit that puts `what(h)` in the place of every residual but padding and the first token's."""

    def edit(residual: Residual, positions: TokenIds) -> Residual:
        return torch.where((positions > 0)[..., None], what(residual.float()).to(residual.dtype), residual)

    return edit
