"""Near-duplicates: token ids and texts whose likeness is computed by hand, and the IOI prompts that ship."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from recover.models.host import Prompts
from recover.tasks import Examples, LogitDifference
from recover.tasks.duplicates import SHARED, grouped, near_duplicates

LONG = list(range(100, 120))
OTHER = list(range(200, 220))


def examples(rows: list[list[int]], target: list[int], **given: Any) -> Examples:
    other = torch.tensor([90 if one != 90 else 91 for one in target])
    behavior = LogitDifference(torch.tensor(target), other)
    prompts = Prompts.padded(rows, torch.device("cpu"))
    return Examples([f"e{row}" for row in range(len(rows))], prompts, behavior, **given)


def test_prompts_that_differ_in_one_rare_token_of_many_are_one() -> None:
    """20 tokens that 2 of 4 prompts have weigh log 2 each, the exchanged ones, which 1 has, log 4."""
    changed = [300, *LONG[1:]]
    likeness = 19 * math.log(2) / (19 * math.log(2) + math.log(4))
    assert likeness > SHARED
    found = examples([LONG, OTHER, changed, OTHER[:10]], [1, 2, 1, 2])
    # Half of the fourth's tokens are not there: it is another prompt than the second.
    assert near_duplicates(found).tolist() == [[0, 2]]
    assert list(found.clusters) == ["e0", "e1", "e0", "e3"]


def test_the_share_decides() -> None:
    """Of 20 tokens 18 are shared: 18 log 2 of 18 log 2 + 2 log 4 is 0.82."""
    assert 18 / 22 < SHARED < 19 / 21
    found = examples([LONG, OTHER, [300, 301, *LONG[2:]], OTHER[:10]], [1, 2, 1, 2])
    assert near_duplicates(found).tolist() == []


def test_another_target_is_another_question() -> None:
    assert near_duplicates(examples([LONG, LONG, OTHER], [1, 2, 1])).tolist() == []
    assert near_duplicates(examples([LONG, LONG, OTHER], [1, 1, 1])).tolist() == [[0, 1]]


def test_what_answers_is_not_exchanged() -> None:
    """As in the first test, but that a changed token is what another example answers."""
    changed = [2, *LONG[1:]]
    assert near_duplicates(examples([LONG, OTHER, changed, OTHER[:10]], [1, 2, 1, 2])).tolist() == []
    rival = [90, *LONG[1:]]
    assert near_duplicates(examples([LONG, OTHER, rival, OTHER[:10]], [1, 2, 1, 2])).tolist() == []


def test_what_fills_a_template_makes_the_question() -> None:
    """Three of four share a template of 60 tokens and fill it differently, one of them with another answer.

    The likeness of any two of the three is 60 log(4/3) of 60 log(4/3) + log 4, which is 0.93.
    """
    filled = [[*range(100, 160), slot] for slot in (300, 301, 302)]
    assert near_duplicates(examples([*filled, OTHER], [1, 1, 2, 2])).tolist() == []
    assert near_duplicates(examples([*filled[:2], OTHER, OTHER[:10]], [1, 1, 2, 2])).tolist() == [[0, 1]]


def test_what_stands_before_every_question_weighs_nothing() -> None:
    prefix = list(range(500, 600))
    assert near_duplicates(examples([[*prefix, 300], [*prefix, 301], [*prefix, 302]], [1, 1, 1])).tolist() == []


def test_texts_that_differ_in_case_marks_and_spaces_are_one() -> None:
    texts = ["The capital of France is", "the capital of  France, is", "The capital of Spain is", "?", "!"]
    found = examples([[1], [2], [3], [4], [5]], [7, 7, 7, 7, 7], texts=texts)
    assert near_duplicates(found).tolist() == [[0, 1]]


def test_groups_are_joined_where_their_members_are_alike() -> None:
    """The first of one group and the first of another have the same tokens; so have their last and a third group's."""
    rows = [LONG, OTHER, [7, 8], LONG[::-1], [9, 10], [7, 8], [11, 12]]
    found = examples(rows, [1] * 7, groups=["b", "b", "b", "c", "a", "a", "e"])
    assert grouped(found) == ["a", "a", "a", "a", "a", "a", "e"]
    assert len(set(examples(rows, [1] * 7).clusters)) == 5


def test_no_order_matters() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(1000, 2000, (12, 25), generator=generator).tolist()
    rows = [[*row[:place], 400 + place, *row[place + 1 :]] for row in base for place in range(0, 15, 4)]
    found = examples(rows, [row % 3 for row in range(12) for _ in range(4)])
    turn = torch.randperm(len(rows), generator=generator)
    turned = found.select(turn)
    names = dict(zip(found.ids, found.clusters, strict=True))
    assert len(set(names.values())) == 12
    assert dict(zip(turned.ids, turned.clusters, strict=True)) == names


@pytest.mark.parametrize("n", [1, 2])
def test_few_examples(n: int) -> None:
    assert len(set(examples([[5, 6], [7, 8]][:n], [1, 1][:n]).clusters)) == n
