"""What a model says under a defense, with or without a delta: free generation, clamps and delta live at every step.

A delta for an answer of `n` tokens has `n` columns at each of its sites (`generate`); beyond them the clamps alone act.
Drift during free generation is measured by a teacher-forced run over the text that was generated: it meets the same
states, column by column, and its reference is the same text under the clamps without a delta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from recover.defenses.clamps import Defense
from recover.defenses.defended import clamp_edits
from recover.models.generation import Columns, generate, n_answer
from recover.models.host import Edit, Model, Prompts
from recover.types import Float, Site, Surface, Tensor, TokenIds


def under(defense: Defense, delta: Mapping[Site, Float[Tensor, "batch pos d_model"]] | None = None) -> Columns:
    """Give the clamps as edits that `generate` runs, with the parts of a delta added after them."""
    parts = {site.index: part for site, part in (delta or {}).items()}

    def edits(first: int, last: int) -> dict[Site, Edit]:
        made = clamp_edits(defense, n_answer(first, last))

        def pushed(site: Site, clamp: Edit) -> Edit:
            part = parts[site.index][:, first : last + 1]

            def edit(h: Tensor, positions: TokenIds) -> Tensor:
                h = clamp(h, positions)
                start = h.shape[1] - (last - first + 1)
                reached = h[:, start : start + part.shape[1]] + part.to(h)
                return torch.cat([h[:, :start], reached.to(h.dtype), h[:, start + part.shape[1] :]], dim=1)

            return edit

        return {site: pushed(site, clamp) if site.index in parts else clamp for site, clamp in made.items()}

    return edits


def say(
    model: Model,
    prompts: Prompts,
    n_tokens: int,
    defense: Defense | None = None,
    delta: Float[Tensor, "batch site_pos d_model"] | None = None,
    *,
    surface: Surface = Surface(),
    stop: Sequence[int] = (),
) -> TokenIds:
    """Generate greedy answers `[batch pos]`, `NO_TOKEN` after their end.

    Args:
        model: the host model.
        prompts: without their answers.
        n_tokens: at most.
        defense: clamps, live at every step.
        delta: one an example, as a search gives it, for the first columns of the answer; needs a defense.
        surface: the sites that the delta enters at, always after the clamps.
        stop: tokens that end an answer.
    """
    edits = None
    if defense is not None:
        sites = surface.enters(defense.sites)
        parts = None if delta is None else dict(zip(sites, delta.chunk(len(sites), dim=1), strict=True))
        edits = under(defense, parts)
    return generate(model, prompts, n_tokens, edits, stop=stop)
