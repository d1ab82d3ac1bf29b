"""Question files: the published schemas, a user's own, what is refused and by which line."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recover.models import hub
from recover.tasks import questions
from recover.types import InputError

SECRET = "xylophonic"
GOOD = {"question": "Which is even?", "choices": ["one", "two", "three", "five"], "answer": 1}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refused(name: Path | str) -> str:
    """The message, which is one line and shows nothing of the text; nor does what Python prints beside it."""
    with pytest.raises(InputError) as raised:
        questions.load(str(name))
    message = str(raised.value)
    assert "\n" not in message
    assert SECRET not in "".join(traceback.format_exception(raised.value)).replace(str(name), "")
    return message


def test_lines_with_places_and_with_letters_are_the_same_question(tmp_path: Path) -> None:
    other = GOOD | {"question": " Which is prime and even? ", "answer": "B", "subject": "sums"}
    first, second = questions.load(str(write(tmp_path / "q.jsonl", GOOD, "", other)))
    assert (first.id, second.id) == ("line-1", "line-3")
    assert first.answer == second.answer == 1
    assert second.question == "Which is prime and even?"
    assert first.choices == ("one", "two", "three", "five")
    assert repr(first) == str(first) == "Question(line-1)"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ('{"question": "xylophonic', "is not valid JSON"),
        ([SECRET], "is not a JSON object"),
        (GOOD | {"question": " "}, 'has no text under "question"'),
        ({"choices": GOOD["choices"], "answer": 0, SECRET: 1}, 'has no text under "question"'),
        (GOOD | {"choices": [SECRET, "b", "c"]}, 'must have a list of four texts under "choices"'),
        (GOOD | {"choices": SECRET}, 'must have a list of four texts under "choices"'),
        (GOOD | {"choices": [SECRET, "b", "c", 4]}, 'must have a list of four texts under "choices"'),
        (GOOD | {"answer": 4}, "0 to 3, or a letter A to D"),
        (GOOD | {"answer": -1}, "0 to 3, or a letter A to D"),
        (GOOD | {"answer": True}, "0 to 3, or a letter A to D"),
        (GOOD | {"answer": 1.0}, "0 to 3, or a letter A to D"),
        (GOOD | {"answer": "BC"}, "0 to 3, or a letter A to D"),
        (GOOD | {"answer": ""}, "0 to 3, or a letter A to D"),
        (GOOD | {"answer": SECRET}, "0 to 3, or a letter A to D"),
        (GOOD | {"choices": [SECRET, "b", "c", f" {SECRET}"]}, "two that are the same"),
        (GOOD | {"choices": [SECRET, "b", "c", " "]}, "an empty choice"),
        (GOOD | {"question": SECRET + "\ud800"}, "half of a surrogate pair"),
        (GOOD | {"choices": ["two", "one", "five", "three"], "answer": 0}, "repeats line 1"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(row: Any, why: str, tmp_path: Path) -> None:
    name = write(tmp_path / "q.jsonl", GOOD, "", row)
    message = refused(name)
    assert message.startswith(f"question file {name}, line 3: ")
    assert why in message


def test_the_same_words_with_other_answers_are_another_question(tmp_path: Path) -> None:
    other = GOOD | {"choices": ["one", "two", "three", "seven"]}
    assert len(questions.load(str(write(tmp_path / "q.jsonl", GOOD, other)))) == 2


def test_what_is_no_text_or_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\n\xff\n")
    assert "line 3: is not UTF-8" in refused(tmp_path / "latin.jsonl")
    assert "has no questions" in refused(write(tmp_path / "empty.jsonl", ""))
    missing = refused(tmp_path / "none.jsonl")
    assert "No such file" in missing
    assert "cais/wmdp" in missing
    (tmp_path / "no.parquet").write_text("{}")
    assert "is not a parquet file" in refused(tmp_path / "no.parquet")
    assert "No such file" in refused(tmp_path / "none.parquet")


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(questions.load(str(tmp_path / "q.jsonl"))) == 1


WMDP = pa.schema([("answer", pa.int64()), ("question", pa.string()), ("choices", pa.list_(pa.string()))])
MMLU = pa.schema(
    [("question", pa.string()), ("subject", pa.string()), ("choices", pa.list_(pa.string())), ("answer", pa.int64())]
)


@pytest.mark.parametrize("schema", [WMDP, MMLU], ids=["wmdp", "mmlu"])
def test_a_published_file_is_read_without_the_rows_that_cannot_be_asked(schema: pa.Schema, tmp_path: Path) -> None:
    """Row 2 has two equal answers and row 3 repeats row 1; the rest keep their numbers."""
    twice, last = GOOD | {"choices": ["a", "a", "b", "c"]}, GOOD | {"question": "Which is least?", "answer": 0}
    rows = [row | {"subject": "sums"} if "subject" in schema.names else row for row in (GOOD, twice, GOOD, last)]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "q.parquet")
    found = questions.load(str(tmp_path / "q.parquet"))
    assert [(question.id, question.answer) for question in found] == [("row-1", 1), ("row-4", 0)]


def test_a_published_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"Question": [SECRET], "A": ["x"]}), tmp_path / "q.parquet")
    assert 'row 1: has no text under "question"' in refused(tmp_path / "q.parquet")


class FakeDatasets:
    """`datasets` with a cache and a hub, each with what it holds."""

    def __init__(self, cached: Any = None, served: Any = None) -> None:
        self.config = SimpleNamespace(HF_HUB_OFFLINE=False)
        self.cached, self.served, self.calls = cached, served, []

    def load_dataset(self, name: str, configuration: str, split: str) -> Any:
        self.calls.append((name, configuration, split, self.config.HF_HUB_OFFLINE))
        found = self.cached if self.config.HF_HUB_OFFLINE else self.served
        if found is None:
            raise ConnectionError("nothing there\nsecond line")
        return found


@pytest.mark.parametrize(
    ("name", "dataset", "configuration"),
    [
        ("cais/wmdp", "cais/wmdp", "wmdp-bio"),
        ("cais/wmdp:wmdp-cyber", "cais/wmdp", "wmdp-cyber"),
        ("cais/mmlu", "cais/mmlu", "all"),
    ],
)
def test_what_is_cached_comes_before_the_hub(
    name: str, dataset: str, configuration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeDatasets(cached=[GOOD], served=[])
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    monkeypatch.setattr(hub, "hub_reachable", lambda: pytest.fail("the hub was asked"))
    assert [question.id for question in questions.load(name)] == ["row-1"]
    assert fake.calls == [(dataset, configuration, "test", True)]
    assert fake.config.HF_HUB_OFFLINE is False


def test_what_is_not_cached_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDatasets(served=[GOOD])
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    assert len(questions.load("cais/wmdp")) == 1
    fake.served = None
    assert "not to be had (nothing there); download" in refused("cais/wmdp")


def test_out_of_reach_the_file_to_download_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real library, whose cache has no such data set."""
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    message = refused("cais/wmdp:not-a-configuration")
    assert "the hub cannot be reached" in message
    assert "download not-a-configuration/test-00000-of-00001.parquet of the data set cais/wmdp" in message
    assert "prompts.forget" in message


def test_shipped_questions_are_read_by_name() -> None:
    for kind in ("forget", "retain"):
        found = questions.load(f"toy-{kind}")
        assert len(found) == 32
        assert {len(set(question.choices)) for question in found} == {4}
