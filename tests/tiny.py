"""A tiny model, its tokenizer and SAEs that fit it, saved as `recover check` reads them: a check takes a second or two.

- *Tokenizer*: one token for every word that an IOI prompt can hold, so every name is a single token.
- *Model*: a random Llama of three blocks. The embedding writes only to the first half of the residual stream and the
  blocks only to the second half, so that what an SAE explains depends on the layer in a way that is known.
- *SAEs*: an orthonormal basis and its negative under a ReLU, `x = relu(x Q) Q^T - relu(-x Q) Q^T`, exact in the span
  of Q. The full one is exact at every site; one of the first half is exact at the embedding alone.

A random model answers at chance, so about half of the prompts show the behavior at base, and setting a few features
to a large value makes every prompt alike, so about half of these lose it. The budget brings all of them back: what is
not found soon is looked for long. The configuration asks for little of every part of the protocol.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sae_lens
import torch
import yaml
from sae_lens.registry import get_sae_class
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recover.tasks import ioi

D_MODEL, D_SAE, LAYERS = 32, 64, 3
SITE = "blocks.1.hook_resid_pre"
FEATURES = (0, 1, 2, 3, 4, 5)


def words() -> list[str]:
    """Every word and mark that an IOI prompt can hold."""
    split = pre_tokenizers.Whitespace().pre_tokenize_str
    texts = [*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS, ioi.CONTEXT, *(frame.replace("{", " ") for frame in ioi.FRAMES)]
    return sorted({word for text in texts for word, _ in split(text.replace("}", " "))})


def save_tokenizer(folder: Path) -> int:
    """Save the tokenizer; gives the size of its vocabulary."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", *words()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    return len(vocabulary)


def save_model(folder: Path, *, seed: int = 1) -> Path:
    """Save the model and the tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, D_MODEL // 2 :] = 0
        for block in model.model.layers:
            block.self_attn.o_proj.weight[: D_MODEL // 2] = 0
            block.mlp.down_proj.weight[: D_MODEL // 2] = 0
    model.save_pretrained(folder)
    return folder


def signed_basis(first: int = D_MODEL, *, hook_name: str = SITE, d_model: int = D_MODEL) -> sae_lens.SAE[Any]:
    """An SAE that is exact in the span of the first `first` dimensions and blind to the others."""
    sae_class, config_class = get_sae_class("standard")
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=hook_name)
    sae = sae_class(config_class(d_in=d_model, d_sae=2 * first, metadata=metadata, apply_b_dec_to_input=False))
    square = torch.randn(first, first, generator=torch.Generator().manual_seed(1))
    basis = torch.zeros(d_model, first)
    basis[:first] = torch.linalg.qr(square).Q
    signed = torch.cat([basis, -basis], dim=1)
    sae.load_state_dict(
        {"W_enc": signed, "W_dec": signed.T, "b_enc": torch.zeros(2 * first), "b_dec": torch.zeros(d_model)}
    )
    return sae


def configuration(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration over what `make` saved in `folder`; dotted keys, such as `search__budget`, change values."""
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "clamps": [
            {
                "sae": str(folder / "sae"),
                "features": list(FEATURES),
                "mode": "set",
                "value": 80.0,
                "only_active": False,
            }
        ],
        "task": "ioi",
        "prompts": {"n": 40, "seed": 0, "candidates": 3},
        "search": {"budget": 100.0, "steps": 20, "curve": [0.5, 1.0]},
        "controls": {"random_draws": 20, "planted_routes": 1, "placebo_features": 1},
        "transfer": {
            **{"norms": [0.65], "folds": 1, "splits": 1, "rules": 2, "scales": [0.5, 1.0]},
            **{"shuffles": 1, "draws": 10, "steps": 10},
        },
        "device": "cpu",
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = settings
        for parent in parents:
            section = section["clamps"][0] if parent == "clamps" else section[parent]
        section[last] = value
    return settings


def make(folder: Path) -> Path:
    """Save a model, SAEs and `defense.yaml` in `folder`."""
    save_model(folder / "model")
    signed_basis().save_model(folder / "sae")
    signed_basis(D_MODEL // 2).save_model(folder / "sae-of-layer-0")
    signed_basis(d_model=24, first=24).save_model(folder / "sae-narrow")
    signed_basis(hook_name="blocks.2.hook_resid_pre").save_model(folder / "sae-of-layer-2")
    signed_basis(hook_name="blocks.7.hook_resid_pre").save_model(folder / "sae-deep")
    (folder / "defense.yaml").write_text(yaml.safe_dump(configuration(folder)))
    return folder
