"""Where a recovery travels: the parts of a delta by the SAE's own lights, each replayed and knocked out.

At each site where a delta enters, with `E` the encoder, `d_j` the decoder's rows, `h` the state that arrives there
after the clamp (deltas below live) and `dz = E(h + delta) - E(h)`:

================  ===================================================================================================
`clamped`         `dz` of the clamped features, decoded
`top_k`           `dz` of the `k` other features of largest `||dz_j|| ||d_j||`, decoded
`other`           `dz` of all the rest, decoded
`error_linear`    of what the SAE does not reconstruct, `delta - (D(E(h + delta)) - D(E(h)))`, what a linear map from
                  the residual to the error predicts: `M delta`, `M` a ridge regression on held-out activations
`error_rest`      the rest of it
================  ===================================================================================================

1. *Parts* add up to the delta, by construction. `VIEWS` are sums of them: those of the published table are `full`,
   `error`, `free` (features that are not clamped), `top_k`, `clamped`. Decoder rows are not orthogonal, so that norms
   of parts are no shares.
2. *First order*. The effect of a part is the gradient of the score, with respect to the delta, times the part; with
   the gradient at the defended state, or averaged along the delta (integrated gradient; Gauss-Legendre points). Effects
   are linear in the part, so that those of the parts add up to that of the delta, which is `score(delta) - score(0)`
   where the model is linear, and along the delta in any model, up to quadrature. The gap is reported.
3. *Replay*: the part alone, added under the live clamps. *Knockout*: the delta without the part.

Source: reference page, "Recovery-path replay". The linear part and the first-order effects are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum, rearrange, reduce

from recover.defenses.defended import Defended
from recover.evidence.attribution.linear_error import LinearError
from recover.models.host import Change
from recover.saes.sae import SAE
from recover.types import Delta, InputError, Int, PerExample, Residual, Site, Surface, Tensor, widened

LEAVES = ("clamped", "top_k", "other", "error_linear", "error_rest")
SUMS = {"full": LEAVES, "error": ("error_linear", "error_rest"), "free": ("top_k", "other")}
ORDER = ("full", "error", "error_linear", "error_rest", "free", "top_k", "other", "clamped")
VIEWS: Mapping[str, tuple[str, ...]] = {name: SUMS.get(name, (name,)) for name in ORDER}
"""What is replayed and knocked out: the leaves and their sums."""
TOP_K = 16
POINTS = 8


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a batch of deltas, `[batch (site n_pos) d_model]` each."""

    leaves: Mapping[str, Delta]

    def view(self, name: str) -> Delta:
        """The sum of the leaves of a view."""
        return torch.stack([self.leaves[leaf] for leaf in VIEWS[name]]).sum(dim=0)


@dataclass(frozen=True, eq=False)
class View:
    """Measurements of one part, per example: scores and slacks in the behavior's units, norms in the residual's.

    Attributes:
        first_order: effect by the gradient at the defended state.
        integrated: effect by the gradient averaged along the delta.
        replay_score, replay_slack: with the part alone.
        knockout_score, knockout_slack: with the delta without the part.
    """

    norm: PerExample
    first_order: PerExample
    integrated: PerExample
    replay_score: PerExample
    replay_slack: PerExample
    knockout_score: PerExample
    knockout_slack: PerExample


@dataclass(frozen=True, eq=False)
class Attribution:
    """The attribution of a batch of deltas to their parts.

    Attributes:
        defended: the score without a delta.
        recovered: the score with it.
        views: by name.
        deltas: those of the views, as they were replayed: after the clamp.
    """

    defended: PerExample
    recovered: PerExample
    views: Mapping[str, View]
    deltas: Mapping[str, Delta]

    @property
    def effect(self) -> PerExample:
        """Effect of the delta on the score, `[batch]`."""
        return self.recovered - self.defended

    @property
    def gap(self) -> PerExample:
        """Share of the effect that first order misses: 0 where the score is linear along the delta."""
        return 1 - self.views["full"].first_order / self.effect

    @property
    def integrated_gap(self) -> PerExample:
        """Share of the effect that the integrated gradient misses, by quadrature and jumps in SAEs of later clamps."""
        return 1 - self.views["full"].integrated / self.effect

    def share(self, name: str) -> PerExample:
        """The part's share of the integrated effect."""
        return self.views[name].integrated / self.views["full"].integrated


def attribute(
    defended: Defended,
    delta: Delta,
    linear: Mapping[Site, LinearError] | None = None,
    *,
    top_k: int = TOP_K,
    points: int = POINTS,
    views: Sequence[str] = tuple(VIEWS),
) -> Attribution:
    """Split deltas into parts and measure the effect of each part.

    Args:
        defended: the examples; where their deltas enter before the clamp, what is split is what that changes after it.
        delta: one for each, as saved; a pinned one with its corrections.
        linear: of each site where a delta enters; without it no error counts as linear.
        top_k: how many features that are not clamped count as the largest.
        points: of the integral.
        views: those that are looked at; `full` always is.

    Raises:
        InputError: `top_k` or `points` is below 1.
    """
    if top_k < 1 or points < 1:
        raise InputError(f"attribution: top_k {top_k}, points {points}; both must be at least 1")
    after, delta = entering(defended, delta)
    parts = parts_of(after, delta, linear, top_k=top_k)
    here, along = gradient(after, delta, 0), gradient(after, delta, points)
    whole = parts.view("full")
    with torch.no_grad():
        start, end = after(torch.zeros_like(delta))[0], after(delta)[0]
        found: dict[str, View] = {}
        deltas = {name: parts.view(name) for name in dict.fromkeys(("full", *views))}
        for name, part in deltas.items():
            replay, knockout = after(part), after(whole - part)
            size = part.flatten(1).norm(dim=1)
            found[name] = View(size, first_order(here, part), first_order(along, part), *replay, *knockout)
    return Attribution(start, end, found, deltas)


def entering(defended: Defended, delta: Delta) -> tuple[Defended, Delta]:
    """Rewrite perturbations as ones that enter after the clamp, with the examples to match."""
    if defended.surface.placement == "after_clamp":
        return defended, delta
    with torch.no_grad():
        moved = defended.perturbed(delta) - defended.suffix.residual
    return defended.entered_at(Surface()), moved


def parts_of(
    defended: Defended, delta: Delta, linear: Mapping[Site, LinearError] | None = None, *, top_k: int = TOP_K
) -> Parts:
    """The parts of deltas that enter after the clamps; arguments as of `attribute`."""
    places = []
    for site, state in _arriving(defended, delta).items():
        part = widened(defended.by_site(delta)[site])
        clamps, map_ = defended.defense.at(site), None if linear is None else linear[site]
        held = torch.cat([clamp.indices for clamp in clamps])
        places.append(split(clamps[0].sae, held, widened(state), part, map_, top_k))
    return Parts({name: torch.cat([place[name] for place in places], dim=1) for name in LEAVES})


def split(
    sae: SAE, held: Int[Tensor, "k"], state: Residual, delta: Residual, linear: LinearError | None, top_k: int
) -> dict[str, Residual]:
    """Split at one site what is added (`delta`) to the state that arrives after the clamp of the features `held`."""
    with torch.no_grad():
        change = sae.encode(state + delta) - sae.encode(state)
    free = torch.ones(sae.d_sae, dtype=torch.bool, device=change.device)
    free[held] = False
    # A feature counts at all positions of an example or at none.
    size = reduce(change.square(), "batch pos d_sae -> batch d_sae", "sum").sqrt() * sae.W_dec.norm(dim=1)
    size = size.where(free, -1.0)
    largest = torch.zeros_like(size, dtype=torch.bool)
    largest.scatter_(1, size.topk(min(top_k, sae.d_sae), dim=1).indices, True)
    largest &= free

    def decoded(which: Tensor) -> Residual:
        some = change * rearrange(which.to(change.dtype), "batch d_sae -> batch 1 d_sae")
        return einsum(some, sae.W_dec, "batch pos d_sae, d_sae d_model -> batch pos d_model")

    chosen = {"clamped": (~free).expand_as(largest), "top_k": largest, "other": free & ~largest}
    parts = {name: decoded(which) for name, which in chosen.items()}
    error = delta - torch.stack(list(parts.values())).sum(dim=0)
    predicted = torch.zeros_like(delta) if linear is None else linear.predicted(delta)
    return parts | {"error_linear": predicted, "error_rest": error - predicted}


def _arriving(defended: Defended, delta: Delta) -> dict[Site, Residual]:
    """What comes to each site where a delta enters, after the clamp there and before its own part of the delta."""
    parts = defended.by_site(delta)
    first, *later = parts
    seen = {first: defended.suffix.residual}

    def watch(site: Site) -> Change:
        def change(h: Tensor) -> Tensor:
            seen[site] = h
            return h + parts[site]

        return change

    if later:
        with torch.no_grad():
            state = defended.suffix.residual + parts[first]
            defended.changed_logits(state, {site: watch(site) for site in later})
    return {site: seen[site] for site in parts}


def gradient(defended: Defended, delta: Delta, points: int) -> Delta:
    """The gradient of the score, averaged along `delta` by Gauss-Legendre quadrature of so many points.

    With 0 points, that at no delta.
    """
    total = torch.zeros_like(delta)
    for share, weight in nodes(points):
        leaf = (share * delta.detach()).requires_grad_(True)
        (slope,) = torch.autograd.grad(defended(leaf)[0].sum(), leaf)
        total += weight * slope
    return total


def nodes(points: int) -> list[tuple[float, float]]:
    """Gauss-Legendre points between 0 and 1 with their weights; the start alone where `points` is 0."""
    if points == 0:
        return [(0.0, 1.0)]
    places, weights = np.polynomial.legendre.leggauss(points)
    return [(float(at + 1) / 2, float(weight) / 2) for at, weight in zip(places, weights, strict=True)]


def first_order(slope: Delta, part: Delta) -> PerExample:
    """The effect of a part where the score has this gradient."""
    return einsum(slope, part.to(slope.dtype), "batch pos d_model, batch pos d_model -> batch")
