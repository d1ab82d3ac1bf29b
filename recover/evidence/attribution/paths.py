"""Which components above the clamped site carry a recovery: attention heads and MLPs, by attribution and by doing.

With the outputs `c` of each component in the defended and the recovered run (`components`; at the positions that a
delta touches, as nothing before them differs):

1. *Through*: `dscore/dc . (c_rec - c_def)`, the gradient through everything above `c`: at the defended state, or
   averaged along the delta. To first order this is what putting `c_rec` into the defended run does. Components in
   series each carry the same effect, so these do not add up to the whole.
2. *Direct*: `dscore/dh . write`, with `h` the residual after the last block, the gradient averaged along the straight
   line between its two values, and `write` what the delta itself, each attention and each MLP add to `h_rec - h_def`.
   Blocks add, so that these do add up to `score(delta) - score(0)`, in any model, up to quadrature; what the clamps
   further up change counts as `rest`.
3. *Doing*: the recovered run with some components put back to what they gave when defended (does the recovery go?),
   and the defended run with these alone as when recovered (does it come?).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce

from recover.defenses.defended import Defended, adds
from recover.evidence.attribution.parts import POINTS, entering, first_order, nodes
from recover.models.components import Component, head_count
from recover.models.host import Change
from recover.types import Delta, Float, InputError, PerExample, Residual, Site, Tensor

ADDS_UP = 0.05
"""A share of the residual that sums of components may miss: rounding, in half precision too."""


@dataclass(frozen=True, order=True)
class Carrier:
    """One attention head, or the MLP of a block where `head` is None."""

    layer: int
    head: int | None = None

    def __str__(self) -> str:
        return f"L{self.layer} MLP" if self.head is None else f"L{self.layer} H{self.head}"

    @property
    def component(self) -> Component:
        """Where what it gives is read."""
        return Component(self.layer, "mlp" if self.head is None else "heads")


@dataclass(frozen=True, eq=False)
class Trace:
    """The outputs of one run.

    Attributes:
        score, slack: of the behavior.
        given: what each component gives at the positions that a delta touches, `[batch n_pos width]`.
        final: the residual after the last block there.
    """

    score: PerExample
    slack: PerExample
    given: Mapping[Component, Float[Tensor, "batch n_pos width"]]
    final: Residual


@dataclass(frozen=True, eq=False)
class Direct:
    """Effects on the score through the last residual alone, which add up to `effect` up to quadrature.

    Attributes:
        by_name: of the delta itself (`delta`), of each attention (`L7 attention`) and MLP (`L7 MLP`), and `rest`.
        effect: what the delta does to the score.
    """

    by_name: Mapping[str, PerExample]
    effect: PerExample


def above(defended: Defended) -> range:
    """The blocks above the first clamped site.

    Raises:
        InputError: there is none.
    """
    model, first = defended.suffix.model, defended.suffix.site.index
    if first >= model.n_layers:
        raise InputError("paths: no block is above the clamped site, so that nothing carries a recovery but the delta")
    return range(first, model.n_layers)


def carriers(defended: Defended) -> tuple[Carrier, ...]:
    """Every head and MLP above the first clamped site, in the order of a pass."""
    n_heads = head_count(defended.suffix.model.module)
    return tuple(Carrier(layer, head) for layer in above(defended) for head in (*range(n_heads), None))


def trace(defended: Defended, delta: Delta) -> Trace:
    """Run with a delta that enters after the clamp, and keep what every component gives.

    Raises:
        InputError: what attention and the MLPs give does not add up to what their blocks add, as where a block scales
            it, changes it in place, or adds the residual within the MLP.
    """
    last = _last(defended)
    given: dict[Any, Tensor] = {}
    parts = {
        place: keeps(given, place)
        for layer in above(defended)
        for place in (Component(layer, "heads"), Component(layer, "attention"), Component(layer, "mlp"))
    }
    with torch.no_grad():
        logits = defended.logits(delta, parts, {last: keeps(given, last)}).float()
    final = given.pop(last)
    if len(defended.defense.sites) == 1:  # clamps further up add to the residual as well
        _check_sum(defended.suffix.residual + delta.to(final.dtype), given, final)
    return Trace(defended.behavior.score(logits), defended.behavior.slack(logits), given, final)


def through(defended: Defended, delta: Delta, points: int = POINTS) -> dict[Carrier, PerExample]:
    """The effect on the score through each head and MLP; they do not add up, as some are in series.

    The gradient is averaged over `points` along the delta; with 0 points it is that at the defended state.
    """
    defended, delta = entering(defended, delta)
    places = {carrier.component for carrier in carriers(defended)}
    start, end = trace(defended, torch.zeros_like(delta)), trace(defended, delta)
    slopes = {place: torch.zeros_like(start.given[place]) for place in places}
    for share, weight in nodes(points):
        leaves = {place: torch.zeros_like(value).requires_grad_(True) for place, value in slopes.items()}
        logits = defended.logits(share * delta, {place: adds(leaf) for place, leaf in leaves.items()}).float()
        found = torch.autograd.grad(defended.behavior.score(logits).sum(), list(leaves.values()))
        for place, slope in zip(leaves, found, strict=True):
            slopes[place] += weight * slope
    n_heads = head_count(defended.suffix.model.module)
    effects: dict[Carrier, PerExample] = {}
    for place, slope in slopes.items():
        product = slope * (end.given[place] - start.given[place])
        if place.kind == "mlp":
            effects[Carrier(place.layer)] = reduce(product, "batch pos d_model -> batch", "sum")
        else:
            by_head = reduce(product, "batch pos (head d_head) -> head batch", "sum", head=n_heads)
            effects |= {Carrier(place.layer, head): effect for head, effect in enumerate(by_head)}
    return {carrier: effects[carrier] for carrier in carriers(defended)}


def direct(defended: Defended, delta: Delta, points: int = POINTS) -> Direct:
    """The effect on the score of what the delta, each attention and each MLP add to the last residual."""
    defended, delta = entering(defended, delta)
    start, end = trace(defended, torch.zeros_like(delta)), trace(defended, delta)
    moved = end.final - start.final
    slope = torch.zeros_like(moved)
    for share, weight in nodes(points):
        slope += weight * last_slope(defended, start.final + share * moved)
    added = torch.stack(list(defended.by_site(delta).values())).sum(dim=0).to(moved.dtype)
    writes = {"delta": added}
    for layer in above(defended):
        for place, word in ((Component(layer, "attention"), "attention"), (Component(layer, "mlp"), "MLP")):
            writes[f"L{layer} {word}"] = end.given[place] - start.given[place]
    writes["rest"] = moved - torch.stack(list(writes.values())).sum(dim=0)
    effects = {name: first_order(slope, write) for name, write in writes.items()}
    return Direct(effects, end.score - start.score)


def last_slope(defended: Defended, final: Residual) -> Residual:
    """The gradient of the score with respect to the residual after the last block, where that is `final`."""
    leaf = final.detach().requires_grad_(True)
    logits = defended.logits(defended.zero_delta, changes={_last(defended): _is(leaf)}).float()
    (slope,) = torch.autograd.grad(defended.behavior.score(logits).sum(), leaf)
    return slope


def patched(
    defended: Defended, delta: Delta, values: Trace, chosen: Iterable[Carrier]
) -> tuple[PerExample, PerExample]:
    """Score and slack with a delta that enters after the clamp, and some components as they were in another run."""
    n_heads = head_count(defended.suffix.model.module)
    heads: dict[Component, set[int | None]] = {}
    for carrier in chosen:
        heads.setdefault(carrier.component, set()).add(carrier.head)
    parts = {place: _replaces(values.given[place], some, n_heads) for place, some in heads.items()}
    with torch.no_grad():
        logits = defended.logits(delta, parts).float()
    return defended.behavior.score(logits), defended.behavior.slack(logits)


def _replaces(values: Tensor, some: set[int | None], n_heads: int) -> Change:
    """Put in another run's values: those of some heads, or all of an MLP's."""
    if None in some:
        return _is(values)
    mask = torch.tensor([head in some for head in range(n_heads)], device=values.device)

    def change(h: Tensor) -> Tensor:
        mine, theirs = (rearrange(x, "b pos (head d_head) -> b pos head d_head", head=n_heads) for x in (h, values))
        mixed = torch.where(rearrange(mask, "head -> head 1"), theirs.to(mine.dtype), mine)
        return rearrange(mixed, "b pos head d_head -> b pos (head d_head)")

    return change


def keeps(seen: dict[Any, Tensor], name: Any) -> Change:
    """Keep what is there under a name, unchanged."""

    def change(h: Tensor) -> Tensor:
        seen[name] = h.detach()
        return h

    return change


def _check_sum(start: Residual, given: Mapping[Component, Tensor], final: Residual) -> None:
    added = sum(value for place, value in given.items() if place.kind != "heads")
    apart = float((start + added - final).abs().max() / final.abs().max())
    if not apart <= ADDS_UP:
        raise InputError(
            f"components: what attention and the MLPs give is {apart:.1e} of the residual from adding up to what their "
            "blocks add, so that heads and MLPs of this model cannot be told apart; see `recover verify`"
        )


def _is(value: Tensor) -> Change:
    """Put a value in the place of what is there."""
    return lambda h: value.to(h.dtype)


def _last(defended: Defended) -> Site:
    """Give the site after the last block."""
    return Site(defended.suffix.model.n_layers - 1, "post")
