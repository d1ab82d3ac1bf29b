"""Labeled texts to train probes on and to test them with: where they come from, and how many of each class.

===================  ===============================================================================================
`glosses`            shipped: what nouns mean, by what kind of thing they name (`fixtures/glosses.py`); English
`bias_in_bios_1`     `LabHC/bias_in_bios` (columns `hard_text`, `profession`, `gender`), the professions of SAEBench's
`bias_in_bios_2`     class sets 1, 2 and 3
`bias_in_bios_3`
`amazon_reviews`     `canrager/amazon_reviews_mcauley_1and5` (columns `text`, `category`, `rating`), five categories
===================  ===============================================================================================

All but the first are read through the `datasets` library, or from the user's own JSON lines of the same columns, which
may have a column `split` (`train` or `test`); without it every third row of a class is one to test with. A file for
`glosses` has the columns `text` and `label` and classes of its own. What a file says is never shown in a message.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from recover.models import hub
from recover.models.hub import hub_offline
from recover.tasks.files import decoded, numbered
from recover.tasks.prose import read_data
from recover.types import InputError

Data = Literal["glosses", "bias_in_bios_1", "bias_in_bios_2", "bias_in_bios_3", "amazon_reviews"]
Split = Literal["train", "test"]
SHIPPED = Path(__file__).parent / "data" / "glosses.jsonl.gz"
TEST_EVERY = 3


@dataclass(frozen=True)
class Labeled:
    """A text, the name of its class, and what it is for."""

    id: str
    text: str
    label: str
    split: Split


@dataclass(frozen=True)
class _Source:
    """Where a set lies on the hub, and how its rows are read.

    Attributes:
        classes: the values of the column `label` that are kept, and their names; None keeps all by their own names.
        whole: the columns that a row must have beside these two.
    """

    hub: str | None
    text: str
    label: str
    classes: Mapping[int, str] | None = None
    whole: tuple[str, ...] = ()


def _source(name: str, hub: str, *columns: str) -> _Source:
    """A published set: its columns of text and of class, and the others; its classes are in `data/classes.json`."""
    text, label, *whole = columns
    classes = json.loads(read_data("classes.json"))[name]
    return _Source(hub, text, label, {int(number): called for number, called in classes.items()}, tuple(whole))


BIOS: tuple[Data, ...] = ("bias_in_bios_1", "bias_in_bios_2", "bias_in_bios_3")
AMAZON = "canrager/amazon_reviews_mcauley_1and5"
SOURCES: Mapping[Data, _Source] = {
    "glosses": _Source(None, "text", "label"),
    **{name: _source(name, "LabHC/bias_in_bios", "hard_text", "profession", "gender") for name in BIOS},
    "amazon_reviews": _source("amazon_reviews", AMAZON, "text", "category", "rating"),
}


def load(data: Data = "glosses", file: Path | str | None = None) -> list[Labeled]:
    """All rows of a set, in its order, or of a `file` with its columns: JSON lines, gzipped where it is named `.gz`.

    Raises:
        InputError: from `load_file`; or a set that is neither cached nor reachable.
    """
    source = SOURCES[data]
    if file is not None:
        return load_file(file, data)
    if source.hub is None:
        return load_file(SHIPPED, data)
    try:
        both = (_kept(_hub_rows(source, split), source, default=split, name=split) for split in get_args(Split))
        return list(itertools.chain.from_iterable(both))
    except InputError as error:
        raise InputError(f"data set {source.hub}: {error}") from None


def load_file(path: Path | str, data: Data = "glosses") -> list[Labeled]:
    """Read JSON lines with the columns of a set.

    Raises:
        InputError: with the line number: no JSON object, no text, a class or a split that is none; or no row at all.
    """
    path, source, called = Path(path), SOURCES[data], f"text file {path}"
    try:
        raw = path.read_bytes()
        text = decoded(gzip.decompress(raw) if path.suffix == ".gz" else raw, called)
    except (OSError, EOFError) as error:
        raise InputError(f"{called}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        found = list(_kept(_json_rows(text), source, default=None, name="line"))
    except InputError as error:
        raise InputError(f"{called}, {error}") from None
    if not found:
        raise InputError(f"{called}: has no text of a class of {data!r}; give rows with {_columns(source)}")
    return found


def draw(rows: Sequence[Labeled], split: Split, seed: int, per_class: int | None = None) -> list[Labeled]:
    """Up to `per_class` rows of each class, drawn by the seed: the same ones first for every number."""
    by_class: dict[str, list[Labeled]] = {}
    for row in rows:
        if row.split == split:
            by_class.setdefault(row.label, []).append(row)
    drawn = []
    for label in sorted(by_class):
        shuffled = random.Random(f"{seed}:{label}").sample(by_class[label], len(by_class[label]))
        drawn += shuffled[:per_class]
    return drawn


def _columns(source: _Source) -> str:
    return ", ".join((source.text, source.label, *source.whole))


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in numbered(text):
        try:
            yield number, json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            yield number, None


def _kept(rows: Iterable[tuple[int, Any]], source: _Source, default: Split | None, name: str) -> Iterator[Labeled]:
    """The rows of the classes that are kept; `default` is the split of rows that do not say."""
    seen: dict[str, int] = {}
    for number, row in rows:
        try:
            label, text = _read(row, source)
        except InputError as error:
            raise InputError(f"{'line' if default is None else name + ' row'} {number}: {error}") from None
        if label is None:
            continue
        seen[label] = seen.get(label, 0) + 1
        split = row.get("split", default)
        if split is None:
            split = "test" if seen[label] % TEST_EVERY == 0 else "train"
        if split not in get_args(Split):
            raise InputError(
                f"line {number}: its split is neither 'train' nor 'test'; write one of these, or leave it out"
            )
        yield Labeled(f"{name}-{number}", text, label, split)


def _read(row: Any, source: _Source) -> tuple[str | None, str]:
    """Class and text of a row; no class where it is of one that is left out."""
    if not isinstance(row, dict):
        raise InputError("is not a JSON object; give one object a line")
    missing = [column for column in (source.text, source.label, *source.whole) if column not in row]
    if missing:
        raise InputError(f"has no {missing[0]!r}; give the columns {_columns(source)}")
    text, value = row[source.text], row[source.label]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"has no text under {source.text!r}; write it there or delete the row")
    if source.classes is None:
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"has no class under {source.label!r}; write its name there")
        return value.strip(), text
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"has no class under {source.label!r}; write its number there, such as {min(source.classes)}")
    return source.classes.get(value), text


def _hub_rows(source: _Source, split: Split) -> Iterator[tuple[int, Any]]:
    """Rows of the hub's set, numbered from 1; from the cache where the hub is out of reach."""
    import datasets  # here, because it is slow to import and serves these sets alone

    reachable = hub.hub_reachable()
    try:
        # With the hub out of reach its client would retry for long before it looked into its cache.
        with contextlib.nullcontext() if reachable else hub_offline():
            found = datasets.load_dataset(source.hub, split=split)
    except Exception as error:  # whatever the library raises, the set cannot be had
        why = (
            f"cannot be loaded ({type(error).__name__})" if reachable else "not in the cache, and no hub to be reached"
        )
        raise InputError(
            f"{why}; download its rows as JSON lines with the columns {_columns(source)}, and name that file as "
            "prompts.file"
        ) from None
    return enumerate(found, start=1)
