"""What a perturbation does downstream, beside what lifting the clamp does; and whether the model uses what it moves.

1. *Likeness*. Lifting the clamp moves the residual of each later layer, and the logits, from the defended to the
   undefended ones; the perturbation moves them from the defended to the recovered ones. The cosine of the two moves
   says how alike they are, layer by layer. Of the logits those count that the behavior does not read, where the clamp
   moves them: unrelated behavior that comes back as well tells an undone clamp from a written answer. A way of undoing
   that no decoder direction shows is seen in this way, and decoders of features that never fire are nothing.
2. *Restored*. The share of the distance between defended and undefended logits that the perturbation takes back.
3. *Use at base*. Without the defense, the residual's part along the perturbation is set to its mean over the examples:
   does the behavior still show? If it does, what the perturbation moves is not what the model itself uses. That such a
   test can see a use at all is shown by the clamp's own displacement, taken out in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange

from recover.defenses.defended import Defended
from recover.evidence.controls import Undefended, displacement
from recover.models.host import Change
from recover.search.ascent import scale_to
from recover.tasks.behaviors import Targeted, positions_read
from recover.types import Bool, Delta, Float, Int, PerExample, Residual, Site, Surface, Tensor

LAYERS = 4
"""Layers at which moves are compared, evenly from the one after the clamp to the last."""
HURT = 0.01
"""Share of all that the clamp moves in the logits, from which on the unrelated ones are read by themselves."""


@dataclass(frozen=True, eq=False)
class Undoing:
    """What deltas do downstream, one row an example.

    Attributes:
        layers: cosine of the perturbation's move of the residual with that of lifting the clamp, at some layers.
        likeness: the same for the logits.
        unrelated: whether `likeness` is of logits that the behavior does not read.
        restored: share of the distance to the undefended logits that is taken back; negative where it grows.
        without_find, without_clamp: the behavior shows at base without the part of the residual along the perturbation,
            and without the one along the clamp's displacement.
    """

    layers: Float[Tensor, "batch layer"]
    likeness: PerExample
    unrelated: Bool[Tensor, "batch"]
    restored: PerExample
    without_find: Bool[Tensor, "batch"]
    without_clamp: Bool[Tensor, "batch"]


def undoing(defended: Defended, delta: Delta) -> Undoing:
    """Compare what `delta [batch (site n_pos) d_model]` does downstream with what lifting the clamp does."""
    first = defended.entered_at(Surface("first") if len(defended.delta_sites) == 1 else defended.surface)
    base = Undefended.of(defended)
    reads, watched = positions_read(defended.behavior), _watched(defended)
    with torch.no_grad():
        lifted, at_base = _seen(base.suffix.residual, base.suffix, watched, reads)
        held, under = _moved(first, 0 * delta, watched, reads)
        back, found = _moved(first, delta, watched, reads)
    layers = torch.stack([_cosine(back[s] - held[s], lifted[s] - held[s]) for s in watched], dim=1)
    others = _unread(defended, under)
    lift, move = (at_base - under).flatten(1), (found - under).flatten(1)
    apart = torch.where(others, lift, 0.0)
    unrelated = apart.norm(dim=1) > HURT * lift.norm(dim=1)
    likeness = torch.where(unrelated, _cosine(torch.where(others, move, 0.0), apart), _cosine(move, lift))
    left = (at_base - found).flatten(1).norm(dim=1)
    return Undoing(
        layers=layers,
        likeness=likeness,
        unrelated=unrelated,
        restored=1 - left / lift.norm(dim=1),
        without_find=_shows_without(base, delta[:, : defended.suffix.n_pos]),
        without_clamp=_shows_without(base, displacement(defended)[:, : defended.suffix.n_pos]),
    )


def _watched(defended: Defended) -> list[Site]:
    """Sites above the first clamp, evenly to the last."""
    model, first = defended.suffix.model, defended.suffix.site.index
    places = torch.linspace(first + 1, model.n_layers, LAYERS).round().int().tolist()
    return [Site(index - 1, "post") for index in dict.fromkeys(places) if index > first]


def _seen(
    state: Residual, suffix: object, watched: list[Site], reads: int
) -> tuple[dict[Site, Residual], Float[Tensor, "batch ..."]]:
    """Residuals at the watched sites, and all logits, without the defense."""
    seen: dict[Site, Residual] = {}
    logits = suffix.logits(state, None, reads, changes=_watching(watched, seen))  # type: ignore[attr-defined]
    return seen, logits.float()


def _moved(
    defended: Defended, delta: Delta, watched: list[Site], reads: int
) -> tuple[dict[Site, Residual], Float[Tensor, "batch ..."]]:
    """Residuals at the watched sites, and all logits, with the defense and a delta."""
    seen: dict[Site, Residual] = {}
    whole = defended.asking(_Whole(reads))
    return seen, whole.logits(delta, changes=_watching(watched, seen)).float()


def _watching(watched: list[Site], seen: dict[Site, Residual]) -> Mapping[Site, Change]:
    def watch(site: Site) -> Change:
        def change(h: Tensor) -> Tensor:
            seen[site] = h.float()
            return h

        return change

    return {site: watch(site) for site in watched}


@dataclass(frozen=True)
class _Whole:
    """Reads every logit."""

    reads: int

    @property
    def tokens(self) -> None:
        return None

    def score(self, logits: Tensor) -> Tensor:
        return logits.flatten(1).sum(dim=1)

    slack = score

    def select(self, rows: Tensor) -> _Whole:
        return self


def _unread(defended: Defended, logits: Tensor) -> Bool[Tensor, "batch logit"]:
    """Which logits the behavior does not read; all but the target where it reads the whole vocabulary."""
    behavior = defended.behavior
    tokens: Int[Tensor, "batch choice"] | None = behavior.tokens
    if tokens is None and isinstance(behavior, Targeted) and logits.dim() == 2:
        tokens = behavior.target[:, None]
    others = torch.ones_like(logits, dtype=torch.bool)
    if tokens is not None and logits.dim() == 2 and int(tokens.max()) < logits.shape[1]:
        others = others.scatter(1, tokens, value=False)
    return others.flatten(1)


def _cosine(one: Tensor, other: Tensor) -> PerExample:
    """Cosine of each example's two moves; 0 where one of them is none."""
    flat = (rearrange(scale_to(x.flatten(1)[:, None], 1.0), "batch 1 d -> batch d") for x in (one, other))
    a, b = flat
    return (a * b).sum(dim=1)


def _shows_without(base: Undefended, along: Residual) -> Bool[Tensor, "batch"]:
    """Whether the behavior shows at base with the part along a direction set to its mean over the examples."""
    state = base.suffix.residual.float()
    unit = scale_to(along.float(), 1.0)
    part = ((state - state.mean(dim=0, keepdim=True)) * unit).sum(dim=(1, 2), keepdim=True)
    with torch.no_grad():
        return base(-part * unit)[1] > 0
