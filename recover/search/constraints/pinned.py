"""Pinned search: a delta at every clamped site, under which no clamped pre-activation of any site moves, exactly.

At site `m`, after its clamp, a delta consists of two parts (design, "Several sites"):

    delta_m = P_m v_m + A_m (A_m^T A_m)^+ (pre_ref - pre(state + P_m v_m))

1. *Free*. `P_m v_m` is what the search is free to choose: a part that the clamped features of the site do not read.
2. *Correction*. What the parts below did to the clamped pre-activations here is taken back by the smallest change
   that does: along the encoder columns alone. It is part of delta, in its norm and in what is saved, so that a replay
   adds plain vectors. At the first site nothing comes from below and it is zero.
3. *Norm*. The two parts are orthogonal at every site: `||delta||^2 = ||P v||^2 + ||correction||^2`. A search bounds the
   first; `Pinned.within` shortens it until the whole is within the budget.

Every pinned delta is of this form and every `v` gives one. With a pointwise SAE pinned pre-activations are pinned
features. All of it is differentiable, through the correction too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import einsum, rearrange

from recover.defenses.clamps import Clamp
from recover.defenses.defended import Defended
from recover.models.host import Change
from recover.numerics.metrics import by_example, norm
from recover.search.constraints.linear import EncoderOrthogonal
from recover.tasks.behaviors import Behavior
from recover.types import Delta, Float, InputError, PerExample, Residual, Rows, Site, Tensor, widened

HALVINGS = 30
"""Bisections of the share by which a delta is shortened until it is within the budget."""


@dataclass(frozen=True, eq=False)
class Pin:
    """The clamped pre-activations of one site, and where they are to stay.

    Attributes:
        clamps: those of the site.
        reference: their pre-activations in the defended state, one after another.
    """

    clamps: tuple[Clamp, ...]
    reference: Float[Tensor, "batch pos k"]

    @classmethod
    def at(cls, clamps: tuple[Clamp, ...], state: Residual) -> Pin:
        """What these clamps' features read in `state` stays."""
        return cls(clamps, _read(clamps, state))

    @cached_property
    def encoder(self) -> Float[Tensor, "d_model k"]:
        """`A`: the directions that are read."""
        return torch.cat([clamp.encoder for clamp in self.clamps], dim=1)

    @cached_property
    def answer(self) -> Float[Tensor, "k d_model"]:
        """`(A (A^T A)^+)^T`: the smallest change of the residual that moves each pre-activation by one, in float64."""
        inverse: Tensor = torch.linalg.pinv(self.encoder.double())
        return inverse

    def correction(self, state: Residual) -> Residual:
        """The smallest change of `state` after which the clamped pre-activations are at their reference."""
        missing = (self.reference - _read(self.clamps, state)).double()
        return einsum(missing, self.answer, "batch pos k, k d_model -> batch pos d_model").to(state.dtype)

    def select(self, rows: Rows) -> Pin:
        return Pin(self.clamps, self.reference[rows])


@dataclass(frozen=True, eq=False)
class FreeParts:
    """The linear space of `P_m v_m` over all sites: what a pinned search is free to choose."""

    sites: tuple[EncoderOrthogonal, ...]

    def project(self, delta: Delta) -> Delta:
        """The nearest free parts, site by site."""
        parts = rearrange(delta, "batch (site pos) d_model -> site batch pos d_model", site=len(self.sites))
        return torch.cat([space.project(part) for space, part in zip(self.sites, parts, strict=True)], dim=1)

    def select(self, rows: Rows) -> FreeParts:
        return self


@dataclass(frozen=True, eq=False)
class Pinned:
    """The objective of a pinned search: score and slack of the delta that free parts `v` give."""

    defended: Defended
    pins: Mapping[Site, Pin]

    @classmethod
    def of(cls, defended: Defended) -> Pinned:
        """Pin every clamped site of a defended batch where it is.

        Raises:
            InputError: a delta does not enter at every clamped site.
        """
        defense = defended.defense
        if defended.delta_sites != defense.sites:
            use = 'use defend(..., surface=Surface("every"))'
            raise InputError(f"pinned search: a delta must enter at every clamped site; {use}")
        states = defended.states()
        return cls(defended, {site: Pin.at(defense.at(site), widened(states[site])) for site in defense.sites})

    @property
    def free(self) -> FreeParts:
        """Where `v` may lie."""
        return FreeParts(tuple(EncoderOrthogonal(pin.encoder) for pin in self.pins.values()))

    @property
    def write_orthogonal(self) -> FreeParts:
        """Where `v` may lie under C1+: orthogonal to what the clamped features of its site write as well."""
        both = (torch.cat([pin.encoder, *(c.decoder.mT for c in pin.clamps)], dim=1) for pin in self.pins.values())
        return FreeParts(tuple(map(EncoderOrthogonal, both)))

    def orthogonal_to(self, written: Mapping[Site, Float[Tensor, "d_model written"]]) -> FreeParts:
        """Where `v` may lie: orthogonal also to these directions at each site."""
        both = (torch.cat([pin.encoder, written[site].to(pin.encoder)], dim=1) for site, pin in self.pins.items())
        return FreeParts(tuple(map(EncoderOrthogonal, both)))

    @property
    def behavior(self) -> Behavior:
        return self.defended.behavior

    @property
    def residual(self) -> Delta:
        """Where the free parts enter, as in `Defended`."""
        return self.defended.residual

    def __len__(self) -> int:
        return len(self.defended)

    @property
    def zero_delta(self) -> Delta:
        """`v = 0`."""
        return self.defended.zero_delta

    start = zero_delta

    def asking(self, behavior: Behavior) -> Pinned:
        """These examples with another behavior as the goal."""
        return Pinned(self.defended.asking(behavior), self.pins)

    def select(self, rows: Rows) -> Pinned:
        return Pinned(self.defended.select(rows), {site: pin.select(rows) for site, pin in self.pins.items()})

    def run(self, free: Delta) -> tuple[Float[Tensor, "batch ..."], Delta]:
        """Logits with the pinned delta of `free` added, and that delta; both differentiable."""
        parts = self.defended.by_site(free)
        added: dict[Site, Tensor] = {}

        def pinned(site: Site) -> Change:
            def change(h: Tensor) -> Tensor:
                pushed = h + parts[site]
                added[site] = parts[site] + self.pins[site].correction(widened(pushed))
                return h + added[site]

            return change

        first, *later = self.defended.delta_sites
        state = pinned(first)(self.defended.suffix.residual)
        logits = self.defended.changed_logits(state, {site: pinned(site) for site in later})
        return logits, torch.cat([added[site] for site in self.defended.delta_sites], dim=1)

    def logits(self, free: Delta) -> Float[Tensor, "batch ..."]:
        """Logits with the pinned delta of `free` added."""
        return self.run(free)[0]

    def __call__(self, delta: Delta) -> tuple[PerExample, PerExample]:
        """Score and slack, as a search asks for them; what it varies are the free parts."""
        logits = self.logits(delta).float()
        return self.behavior.score(logits), self.behavior.slack(logits)

    def downstream(self, delta: Delta) -> Float[Tensor, "batch n"]:
        """What is computed from the state under the pinned delta of these free parts, as `Defended.downstream`."""
        return self.defended.downstream(self.delta(delta))

    def delta(self, free: Delta) -> Delta:
        """The pinned delta of these free parts, corrections included: what is saved and replayed."""
        with torch.no_grad():
            return self.run(free)[1]

    def within(self, free: Delta, budget: float) -> Delta:
        """`free`, shortened where the whole delta would be longer than the budget, by the least that bisection finds.

        The length of a delta need not fall with that of its free parts, but it is zero where they are.
        """
        low, high = torch.zeros_like(norm(free)), torch.ones_like(norm(free))
        fits = norm(self.delta(free)) <= budget
        for _ in range(HALVINGS):
            if bool(fits.all()):
                break
            middle = (low + high) / 2
            inside = norm(self.delta(by_example(middle) * free)) <= budget
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
            if bool(((high - low) <= 1e-4 * high)[~fits].all()):
                break
        return by_example(torch.where(fits, 1.0, low)) * free


def _read(clamps: tuple[Clamp, ...], state: Delta) -> Float[Tensor, "batch pos k"]:
    return torch.cat([clamp.pre_activations(state) for clamp in clamps], dim=-1)
