"""Watch what the clamped features of every site do when a delta enters at the first, and differentiate it.

`Phi(delta)` stacks the pre-activations of the clamped features of all sites, at the positions that a delta touches,
read *after* the clamp of each site: drift is measured there (reference: Definitions). Not every row must be kept:

1. *Active* features, those that are not zero in the defended state, stay at their pre-activation.
2. *Inactive* ones are free below their threshold. One that comes near it is brought back to `threshold - BACK gap`,
   with `gap` its distance in the defended state; a search that would go on toward the threshold is turned aside.
3. Where features compete there is no threshold, and all are kept.

Rows are in units of length, pre-activation by norm of the encoder column. At the first site C1 keeps all features
exactly (without C1, they are rows like those of later sites). Of what C1 leaves, `J = d Phi / d delta` gives the row
space that a delta must keep out of:

    P v = v - J^T (J J^T)^+ J v        nearest delta that moves no kept row, to first order
    J^+ r                              shortest delta that moves the kept rows by r

- *Few rows*: `J` itself, by batched backward passes, and those of its singular values above `tolerance` of the largest.
- *Many*: by `least_squares`, which stops at the same tolerance and stores nothing of size rows x columns. `J^T w` is
  one backward pass; it is linear in `w`, so its gradient along `v` is `J v`. Attention is computed in the open
  ("math"), as fused kernels have no second derivative.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Shaped
from torch.nn.attention import SDPBackend, sdpa_kernel

from recover.defenses.clamps import Clamp
from recover.defenses.defended import Defended
from recover.models.host import Change
from recover.numerics.least_squares import cgls
from recover.numerics.metrics import relative_drift
from recover.search.constraints.first_order import _gradients
from recover.search.constraints.linear import EncoderOrthogonal
from recover.tasks.behaviors import Behavior
from recover.types import Bool, Delta, Float, InputError, Int, PerExample, Residual, Rows, Site, Tensor

NEAR, BACK, ASIDE = 0.05, 0.2, 0.3
"""Shares of its gap: an inactive feature as near as the first is brought back to the second; a search turns aside at
the third, so that what was brought back is not run into again."""
DENSE_ROWS, DENSE_NUMBERS = 256, 2**25
"""Rows, and numbers in the Jacobian of a batch, up to which it is stored."""
STEPS = 200
"""Steps of conjugate gradients at most."""
TOLERANCE = 1e-5
"""Share of the largest singular value up to which what back-propagation gives is rounding: models compute norms in
float32 even where their weights are in float64."""

OfRows = Float[Tensor, "batch row"]


@dataclass(frozen=True, eq=False)
class Watched:
    """One pass with a delta: logits, and clamped features by site, clamp, position, feature; differentiable."""

    logits: Float[Tensor, "batch ..."]
    pre: OfRows
    features: OfRows

    def graded(self, behavior: Behavior, leaf: Delta) -> tuple[PerExample, PerExample, Delta]:
        """Score, slack and the score's gradient at `leaf`, the delta that was watched; the graph is kept."""
        score, slack = behavior.score(self.logits.float()), behavior.slack(self.logits.float())
        (gradient,) = torch.autograd.grad(score.sum(), leaf, retain_graph=True)
        return score.detach(), slack.detach(), gradient

    def select(self, rows: Rows) -> Watched:
        return Watched(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def detached(self) -> Watched:
        """The numbers alone."""
        return Watched(**{field.name: getattr(self, field.name).detach() for field in fields(self)})


@dataclass(frozen=True, eq=False)
class Monitor:
    """A defended batch whose clamped features are watched at every site.

    Attributes:
        reference: without a delta.
        c1: whether the features of the first site are kept exactly, all of them.
    """

    defended: Defended
    reference: Watched
    c1: bool = True

    @classmethod
    def of(cls, defended: Defended, *, c1: bool = True) -> Monitor:
        """Watch a defended batch.

        Raises:
            InputError: a delta enters elsewhere than after the clamp of the first site.
        """
        if defended.delta_sites != defended.defense.sites[:1] or defended.surface.placement != "after_clamp":
            use = 'use defend(..., surface=Surface("first", "after_clamp"))'
            raise InputError(f"restoration: a delta must enter at the first clamped site alone, after the clamp; {use}")
        with torch.no_grad():
            return cls(defended, _watch(defended, defended.zero_delta), c1)

    def watch(self, delta: Delta) -> Watched:
        """Logits and clamped features with `delta` added."""
        return _watch(self.defended, delta)

    def select(self, rows: Rows) -> Monitor:
        return Monitor(self.defended.select(rows), self.reference.select(rows), self.c1)

    @cached_property
    def first(self) -> EncoderOrthogonal:
        """C1 at the first site; nothing, without it."""
        whole = EncoderOrthogonal.of(*self.defended.defense.at(self.defended.defense.sites[0]))
        return whole if self.c1 else EncoderOrthogonal(whole.directions[:, :0])

    @cached_property
    def watched(self) -> Bool[Tensor, "row"]:
        """Which rows C1 does not keep."""
        first = self.defended.defense.sites[0].index
        free = [torch.full((len(c.features),), c.site.index != first or not self.c1) for c in self._clamps]
        return torch.cat([self._by_row(one) for one in free]).to(self.reference.pre.device)

    @cached_property
    def units(self) -> Float[Tensor, "row"]:
        """What a row is divided by: the norm of its encoder column; 1 where that reads nothing."""
        read = torch.cat([self._by_row(clamp.encoder.norm(dim=0)) for clamp in self._clamps])
        return torch.where(read > 0, read, 1.0)

    @cached_property
    def threshold(self) -> Float[Tensor, "row"]:
        """The threshold of each row; NaN where features compete."""
        return torch.cat([self._by_row(clamp.threshold) for clamp in self._clamps]).to(self.reference.pre)

    def drift(self, watched: Watched) -> PerExample:
        """`||z_S(h_rec) - z_S(h_def)|| / ||z_S(h_def)||`, over all sites and positions."""
        return relative_drift(watched.features, self.reference.features)

    @property
    def active(self) -> Bool[Tensor, "batch row"]:
        """Which rows stay where they are (1 and 3 above)."""
        return (self.reference.features != 0) | self.threshold.isnan()

    def near(self, watched: Watched, share: float = ASIDE) -> Bool[Tensor, "batch row"]:
        """Which inactive ones are nearer to their threshold than this share of their gap, or above it."""
        return ~self.active & (watched.pre > self.threshold - share * self._gap)

    def kept(self, watched: Watched) -> Bool[Tensor, "batch row"]:
        """Which rows a restoration brings back: the active ones, and what has come too near to its threshold."""
        return self.active | self.near(watched, NEAR)

    def moved(self, watched: Watched) -> OfRows:
        """How far each kept row is from where it should be, in units of length; 0 for the others."""
        goal = torch.where(self.active, self.reference.pre, self.threshold - BACK * self._gap)
        return torch.where(self.kept(watched), (watched.pre - goal) / self.units, 0.0)

    @property
    def _gap(self) -> OfRows:
        return (self.threshold - self.reference.pre).clamp(min=0)

    @property
    def _clamps(self) -> list[Clamp]:
        return [clamp for site in self.defended.defense.sites for clamp in self.defended.defense.at(site)]

    def _by_row(self, values: Shaped[Tensor, "k"]) -> Shaped[Tensor, "row"]:
        return repeat(values, "k -> (pos k)", pos=self.defended.suffix.n_pos)


def passed(defended: Defended, delta: Delta) -> tuple[Float[Tensor, "batch ..."], dict[Site, Residual]]:
    """Logits with `delta` added where it enters, and the residual after each clamp and delta; differentiable twice."""
    parts = defended.by_site(delta)
    seen: dict[Site, Tensor] = {defended.suffix.site: defended.suffix.residual + parts[defended.suffix.site]}

    def watching(site: Site) -> Change:
        def change(h: Tensor) -> Tensor:
            seen[site] = h + parts[site] if site in parts else h
            return seen[site]

        return change

    with sdpa_kernel(SDPBackend.MATH):
        later = {site: watching(site) for site in defended.defense.sites[1:]}
        logits = defended.changed_logits(seen[defended.suffix.site], later)
    return logits, seen


def _watch(defended: Defended, delta: Delta) -> Watched:
    logits, seen = passed(defended, delta)
    clamps = [(clamp, seen[site]) for site in defended.defense.sites for clamp in defended.defense.at(site)]
    pre = torch.cat([_flat(clamp.pre_activations(h)) for clamp, h in clamps], dim=1)
    return Watched(logits, pre, torch.cat([_flat(clamp.read(h)) for clamp, h in clamps], dim=1))


@dataclass(frozen=True, eq=False)
class Jacobian:
    """The kept rows of `Phi` at one delta, restricted to C1: known by what it makes of vectors.

    Attributes:
        leaf: the delta.
        pre: `Phi` there, with the graph that leads to it.
        weight: what each row counts: 0 where it is not kept.
        first: C1.
    """

    leaf: Delta
    pre: OfRows
    weight: OfRows
    first: EncoderOrthogonal

    @classmethod
    def at(cls, monitor: Monitor, leaf: Delta, watched: Watched, kept: Bool[Tensor, "batch row"]) -> Jacobian:
        """At `leaf`, where `watched` was seen (with gradients), for those of the rows `kept` that C1 does not keep."""
        weight = torch.where(kept & monitor.watched, 1 / monitor.units, 0.0)
        return cls(leaf, watched.pre, weight, monitor.first)

    @property
    def rows(self) -> Int[Tensor, "row"]:
        """Rows that are kept in some example."""
        return self.weight.any(dim=0).nonzero().flatten()

    def pull(self, w: OfRows) -> Delta:
        """`J^T w`, in float64."""
        (pulled,) = torch.autograd.grad(self.pre, self.leaf, (w * self.weight).to(self.pre.dtype), retain_graph=True)
        return self.first.project(pulled.double())

    def push(self, v: Delta) -> OfRows:
        """`J v`, in float64."""
        along, pulled = self._linear
        v = self.first.project(v.double()).to(pulled.dtype)
        (pushed,) = torch.autograd.grad(pulled, along, v, retain_graph=True)
        return pushed.double() * self.weight.double()

    def table(self) -> Float[Tensor, "batch row n"]:
        """`J` of `rows`, in float64."""
        rows = self.rows
        # Examples do not see each other, so that the gradient of a sum over them holds the row of each.
        table = rearrange(_gradients(self.pre.sum(dim=0)[rows], self.leaf), "row batch ... -> batch row ...").double()
        table = self.first.null_space.project(table) * rearrange(self.weight[:, rows], "batch row -> batch row 1 1")
        return rearrange(table, "batch row pos d_model -> batch row (pos d_model)")

    @cached_property
    def _linear(self) -> tuple[OfRows, Delta]:
        """A vector over rows, and `J^T` of it with the graph between."""
        along = torch.zeros_like(self.pre, requires_grad=True)
        (pulled,) = torch.autograd.grad(self.pre, self.leaf, along, create_graph=True)
        return along, pulled


@runtime_checkable
class RowSpace(Protocol):
    """The space that a delta must keep out of, and the way back."""

    def project(self, v: Residual) -> Residual:
        """`P v`: the nearest delta within C1 that moves no kept row, to first order."""

    def solve(self, r: Tensor) -> Residual:
        """`J^+ r`: the shortest delta within C1 that moves the kept rows by `r [batch row]`."""


@dataclass(frozen=True, eq=False)
class DenseRows:
    """The row space by the singular values of a stored Jacobian.

    Attributes:
        jacobian: where it is from.
        left, inverse, right: singular vectors, and the inverse of what counts of the singular values.
    """

    jacobian: Jacobian
    rows: Int[Tensor, "row"]
    left: Float[Tensor, "batch row rank"]
    inverse: Float[Tensor, "batch rank"]
    right: Float[Tensor, "batch rank n"]

    @classmethod
    def of(cls, jacobian: Jacobian, tolerance: float) -> DenseRows:
        # What is not finite is met again in the score's gradient, and a search says so.
        table = jacobian.table().nan_to_num(0.0, 0.0, 0.0)
        left, singular, right = torch.linalg.svd(table, full_matrices=False)
        counts = singular > tolerance * singular.amax(dim=1, keepdim=True)
        inverse = torch.where(counts, 1 / singular, 0.0)
        return cls(jacobian, jacobian.rows, left, inverse, right * rearrange(counts, "batch rank -> batch rank 1"))

    def project(self, v: Residual) -> Residual:
        free = _flat(self.jacobian.first.project(v.double()))
        # Twice, as an error relative to what is taken away is large where little is left.
        for _ in range(2):
            seen = einsum(free, self.right, "batch n, batch rank n -> batch rank")
            free = free - einsum(seen, self.right, "batch rank, batch rank n -> batch n")
        return self.jacobian.first.project(_unflat(free, v)).to(v.dtype)

    def solve(self, r: OfRows) -> Residual:
        seen = einsum(r[:, self.rows].double(), self.left, "batch row, batch row rank -> batch rank") * self.inverse
        return _unflat(einsum(seen, self.right, "batch rank, batch rank n -> batch n"), self.jacobian.leaf)


@dataclass(frozen=True, eq=False)
class IteratedRows:
    """The row space by conjugate gradients; where they are cut short, the measured drift shows it."""

    jacobian: Jacobian
    tolerance: float
    steps: int = STEPS

    def project(self, v: Residual) -> Residual:
        start = self.jacobian.first.project(v.double())
        found = cgls(self._pull, self._push, _flat(start), tolerance=self.tolerance, steps=self.steps)
        return self.jacobian.first.project(_unflat(found.residual, v)).to(v.dtype)

    def solve(self, r: OfRows) -> Residual:
        found = cgls(self._push, self._pull, r.double(), tolerance=self.tolerance, steps=self.steps)
        return _unflat(found.x, self.jacobian.leaf)

    def _pull(self, w: OfRows) -> Float[Tensor, "batch n"]:
        return _flat(self.jacobian.pull(w))

    def _push(self, v: Float[Tensor, "batch n"]) -> OfRows:
        return self.jacobian.push(_unflat(v, self.jacobian.leaf))


def jacobian_row_space(jacobian: Jacobian, *, dense: bool | None = None, tolerance: float = TOLERANCE) -> RowSpace:
    """The row space of a Jacobian, stored where it is small and iterated where it is large.

    Args:
        jacobian: at one delta.
        dense: whether to store it; by default where it is small.
        tolerance: share of the largest singular value up to which one counts as zero, and precision of the projection.
    """
    n_rows = len(jacobian.rows)
    if dense is None:
        dense = n_rows <= DENSE_ROWS and n_rows * jacobian.leaf.numel() <= DENSE_NUMBERS
    return DenseRows.of(jacobian, tolerance) if dense and n_rows else IteratedRows(jacobian, tolerance)


def _flat(delta: Residual) -> Float[Tensor, "batch n"]:
    return rearrange(delta, "batch pos d_model -> batch (pos d_model)")


def _unflat(flat: Float[Tensor, "batch n"], like: Residual) -> Residual:
    return rearrange(flat, "batch (pos d_model) -> batch pos d_model", pos=like.shape[1])
