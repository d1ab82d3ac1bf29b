"""The dimension vocabulary, tensor aliases and places that every other module speaks.

Dimensions, in jaxtyping annotations and einops patterns alike:

=========  ==================================================================
``batch``  examples
``pos``    token positions (left-padded, so that the last one is aligned)
``d_model``  width of the residual stream
``d_sae``  width of the SAE dictionary
``k``      clamped features
``layer``  decoder blocks
``vocab``  tokens of the tokenizer
=========  ==================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

__all__ = [
    "Bool",
    "Delta",
    "Features",
    "Finite",
    "Float",
    "InputError",
    "Int",
    "Mask",
    "PerExample",
    "Placement",
    "Positions",
    "Positive",
    "Progress",
    "Residual",
    "Rows",
    "Share",
    "Site",
    "Surface",
    "Tensor",
    "TokenIds",
    "widened",
]

Residual = Float[Tensor, "batch pos d_model"]
Features = Float[Tensor, "batch pos d_sae"]
TokenIds = Int[Tensor, "batch pos"]
Mask = Bool[Tensor, "batch pos"]
PerExample = Float[Tensor, "batch"]
Delta = Float[Tensor, "batch site_pos d_model"]
"""A perturbation of the residual: the positions that it touches, at one site after another."""
Rows = Int[Tensor, "rows"]
"""Which examples of a batch, by index."""
Progress = Callable[[str, int, int], None]
"""Called with (phase, units done, units in all)."""

DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
"""How transformers and accelerate spread a model over all cards, and over memory and disk where these are too few."""
Positions = Literal["all", "last", "prompt", "answer"]
"""Which token positions a clamp edits. `answer` is what the model generates, `prompt` the rest."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""Ranges of numbers that a user gives. Dataclasses carry them, and sections of DEFENSE.yaml take them from there."""
Placement = Literal["after_clamp", "before_clamp"]
"""Whether a perturbation is added after or before the clamp of its site."""

HOOK_NAME = re.compile(r"^blocks\.(?P<layer>\d+)\.hook_resid_(?P<point>pre|post)$")


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in float32 at least: half precision is for storage, not for what is measured."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class InputError(ValueError):
    """The user's input cannot be used. The message is one line: what, where, how to mend it."""


@dataclass(frozen=True)
class Site:
    """A place in the residual stream: before (`pre`) or after (`post`) the block `layer`."""

    layer: int
    point: Literal["pre", "post"] = "pre"

    @classmethod
    def from_hook_name(cls, hook_name: str) -> Site:
        """Read a TransformerLens hook name, such as `blocks.4.hook_resid_pre`.

        Raises:
            InputError: the hook is not in the residual stream.
        """
        match = HOOK_NAME.match(hook_name)
        if match is None:
            raise InputError(
                f"hook {hook_name!r} is not a residual-stream site; "
                "recover works at blocks.N.hook_resid_pre and blocks.N.hook_resid_post"
            )
        return cls(int(match["layer"]), "pre" if match["point"] == "pre" else "post")

    @property
    def hook_name(self) -> str:
        """The TransformerLens name of this site."""
        return f"blocks.{self.layer}.hook_resid_{self.point}"

    @property
    def index(self) -> int:
        """How many blocks run before this site; after block `n` and before block `n + 1` are the same place."""
        return self.layer + (self.point == "post")


@dataclass(frozen=True)
class Surface:
    """Where a perturbation enters the residual stream of a defended model.

    Args:
        sites: the first clamped site alone, or every clamped site, where the clamped features can be pinned exactly.
        placement: after or before the clamp of the first site. At every site a perturbation enters after the clamps.

    Raises:
        InputError: a perturbation before several clamps.

    >>> Surface("every").enters((Site(15), Site(18)))
    (Site(layer=15, point='pre'), Site(layer=18, point='pre'))
    """

    sites: Literal["first", "every"] = "first"
    placement: Placement = "after_clamp"

    def __post_init__(self) -> None:
        if self.every and self.placement != "after_clamp":
            raise InputError(f"placement: {self.placement!r} with a delta at every clamped site; use after_clamp")

    @property
    def every(self) -> bool:
        """Whether a perturbation enters at every clamped site."""
        return self.sites == "every"

    @property
    def first(self) -> Surface:
        """The surface at the first clamped site alone, with the same placement."""
        return Surface("first", self.placement)

    def enters(self, clamped: tuple[Site, ...]) -> tuple[Site, ...]:
        """The sites that a perturbation enters at, of the clamped ones (`defense.sites`)."""
        return clamped if self.every else clamped[:1]
