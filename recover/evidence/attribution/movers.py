"""Attention heads that look at a token and write it: name movers, where the token is a name (Wang et al. 2022).

1. *Look*: how much of a head's attention, at the last position, is on marked positions of the prompt.
2. *Write*: what the head adds to the score through the last residual alone, `dscore/dh . W_O z`, with the gradient of
   the run itself and `z` what the head gives.

Both are read in any run: without the defense (`undefended`), with it, with a delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange, reduce

from recover.defenses.defended import Defended
from recover.evidence.attribution.parts import entering
from recover.evidence.attribution.paths import Carrier, above, keeps, last_slope, trace
from recover.evidence.controls import Undefended
from recover.models.components import Component, eager, head_count, modules_of, projection
from recover.tasks.behaviors import Targeted
from recover.types import Delta, InputError, Mask, PerExample, Tensor

LOOKS = 0.2
"""Attention at base above which a head that writes the target counts as a name mover."""
Reading = Mapping[str, float]


@dataclass(frozen=True)
class Movers:
    """Heads that, without the defense, look at the target more than at its rivals and write it.

    Attributes:
        n: examples.
        heads: of each head, in the states `base`, `defended` and `recovered`, the means of `look` (attention on the
            target), `rival` (attention on its rivals) and `write`; those that write most at base first.
        written: what they write together in each state.
        re_engaged: the share of what the clamp took of `written` that is back; None where it took nothing.
    """

    n: int
    heads: Mapping[str, Mapping[str, Reading]]
    written: Mapping[str, float | int]
    re_engaged: float | None


def undefended(defended: Defended) -> Defended:
    """Remove the clamps from the examples; meant to be run without a delta."""
    return replace(
        defended, suffix=Undefended.of(defended).suffix, surface=replace(defended.surface, placement="after_clamp")
    )


def looks(defended: Defended, delta: Delta, marked: Mask) -> dict[Carrier, PerExample]:
    """Share of each head's attention at the last position that falls on marked positions of the whole prompts.

    The delta enters after the clamp.
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
    """Contribution of each head to the score through the last residual.

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


def name_movers(defended: Defended, delta: Delta) -> Movers | None:
    """Find the name movers of these examples; read them without the defense, with it, and with a delta.

    None where the behavior has no target, or where a prompt does not hold its target.

    Raises:
        InputError: the model's blocks norm what attention gives, so that heads do not add.
    """
    behavior, ids = defended.behavior, defended.suffix.prompts.ids
    if not isinstance(behavior, Targeted):
        return None
    target = ids == behavior.target[:, None]
    rival = torch.stack([torch.isin(row, tokens) for row, tokens in zip(ids, behavior.rivals, strict=True)]) & ~target
    if not bool(target.any(dim=1).all()):
        return None
    defended, delta = entering(defended, delta)
    zero = torch.zeros_like(delta)
    states = {"base": (undefended(defended), zero), "defended": (defended, zero), "recovered": (defended, delta)}
    read = {name: _at(*state, target, rival) for name, state in states.items()}
    base = read["base"]
    movers = [head for head, at in base.items() if at["look"] >= max(LOOKS, at["rival"]) and at["write"] > 0]
    movers.sort(key=lambda head: -base[head]["write"])
    total = {name: sum((at[head]["write"] for head in movers), 0.0) for name, at in read.items()}
    lost = total["base"] - total["defended"]
    heads = {head: {name: at[head] for name, at in read.items()} for head in movers}
    return Movers(len(ids), heads, total, (total["recovered"] - total["defended"]) / lost if lost else None)


def _at(defended: Defended, delta: Delta, target: Mask, rival: Mask) -> dict[str, dict[str, float]]:
    """The means over examples for each head in one state."""
    found = looks(defended, delta, target), looks(defended, delta, rival), writes(defended, delta)
    return {
        str(head): {k: float(one[head].mean()) for k, one in zip(("look", "rival", "write"), found, strict=True)}
        for head in found[0]
    }
