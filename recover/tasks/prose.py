"""The text that recover ships, read from `recover/tasks/data`: facts, requests and neutral passages.

All of it was written for this project.

- `facts.json`: facts that a small model may know, by domain and relation. Each paraphrase of a relation ends right
  before the answer, which follows after a space; `{}` stands for the subject. Of some 400 facts these are the ones that
  SmolLM2-135M-Instruct answers correctly in all four paraphrases, above every other answer of their relation. No answer
  occurs in the prompts of its own fact.
- `ordinary.txt` and `unservable.txt`: benign requests to a chat model, one per line. None is text that the shipped SAEs
  were trained on (`fixtures/phrases.py`). Each was kept by the greedy replies of SmolLM2-135M-Instruct: an ordinary
  request where the reply neither opens with a refusal nor loops, in float32 (48 tokens) and in bfloat16 (40); an
  unservable one where the float32 reply opens with a refusal. The ids of examples count lines from the start of a
  file, so append new requests at its end.
- `neutral.txt`: everyday passages of two or three sentences, one per line. Nobody in them has a name, so that behaviors
  about names leave them alone.
- `ioi.json`, `openings.toml` and `classes.json`: the words of `recover.tasks.ioi`, the patterns of
  `recover.tasks.replies`, and the classes of `recover.tasks.labeled`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Relation:
    """Facts that share a relation.

    Attributes:
        domain: the domain of knowledge, whose facts a defense may suppress together.
        name: the name of the relation, part of an example's id.
        ways: the paraphrases, with `{}` for the subject.
        pairs: subjects and their answers.
    """

    domain: str
    name: str
    ways: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


def read_data(file: str) -> str:
    """Read a file of `recover/tasks/data`."""
    return resources.files("recover.tasks").joinpath("data", file).read_text(encoding="utf-8")


NEUTRAL = tuple(read_data("neutral.txt").splitlines())
ORDINARY = tuple(read_data("ordinary.txt").splitlines())
UNSERVABLE = tuple(read_data("unservable.txt").splitlines())
RELATIONS = tuple(
    Relation(row["domain"], row["name"], tuple(row["ways"]), tuple(row["pairs"].items()))
    for row in json.loads(read_data("facts.json"))
)
