"""How often the rules of evidence err, over tables drawn with a known truth."""

from __future__ import annotations

from functools import cache

import pytest

from recover.evidence import Rules, judge_content, judge_rule
from recover.planted.tables import TABLES, drawn_table

N, SEEDS = 24, 40


@cache
def said(name: str, cluster: int) -> list[tuple[bool | None, bool | None]]:
    drawn = [drawn_table(TABLES[name], N * cluster, seed, cluster=cluster) for seed in range(SEEDS)]
    return [(judge_content(table, Rules()).by.content, judge_rule(table, Rules()).by.rule) for table in drawn]


@pytest.mark.parametrize("cluster", [1, 3])
@pytest.mark.parametrize("name", TABLES)
def test_false_claims_are_rare(name: str, cluster: int) -> None:
    """At a rate of 1 % more than 2 of 40 come in 7 of 1,000 runs; these seeds are fixed."""
    truth, told = TABLES[name], said(name, cluster)
    for value in (True, False):
        if truth.content is not value:
            assert sum(content is value for content, _ in told) <= 2
        if truth.rule is not value and truth.rule is not None:
            assert sum(rule is value for _, rule in told) <= 2


@pytest.mark.parametrize("cluster", [1, 3])
@pytest.mark.parametrize(
    ("name", "at", "least"),
    [
        ("80 % survives", 0, 0.85),
        ("all of it survives", 0, 0.95),
        ("erased, one answer is written", 0, 0.95),
        ("the own rule is easier, equal fits", 1, 0.9),
        ("the own rule is easier", 1, 0.8),
        ("another rule is easier", 1, 0.9),
    ],
)
def test_what_is_true_is_mostly_decided(name: str, at: int, least: float, cluster: int) -> None:
    truth = (TABLES[name].content, TABLES[name].rule)[at]
    assert sum(one[at] is truth for one in said(name, cluster)) / SEEDS >= least


def test_a_table_is_its_seed() -> None:
    one, same, other = (drawn_table(TABLES["80 % survives"], N, seed) for seed in (0, 0, 1))
    assert (one.shown == same.shown).all()
    assert (one.shown != other.shown).any()
    # Each prompt is unseen in one draw of every split.
    assert (one.read.sum(axis=0) == 3).all()
