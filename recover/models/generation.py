"""Greedy generation with edits live at every step, and the same text run again at once (teacher forcing).

1. *Columns*. A prompt's last column gives the first token of its answer; from there on each token is fed back and gives
   the next. Column 0 of an answer is therefore the prompt's last one, column `j` its `j`-th generated token. A delta
   for an answer of `n` tokens has `n` columns.
2. *Steps*. With keys and values kept, the first step runs the whole prompt and every other one column; without, every
   step runs everything again. Edits are asked for by the columns that a step runs, so that both do the same.
3. *Teacher forcing*: `answered` puts an answer behind its prompt, all answers starting in the same column, so that one
   pass gives the logits of every token of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange

from recover.models.host import Edit, Model, Prompts
from recover.models.prefix import recorder
from recover.types import Int, Site, Tensor, TokenIds

__all__ = ["NO_TOKEN", "answered", "generate", "n_answer"]

NO_TOKEN = -1
"""Stands after the end of an answer."""
Columns = Callable[[int, int], Mapping[Site, Edit]]
"""`edits(first, last)`: those of a pass whose last columns are the answer's columns `first` to `last`."""


def n_answer(first: int, last: int) -> int:
    """How many of the columns `first` to `last` follow the prompt; column 0 is the prompt's own last one."""
    return last - max(first, 1) + 1


@torch.no_grad()
def generate(
    model: Model,
    prompts: Prompts,
    n_tokens: int,
    edits: Columns | None = None,
    *,
    stop: Sequence[int] = (),
    use_cache: bool = True,
    on_step: Callable[[int, int], None] | None = None,
) -> TokenIds:
    """The likeliest token at each step, up to `n_tokens`.

    Args:
        model: the host model.
        prompts: any number, left-padded.
        n_tokens: steps.
        edits: edits of the residual stream, live at every step; none by default.
        stop: tokens that end an answer; they are its last token.
        use_cache: keep keys and values (where the model has such) in place of running everything again.
        on_step: called with (tokens generated, steps at most).

    Returns:
        `[batch pos]`, `NO_TOKEN` after the end of an answer.
    """
    edits = edits or (lambda first, last: {})
    kept = use_cache and model.is_language_model and not model.recurrent
    past = recorder(model.n_layers) if kept else None
    ids, mask = prompts.ids, prompts.mask
    ends = torch.tensor(list(stop), device=ids.device)
    going = torch.ones(len(prompts), dtype=torch.bool, device=ids.device)
    answer: list[Int[Tensor, "batch"]] = []
    for step in range(n_tokens):
        new = slice(-1, None) if kept and step else slice(None)
        logits = model.run(
            Prompts(ids[:, new], mask[:, new]),
            edits=edits(step if kept else 0, step),
            past=(past, mask[:, :-1] if step else None) if kept else None,
        ).logits
        token = logits.argmax(dim=-1)
        answer.append(torch.where(going, token, NO_TOKEN))
        going = going & ~torch.isin(token, ends)
        if on_step is not None:
            on_step(step + 1, n_tokens)
        if not going.any():
            break
        ids = torch.cat([ids, rearrange(token, "batch -> batch 1")], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return torch.stack(answer, dim=1)


def answered(prompts: Prompts, answer: TokenIds) -> Prompts:
    """The prompts with all but the last column of the answers behind them: what a pass reads that predicts the answers.

    Args:
        prompts: left-padded.
        answer: `[batch pos]`, `NO_TOKEN` where an answer has ended.
    """
    fed = answer[:, :-1]
    there = fed != NO_TOKEN
    ids = torch.cat([prompts.ids, torch.where(there, fed, 0)], dim=1)
    return Prompts(ids, torch.cat([prompts.mask, there], dim=1))


def texts(tokenizer: Any, answers: TokenIds) -> list[str]:
    """The answers in words, special tokens left out."""
    return [
        tokenizer.decode([token for token in row if token != NO_TOKEN], skip_special_tokens=True)
        for row in answers.tolist()
    ]
