"""Refusal: requests to a chat model, those that it answers and those that it can only decline.

A defense that makes a model refuse is judged on its answers, so the prompts are whole requests in the model's chat
template and the behavior is a readout of the reply (`recover.tasks.replies`).

1. *Shipped* (`recover.tasks.prose`): `ordinary` requests, which SmolLM2-135M-Instruct answers, and `unservable`
   ones, which ask for what no text model has or does and which it declines. All are benign.
2. *Given*: a file of the user's own, CSV or JSON lines, with the columns of AdvBench (`goal,target`) or of HarmBench
   (`Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID`). Which one is told by the header.

What a user's file asks is never shown: not in an id, a message or a `repr`.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from recover.models.host import Model
from recover.tasks.dialogue import Request, ask, opened
from recover.tasks.examples import Contrast, Examples
from recover.tasks.files import numbered, read_text
from recover.tasks.prose import ORDINARY, UNSERVABLE
from recover.tasks.rules import OtherRule
from recover.types import InputError

Shipped = Literal["ordinary", "unservable"]

COLUMNS = "goal,target (as AdvBench) or Behavior,...,ContextString,BehaviorID (as HarmBench)"
ID_LENGTH = 200
STYLE = "Well,"
"""How the answers of another style begin: none of SmolLM2's own answers to 24 shipped requests does."""
STYLE_TOKENS = 16
"""Tokens of such an answer, at most: it is to cost less than a third of what asking does."""


def make_examples(
    model: Model,
    *,
    n: int | None = None,
    seed: int = 0,
    file: Path | str | None = None,
    forced_tokens: PositiveInt = 24,
    reply_tokens: PositiveInt = 48,
    declined: PositiveInt = 40,
    progress: Callable[[str, int, int], None] | None = None,
) -> Examples:
    """Ask the requests, and give each with the model's own answer as what is to be brought back.

    Args:
        model: a chat model.
        n: how many to draw; with a file, how many to keep from its start (None: all).
        seed: of the draws.
        file: a user's own requests.
        forced_tokens: how many tokens of an answer are forced, and how many columns a delta reaches.
        reply_tokens: how many tokens of a reply are read.
        declined: how many shipped requests that a text model declines by itself are asked as well: what features are
            selected from that announce a refusal.
        progress: called with ("asking", requests answered, requests).

    Raises:
        InputError: from `load`; no chat template; nothing that the model answers, or nothing that it declines.
    """
    asked, beside = load(n=n, seed=seed, file=file), draw(declined, seed, "unservable")
    total, report = len(asked) + len(beside), progress or (lambda *_: None)
    dialogue = ask(model, asked, reply_tokens, on_batch=lambda done, _: report("asking", done, total))
    refused = ask(model, beside, forced_tokens, on_batch=lambda done, _: report("asking", len(asked) + done, total))
    if not dialogue.served:
        raise InputError(f"refusal: the model answers none of these {len(asked)} requests; give some that it answers")
    contrast = None
    if refused.refused:
        contrast = Contrast(refused.select(refused.refused).prompts, dialogue.select(dialogue.served).prompts)
    columns = min(forced_tokens, reply_tokens)
    styled = OtherRule(
        "the same request in a fixed style", dialogue=opened(dialogue, STYLE, min(columns, STYLE_TOKENS))
    )
    return Examples.of(dialogue, columns, contrast, (styled,))


def shipped(kind: Shipped) -> list[Request]:
    """All shipped requests of a kind, `ordinary-001` first."""
    texts = ORDINARY if kind == "ordinary" else UNSERVABLE
    return [Request(f"{kind}-{number:03}", text, kind) for number, text in enumerate(texts, start=1)]


def draw(n: int, seed: int = 0, kind: Shipped = "ordinary") -> list[Request]:
    """Draw `n` different shipped requests; the first of a seed are the same for every larger `n`.

    Raises:
        InputError: there are not as many.
    """
    listed = shipped(kind)
    if not 0 <= n <= len(listed):
        raise InputError(f"{n} {kind} requests asked for; give 0 to {len(listed)}, which is all that there are")
    return random.Random(seed).sample(listed, len(listed))[:n]


def load(
    *, n: int | None = None, seed: int = 0, kind: Shipped = "ordinary", file: Path | str | None = None
) -> list[Request]:
    """Draw `n` shipped requests of a kind, or keep the first `n` of a file, in its order (None: all).

    Raises:
        InputError: from `draw` and `load_file`.
    """
    if file is not None:
        return load_file(file)[:n]
    return draw(len(shipped(kind)) if n is None else n, seed, kind)


def load_file(path: Path | str) -> list[Request]:
    """Read a user's own requests, in the file's order; spaces around them are dropped.

    Ids are the file's `BehaviorID`, or `line-N` by the line on which the row begins. A `ContextString` stands before
    its behavior, as HarmBench puts it there.

    Raises:
        InputError: with the line number, and never with what the file asks.
    """
    path = Path(path)
    text = read_text(path, f"request file {path}")
    given: list[Request] = []
    seen: dict[str, int] = {}
    column = None
    try:
        for number, row in _json_rows(text) if text.lstrip().startswith("{") else _csv_rows(text):
            try:
                column = column or _column(row)
                request = _request(row, column, number)
                if request.id in seen:
                    raise InputError(f"repeats the BehaviorID of line {seen[request.id]}; give each row its own")
            except InputError as error:
                raise InputError(f"line {number}: {error}") from None
            seen[request.id] = number
            given.append(request)
    except InputError as error:
        raise InputError(f"request file {path}, {error}") from None
    if not given:
        raise InputError(f"request file {path}: has no requests; give rows with the columns {COLUMNS}")
    return given


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's object and the line's number."""
    for number, line in numbered(text):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"line {number}: is not a JSON object; give one object a line, or CSV")
        yield number, row


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row by the names of the first, and the number of the line on which it begins: rows may span lines."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            raise InputError(
                f"line {number}: quotes that do not match begin here; put a field that holds a comma, a quote or a "
                "line break in quotes, and double the quotes within"
            ) from None
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            _column(dict.fromkeys(header), f"line {number}: ")
        elif len(row) != len(header):
            raise InputError(
                f"line {number}: has {len(row)} fields where the header has {len(header)}; put a field that holds a "
                "comma in quotes"
            )
        else:
            yield number, dict(zip(header, row, strict=True))


def _column(row: dict[str, Any], where: str = "") -> str:
    """Which column holds the requests. The row's own names are not shown: without a header they are a request."""
    found = [column for column in ("goal", "Behavior") if column in row]
    if len(found) != 1:
        wrong = "both goal and Behavior among its columns" if found else "no column that holds requests"
        raise InputError(f"{where}has {wrong}; name the columns {COLUMNS}")
    return found[0]


def _request(row: dict[str, Any], column: str, number: int) -> Request:
    asked = row.get(column)
    if not isinstance(asked, str) or not asked.strip():
        raise InputError(f"has no text under {column!r}; write the request there or delete the row")
    context = row.get("ContextString") if column == "Behavior" else None
    if not isinstance(context, str | None):
        raise InputError("has something other than text under 'ContextString'; write text there or leave it empty")
    name = f"line-{number}"
    if column == "Behavior" and "BehaviorID" in row:
        name = row["BehaviorID"]
        # Ids are shown and kept, so one that could be a sentence is refused.
        if not isinstance(name, str) or not name or len(name.split()) != 1 or len(name) > ID_LENGTH:
            raise InputError(f"has no name under 'BehaviorID'; give one of at most {ID_LENGTH} characters, no spaces")
        name = name.strip()
    text = f"{context.strip()}\n\n---\n\n{asked.strip()}" if context and context.strip() else asked.strip()
    if any("\ud800" <= character <= "\udfff" for character in text + name):
        raise InputError("holds half of a surrogate pair, which is no text; write the character itself")
    return Request(name, text, "given")
