"""Tiny random language models of every supported family, and a plain hooked forward pass to hold the engine against.

The plain pass knows nothing of nnsight, caches or padding: one prompt at a time, PyTorch hooks on the module itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from recover.models.host import Prompts
from recover.types import Site

D_MODEL, N_LAYERS, VOCAB = 16, 4, 61
LENGTHS = (11, 7, 9, 4)
"""Prompts of unequal length, most of them longer than `WINDOW`."""
WINDOW = 4

_SHARED = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "vocab_size": VOCAB}
_LLAMA = _SHARED | {
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GEMMA = _LLAMA | {"head_dim": 4, "sliding_window": WINDOW, "query_pre_attn_scalar": 4}
_ALTERNATING = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "gpt2": ("GPT2", {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}),
    "gpt_neox": (
        "GPTNeoX",
        _SHARED | {"intermediate_size": 24, "num_attention_heads": 4, "max_position_embeddings": 64},
    ),
    "qwen2": ("Qwen2", _LLAMA | {"use_sliding_window": False}),
    "gemma2": (
        "Gemma2",
        _GEMMA | {"layer_types": _ALTERNATING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3", _GEMMA | {"layer_types": _ALTERNATING}),
    "mistral": ("Mistral", _LLAMA | {"head_dim": 4, "sliding_window": WINDOW}),
}
FAMILIES = tuple(CONFIGS)
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "vocab_size": VOCAB}),
    "cohere2": ("Cohere2", _LLAMA | {"sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    "deepseek_v3": (
        "DeepseekV3",
        _LLAMA
        | _EXPERTS
        | {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
        | {"v_head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "falcon": ("Falcon", _SHARED | {"num_attention_heads": 4, "multi_query": True, "parallel_attn": True}),
    "falcon_alibi": ("Falcon", _SHARED | {"num_attention_heads": 4, "alibi": True, "parallel_attn": False}),
    "gptj": (
        "GPTJ",
        {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, "rotary_dim": 2},
    ),
    "granite": ("Granite", _LLAMA | {"residual_multiplier": 0.5}),
    "mixtral": ("Mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mpt": ("Mpt", {"d_model": D_MODEL, "n_heads": 4, "n_layers": N_LAYERS, "vocab_size": VOCAB, "max_seq_len": 64}),
    "olmo2": ("Olmo2", _LLAMA),
    "opt": (
        "OPT",
        _SHARED
        | {"ffn_dim": 24, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": D_MODEL},
    ),
    "phi": ("Phi", _LLAMA | {"partial_rotary_factor": 0.5}),
    "qwen3": ("Qwen3", _LLAMA | {"head_dim": 4}),
    "stablelm": ("StableLm", _LLAMA | {"partial_rotary_factor": 0.5}),
}
"""Families that differ from those in kind: ALiBi, learned positions, parallel blocks, experts, latent attention."""
CLASSES = {
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "opt": ("OPTConfig", "OPTForCausalLM"),
}


def tiny_lm(family: str = "llama", *, seed: int = 0, scale: float = 20.0, **changes: Any) -> Any:
    """A random model of `family`, its matrices enlarged so that attention is sharp and logits differ."""
    name, options = (CONFIGS | OTHERS)[family]
    config_class, model_class = CLASSES.get(family, (f"{name}Config", f"{name}ForCausalLM"))
    settings = options | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | changes
    config = getattr(transformers, config_class)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = getattr(transformers, model_class)(config).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(scale)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return module.requires_grad_(False)


class PlainBlock(nn.Module):
    """A residual block that looks back: a mean over earlier positions, then a nonlinearity."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.look = nn.Linear(d_model, d_model, bias=False)
        self.think = nn.Linear(d_model, d_model)

    def forward(self, hidden: Tensor) -> Tensor:
        count = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype, device=hidden.device)
        seen = self.look(hidden).cumsum(dim=1) / count[:, None]
        return hidden + torch.tanh(self.think(hidden) + seen)


class PlainLM(nn.Module):
    """Not of transformers: `input_ids` to logits through a list of blocks, no cache, no attention mask."""

    def __init__(self, n_layers: int = 3, d_model: int = D_MODEL, vocab: int = VOCAB) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=d_model)
        self.embedding = nn.Embedding(vocab, d_model)
        self.stack = nn.ModuleList(PlainBlock(d_model) for _ in range(n_layers))
        self.unembed = nn.Linear(d_model, vocab)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for block in self.stack:
            hidden = block(hidden)
        return self.unembed(hidden)


def plain_lm(seed: int = 0) -> PlainLM:
    """A `PlainLM` with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PlainLM().eval().requires_grad_(False)


def blocks_of(module: nn.Module) -> nn.ModuleList:
    """The stack of blocks, by the names that the families give it."""
    for path in ("model.layers", "transformer.h", "gpt_neox.layers", "stack"):
        try:
            found = module.get_submodule(path)
        except AttributeError:
            continue
        assert isinstance(found, nn.ModuleList)
        return found
    raise AssertionError(type(module))


def token_rows(lengths: Sequence[int] = LENGTHS, seed: int = 0, vocab: int = VOCAB) -> list[Tensor]:
    """Random prompts of these lengths, none with token 0."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (length,), generator=generator) for length in lengths]


def left_padded(rows: Sequence[Tensor]) -> Prompts:
    """The prompts as one batch, padded by hand."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = True
    return Prompts(ids, mask)


def plain_forward(
    module: nn.Module,
    ids: Tensor,
    changes: Mapping[Site, Callable[[Tensor], Tensor]] | None = None,
    read: Site | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Logits `[pos vocab]` of one prompt `ids [pos]`, and the residual `[pos d_model]` read, by PyTorch hooks alone.

    `changes` maps a site to a function of its residual `[pos d_model]`; what is read has it applied.
    """
    blocks, handles, seen = blocks_of(module), [], []
    sites = dict(changes or {})
    if read is not None and read not in sites:
        sites[read] = lambda h: h

    def watch(site: Site, change: Callable[[Tensor], Tensor]) -> None:
        def edited(hidden: Tensor) -> Tensor:
            new = change(hidden[0])[None]
            if site == read:
                seen.append(new[0])
            return new

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (edited(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": edited(kwargs["hidden_states"])}

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

        if site.point == "pre":
            handles.append(blocks[site.layer].register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(blocks[site.layer].register_forward_hook(after))

    for site, change in sites.items():
        watch(site, change)
    try:
        options = {"use_cache": False} if hasattr(module, "prepare_inputs_for_generation") else {}
        output = module(input_ids=ids[None], **options)
    finally:
        for handle in handles:
            handle.remove()
    logits = output if isinstance(output, Tensor) else output.logits
    return logits[0], seen[0] if seen else None
