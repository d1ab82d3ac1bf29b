"""Components of a residual block (attention, its heads and patterns, and the MLP) and where a model computes them.

==============  =====================================================================================================
`heads`         outputs of the attention heads, concatenated, `[batch pos (head d_head)]`: the input of the output
                projection (`o_proj`, `c_proj`, `dense`, `out_proj`)
`pattern`       attention weights, `[batch head pos key]`; read-only, and only with eager attention
`attention`     the attention's contribution to the residual stream, `[batch pos d_model]`
`mlp`           the MLP's contribution to the residual stream, `[batch pos d_model]`
==============  =====================================================================================================

In a block that normalizes contributions before adding them (Gemma 2 and 3, OLMo 2), the contribution is the norm's
output. Components are found by the module names of transformers; nothing here runs a model.
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

Kind = Literal["heads", "pattern", "attention", "mlp"]
KINDS: tuple[Kind, ...] = ("heads", "pattern", "attention", "mlp")
"""Kinds in the order in which a block computes them. One pass reads `pattern` or `attention` of a block, not both."""

PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj")
ATTENTIONS = ("attn", "attention")
MLPS = ("mlp", "feed_forward", "ffn")
POST_ATTENTION, POST_MLP = "post_attention_layernorm", "post_feedforward_layernorm"


@dataclass(frozen=True)
class Component:
    """The output of one kind of component in the block `layer`."""

    layer: int
    kind: Kind

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: the component's place in a forward pass."""
        return self.layer, KINDS.index(self.kind)


@dataclass(frozen=True)
class Modules:
    """Module paths within a block: `heads` is an input there, `pattern` the second output, the others the output."""

    heads: str
    pattern: str
    attention: str
    mlp: str


def modules_of(block: nn.Module) -> Modules:
    """Find the modules that compute a block's components.

    Raises:
        InputError: the block has no attention output projection or no MLP under a known name.
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
    """Switch the module to eager attention, whose weights can be read, while the context is open.

    Raises:
        InputError: the module is not a transformers model, or has no eager attention.
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
    """Number of attention heads per block.

    Raises:
        InputError: the module's configuration has no `num_attention_heads`.
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
    """Split the weight of the attention's output projection into heads; each maps a head's output to the residual."""
    module: Any = block.get_submodule(modules_of(block).heads)
    weight: torch.Tensor = module.weight if _is_transposed(module) else module.weight.mT
    return rearrange(weight, "(head d_head) d_model -> head d_head d_model", head=n_heads)


def _is_projection(path: str) -> bool:
    *outer, last = path.split(".")
    return last in PROJECTIONS and any(name in part for part in outer for name in ATTENTIONS)


def _is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as `[in out]`, as in GPT-2."""
    return type(module).__name__ == "Conv1D"
