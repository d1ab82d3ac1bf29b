"""Scores and predicates against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from recover.tasks.behaviors import (
    AnswerLikelihood,
    Behavior,
    ChoiceCrossEntropy,
    ChoiceMargin,
    ChoiceOdds,
    LogitDifference,
    Targeted,
    VocabularyMargin,
    shows,
)
from recover.types import InputError

LOGITS = torch.tensor([[1.0, 4.0, 2.0, -1.0], [0.0, 0.0, 3.0, 3.0]])


def read(behavior: Behavior, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    """What the engine hands over: the columns that the behavior names."""
    return logits if behavior.tokens is None else logits.gather(1, behavior.tokens)


def test_logit_difference() -> None:
    behavior = LogitDifference(torch.tensor([2, 0]), torch.tensor([1, 3]))
    assert behavior.score(read(behavior)).tolist() == [-2.0, -3.0]
    assert behavior.slack(read(behavior)).tolist() == [-2.0, -3.0]
    turned = LogitDifference(behavior.other, behavior.target)
    assert turned.slack(read(turned)).tolist() == [2.0, 3.0]
    assert shows(turned, read(turned)).tolist() == [True, True]


def test_a_tie_does_not_show() -> None:
    tie = LogitDifference(torch.tensor([1, 2]), torch.tensor([2, 3]))
    assert shows(tie, read(tie)).tolist() == [True, False]
    answer = AnswerLikelihood(torch.tensor([1, 2]))
    assert shows(answer, read(answer)).tolist() == [True, False]


def test_choice_margin_scores_by_the_mean_and_shows_by_the_largest() -> None:
    """Example 1: 2 against 1, 4 and -1: above their mean of 4/3, but below the 4."""
    behavior = ChoiceMargin(torch.tensor([2, 3]), torch.tensor([[0, 1, 3], [0, 1, 2]]))
    assert_close(behavior.score(read(behavior)), torch.tensor([2 - 4 / 3, 3 - 1.0]))
    assert behavior.slack(read(behavior)).tolist() == [-2.0, 0.0]
    assert shows(behavior, read(behavior)).tolist() == [False, False]
    best = ChoiceMargin(torch.tensor([1]), torch.tensor([[0, 2]]))
    assert best.slack(read(best, LOGITS[:1])).tolist() == [2.0]


def test_choice_cross_entropy_is_a_log_probability_among_the_choices_alone() -> None:
    """Example 1: 2 among 2, 1 and -1, the 4 being no choice; example 2: 3 among 3, 0 and 0."""
    behavior = ChoiceCrossEntropy(torch.tensor([2, 3]), torch.tensor([[0, 3], [0, 1]]))
    expected = [2 - math.log(math.exp(2) + math.exp(1) + math.exp(-1)), 3 - math.log(math.exp(3) + 2)]
    assert_close(behavior.score(read(behavior)), torch.tensor(expected))
    assert behavior.slack(read(behavior)).tolist() == [1.0, 3.0]


def test_choice_odds_show_above_one_half_of_the_choices() -> None:
    """Example 1 of three: the largest, and yet below one half; 2 against ln 2 + 1 would be a tie."""
    logits = torch.tensor([[2.0, 1.5, 1.5], [2.0, 1.0, 1.0], [math.log(2), 0.0, 0.0]], dtype=torch.float64)
    behavior = ChoiceOdds(torch.tensor([0, 0, 0]), torch.tensor([[1, 2]] * 3))
    odds = [2 - (1.5 + math.log(2)), 1 - math.log(2), 0.0]
    assert_close(behavior.score(read(behavior, logits)), torch.tensor(odds, dtype=torch.float64))
    assert shows(behavior, read(behavior, logits)).tolist() == [False, True, False]
    weaker = ChoiceMargin(behavior.target, behavior.others)
    assert shows(weaker, read(weaker, logits)).tolist() == [True, True, True]


def test_vocabulary_margin_raises_more_than_its_predicate_asks() -> None:
    """Example 1: the 2 beats the choices 1 and -1, and not the 4, which is no choice."""
    behavior = VocabularyMargin(torch.tensor([2, 2]), torch.tensor([[0, 3], [0, 1]]))
    assert behavior.tokens is None
    assert behavior.score(LOGITS).tolist() == [-2.0, 0.0]
    assert behavior.slack(LOGITS).tolist() == [1.0, 3.0]


@pytest.mark.parametrize("kind", [ChoiceMargin, ChoiceCrossEntropy, ChoiceOdds, VocabularyMargin])
def test_asked_of_another_choice_the_right_one_takes_its_place(kind: type[ChoiceMargin]) -> None:
    """The first is asked of the choice 3, the second of its own target, the third of what was no choice."""
    behavior = kind(torch.tensor([2, 3, 0]), torch.tensor([[0, 3], [0, 1], [1, 2]]))
    other = behavior.retarget(torch.tensor([3, 3, 3]))
    assert isinstance(other, Targeted)
    assert type(other) is kind
    assert other.target.tolist() == [3, 3, 3]
    assert other.rivals.tolist() == [[0, 2], [0, 1], [1, 0]]


def test_answer_likelihood_is_a_log_probability_with_a_margin_in_logits() -> None:
    behavior = AnswerLikelihood(torch.tensor([2, 0]))
    total = math.exp(1) + math.exp(4) + math.exp(2) + math.exp(-1)
    expected = [2 - math.log(total), -math.log(2 + 2 * math.exp(3))]
    assert_close(behavior.score(read(behavior)), torch.tensor(expected))
    assert behavior.slack(read(behavior)).tolist() == [-2.0, -3.0]
    first = AnswerLikelihood(torch.tensor([1]))
    assert first.slack(LOGITS[:1]).tolist() == [2.0]


@pytest.mark.parametrize(
    "behavior",
    [
        LogitDifference(torch.tensor([2, 0]), torch.tensor([1, 3])),
        ChoiceMargin(torch.tensor([2, 3]), torch.tensor([[0, 1, 3], [0, 1, 2]])),
        ChoiceCrossEntropy(torch.tensor([2, 3]), torch.tensor([[0, 1], [0, 1]])),
        ChoiceOdds(torch.tensor([2, 3]), torch.tensor([[0, 1], [0, 1]])),
        VocabularyMargin(torch.tensor([1, 0]), torch.tensor([[0, 3], [1, 2]])),
        AnswerLikelihood(torch.tensor([2, 0])),
    ],
    ids=lambda behavior: type(behavior).__name__,
)
def test_select_keeps_what_belongs_to_each_example_and_scores_have_gradients(behavior: Behavior) -> None:
    assert isinstance(behavior, Behavior)
    rows = torch.tensor([1])
    part = behavior.select(rows)
    assert_close(part.score(read(part, LOGITS[rows])), behavior.score(read(behavior))[rows])
    assert_close(part.slack(read(part, LOGITS[rows])), behavior.slack(read(behavior))[rows])
    leaf = LOGITS.clone().double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda logits: behavior.score(read(behavior, logits)), leaf)


def test_a_target_against_itself_is_refused_and_named() -> None:
    with pytest.raises(InputError, match=r"\[1\]"):
        LogitDifference(torch.tensor([2, 3]), torch.tensor([1, 3]))
