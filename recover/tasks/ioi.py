"""Indirect object identification: "... Mary and John ... John gave a drink to" is continued by " Mary".

As in Wang et al. (2022): two names appear, the *subject* appears again as the giver, and the model should
name the other one, the *indirect object* (`io`). In a BABA prompt the subject (B) opens, in an ABBA prompt
the indirect object (A) does. The wording, names, places and objects here are our own:

1. Keep the names that the tokenizer in use writes as exactly one token after a prompt.
2. Draw frames, names, places and objects from shuffled decks, so that each is used about equally often, and
   the templates in turn.
3. Skip a prompt that was drawn before.

The first `n` examples of a seed are the same for every larger `n`. Prompts can also come from a JSONL file.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from pydantic import Field, PositiveInt

from recover.models.host import Model
from recover.tasks.behaviors import ChoiceMargin, LogitDifference
from recover.tasks.examples import Examples
from recover.tasks.files import read_text, rows_of, text_object
from recover.tasks.prose import read_data
from recover.tasks.rules import OtherRule
from recover.types import InputError

Template = Literal["BABA", "ABBA"]
TEMPLATES: tuple[Template, ...] = get_args(Template)
T = TypeVar("T")

WORDS = json.loads(read_data("ioi.json"))
NAMES, PLACES, FRAMES = tuple(WORDS["names"].split()), tuple(WORDS["places"].split()), tuple(WORDS["frames"])
OBJECTS = tuple(f"{article} {noun}" for article in ("a", "the") for noun in WORDS["nouns"].split())
KEYS = 'the keys "prompt", "io" and "subject"'
CONTEXT = "The drink was handed to"


@dataclass(frozen=True)
class IOIExample:
    """One prompt, the name that continues it (`io`), and the other name in it (`subject`).

    `id` is a hash of the content; `str()` of an example shows it alone, so that no prompt text leaks.
    """

    id: str
    prompt: str
    io: str
    subject: str
    template: Template

    @classmethod
    def of(cls, prompt: str, io: str, subject: str, template: Template) -> IOIExample:
        """Build an example with the `id` that its content gives it."""
        digest = hashlib.sha256(json.dumps([prompt, io, subject]).encode()).hexdigest()
        return cls(f"ioi-{digest[:16]}", prompt, io, subject, template)

    def __repr__(self) -> str:
        return f"IOIExample({self.id})"


def token_id(tokenizer: Any, name: str, prompt: str = CONTEXT) -> int:
    """Return the token id of `name` after `prompt` and a space.

    The tokenizer is asked in context, so that byte-pair (`Ġ`) and SentencePiece (`▁`) ones both serve.

    Raises:
        InputError: it is not exactly one token, or it changes the prompt's own tokens.
    """
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(f"{prompt} {name}", add_special_tokens=False)["input_ids"]
    added = after[len(before) :]
    if after[: len(before)] != before or len(added) != 1:
        raise InputError(f"the name {name!r} is not a single token after its prompt; choose another name")
    return int(added[0])


def single_token_names(tokenizer: Any) -> list[str]:
    """Give the built-in names that are single tokens, and different ones, in this tokenizer."""
    by_token: dict[int, str] = {}
    for name in NAMES:
        try:
            by_token.setdefault(token_id(tokenizer, name), name)
        except InputError:
            continue
    return list(by_token.values())


def generate(
    tokenizer: Any, n: int, seed: int, templates: Sequence[Template] = TEMPLATES, frames: int | None = None
) -> list[IOIExample]:
    """Draw `n` different examples, the templates in turn, from the first `frames` wordings (None: all).

    Raises:
        InputError: `n` exceeds what can be drawn from the names that are single tokens.
    """
    names, wordings = single_token_names(tokenizer), FRAMES[:frames]
    # Half of all prompts that exist: up to there a repeated draw is soon followed by a new one.
    limit = len(names) * (len(names) - 1) * len(wordings) * len(PLACES) * len(OBJECTS) * len(set(templates)) // 2
    if n > limit:
        raise InputError(f"{n} IOI prompts asked for, but with this tokenizer at most {limit} can be drawn")
    rng = random.Random(seed)
    decks = {key: _deck(items, rng) for key, items in (("place", PLACES), ("object", OBJECTS))}
    drawn = {template: _deck(wordings, rng) for template in templates}
    ios, subjects = _deck(names, rng), _deck(names, rng)
    examples: dict[str, IOIExample] = {}
    while len(examples) < n:
        template = templates[len(examples) % len(templates)]
        io = next(ios)
        subject = next(name for name in subjects if name != io)
        first, second = (subject, io) if template == "BABA" else (io, subject)
        filled = {key: next(deck) for key, deck in decks.items()}
        prompt = next(drawn[template]).format(first=first, second=second, subject=subject, **filled)
        example = IOIExample.of(prompt, io, subject, template)
        examples.setdefault(example.id, example)
    return list(examples.values())


def _deck(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    while True:
        yield from rng.sample(items, len(items))


def load_jsonl(path: Path | str, tokenizer: Any) -> list[IOIExample]:
    """Read examples from lines such as `{"prompt": "... gave a drink to", "io": "Mary", "subject": "John"}`.

    The template is read off the prompt: BABA where the subject is the first of the two names in it.

    Raises:
        InputError: with the line number, and never with the prompt's text.
    """
    name = f"prompt file {path}"
    text = read_text(Path(path), name)
    examples = rows_of(text, name, lambda _, line: _parse(line, tokenizer), lambda one: one.id, "repeats line {}")
    if not examples:
        raise InputError(f"{name}: is empty; give lines with {KEYS}")
    return examples


def _parse(line: str, tokenizer: Any) -> IOIExample:
    row = text_object(line, ("prompt", "io", "subject"), KEYS)
    prompt, io, subject = row["prompt"], row["io"], row["subject"]
    if prompt != prompt.rstrip():
        raise InputError("the prompt ends in white space; end it with its last word")
    if io == subject:
        raise InputError('"io" and "subject" are the same name')
    first_io, first_subject = (re.search(rf"\b{re.escape(name)}\b", prompt) for name in (io, subject))
    if first_io is None or first_subject is None:
        raise InputError('"io" and "subject" must both occur in the prompt')
    if token_id(tokenizer, io, prompt) == token_id(tokenizer, subject, prompt):
        raise InputError('"io" and "subject" are the same token to this tokenizer')
    return IOIExample.of(prompt, io, subject, "BABA" if first_subject.start() < first_io.start() else "ABBA")


def behavior(tokenizer: Any, examples: Sequence[IOIExample], device: torch.device | str = "cpu") -> LogitDifference:
    """Build the behavior whose score is the logit of the indirect object minus that of the subject."""
    target = [token_id(tokenizer, example.io, example.prompt) for example in examples]
    other = [token_id(tokenizer, example.subject, example.prompt) for example in examples]
    return LogitDifference(torch.tensor(target, device=device), torch.tensor(other, device=device))


def strict(
    tokenizer: Any, examples: Sequence[IOIExample], device: torch.device | str = "cpu", candidates: int | None = None
) -> ChoiceMargin:
    """Build the strict behavior: the indirect object is the most likely of all names, so that chance is 1 / names.

    The same names compete in every prompt, so that a shared delta which takes down the subject, or writes one name, is
    not rewarded for it.

    Args:
        tokenizer: the model's.
        examples: whose names are targets.
        device: of the tokens.
        candidates: how many names compete, the example's own two first; all by default.
    """
    names = {name: token_id(tokenizer, name) for name in single_token_names(tokenizer)}
    owns = [[token_id(tokenizer, name, one.prompt) for name in (one.io, one.subject)] for one in examples]
    rows = [[*own, *(token for token in names.values() if token not in own)] for own in owns]
    width = min(candidates or len(names), *map(len, rows))  # a file's own names may not be among ours
    tokens = torch.tensor([row[:width] for row in rows], device=device)
    return ChoiceMargin(tokens[:, 0], tokens[:, 1:])


def other_rules(
    tokenizer: Any, examples: Sequence[IOIExample], device: torch.device | str = "cpu"
) -> tuple[OtherRule, ...]:
    """List other rules that pick a name of the prompt: the subject, and the name that comes first or second."""

    def rule(name: str, picked: Sequence[str]) -> OtherRule:
        tokens = [token_id(tokenizer, one, example.prompt) for one, example in zip(picked, examples, strict=True)]
        return OtherRule(name, torch.tensor(tokens, device=device))

    subjects = [one.subject for one in examples]
    opens = [one.template == "BABA" for one in examples]
    first = [one.subject if by else one.io for one, by in zip(examples, opens, strict=True)]
    second = [one.io if by else one.subject for one, by in zip(examples, opens, strict=True)]
    return rule("the subject", subjects), rule("the first name", first), rule("the second name", second)


def load(
    tokenizer: Any,
    *,
    n: int | None = None,
    seed: int = 0,
    templates: Sequence[Template] = TEMPLATES,
    file: Path | str | None = None,
    frames: int | None = None,
) -> list[IOIExample]:
    """Give the examples that a `prompts:` section asks for.

    Args:
        tokenizer: the model's.
        n: how many to draw; with a file, how many to keep from its start (None: all).
        seed: of the draw; a file is kept in its order.
        templates: which name orders to draw, or to keep from the file.
        file: a JSONL file to read instead of drawing.
        frames: how many of the wordings to draw from (None: all); a file has its own.

    Raises:
        InputError: from `generate` and `load_jsonl`, or if no example of the file has such a template.
    """
    if file is None:
        return generate(tokenizer, 64 if n is None else n, seed, templates, frames)
    examples = [example for example in load_jsonl(file, tokenizer) if example.template in templates]
    if not examples:
        raise InputError(f"prompt file {file}: no prompt has the name order {' or '.join(templates)}")
    return examples[:n]


def make_examples(
    model: Model,
    *,
    n: int | None = None,
    seed: int = 0,
    templates: Sequence[Template] = TEMPLATES,
    file: Path | str | None = None,
    candidates: Annotated[int, Field(ge=2)] | None = None,
    frames: PositiveInt | None = None,
) -> Examples:
    """Make the examples of a check; arguments as in `load` and `strict`.

    Raises:
        InputError: from `load`.
    """
    asked = load(model.tokenizer, n=n, seed=seed, templates=templates, file=file, frames=frames)
    texts = [example.prompt for example in asked]
    return Examples(
        [example.id for example in asked],
        model.tokenize(texts),
        behavior(model.tokenizer, asked, model.device),
        texts,
        strict(model.tokenizer, asked, model.device, candidates),
        rules=other_rules(model.tokenizer, asked, model.device),
    )
