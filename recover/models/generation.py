"""Greedy generation with edits at every step, and teacher forcing of the generated text in one pass.

1. *Columns*. The last column of a prompt predicts the first token of its answer; each token is fed back and predicts
   the next. Column 0 of an answer is therefore the prompt's last column, and column `j` the `j`-th generated token. A
   delta for an answer of `n` tokens has `n` columns.
2. *Steps*. With a cache the first step runs the whole prompt and each later step one column; without one, every step
   runs everything again. Edits are requested for the columns that a step runs, so both give the same answer.
3. *Teacher forcing*. `answered` appends answers to their prompts, all from the same column on, so that one pass gives
   the logits of every answer token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange

from recover.models.host import Edit, Model, Prompts
from recover.models.prefix import recorder
from recover.types import Int, Site, Tensor, TokenIds

NO_TOKEN = -1
"""The token id that fills an answer after its end."""
Columns = Callable[[int, int], Mapping[Site, Edit]]
"""`edits(first, last)`: the edits of a pass whose last columns are the answer's columns `first` to `last`."""


def n_answer(first: int, last: int) -> int:
    """Number of the answer columns `first` to `last` that follow the prompt; column 0 is the prompt's last column."""
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
    """Generate greedily: the most likely token at each step.

    Args:
        model: the host model.
        prompts: left-padded prompts.
        n_tokens: the largest number of tokens per answer.
        edits: edits of the residual stream, applied at every step; none by default.
        stop: token ids that end an answer and are part of it.
        use_cache: keep keys and values, where the model has them, instead of running everything again.
        on_step: called as `on_step(tokens generated, n_tokens)`.

    Returns:
        Token ids `[batch pos]`, with `NO_TOKEN` after the end of an answer.

    >>> from recover.models.names import load_model
    >>> toy = load_model("toy-choice", "cpu")
    >>> generate(toy, toy.tokenize(["Anna likes"]), n_tokens=2).shape
    torch.Size([1, 2])
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
    """Append all but the last column of the answers to their prompts, for a pass that predicts every answer token.

    Answers are token ids `[batch pos]`, `NO_TOKEN` where one has ended.
    """
    there = answer[:, :-1] != NO_TOKEN
    ids = torch.cat([prompts.ids, torch.where(there, answer[:, :-1], 0)], dim=1)
    return Prompts(ids, torch.cat([prompts.mask, there], dim=1))


def texts(tokenizer: Any, answers: TokenIds) -> list[str]:
    """Decode answers to text, without special tokens."""
    return [
        tokenizer.decode([token for token in row if token != NO_TOKEN], skip_special_tokens=True)
        for row in answers.tolist()
    ]
