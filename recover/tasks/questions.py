"""Questions with four answers: from the files of WMDP and MMLU, from a user's own, and from those that ship.

1. *Shipped*: by name (`toy-forget`, `toy-retain`), about invented things, for the model `toy-choice`.
2. *Published*: `cais/wmdp` and `cais/mmlu`, with a configuration after a colon (`cais/mmlu:high_school_geography`);
   from the cache of the library `datasets`, else from the hub. A row that cannot be asked in all orders, because two of
   its answers are equal or because it repeats another row, is left out: it is not the user's to mend.
3. *Given*: a file of JSON lines with the keys `question`, `choices` and `answer` (0 to 3, or a letter A to D), where
   such a row is refused; or a downloaded `.parquet` file of the published ones, read as these are.

What a question says is never shown: not in an id, a message or a `repr`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recover.models import hub, names
from recover.tasks.files import numbered, read_text
from recover.types import InputError

LETTERS = "ABCD"
PUBLISHED = {"cais/wmdp": "wmdp-bio", "cais/mmlu": "all"}
"""Data sets of the hub, each with the configuration that is read where none is named."""
SPLIT = "test"
KEYS = '"question", "choices" and "answer"'
Numbered = Iterable[tuple[int, Any]]
"""Each row and its number, counted from 1."""


@dataclass(frozen=True)
class Question:
    """A question, its four answers, and the place of the right one; `str()` shows the id alone."""

    id: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int

    def __repr__(self) -> str:
        return f"Question({self.id})"


class _UnusableError(InputError):
    """A row that is as it should be, and yet cannot be asked in all orders, or was asked before."""


def load(name: str) -> list[Question]:
    """The questions of this name, in their own order; ids are `line-N` in a file of lines, else `row-N`.

    Args:
        name: a shipped name, a published data set with or without a configuration, or a file.

    Raises:
        InputError: with the number of the line or row, and never with what it says; a data set that cannot be had.
    """
    dataset, _, configuration = name.partition(":")
    if name in (shipped := names.shipped_questions()):
        return _lines(name, shipped[name])
    if dataset in PUBLISHED:
        return _table(name, _from_hub(dataset, configuration or PUBLISHED[dataset]))
    path = Path(name).expanduser()
    if path.suffix == ".parquet":
        return _table(name, _parquet(path))
    return _lines(name, path)


def _lines(name: str, path: Path) -> list[Question]:
    return _questions(name, "line", _json_rows(path, f"question file {name}"), lenient=False)


def _table(name: str, rows: Iterable[Any]) -> list[Question]:
    return _questions(name, "row", enumerate(rows, start=1), lenient=True)


def _questions(name: str, unit: str, rows: Numbered, lenient: bool) -> list[Question]:
    seen: dict[tuple[str, ...], int] = {}
    asked = []
    for number, row in rows:
        try:
            question = _question(row, f"{unit}-{number}")
            content = (question.question, *sorted(question.choices))
            if content in seen:
                raise _UnusableError(f"repeats {unit} {seen[content]}; delete one of them")
        except InputError as error:
            if lenient and isinstance(error, _UnusableError):
                continue
            raise InputError(f"question file {name}, {unit} {number}: {error}") from None
        seen[content] = number
        asked.append(question)
    if not asked:
        raise InputError(f"question file {name}: has no questions; give rows with the keys {KEYS}")
    return asked


def _question(row: Any, name: str) -> Question:
    if not isinstance(row, dict):
        raise InputError(f"is not a JSON object; give one with the keys {KEYS}")
    question, choices, answer = (row.get(key) for key in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise InputError('has no text under "question"; write the question there or delete the row')
    if not isinstance(choices, list) or len(choices) != len(LETTERS) or not all(isinstance(c, str) for c in choices):
        raise InputError('must have a list of four texts under "choices"')
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        answer = LETTERS.index(answer)
    if type(answer) is not int or not 0 <= answer < len(LETTERS):
        raise InputError('must have the place of the right choice under "answer": 0 to 3, or a letter A to D')
    first, second, third, fourth = (choice.strip() for choice in choices)
    texts = (first, second, third, fourth)
    if any("\ud800" <= character <= "\udfff" for text in (question, *texts) for character in text):
        raise InputError("holds half of a surrogate pair, which is no text; write the character itself")
    if not all(texts) or len(set(texts)) < len(texts):
        raise _UnusableError("has an empty choice, or two that are the same; give four different ones")
    return Question(name, question.strip(), texts, answer)


def _json_rows(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    known = ", ".join([*names.shipped_questions(), *PUBLISHED])
    for number, line in numbered(read_text(path, name, f"; give a file, or one of: {known}")):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{name}, line {number}: is not valid JSON; give one object a line") from None


def _parquet(path: Path) -> list[Any]:
    import pyarrow.parquet  # here, because only this kind of file needs it; it comes with `datasets`

    try:
        with path.open("rb") as file:
            rows: list[Any] = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is not a parquet file"
        raise InputError(f"question file {path}: cannot be read ({reason})") from None
    return rows


def _from_hub(dataset: str, configuration: str) -> Iterable[Any]:
    """The rows of a published data set: from the cache, and only then from the hub."""
    import datasets  # here, because it is slow to import and serves this one kind of name

    with (
        hub.hub_offline(datasets.config),
        contextlib.suppress(Exception),
    ):  # whatever its many loaders raise, it is not in the cache
        return list(datasets.load_dataset(dataset, configuration, split=SPLIT))
    reason = "the hub cannot be reached"
    if hub.hub_reachable():
        try:
            return list(datasets.load_dataset(dataset, configuration, split=SPLIT))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:")
    raise InputError(
        f"questions {dataset}:{configuration}: not in the cache, and not to be had ({reason}); download "
        f"{configuration}/{SPLIT}-00000-of-00001.parquet of the data set {dataset} and give its path in their place "
        "(prompts.forget or prompts.retain)"
    )
