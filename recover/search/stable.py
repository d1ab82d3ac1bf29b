"""Search under C2 or C3 themselves, and not by way of C1: clamped features, or what they write, stay.

C1 forbids every move along what the clamped features read. C2 forbids less: that features change. Of each clamped
feature, position and site it says, with *awake* for what is not zero in the defended state,

    awake      its pre-activation stays, and it stays awake     equality `c = 0`, inequality `g <= 0`
    asleep     it stays asleep, anywhere below its threshold    inequality `g <= 0`

C3 has the same inequalities and a weaker equality: what all of a site write together stays. (Trades by which one
feature falls asleep as another wakes are left out: no gradient need lead back from there.) Where features compete, the
distance to the `k`-th largest of the others says who is awake. The budget (C4) is one more inequality. All are rows in
units of length; at the only site that a delta enters those of features that do not compete are linear in it.

The search is that of `recover.search.restoring`, from what C1 gives (under C3: what C2 gives) and then from no delta.
Of it this module says

1. *Which way*: the gradient of the score, projected onto what the equalities leave, and what is left by those
   inequalities that are met and that it would break (Rosen 1961).
2. *Restore*: Gauss-Newton on the equalities and on what is broken of the inequalities; each step is the shortest that
   mends them to first order. Linear rows are met at once: features end at their thresholds and not short of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange

from recover.defenses.clamps import Clamp, Set
from recover.defenses.defended import Defended
from recover.numerics.metrics import by_example, norm, relative_drift
from recover.saes.activations import AbsTopK, TopK
from recover.search.ascent import OnStep, Point, Schedule, clip, without_rounding
from recover.search.constraints.linear import ActivationStable, DecodeStable, EncoderOrthogonal
from recover.search.constraints.monitor import Jacobian, jacobian_row_space, passed
from recover.search.constraints.pinned import Pinned
from recover.search.pinned import find_pinned
from recover.search.restored import find_restored
from recover.search.restoring import RestoredSolution, search_restoring
from recover.types import Bool, Delta, Float, PerExample, Residual, Rows, Tensor

Stable = type[ActivationStable] | type[DecodeStable]
TOLERANCE = 1e-4
"""Relative drift that is allowed."""
INSIDE, NEAR = 1e-3, 1e-3
"""How far from its threshold a feature must stay, as a share of its distance in the defended state; and the share of
the length of delta within which an inequality counts as met."""
CORRECTIONS, TURNS = 8, 4
"""Gauss-Newton steps of one restoration, and rounds of keeping what a direction would break."""
OfRows = Float[Tensor, "batch row"]


def find_stable(
    defended: Defended,
    constraint: Stable,
    budget: float,
    schedule: Schedule | None = None,
    on_step: OnStep = None,
    *,
    tolerance: float = TOLERANCE,
) -> RestoredSolution:
    """Search for a delta of norm at most `budget` that brings the behavior back and keeps C2 or C3 at every site.

    Args:
        defended: a defense put into a model, with deltas after the clamp of its first site or of every one.
        constraint: `ActivationStable` for C2, `DecodeStable` for C3.
        budget: largest Frobenius norm of an example's delta; `inf` for none.
        schedule: how hard to search from each start.
        on_step: called with (steps done, examples still being searched) after every step.
        tolerance: largest drift of a result over all sites and positions, as a share of what the features are, or
            write, in the defended state. Where that is nothing there must be no drift at all.

    Returns:
        For each example the delta with the largest slack met within budget and tolerance, zero included. What C1 (under
        C3: C2) recovers within the tolerance is left as it is.

    Raises:
        InputError: the budget or the tolerance is not a positive number, or a delta enters elsewhere.
    """
    schedule = schedule or Schedule()
    if constraint is DecodeStable:
        stricter = find_stable(defended, ActivationStable, budget, schedule, on_step, tolerance=tolerance).delta
    elif len(defended.delta_sites) > 1:
        stricter = find_pinned(Pinned.of(defended), budget, schedule).delta
    else:
        stricter = find_restored(defended, budget, schedule, on_step, tolerance=tolerance).delta
    rules = _Rules.of(defended, constraint, budget, tolerance)
    return search_restoring(rules, [stricter, defended.zero_delta], budget, tolerance, schedule, on_step)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one pass with a delta shows: `rows` are `n_equal` equalities and then the inequalities."""

    score: PerExample
    slack: PerExample
    rows: OfRows
    n_equal: int
    drift: PerExample


@dataclass(frozen=True, eq=False)
class _Rules:
    """The `Restoration` of what C2 or C3 says must stay.

    Attributes:
        watched: the clamped features of each site, those of several clamps together.
        writes: what each of them writes, as coordinates in an orthonormal basis of what they write together.
        reference: for each site pre-activations, features and how far awake they are, `[batch pos k]`, without a delta.
    """

    defended: Defended
    constraint: Stable
    budget: float
    tolerance: float
    watched: tuple[Clamp, ...]
    writes: tuple[Float[Tensor, "rank k"], ...]
    reference: tuple[tuple[Tensor, Tensor, Tensor], ...]

    @classmethod
    def of(cls, defended: Defended, constraint: Stable, budget: float, tolerance: float) -> _Rules:
        sites = [(site, defended.defense.at(site)) for site in defended.defense.sites]
        watched = [Clamp(at[0].sae, [f for c in at for f in c.features], Set(0.0), site=site) for site, at in sites]
        with torch.no_grad():
            states = passed(defended, defended.zero_delta)[1]
            reference = tuple(_read(clamp, states[clamp.site]) for clamp in watched)
            writes = tuple(torch.linalg.qr(clamp.decoder.mT, mode="r").R for clamp in watched)
        return cls(defended, constraint, budget, tolerance, tuple(watched), writes, reference)

    def select(self, rows: Rows) -> _Rules:
        reference = tuple((pre[rows], z[rows], distance[rows]) for pre, z, distance in self.reference)
        return replace(self, defended=self.defended.select(rows), reference=reference)

    def look(self, delta: Delta) -> Point:
        leaf = delta.detach().requires_grad_(True)
        seen = self._see(leaf)
        (gradient,) = torch.autograd.grad(seen.score.sum(), leaf, retain_graph=True)
        free = self._uphill(leaf, seen, gradient)
        return Point(delta, seen.score.detach(), seen.slack.detach(), without_rounding(free, gradient), seen.drift)

    def free(self, delta: Delta, along: Delta) -> Delta:
        leaf = delta.detach().requires_grad_(True)
        return self._uphill(leaf, self._see(leaf), along)

    def within(self, delta: Delta) -> Delta:
        for _ in range(CORRECTIONS):
            leaf = delta.detach().requires_grad_(True)
            seen = self._see(leaf)
            amiss = (seen.drift > 0.5 * self.tolerance) | (norm(delta) > self.budget)
            if not bool(amiss.any()):
                break
            wrong = torch.cat([seen.rows[:, : seen.n_equal], torch.relu(seen.rows[:, seen.n_equal :])], dim=1).detach()
            back = jacobian_row_space(_jacobian(leaf, seen, wrong > 0)).solve(wrong).to(delta.dtype)
            delta = torch.where(by_example(amiss & torch.isfinite(norm(back))), delta - back, delta)
        return clip(delta, self.budget)

    def _see(self, delta: Delta) -> _Seen:
        """A pass with `delta`; differentiable."""
        logits, states = passed(self.defended, delta)
        equal, below, now, before = [], [], [], []
        for clamp, writes, reference in zip(self.watched, self.writes, self.reference, strict=True):
            pre_ref, z_ref, distance_ref = reference
            pre, z, distance = _read(clamp, states[clamp.site])
            units, awake = clamp.encoder.norm(dim=0), z_ref != 0
            units = torch.where(units > 0, units, 1.0)
            if self.constraint is DecodeStable:
                z, z_ref = (einsum(one, writes, "batch pos k, rank k -> batch pos rank") for one in (z, z_ref))
                equal.append((z - z_ref) / units.mean())
            else:
                equal.append(torch.where(awake, pre - pre_ref, 0.0) / units)
            now.append(z)
            before.append(z_ref)
            below.append((torch.where(awake, -distance, distance) + INSIDE * distance_ref.abs()) / units)
        if math.isfinite(self.budget):
            # As long as what is too long, near the budget. Aimed low, so that no rounding is above it.
            aim = self.budget * (1 - 2e-6)
            below.append((delta.square().sum(dim=(1, 2), keepdim=True) - aim**2) / (2 * aim))
        rows, n_equal = _flat(equal + below), sum(part[0].numel() for part in equal)
        drift = relative_drift(_flat(now), _flat(before)).detach()
        logits, behavior = logits.float(), self.defended.behavior
        return _Seen(behavior.score(logits), behavior.slack(logits), rows, n_equal, drift)

    def _uphill(self, leaf: Delta, seen: _Seen, along: Delta) -> Delta:
        """The part of a direction that keeps the equalities and breaks no inequality that is met."""
        near = seen.rows.detach() > -NEAR * rearrange(norm(leaf.detach()), "batch -> batch 1")
        near[:, : seen.n_equal] = False
        kept, jacobian = torch.zeros_like(near), _jacobian(leaf, seen, near)
        for _ in range(TURNS):
            free = jacobian_row_space(_jacobian(leaf, seen, kept)).project(along)
            broken = near & ~kept & (jacobian.push(free) > 0)
            if not bool(broken.any()):
                break
            kept = kept | broken
        return free


def _jacobian(leaf: Delta, seen: _Seen, kept: Bool[Tensor, "batch row"]) -> Jacobian:
    """The Jacobian of the equalities, and of the inequalities that are kept."""
    weight = kept.to(seen.rows.dtype)
    weight[:, : seen.n_equal] = 1.0
    return Jacobian(leaf, seen.rows, weight, EncoderOrthogonal(leaf.new_zeros(leaf.shape[2], 0)))


def _read(clamp: Clamp, state: Residual) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations, features, and by how much each is awake (negative where asleep), `[batch pos k]`."""
    pre, z, activation = clamp.pre_activations(state), clamp.read(state), clamp.sae.activation
    if not isinstance(activation, TopK | AbsTopK):
        return pre, z, pre - clamp.threshold
    every, own = clamp.sae.pre_activations(state), pre
    if isinstance(activation, AbsTopK):
        every, own = every.abs(), own.abs()
    if activation.k < every.shape[-1]:
        top = every.topk(activation.k + 1, dim=-1).values
        # The k-th largest of the others: the next one where it is itself among the k largest.
        last, following = top[..., -2:-1], top[..., -1:]
        own = own - torch.where(own >= last, following, last)
    return pre, z, own if isinstance(activation, AbsTopK) else torch.minimum(own, pre)


def _flat(parts: list[Tensor]) -> OfRows:
    return torch.cat([part.flatten(1) for part in parts], dim=1)
