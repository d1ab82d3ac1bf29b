"""Clamps: edits of SAE features in a residual, with everything else left as it is.

The defended state (reference: Definitions) is `h_def = D(clamp_S(E(h))) + e`. The features outside `S` and
the error cancel, so that

    h_def = h + (z'_S - z_S) @ W_dec[S]

which costs `k` columns instead of the whole dictionary, and returns `h` bit for bit where nothing is edited.

Clamp conventions differ in the field, so each is named: a *mode* (`Set`, `Scale`, `Floor`), `only_active` or
not, and the positions. Several clamps at one site edit one decomposition *together*, each reading the
unedited residual; this has a meaning only for disjoint features of one SAE.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsIndex

import torch
from einops import einsum, rearrange

from recover.saes.sae import SAE
from recover.types import Float, InputError, Int, Mask, Positions, Residual, Site, Tensor

Number = float | int  # to a run-time type checker an int is no float
Values = Number | tuple[Number, ...]
"""One for all clamped features, or one for each in their order."""


class _Finite:
    """A mode, whose values must be finite."""

    def __post_init__(self) -> None:
        for given in vars(self).values():
            for value in given if isinstance(given, tuple) else (given,):
                if not math.isfinite(value):
                    mode = type(self).__name__.lower()
                    raise InputError(f"clamp: {mode} {value} is not finite; give a finite number")


@dataclass(frozen=True)
class Set(_Finite):
    """Write a value, whatever the activation was."""

    value: Values

    def __call__(self, z: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        return torch.zeros_like(z) + _like(self.value, z)


@dataclass(frozen=True)
class Scale(_Finite):
    """Multiply the activation."""

    factor: Values

    def __call__(self, z: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        return _like(self.factor, z) * z


@dataclass(frozen=True)
class Floor(_Finite):
    """Raise the activation to at least a value."""

    value: Values

    def __call__(self, z: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        return torch.maximum(z, _like(self.value, z).expand_as(z))


Mode = Set | Scale | Floor


@dataclass(frozen=True, eq=False, init=False)
class Clamp:
    """An edit of `features` at a site.

    Attributes:
        only_active: leave a feature that is zero alone.
        positions: `all`; `prompt`; `last`, the last column of the prompt; or `answer`, what follows the prompt.
        site: by default the SAE's own.

    Raises:
        InputError: no features, one that is out of range or named twice, no site, or not as many values as features.
    """

    sae: SAE
    features: tuple[int, ...]
    mode: Mode
    only_active: bool
    positions: Positions
    site: Site

    def __init__(
        self,
        sae: SAE,
        features: Iterable[SupportsIndex],
        mode: Mode,
        only_active: bool = True,
        positions: Positions = "all",
        site: Site | None = None,
    ) -> None:
        site = site or sae.site
        if site is None:
            raise InputError("clamp: the SAE does not say where it reads; give the clamp a site")
        chosen = _checked(features, sae.d_sae)
        given = mode.factor if isinstance(mode, Scale) else mode.value
        if isinstance(given, tuple) and len(given) != len(chosen):
            raise InputError(f"clamp: {len(given)} values for {len(chosen)} features; give one for all, or one each")
        values = (sae, chosen, mode, only_active, positions, site)
        vars(self).update(zip(self.__dataclass_fields__, values, strict=True))

    @cached_property
    def indices(self) -> Int[Tensor, "k"]:
        return torch.tensor(self.features, device=self.sae.device)

    @cached_property
    def encoder(self) -> Float[Tensor, "d_model k"]:
        """`A`: the directions that the clamped features read."""
        return self.sae.W_enc[:, self.indices]

    @cached_property
    def decoder(self) -> Float[Tensor, "k d_model"]:
        """The directions that the clamped features write."""
        return self.sae.W_dec[self.indices]

    @cached_property
    def threshold(self) -> Float[Tensor, "k"]:
        """The pre-activation at or below which each clamped feature is zero; NaN where features compete."""
        return self.sae.activation.threshold(self.indices)

    def read(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        """The clamped features of a residual."""
        return self.sae.read(x, self.indices) if self._selected is None else self._selected.encode(x)

    def pre_activations(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        """The pre-activations of the clamped features."""
        return self.sae.pre_activations(x, self.indices)

    def reference(self, x_def: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        """The clamped features, read again *after* the clamp: drift is measured from these."""
        return self.read(x_def)

    def features_after(self, z: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        """Edit the activations `z` as the clamp does."""
        # Not `z > 0`: the features of an AbsTopK SAE are active at negative values too.
        return torch.where(z != 0, self.mode(z), z) if self.only_active else self.mode(z)

    def displacement(self, x: Residual, mask: Mask | None = None, n_answer: int = 0) -> Residual:
        """`h_def - h`, in the dtype of the SAE; arguments as in `apply`."""
        z = self.read(x)
        change = self.features_after(z) - z
        edited = self.edited(x, mask, n_answer)
        if edited is not None:
            change = change.where(rearrange(edited, "batch pos -> batch pos 1"), 0.0)
        return einsum(change, self.decoder, "batch pos k, k d_model -> batch pos d_model")

    def apply(self, x: Residual, mask: Mask | None = None, n_answer: int = 0) -> Residual:
        """The defended residual, in the dtype of `x`.

        The clamp may act where `mask` is true, the real tokens; the last `n_answer` columns follow the prompt.
        """
        return (x + self.displacement(x, mask, n_answer)).to(x.dtype)

    @cached_property
    def _selected(self) -> SAE | None:
        return self.sae.select(self.indices) if self.sae.pointwise else None

    def edited(self, x: Residual, mask: Mask | None, n_answer: int = 0) -> Mask | None:
        """Where the clamp acts, arguments as in `apply`; None for everywhere."""
        if self.positions == "all" or (self.positions == "prompt" and n_answer == 0):
            return mask
        column = torch.arange(x.shape[1], device=x.device) - (x.shape[1] - n_answer)
        chosen = {"prompt": column < 0, "last": column == -1, "answer": column >= 0}[self.positions]
        chosen = chosen.expand(x.shape[:2])
        return chosen if mask is None else chosen & mask


@dataclass(frozen=True, eq=False)
class Defense:
    """One or more clamps. Those at one place (after block `n` and before `n + 1` are one) act together.

    Attributes:
        skip_first: so many tokens at the start of every prompt are left alone; `apply` is told by its mask. 1 spares an
            attention sink, which SAEs are not trained on and where most features seem active.

    Raises:
        InputError: no clamp, or clamps at one place that do not share their SAE or that share a feature.
    """

    clamps: tuple[Clamp, ...]
    skip_first: int = 0

    def __post_init__(self) -> None:
        if self.skip_first < 0:
            raise InputError(f"defense: skip_first is {self.skip_first}; give a number of tokens, 0 or more")
        if not self.clamps:
            raise InputError("defense: it has no clamp; give at least one")
        for site in self.sites:
            here = self.at(site)
            if any(clamp.sae is not here[0].sae for clamp in here):
                raise InputError(
                    f"defense: two clamps at {site.hook_name} use different SAEs, so what both leave "
                    "untouched is not defined; clamp features of one SAE there"
                )
            _checked((feature for clamp in here for feature in clamp.features), here[0].sae.d_sae)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The clamped sites, in the order of a forward pass."""
        by_index = {clamp.site.index: clamp.site for clamp in reversed(self.clamps)}
        return tuple(by_index[index] for index in sorted(by_index))

    def at(self, site: Site) -> tuple[Clamp, ...]:
        """The clamps at this place, in the order given."""
        return tuple(clamp for clamp in self.clamps if clamp.site.index == site.index)

    def to(self, dtype: torch.dtype) -> Defense:
        """Let the SAEs compute in `dtype`."""
        if all(clamp.sae.dtype == dtype for clamp in self.clamps):
            return self
        # Clamps of one SAE go on sharing it.
        cast = {id(clamp.sae): clamp.sae.to(dtype=dtype) for clamp in self.clamps}
        moved = (Clamp(cast[id(c.sae)], c.features, c.mode, c.only_active, c.positions, c.site) for c in self.clamps)
        return Defense(tuple(moved), self.skip_first)

    def apply(self, site: Site, x: Residual, mask: Mask | None = None, n_answer: int = 0) -> Residual:
        """The residual at `site` with its clamps applied together; as it is, where there are none."""
        here = self.at(site)
        if not here:
            return x
        displacement = torch.stack([clamp.displacement(x, mask, n_answer) for clamp in here]).sum(dim=0)
        return (x + displacement).to(x.dtype)


def _like(values: Values, z: Tensor) -> Tensor:
    return torch.tensor(values, dtype=z.dtype, device=z.device)


def _checked(features: Iterable[SupportsIndex], d_sae: int) -> tuple[int, ...]:
    try:
        checked = tuple(operator.index(feature) for feature in features)
    except TypeError as error:
        raise InputError(f"clamp: features must be integers ({error}); give indices in 0..{d_sae - 1}") from error
    if not checked:
        raise InputError("clamp: no features; name at least one")
    for feature in checked:
        if not 0 <= feature < d_sae:
            raise InputError(f"clamp: feature {feature} is out of range; this SAE has features 0..{d_sae - 1}")
    if len(set(checked)) < len(checked):
        twice = next(feature for feature in checked if checked.count(feature) > 1)
        raise InputError(f"clamp: feature {twice} is named twice; name each feature once")
    return checked
