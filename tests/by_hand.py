"""Clamps written out by hand: sae_lens's own encoder, loops over positions and features, hooks on the plain module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recover.defenses.clamps import Clamp, Defense, Floor, Mode, Scale, Set
from recover.saes.sae import SAE, from_sae_lens
from recover.types import Site
from tests.models import D_MODEL, plain_forward
from tests.saes import random_sae

D_SAE = 24
Edit = tuple[Any, tuple[int, ...], Mode, bool, str]
"""A clamp as plain values: sae_lens SAE, features, mode, only_active, positions."""
Edits = dict[Site, list[Edit]]


def write(mode: Mode, z: Tensor) -> Tensor:
    match mode:
        case Set(value):
            return torch.full_like(z, value)
        case Scale(factor):
            return z * factor
        case Floor(value):
            return torch.maximum(z, torch.tensor(value, dtype=z.dtype))


def clamped(h: Tensor, edits: list[Edit], skip_first: int = 0) -> Tensor:
    """`D(clamp(E(h))) + h - D(E(h))` for one prompt `[pos d_model]`, in sae_lens's words."""
    sae = edits[0][0]
    z = sae.encode(h)
    edited = z.clone()
    for _, features, mode, only_active, positions in edits:
        for t in range(skip_first, len(h)):
            for f in features:
                if positions == "last" and t < len(h) - 1:
                    continue
                if not only_active or z[t, f] != 0:
                    edited[t, f] = write(mode, z[t, f])
    return sae.decode(edited) + h - sae.decode(z)


def clamped_forward(
    module: nn.Module, ids: Tensor, push: Tensor, edits: Edits, placement: str, skip_first: int = 0
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Last logits of one prompt under the clamps, `push [n_pos d_model]` at the first site, and the edited states."""
    first, after = min(edits, key=lambda site: site.index), {}

    def change(site: Site) -> Any:
        def at(h: Tensor) -> Tensor:
            extra = torch.cat([torch.zeros(len(h) - len(push), D_MODEL), push]) if site == first else 0
            if placement == "before_clamp":
                h = clamped(h + extra, edits[site], skip_first)
            else:
                h = clamped(h, edits[site], skip_first) + extra
            after[site] = h.detach()
            return h

        return at

    logits, _ = plain_forward(module, ids, {site: change(site) for site in edits})
    return logits[-1], after


def defense_of(edits: Edits, **options: Any) -> Defense:
    """The same clamps as the code under test has them."""
    folded: dict[int, SAE] = {}
    for here in edits.values():
        folded[id(here[0][0])] = from_sae_lens(here[0][0])
    return Defense(
        tuple(
            Clamp(folded[id(sae)], features, mode, only_active, positions, site)  # type: ignore[arg-type]
            for site, here in edits.items()
            for sae, features, mode, only_active, positions in here
        ),
        **options,
    )


def sae_lens_sae(architecture: str, seed: int = 0) -> Any:
    """A random SAE of the tiny models' width, as sae_lens has it."""
    options = {"k": 6} if architecture == "topk" else {}
    sae = random_sae(architecture, seed=seed, d_model=D_MODEL, d_sae=D_SAE, **options)
    return sae.requires_grad_(False)
