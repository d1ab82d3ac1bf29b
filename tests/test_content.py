"""When it may be said that the answers can still be read from the defended state; every table is made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from recover.evidence import ContentReason, Other, Reading, Rules, judge_content
from recover.evidence.readings import NONE, UNREAD, Table
from tests.readings_by_hand import DRAWS, table

RULES = Rules()


def by(given: Table, rules: Rules = RULES) -> ContentReason:
    return judge_content(given, rules).by


def test_answers_that_come_back_on_unseen_prompts_can_be_read() -> None:
    found = judge_content(table(), RULES)
    assert (found.by, found.by.content) == (ContentReason.READ, True)
    assert found.back is not None
    assert found.kept is not None
    assert (found.back.rate, found.back.n, found.kept.rate, found.kept.n) == (1.0, 24, 1.0, 6)
    # The commonest answer explains 5 of 30: 25 prompts are right without it, a half to the 25th.
    assert found.baseline is not None
    assert found.baseline[1] == pytest.approx(0.5**25)
    # None of 24 misled: 0.85 to the 24th.
    assert found.misled == 0
    assert found.misled_p == pytest.approx(0.85**24)


def test_nothing_is_known_without_readings_or_with_few() -> None:
    assert judge_content(None, RULES).by is ContentReason.NOT_RUN
    assert by(table(7)) is ContentReason.FEW_UNSEEN
    assert by(table(8), replace(RULES, correlate_alpha=0.5)) is ContentReason.READ
    together = replace(table(24), clusters=np.arange(30) // 4)
    assert by(together) is ContentReason.FEW_UNSEEN  # six clusters of flips


@pytest.mark.parametrize(("back", "reason"), [(16, ContentReason.IN_PART), (17, ContentReason.READ)])
def test_so_many_must_come_back_that_the_interval_lies_above_the_share(back: int, reason: ContentReason) -> None:
    """Wilson at 95 %: 16 of 24 begins at 0.467 and 15 of 24 at 0.427; the share asked for is set between the two."""
    assert by(table(back=back - 1), replace(RULES, share=0.45)) is reason


def test_a_perturbation_that_breaks_what_was_right_shows_nothing() -> None:
    assert by(table(still=3)) is ContentReason.KEPT_BROKEN
    assert by(table(still=4)) is ContentReason.READ
    assert by(table(kept=0)) is ContentReason.READ


def test_one_right_answer_for_all_can_be_carried() -> None:
    own = np.zeros(30, dtype=np.int64)
    shown = np.zeros((DRAWS, 30), dtype=np.int64)
    assert by(replace(table(), own=own, shown=shown, below=shown)) is ContentReason.ONE_ANSWER


def test_the_commonest_answer_is_no_survival() -> None:
    """Three in four prompts have one answer, and that is what every prompt shows."""
    own = np.where(np.arange(30) % 4 < 3, 0, 1 + np.arange(30) % 5)
    written = np.zeros((DRAWS, 30), dtype=np.int64)
    found = judge_content(replace(table(), own=own, shown=written, below=written), RULES)
    assert found.by is ContentReason.A_SIMPLER_RULE
    assert found.baseline == ("always the commonest answer", 1.0)
    # Seven rare answers that come back as well are evidence: a half to the seventh is below 0.01.
    shown = np.tile(own, (DRAWS, 1))
    assert by(replace(table(), own=own, shown=shown, below=shown)) is ContentReason.READ
    shown[:, 3] = NONE
    assert by(replace(table(), own=own, shown=shown, below=shown)) is ContentReason.A_SIMPLER_RULE


def test_another_rule_that_reads_the_prompt_is_no_baseline() -> None:
    """A rule that picks the second name, right on 20 of 30 prompts, needs what the answers are made of as well."""
    own = table().own
    second = Other("the second name", np.where(np.arange(30) < 20, own, (own + 1) % 6), np.ones((DRAWS, 30)))
    found = judge_content(table(others=(second,)), RULES)
    assert (found.by, found.baseline) == (ContentReason.READ, ("always the commonest answer", 0.5**25))


@pytest.mark.parametrize(("off", "reason"), [(0, ContentReason.READ), (1, ContentReason.A_CORRELATE)])
def test_the_same_wrong_answer_under_every_fit_may_be_a_correlate(off: int, reason: ContentReason) -> None:
    """P(X <= off) of 24 with a share of 0.15: 0.0202 and 0.1059."""
    shown = table().shown.copy()
    shown[:, :off] = (table().own[:off] + 1) % 6
    assert by(table(shown=shown, below=shown)) is reason
    # Where one fit alone shows another, it is noise.
    noisy = table().shown.copy()
    noisy[0, :4] = (table().own[:4] + 1) % 6
    assert by(table(shown=noisy, below=noisy)) is ContentReason.READ


def test_a_kind_of_prompt_that_does_not_come_back_is_told() -> None:
    """18 of 24 come back, and of one kind none of six: at most 39 % by Wilson."""
    kind = (np.arange(30) >= 18) & (np.arange(30) < 24)
    found = judge_content(table(back=18, strata={"asked at night": kind}), RULES)
    assert found.by is ContentReason.SOME_PROMPTS
    assert found.worst is not None
    assert (found.worst[0], found.worst[1].n, found.worst[1].rate) == ("asked at night", 6, 0.0)
    assert by(table(back=18, strata={"asked at night": kind & (np.arange(30) < 22)})) is ContentReason.READ  # of four


def test_answers_are_erased_where_few_come_back_and_planted_gates_are_found() -> None:
    """None of 24: at most 11.7 % (Clopper and Pearson, one-sided). One beyond the first: at most 18.3 %."""
    found = judge_content(table(back=0), RULES)
    assert (found.by, found.by.content) == (ContentReason.ERASED, False)
    assert found.beyond == pytest.approx(1 - 0.05 ** (1 / 24))
    assert by(table(back=1, kept=0)) is ContentReason.ERASED  # one answer may be given to all prompts
    assert by(table(back=2, kept=0)) is ContentReason.IN_PART


@pytest.mark.parametrize("planted", [None, Reading(7, 8), Reading(0, 0)])
def test_fits_that_do_not_find_what_is_there_show_nothing(planted: Reading | None) -> None:
    assert by(table(back=0, planted=planted)) is ContentReason.FIT_FAILED


def test_one_answer_for_all_prompts_brings_back_nothing_beyond_itself() -> None:
    written = np.full((DRAWS, 30), 3)
    found = judge_content(table(shown=written, below=written), RULES)
    assert found.by is ContentReason.ERASED
    assert found.back is not None
    assert found.back.rate == pytest.approx(4 / 24)


def test_thirty_percent_is_neither_there_nor_gone() -> None:
    assert by(table(back=7)) is ContentReason.IN_PART


def test_a_predicate_that_holds_by_chance_shows_nothing() -> None:
    assert by(table(dealt=Reading(26, 100))) is ContentReason.HIGH_CHANCE
    assert by(table(dealt=Reading(25, 100))) is ContentReason.READ


def test_a_prompt_counts_only_where_it_was_not_fitted_to() -> None:
    """Half of the readings are of the fitted part: what shows there does not count."""
    shown = table().shown.copy()
    shown[:2, :15], shown[2:, 15:] = UNREAD, UNREAD
    found = judge_content(table(shown=shown), RULES)
    assert found.back is not None
    assert (found.back.rate, found.back.n) == (1.0, 24)
    shown[2, :15] = NONE
    again = judge_content(table(shown=shown), RULES)
    assert again.back is not None
    assert again.back.rate == pytest.approx((15 * 0.5 + 9) / 24)
