"""Tiny models and SAEs where the published settings look for them: in a Hugging Face cache, by their real names.

- *Names and files* are the hub's: `models--OWNER--NAME/snapshots/REVISION`, `cfg.json` as sae_lens wrote it before
  version 6 for `gpt2-small-res-jb`, `params.npz` for Gemma Scope. So a published setting runs as it stands.
- *Models* are GPT-2 and Gemma 2 of transformers, of few dimensions; their tokenizers are made on the spot.
- *SAEs* are an orthonormal basis and its negative, another one for each layer, exact but for their threshold.

Of these models that of letters is built by hand: it answers multiple choice. Its first block attends to everything
alike and carries over where the right answer stood; all others do nothing. A second set of dimensions, which nothing
writes to, serves as a way around a clamp.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from recover.tasks.prose import UNSERVABLE
from tests import tiny

REVISION = "0123456789abcdef0123456789abcdef01234567"
GPT2, GEMMA, GEMMA_CHAT = "openai-community/gpt2", "google/gemma-2-2b", "google/gemma-2-2b-it"
RES_JB, GEMMA_SCOPE = "jbloom/GPT2-Small-SAEs-Reformatted", "google/gemma-scope-2b-pt-res"
GPT2_WIDTH, GEMMA_WIDTH = 96, 128
THRESHOLD = 0.05
"""Of the JumpReLU: without one a feature set to 0 would be active by rounding."""
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
CHAT = (
    "<bos>{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
REFUSALS = [f"I cannot help with that, {word}." for word in "friend today here now again ever still yet".split()]
ANSWERS = [f"{word} is what you asked for." for word in "Tea Rain Bread Wood Snow Music Salt Light".split()]
LETTERS = "ABCD"
FORGET, RETAIN = ("right", "wrong", "false", "untrue"), ("red", "green", "blue", "grey")


def snapshot(hub: Path, repo: str) -> Path:
    """The folder of a repository's files in a cache, made where it is not there."""
    home = hub / f"models--{repo.replace('/', '--')}"
    folder = home / "snapshots" / REVISION
    folder.mkdir(parents=True, exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(REVISION)
    return folder


def put_gpt2(hub: Path, layer: int = 4) -> None:
    """A random GPT-2 that knows the words of IOI prompts, and the SAE before this block."""
    folder = snapshot(hub, GPT2)
    torch.manual_seed(1)
    size = {"n_embd": GPT2_WIDTH, "n_layer": 6, "n_head": 4, "n_positions": 64, "initializer_range": 0.5}
    vocabulary = tiny.save_tokenizer(folder)
    config = GPT2Config(vocab_size=vocabulary, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, **size)
    GPT2LMHeadModel(config).save_pretrained(folder)
    site = f"blocks.{layer}.hook_resid_pre"
    place = snapshot(hub, RES_JB) / site
    place.mkdir()
    weights = basis(GPT2_WIDTH)
    save_file(weights, place / "sae_weights.safetensors")
    save_file({"sparsity": torch.zeros(2 * GPT2_WIDTH)}, place / "sparsity.safetensors")
    told = {"model_name": "gpt2-small", "hook_point": site, "hook_point_layer": layer, "hook_point_head_index": None}
    told |= {"d_in": GPT2_WIDTH, "d_sae": 2 * GPT2_WIDTH, "dtype": "float32", "device": "cpu", "context_size": 128}
    (place / "cfg.json").write_text(json.dumps(told))


def put_gemma_scope(hub: Path, folders: Sequence[str], rotated: bool = True) -> None:
    """SAEs of the release, each in its folder there."""
    for seed, folder in enumerate(folders):
        place = snapshot(hub, GEMMA_SCOPE) / folder
        place.mkdir(parents=True)
        weights = basis(GEMMA_WIDTH, seed, rotated)
        arrays = {name.replace("W_", "w_"): tensor.numpy() for name, tensor in weights.items()}
        np.savez(place / "params.npz", threshold=np.full(2 * GEMMA_WIDTH, THRESHOLD, np.float32), **arrays)


def basis(width: int, seed: int = 0, rotated: bool = True) -> dict[str, torch.Tensor]:
    """A signed orthonormal basis, as tensors of an SAE."""
    square = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    rows = torch.linalg.qr(square).Q if rotated else torch.eye(width)
    signed = torch.cat([rows, -rows], dim=1).contiguous()
    return {
        "W_enc": signed,
        "W_dec": signed.T.contiguous(),
        "b_enc": torch.zeros(2 * width),
        "b_dec": torch.zeros(width),
    }


def gemma(vocabulary: int, layers: int, *, seed: int = 1, **changes: Any) -> Gemma2ForCausalLM:
    """A random Gemma 2 of this many blocks."""
    torch.manual_seed(seed)
    size = {"hidden_size": GEMMA_WIDTH, "intermediate_size": 16, "num_hidden_layers": layers, "head_dim": 8}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 8, "sliding_window": 16}
    settings = {"initializer_range": 0.5, "tie_word_embeddings": False, "max_position_embeddings": 256}
    ids = {name: SPECIAL.index(f"<{name}>") for name in ("pad", "eos", "bos")}
    tokens = {f"{name}_token_id": number for name, number in ids.items()}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=vocabulary, **size | settings | tokens | changes))


def gemma_tokenizer(words: Sequence[str], split: Any = None) -> PreTrainedTokenizerFast:
    """One token for each word, a BOS before every text, and Gemma's marks of a turn."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = split or pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    named = {name: f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    marks = {f"{name}_token": mark for name, mark in named.items()}
    made = PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=list(SPECIAL[4:]), **marks)
    made.chat_template = CHAT
    return made


def put(hub: Path, repo: str, module: torch.nn.Module, tokenizer: Any) -> None:
    """A model and its tokenizer, as `save_pretrained` writes them."""
    folder = snapshot(hub, repo)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def put_random_gemma(hub: Path, words: Sequence[str], layers: int = 7) -> None:
    """The base model, with these words."""
    tokenizer = gemma_tokenizer(words)
    put(hub, GEMMA, gemma(len(tokenizer), layers), tokenizer)


def put_chat_gemma(hub: Path, texts: Sequence[str], layers: int = 20, seed: int = 6) -> None:
    """The chat model: whatever it is asked it says sentences, half of which decline."""
    split = pre_tokenizers.Whitespace().pre_tokenize_str
    words = sorted({word for text in [*texts, *UNSERVABLE, "user model"] for word, _ in split(text)})
    tokenizer = gemma_tokenizer([*words, *REFUSALS, *ANSWERS])
    module = gemma(len(tokenizer), layers, seed=seed)
    spoken = torch.tensor(tokenizer.convert_tokens_to_ids([*REFUSALS, *ANSWERS]))
    with torch.no_grad():
        kept = module.lm_head.weight[spoken].clone()
        module.lm_head.weight.zero_()
        module.lm_head.weight[spoken] = kept
        # Residuals so small that the budget is large.
        module.model.embed_tokens.weight.mul_(0.05)
        for block in module.model.layers:
            block.post_attention_layernorm.weight.fill_(-0.95)
            block.post_feedforward_layernorm.weight.fill_(-0.95)
    put(hub, GEMMA_CHAT, module, tokenizer)


def put_letters_gemma(hub: Path, questions: int, layers: int = 9) -> None:
    """The base model: right about `FORGET`, in all orders; `basis(rotated=False)` tells what it goes by."""
    answers = [f"{letter}. {word}" for letter in LETTERS for word in (*FORGET, *RETAIN)]
    asked = [f"{kind} question {number}" for kind in ("old", "new") for number in range(questions)]
    split = pre_tokenizers.Split(Regex(r"\n| (?=[A-D]$)"), behavior="removed")
    tokenizer = gemma_tokenizer([*LETTERS, *answers, *asked, "Answer:"], split)
    letters = list(range(len(LETTERS)))
    module = gemma(len(tokenizer), layers, num_attention_heads=1, head_dim=len(LETTERS))
    with torch.no_grad():
        module.lm_head.weight.zero_()
        module.model.embed_tokens.weight[:, : 2 * len(LETTERS)] = 0
        for place, letter in enumerate(LETTERS):
            row = tokenizer.convert_tokens_to_ids(letter)
            module.lm_head.weight[row, place] = 1.0
            module.lm_head.weight[row, len(LETTERS) + place] = 20.0
            module.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(f"{letter}. {FORGET[0]}"), place] = 1.0
        for number, block in enumerate(module.model.layers):
            block.post_feedforward_layernorm.weight.fill_(-1.0)
            if number:
                block.post_attention_layernorm.weight.fill_(-1.0)
        attention = module.model.layers[0].self_attn
        for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            part.weight.zero_()
        attention.v_proj.weight[letters, letters] = 1.0
        attention.o_proj.weight[letters, letters] = 1.0
    put(hub, GEMMA, module, tokenizer)


def write_questions(path: Path, kind: str, words: Sequence[str], n: int) -> Path:
    """Questions whose right answer is the first of `words`, for `put_letters_gemma`."""
    rows = ({"question": f"{kind} question {row}", "choices": list(words), "answer": 0} for row in range(n))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
