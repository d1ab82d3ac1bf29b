"""The rules of evidence, on readings made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from recover.evidence.rules import Reading, Rule, Rules, TransferEvidence, judge
from recover.numerics.statistics import Paired

RULES = Rules()
SURVIVES = TransferEvidence(Reading(40, 40), Reading(39, 40), Reading(6, 120), Reading(5, 120), Reading(40, 4000))
NOTHING = TransferEvidence(Reading(4, 40), Reading(5, 40), Reading(14, 120), Reading(12, 120), Reading(40, 4000))
AS_EASY = Paired(30, 12, 14, 4, 0, 1.02, 0.7)
NEARER = Paired(30, 28, 2, 0, 0, 0.5, 1e-6)


def test_a_mechanism_that_survives_is_specific_however_easy_the_placebo() -> None:
    for placebo in (AS_EASY, NEARER, None):
        assert judge(SURVIVES, placebo, RULES).content is True


def test_nothing_transfers_and_the_placebo_is_as_easy() -> None:
    finding = judge(NOTHING, AS_EASY, RULES)
    assert finding.content is False
    assert finding.rule is Rule.NO_MORE_THAN_CHANCE


def test_nothing_transfers_yet_the_own_target_is_nearer() -> None:
    assert judge(NOTHING, NEARER, RULES).content is None
    assert judge(NOTHING, None, RULES).content is None
    assert judge(NOTHING, replace(AS_EASY, n=4), RULES).content is None


def test_pairs_too_few_to_reach_alpha_are_no_evidence_that_the_placebo_is_as_easy() -> None:
    """Eight of eight pairs have p = 2^-8, times three 0.0117; with nine it is 0.0059."""
    few = judge(NOTHING, Paired(8, 8, 0, 0, 0, 0.1, 2.0**-8), RULES)
    assert few.content is None
    assert few.rule is Rule.FEW_PAIRS
    assert judge(NOTHING, Paired(8, 4, 4, 0, 0, 1.0, 0.64), RULES).content is None
    assert judge(NOTHING, Paired(9, 4, 5, 0, 0, 1.0, 0.75), RULES).content is False
    assert judge(NOTHING, Paired(8, 4, 4, 0, 0, 1.0, 0.64), replace(RULES, alpha=0.02)).content is False


def test_held_out_examples_too_few_to_tell_little_from_most_are_no_evidence_that_nothing_transfers() -> None:
    """2 of 8: Wilson 95 % ends at 0.591; 2 of 16: at 0.360."""
    none = TransferEvidence(Reading(2, 8), Reading(1, 8), Reading(2, 24), Reading(0, 24), Reading(0, 800))
    few = judge(none, AS_EASY, RULES)
    assert few.content is None
    assert few.rule is Rule.WIDE_INTERVAL
    assert few.rule.content is None
    assert none.own.wilson95[1] == pytest.approx(0.591, abs=1e-3)
    assert judge(none, AS_EASY, replace(RULES, most=0.6)).content is False
    assert judge(replace(none, own=Reading(2, 16)), AS_EASY, RULES).content is False


def test_what_fails_under_c1_plus_is_an_undone_clamp() -> None:
    finding = judge(replace(SURVIVES, write_orthogonal=Reading(2, 40)), AS_EASY, RULES)
    assert finding.content is False
    assert finding.rule is Rule.CLAMP_UNDONE


def test_where_c1_plus_admits_nothing_it_says_nothing() -> None:
    """The encoder and decoder directions of many features may span the residual."""
    finding = judge(replace(SURVIVES, write_orthogonal=Reading(0, 0)), AS_EASY, RULES)
    assert finding.content is None
    assert finding.rule is Rule.C1_PLUS_EMPTY
    assert set(finding.comparisons) == {"transfer", "placebo"}
    assert judge(replace(NOTHING, write_orthogonal=Reading(0, 0)), AS_EASY, RULES).content is False


def test_a_part_that_survives_is_no_clear_answer() -> None:
    # 20 of 40: Wilson 95 % begins at 0.352, by (20 + q^2/2)/(40 + q^2) - q sqrt(10 + q^2/4)/(40 + q^2).
    finding = judge(replace(SURVIVES, own=Reading(20, 40), write_orthogonal=Reading(20, 40)), AS_EASY, RULES)
    assert finding.content is None
    assert finding.rule is Rule.NOT_CLEARLY_MOST
    # Under C1+ alone it may also be too little.
    assert judge(replace(SURVIVES, write_orthogonal=Reading(20, 40)), AS_EASY, RULES).content is None


@pytest.mark.parametrize("control", ["dealt", "random"])
def test_a_predicate_that_chance_satisfies_too_often_cannot_make_it_true(control: str) -> None:
    often = replace(SURVIVES, **{control: Reading(31, 120)})  # 25.8 %
    assert judge(often, AS_EASY, RULES).content is None
    seldom = replace(SURVIVES, **{control: Reading(30, 120)})  # 25 %
    assert judge(seldom, AS_EASY, RULES).content is True
    assert judge(often, AS_EASY, replace(RULES, max_chance=0.3)).content is True


def test_right_answers_under_shuffled_fits_are_no_chance_but_must_be_exceeded() -> None:
    """A delta fitted to wrong answers may reopen the mechanism on its way."""
    reopened = replace(SURVIVES, shuffled=Reading(48, 120))
    assert judge(reopened, AS_EASY, RULES).content is True
    as_often = replace(SURVIVES, shuffled=Reading(114, 120))
    assert judge(as_often, AS_EASY, RULES).content is False


def test_too_few_held_out_examples_say_nothing() -> None:
    few = TransferEvidence(Reading(7, 7), Reading(7, 7), Reading(0, 21), Reading(0, 21), Reading(0, 700))
    assert judge(few, AS_EASY, RULES).content is None
    assert judge(few, AS_EASY, replace(RULES, min_heldout=7)).content is True


def test_without_a_shuffled_control_chance_is_not_measured() -> None:
    finding = judge(replace(SURVIVES, shuffled=Reading(0, 0)), AS_EASY, RULES)
    assert finding.content is None
    assert finding.rule is Rule.NOTHING_TO_SHUFFLE


def test_of_transfer_that_was_not_run_nothing_is_known() -> None:
    finding = judge(None, AS_EASY, RULES)
    assert (finding.content, finding.rule) == (None, Rule.NOT_RUN)


def test_the_comparisons_are_counted_and_corrected() -> None:
    finding = judge(SURVIVES, AS_EASY, RULES)
    assert set(finding.comparisons) == {"transfer", "write_orthogonal_transfer", "placebo"}
    # Holm: the largest p-value of three stays as it is.
    assert finding.comparisons["placebo"] == pytest.approx(0.7)
    # Eight of 8 against three of 8: of the ways to place 11 hits on 16, those with all of the first 8; two comparisons.
    weak = TransferEvidence(Reading(8, 8), Reading(8, 8), Reading(3, 8), Reading(0, 8), Reading(0, 100))
    alone = math.comb(8, 3) * math.comb(8, 8) / math.comb(16, 11)
    corrected = judge(weak, None, RULES).comparisons["transfer"]
    assert corrected == pytest.approx(2 * alone, rel=1e-6)


def test_it_is_decided_whether_per_example_recovery_is_specific() -> None:
    as_often = judge(SURVIVES, AS_EASY, RULES, within=(Reading(30, 30), Reading(29, 30)))
    more_often = judge(SURVIVES, NEARER, RULES, within=(Reading(30, 30), Reading(5, 30)))
    assert (as_often.reached_more_often, more_often.reached_more_often) == (False, True)
    assert judge(SURVIVES, AS_EASY, RULES).reached_more_often is None


def test_one_target_for_all_is_held_against_another_one() -> None:
    """A shared delta can carry a target that all share: that it transfers is nothing, unless another one does not."""
    shared = replace(SURVIVES, shuffled=Reading(0, 80), dealt=Reading(79, 80), one_for_all=True)
    written = judge(shared, NEARER, RULES)
    assert written.content is False
    assert written.rule is Rule.WRITES_ANY_TARGET
    # 70 of 80 is clearly less than 400 of 400, and most all the same.
    assert judge(replace(shared, own=Reading(400, 400), dealt=Reading(70, 80)), NEARER, RULES).content is False
    kept = judge(replace(shared, dealt=Reading(3, 80)), NEARER, RULES)
    assert kept.content is None
    assert kept.rule is Rule.ONE_TARGET
    assert "transfer_over_dealt" in kept.comparisons
    assert judge(replace(shared, one_for_all=False, dealt=Reading(3, 80)), NEARER, RULES).content is True
