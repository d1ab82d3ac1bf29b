"""Requests to a chat model, and what it answers to them by itself: greedily, in its chat template.

Each answer is the target of its own search. Requests are told apart by how their answers open (`replies`):
those that the model serves, with neither a refusal nor a safety cue, and those that it declines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jinja2 import TemplateError

from recover.models.generation import answered, generate, texts
from recover.models.host import Model, Prompts
from recover.tasks import replies
from recover.tasks.behaviors import ForcedAnswer
from recover.types import InputError, TokenIds


@dataclass(frozen=True)
class Request:
    """A user's request to the model; `kind` is `given` for one from a file. `str()` shows only the id."""

    id: str
    text: str
    kind: Literal["ordinary", "unservable", "given"]

    def __repr__(self) -> str:
        return f"Request({self.id})"


@dataclass(frozen=True, eq=False)
class Dialogue:
    """Requests and the model's own answers to them.

    Attributes:
        prompts: the requests in the chat template, without answers.
        answers: token ids `[batch pos]` of the greedy answers.
        texts: the answers as text.
        stop: tokens that end an answer.
        asked: the requests as text, for reports that keep it.
    """

    model: Model
    ids: Sequence[str]
    prompts: Prompts
    answers: TokenIds
    texts: Sequence[str]
    stop: tuple[int, ...]
    asked: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int]) -> Dialogue:
        """Select a subset of requests."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.answers.device)
        ids, words = ([values[row] for row in rows] for values in (self.ids, self.texts))
        asked = None if self.asked is None else [self.asked[row] for row in rows]
        return Dialogue(self.model, ids, self.prompts.select(index), self.answers[index], words, self.stop, asked)

    @property
    def refused(self) -> list[int]:
        """Requests that the model declines by itself."""
        return [row for row, text in enumerate(self.texts) if replies.opens_with_refusal(text)]

    @property
    def served(self) -> list[int]:
        """Requests whose answer opens with neither a refusal nor a safety cue."""
        return [row for row, text in enumerate(self.texts) if replies.read(text, text).non_refusal]

    def forced(self, columns: int) -> tuple[Prompts, ForcedAnswer]:
        """Teacher-force the first `columns` answer tokens; return the prompts and the behavior of giving the tokens."""
        target = self.answers[:, :columns]
        return answered(self.prompts, target), ForcedAnswer(target)

    def with_answers_of(self, other: Dialogue) -> Dialogue:
        """Replace each answer by that to another request, as the placebo target."""
        return replace(self, answers=other.answers, texts=other.texts)


def ask(
    model: Model,
    requests: Sequence[Request],
    n_tokens: int,
    *,
    batch_size: int = 24,
    on_batch: Callable[[int, int], None] | None = None,
) -> Dialogue:
    """Ask the model requests and record its greedy answers, of at most `n_tokens` tokens.

    Raises:
        InputError: no requests, or a tokenizer without a chat template.
    """
    if not requests:
        raise InputError("requests: there are none; give at least one")
    tokenizer = model.tokenizer
    rows = [tokenizer(chat_prompt(tokenizer, r.text), add_special_tokens=False)["input_ids"] for r in requests]
    prompts, stop = Prompts.padded(rows, model.device), stops(model)
    answers = torch.full((len(rows), n_tokens), -1, device=model.device)
    for part in torch.split(torch.arange(len(rows), device=model.device), batch_size):
        said = generate(model, prompts.select(part), n_tokens, stop=stop)
        answers[part, : said.shape[1]] = said
        if on_batch is not None:
            on_batch(int(part[-1]) + 1, len(rows))
    ids, asked = [request.id for request in requests], [request.text for request in requests]
    return Dialogue(model, ids, prompts, answers, texts(tokenizer, answers), stop, asked)


def opened(dialogue: Dialogue, opening: str, n_tokens: int, batch_size: int = 24) -> Dialogue:
    """Ask the served requests again, each answer made to begin with `opening`, of at most `n_tokens` tokens in all.

    The model goes on greedily from there. Requests that it declines keep their answers, so that they cost nothing.
    """
    model, answers = dialogue.model, dialogue.answers.clone()
    begun = model.tokenizer(opening, add_special_tokens=False)["input_ids"]
    start = torch.tensor([begun], dtype=answers.dtype, device=answers.device)
    more = min(n_tokens, answers.shape[1]) - len(begun)
    for part in torch.split(torch.tensor(dialogue.served, dtype=torch.long, device=answers.device), batch_size):
        if not len(part) or more < 1:
            break
        asked, first = dialogue.prompts.select(part), start.expand(len(part), -1)
        begin = Prompts(torch.cat([asked.ids, first], 1), torch.cat([asked.mask, torch.ones_like(first).bool()], 1))
        said = generate(model, begin, more, stop=dialogue.stop)
        answers[part] = -1
        answers[part, : len(begun) + said.shape[1]] = torch.cat([first, said], dim=1)
    return replace(dialogue, answers=answers, texts=texts(model.tokenizer, answers))


def stops(model: Model) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation settings.

    A chat model may end its turn with a token of its own, as Gemma does with `<end_of_turn>`.
    """
    given = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    own = given if isinstance(given, list) else [] if given is None else [given]
    return tuple(dict.fromkeys(int(token) for token in (model.tokenizer.eos_token_id, *own)))


def chat_prompt(tokenizer: Any, text: str) -> str:
    """Format a request in the model's chat template, up to where the reply begins.

    The template writes the special tokens, a first one included: tokenize it with `add_special_tokens=False`.

    Raises:
        InputError: the tokenizer has no chat template, or one that takes no request of a user alone.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the model's tokenizer has no chat template; name a chat model, such as smollm2")
    message = [{"role": "user", "content": text}]
    try:
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError) as error:
        raise InputError(
            f"the model's chat template cannot take a request ({type(error).__name__}); name another chat model"
        ) from None
