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
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "Bool",
    "Features",
    "Float",
    "InputError",
    "Int",
    "Mask",
    "PerExample",
    "Positions",
    "Progress",
    "Residual",
    "Site",
    "Tensor",
    "TokenIds",
    "widened",
]

Residual = Float[Tensor, "batch pos d_model"]
Features = Float[Tensor, "batch pos d_sae"]
TokenIds = Int[Tensor, "batch pos"]
Mask = Bool[Tensor, "batch pos"]
PerExample = Float[Tensor, "batch"]

DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
"""How transformers and accelerate spread a model over all cards, and over memory and disk where these are too few."""
Progress = Callable[[str, int, int], None]
"""`progress(phase, done, total)`: told how far a long computation has come."""
Positions = Literal["all", "last", "prompt", "answer"]
"""Which token positions a clamp edits. `answer` is what the model generates, `prompt` the rest."""

HOOK_NAME = re.compile(r"^blocks\.(?P<layer>\d+)\.hook_resid_(?P<point>pre|post)$")


def widened(tensor: Tensor) -> Tensor:
    """In float32 at least: half precision is for storage, not for what is measured."""
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
