"""Components of a residual block, and where in a model's modules they are: what attention and the MLP give.

==============  =====================================================================================================
`heads`         what the attention heads give, side by side, `[batch pos (head d_head)]`: the input of the attention's
                output projection (`o_proj`, `c_proj`, `dense`, `out_proj`)
`pattern`       where heads look, `[batch head pos key]`; only read, and only where attention is computed eagerly
`attention`     what attention adds to the residual stream
`mlp`           what the MLP adds to the residual stream
==============  =====================================================================================================

Where a block norms what its parts give before it adds it (Gemma 2 and 3, OLMo 2), what is added is the norm's output.
Everything is found by the names that transformers gives its modules; nothing here runs a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import nn

from recover.types import Float, InputError, Tensor

__all__ = ["KINDS", "Component", "Modules", "eager", "head_count", "modules_of", "projection"]

Kind = Literal["heads", "pattern", "attention", "mlp"]
KINDS: tuple[Kind, ...] = ("heads", "pattern", "attention", "mlp")
"""In the order in which a block runs them; `pattern` and `attention` of one block are not read in one pass."""

PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj")
ATTENTIONS = ("attn", "attention")
MLPS = ("mlp", "feed_forward", "ffn")
POST_ATTENTION, POST_MLP = "post_attention_layernorm", "post_feedforward_layernorm"


@dataclass(frozen=True)
class Component:
    """What one kind of part of the block `layer` gives."""

    layer: int
    kind: Kind

    @property
    def order(self) -> tuple[int, int]:
        """Its place in a forward pass."""
        return self.layer, KINDS.index(self.kind)


@dataclass(frozen=True)
class Modules:
    """Paths within a block: of `heads` the input is meant, of `pattern` the second output, of the others the output."""

    heads: str
    pattern: str
    attention: str
    mlp: str


def modules_of(block: nn.Module) -> Modules:
    """Where a block's components are.

    Raises:
        InputError: it has no attention output projection, or no MLP, by a name that is known.
    """
    children = dict(block.named_children())
    # Children that run after what they norm; in Llama `post_attention_layernorm` alone is the norm before the MLP.
    normed = POST_MLP in children and POST_ATTENTION in children
    heads = next((path for path, _ in block.named_modules() if _is_projection(path)), None)
    mlp = next((name for name in MLPS if name in children), None)
    if heads is None or mlp is None:
        raise InputError(
            f"components: {type(block).__name__} has no attention and MLP by the names that transformers gives them; "
            "use a model of a family such as Llama, GPT-2, GPT-NeoX or Gemma"
        )
    whole = heads.rpartition(".")[0]
    return Modules(heads, whole, POST_ATTENTION if normed else heads, POST_MLP if normed else mlp)


@contextlib.contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Compute attention so that its pattern can be read.

    Raises:
        InputError: the module is not of transformers, or cannot.
    """
    config: Any = getattr(module, "config", None)
    switch: Any = getattr(module, "set_attn_implementation", None)
    before = getattr(config, "_attn_implementation", None)
    if switch is None or before is None:
        raise InputError("components: attention patterns can be read of models of transformers only")
    switch("eager")
    try:
        yield
    finally:
        switch(before)


def head_count(module: nn.Module) -> int:
    """How many heads attention has.

    Raises:
        InputError: the module's configuration does not say.
    """
    config: Any = getattr(module, "config", None)
    config = getattr(config, "text_config", None) or config
    count = getattr(config, "num_attention_heads", None)
    if count is None:
        raise InputError(
            "components: the model's configuration has no `num_attention_heads`; set it on `module.config`"
        )
    return int(count)


def projection(block: nn.Module, n_heads: int) -> Float[Tensor, "head d_head d_model"]:
    """What each head writes for what it gives, before any norm: the output projection's weight, cut into heads."""
    module: Any = block.get_submodule(modules_of(block).heads)
    weight: torch.Tensor = module.weight if _is_transposed(module) else module.weight.mT
    return rearrange(weight, "(head d_head) d_model -> head d_head d_model", head=n_heads)


def _is_projection(path: str) -> bool:
    *outer, last = path.split(".")
    return last in PROJECTIONS and any(name in part for part in outer for name in ATTENTIONS)


def _is_transposed(module: nn.Module) -> bool:
    """Whether the weight is `[in out]`, as GPT-2 has it."""
    return type(module).__name__ == "Conv1D"
