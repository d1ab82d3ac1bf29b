"""When it may be said that the behavior's own rule comes back more easily than others; every table is made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from recover.evidence import Reading, RuleReason, Rules, judge_rule
from recover.evidence.readings import Table
from tests.readings_by_hand import DRAWS, other, table

RULES = Rules()
OWN = table().own


def by(given: Table, rules: Rules = RULES) -> RuleReason:
    return judge_rule(given, rules).by


def against(*norms: float | list[float]) -> Table:
    return table(others=tuple(other(f"rule {number}", OWN, norm) for number, norm in enumerate(norms)))


def test_a_rule_that_needs_half_the_norm_of_every_other_is_easier() -> None:
    found = judge_rule(against(2.0, 3.0), RULES)
    assert (found.by, found.by.rule) == (RuleReason.EASIER, True)
    nearest = found.nearest
    assert nearest is not None
    assert (nearest.name, nearest.n, nearest.easier, nearest.harder) == ("rule 0", 24, 24, 0)
    assert nearest.median_ratio == pytest.approx(0.5)
    assert nearest.p == pytest.approx(0.5**24)
    assert nearest.fit_p == 0.0  # equal in every fit


def test_it_must_be_easier_than_every_other_rule() -> None:
    assert by(against(2.0, 1.0)) is RuleReason.AS_EASY
    assert by(against(2.0, 0.5)) is RuleReason.AS_EASY
    assert by(against(0.5)).rule is False


def test_norms_within_the_tie_are_equal() -> None:
    assert by(against(1.04)) is RuleReason.AS_EASY
    assert by(against(1.06)) is RuleReason.EASIER


def test_nothing_is_known_without_another_rule() -> None:
    assert judge_rule(None, RULES).by is RuleReason.NOT_RUN
    assert by(table(others=())) is RuleReason.NO_OTHER_RULE
    same = replace(other("the same", OWN, 2.0), answers=OWN)
    assert by(table(others=(same,))) is RuleReason.NO_OTHER_RULE
    mostly = replace(other("mostly the same", OWN, 2.0), answers=np.where(np.arange(30) < 17, OWN, OWN + 1))
    assert by(table(others=(mostly,))) is RuleReason.NO_OTHER_RULE  # seven flips differ


def test_one_lucky_fit_is_no_advantage() -> None:
    """Easier on every prompt by the best of all fits, and not over fits."""
    norms = np.array([[0.5], [1.0], [1.0], [1.0]]) * np.ones(30)
    lucky = table(norms=norms, best_norms=norms)
    lucky = replace(lucky, others=(other("another", OWN, 1.0),))
    assert by(lucky) is RuleReason.FITS_VARY


def test_the_own_rule_must_hold_on_many_flips_and_spare_what_was_right() -> None:
    assert by(replace(table(back=12), planted=None)) is RuleReason.NOT_IMPOSED
    assert by(replace(table(still=2), planted=None)) is RuleReason.NOT_IMPOSED


def test_absence_is_said_only_where_fits_are_known_to_work() -> None:
    """The own rule is never reached, another always is."""
    gone = table(back=0, others=(other("always the same answer", OWN, 1.0),))
    assert by(gone) is RuleReason.AS_EASY
    for planted in (None, Reading(7, 8)):
        assert by(replace(gone, planted=planted)) is RuleReason.NOT_IMPOSED


def test_the_own_rule_gets_the_best_of_all_its_fits_before_it_is_called_no_easier() -> None:
    given = against(1.0)
    assert by(given) is RuleReason.AS_EASY
    assert by(replace(given, best_norms=0.5 * given.norms)) is RuleReason.UNDECIDED


def test_another_rule_that_hardly_holds_is_not_as_easy() -> None:
    rare = other("rare", OWN, 0.5)
    norms = np.where(np.arange(30) < 12, 0.5, np.inf) * np.ones((DRAWS, 1))
    assert by(table(others=(replace(rare, norms=norms),))) is RuleReason.UNDECIDED


def test_where_the_predicate_holds_by_chance_nothing_is_known() -> None:
    assert by(replace(against(2.0), dealt=Reading(30, 100))) is RuleReason.HIGH_CHANCE
