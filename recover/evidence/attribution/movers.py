"""Attention heads that look at a token and write it: name movers, where the token is a name (Wang et al. 2022).

1. *Look*: how much of a head's attention, at the last position, is on marked positions of the prompt.
2. *Write*: what the head adds to the score through the last residual alone, `dscore/dh . W_O z`, with the gradient of
   the run itself and `z` what the head gives.

Both are read in any run: without the defense (`undefended`), with it, with a delta.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import einsum, rearrange, reduce

from recover.defenses.defended import Defended
from recover.evidence.attribution.paths import Carrier, above, keeps, last_slope, trace
from recover.evidence.controls import Undefended
from recover.models.components import Component, eager, head_count, modules_of, projection
from recover.types import Delta, InputError, Mask, PerExample, Tensor

__all__ = ["looks", "undefended", "writes"]


def undefended(defended: Defended) -> Defended:
    """The same examples without the clamps; of use with no delta."""
    return replace(
        defended, suffix=Undefended.of(defended).suffix, surface=replace(defended.surface, placement="after_clamp")
    )


def looks(defended: Defended, delta: Delta, marked: Mask) -> dict[Carrier, PerExample]:
    """How much of each head's attention at the last position is on marked positions.

    Args:
        defended: the examples.
        delta: one for each, which enters after the clamp.
        marked: `[batch pos]`, of the whole prompts.
    """
    seen: dict[Component, Tensor] = {}
    places = [Component(layer, "pattern") for layer in above(defended)]
    with eager(defended.suffix.model.module), torch.no_grad():
        defended.logits(delta, {place: keeps(seen, place) for place in places})
    found: dict[Carrier, PerExample] = {}
    for place in places:
        last = seen[place][:, :, -1].float()
        share = einsum(last, marked.to(last), "batch head key, batch key -> head batch")
        found |= {Carrier(place.layer, head): one for head, one in enumerate(share)}
    return found


def writes(defended: Defended, delta: Delta) -> dict[Carrier, PerExample]:
    """What each head adds to the score through the last residual.

    Raises:
        InputError: the model's blocks norm what attention gives, so that heads do not add.
    """
    model = defended.suffix.model
    n_heads, run = head_count(model.module), trace(defended, delta)
    slope = last_slope(defended, run.final)
    found: dict[Carrier, PerExample] = {}
    for layer in above(defended):
        block = model.module.get_submodule(f"{model.blocks_path}.{layer}")
        modules = modules_of(block)
        if modules.attention != modules.heads:
            raise InputError("name movers: this model's blocks norm what attention gives, so that heads do not add up")
        z = rearrange(run.given[Component(layer, "heads")], "b pos (head d_head) -> b pos head d_head", head=n_heads)
        W_O = projection(block, n_heads)
        write = einsum(z, W_O, "b pos head d_head, head d_head d_model -> head b pos d_model")
        effect = reduce(write * slope, "head b pos d_model -> head b", "sum")
        found |= {Carrier(layer, head): one for head, one in enumerate(effect)}
    return found
