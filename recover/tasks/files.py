"""Files of a user's own prompts: read as UTF-8, row by row; what is wrong is told by its line, never by its text."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from recover.types import InputError

T = TypeVar("T")


def read_text(path: Path, name: str, instead: str = "") -> str:
    """Read a text file, which messages call `name`; `instead` tells what else could be given.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return decoded(path.read_bytes(), name)
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}){instead}") from None


def decoded(raw: bytes, name: str) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises:
        InputError: with the number of the first line that is something else.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}, line {number}: is not UTF-8 text; save it as UTF-8") from None


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """Number the lines from 1, and leave out empty ones."""
    # Not splitlines, which breaks at characters that may stand within a string of JSON.
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def text_object(line: str, texts: Sequence[str], keys: str) -> dict[str, Any]:
    """Parse a JSON object whose keys `texts` hold text; messages list the expected `keys`.

    Raises:
        InputError: the line is something else.
    """
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise InputError("not valid JSON; give one object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"must be a JSON object with {keys}")
    for key in texts:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise InputError(f'the key "{key}" must be there and hold text')
    return row


def rows_of(
    text: str, name: str, read: Callable[[int, str], T], content: Callable[[T], Hashable], repeats: str
) -> list[T]:
    """Parse each line of a text with `read(number, line)`, and refuse rows of equal `content`.

    Messages call the text `name`, and say `repeats` of a repeated row, with `{}` for the number of the first.

    Raises:
        InputError: from `read`, with the line's number; or a line that repeats another.
    """
    seen: dict[Hashable, int] = {}
    rows = []
    for number, line in numbered(text):
        try:
            row = read(number, line)
            if (first := seen.setdefault(content(row), number)) != number:
                raise InputError(repeats.format(first))
        except InputError as error:
            raise InputError(f"{name}, line {number}: {error}") from None
        rows.append(row)
    return rows
