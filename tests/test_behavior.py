"""Scores and predicates against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from recover.behavior import AnswerLikelihood, Behavior, ChoiceMargin, LogitDifference, shows
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
