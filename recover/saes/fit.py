"""Does the SAE describe this model, here, on these prompts? A bad fit means a wrong model or a wrong hook point.

1. Explained variance and L0 at the clamped site, over all real tokens but the first of each prompt (its norm can be a
   hundred times that of the others, and would be all that is seen).
2. Loss recovered: cross-entropy with the reconstruction put in the residual's place, between the clean model (1) and
   the mean residual in its place (0); the first token is left alone.
3. Explained variance at every other site: nothing stops an SAE being used at a wrong hook point, and neighboring
   layers look alike, but an SAE fits best where it was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from recover.models.host import Edit, Model, Prompts
from recover.numerics import metrics
from recover.saes.sae import SAE
from recover.types import Residual, Site, Tensor, TokenIds

TOKENS_BY_SITE = 512


@dataclass(frozen=True)
class Fit:
    """How well one SAE describes a model's residuals at one site.

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
    clamped: int | None = None
    firing: int | None = None


def measure_fit(model: Model, sae: SAE, site: Site, prompts: Prompts, batch_size: int | None = None) -> Fit:
    """Measure how well `sae` describes the residuals at `site`.

    Args:
        model: the host model.
        sae: the SAE; residuals are cast to its dtype.
        site: where it reads the residual stream.
        prompts: explained variance needs tokens that differ; a few dozen prompts do.
        batch_size: prompts per forward pass; all at once by default.
    """
    everywhere = [Site(layer) for layer in range(model.n_layers)]
    here = everywhere[site.index] if site.index < model.n_layers else site
    batches = [prompts.select(rows) for rows in torch.split(torch.arange(len(prompts)), batch_size or len(prompts))]
    tokens: list[Tensor] = []
    sampled: dict[Site, list[Tensor]] = {place: [] for place in dict.fromkeys([*everywhere, here])}
    with torch.no_grad():
        for batch in batches:
            counted = batch.positions > 0
            enough = sum(map(len, sampled[here])) >= TOKENS_BY_SITE
            residuals = model.run(batch, read=[here] if enough else list(sampled)).residuals
            tokens.append(residuals[here].float()[counted])
            if not enough:
                for place, parts in sampled.items():
                    parts.append(residuals[place].float()[counted])
        features = [sae.encode(part) for part in tokens]
        rebuilt = [sae.decode(part) for part in features]
        x, x_hat = torch.cat(tokens), torch.cat(rebuilt)
        variances = {
            place: metrics.explained_variance(values, sae.decode(sae.encode(values)))
            for place, values in ((place, torch.cat(parts)[:TOKENS_BY_SITE]) for place, parts in sampled.items())
        }
        best = max(variances, key=lambda place: variances[place])
        mean = x.mean(dim=0)
        edits: tuple[dict[Site, Edit], ...] = (
            {},
            {here: _replace_by(lambda h: sae.decode(sae.encode(h)))},
            {here: _replace_by(lambda h: mean.expand_as(h))},
        )
        clean, with_sae, ablated = (next_token_loss(model, batches, edit) for edit in edits)
    return Fit(
        site=here.hook_name,
        explained_variance=metrics.explained_variance(x, x_hat),
        l0=sum(metrics.l0(part) * len(part) for part in features) / len(x) if len(x) else math.nan,
        loss_recovered=metrics.loss_recovered(clean, with_sae, ablated),
        better_site=best.hook_name,
        better_by=variances[best] - variances[here],
        tokens=len(x),
    )


def next_token_loss(model: Model, batches: Sequence[Prompts], edits: dict[Site, Edit]) -> float:
    """Mean cross-entropy, in nats per token, of each real token after the first given the tokens before it."""
    losses = []
    for prompts in batches:
        with torch.no_grad():
            logits = model.run(prompts, edits=edits, reads=None).logits[:, :-1]
        counted = (prompts.positions > 0)[:, 1:]
        losses.append(F.cross_entropy(logits[counted].float(), prompts.ids[:, 1:][counted], reduction="none"))
    return torch.cat(losses).double().mean().item()


def _replace_by(what: Callable[[Tensor], Tensor]) -> Edit:
    """An edit that puts `what(h)` in the place of every residual but padding and the first token's."""

    def edit(residual: Residual, positions: TokenIds) -> Residual:
        return torch.where((positions > 0)[..., None], what(residual.float()).to(residual.dtype), residual)

    return edit
