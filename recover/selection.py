"""Which features to clamp: attribution on the task's own prompts.

The attribution of a feature is its activation times the gradient of the behavior's score with respect to it, taken
through an SAE whose error is passed on (reference page, IOI): with `h = D(z) + e` and `e` held, the gradient with
respect to `z` is `dscore/dh @ W_dec^T`. Summed over positions and prompts; the largest positive ones are chosen.
The first token of a prompt counts for nothing: where it is an attention sink its norm is a hundred times the others',
no SAE describes it, and its spurious activations would outweigh all the rest.
"""

from __future__ import annotations

import torch
from einops import einsum

from recover.behavior import Behavior
from recover.model import Model, Prompts
from recover.sae import SAE
from recover.types import Float, InputError, Site, Tensor


def attribution(model: Model, sae: SAE, site: Site, prompts: Prompts, behavior: Behavior) -> Float[Tensor, "d_sae"]:
    """Summed attribution of each feature to the score, in units of the score, over one batch of prompts.

    Padding and first tokens count for nothing. Divide by the number of prompts for the mean.
    """
    with torch.no_grad():
        residual = model.run(prompts, read=[site], tokens=behavior.tokens).residuals[site]
    leaf = residual.clone().requires_grad_(True)
    logits = model.run(prompts, start=(site, leaf), tokens=behavior.tokens).logits
    (gradient,) = torch.autograd.grad(behavior.score(logits).sum(), leaf)
    with torch.no_grad():
        counted = (prompts.positions > 0).to(sae.dtype)
        features = sae.encode(residual)
        slope = einsum(gradient.to(sae.dtype), sae.W_dec, "batch pos d_model, d_sae d_model -> batch pos d_sae")
        return einsum(features, slope, counted, "batch pos d_sae, batch pos d_sae, batch pos -> d_sae")


def largest(attributions: Float[Tensor, "d_sae"], top: int) -> tuple[int, ...]:
    """The `top` features of largest positive attribution, largest first; equal ones in the order of their index.

    Raises:
        InputError: fewer than `top` are positive.
    """
    positive = int((attributions > 0).sum())
    if positive < top:
        raise InputError(f"features: top {top} asked, but only {positive} have positive attribution; ask for fewer")
    order = torch.argsort(attributions, descending=True, stable=True)
    return tuple(order[:top].tolist())
