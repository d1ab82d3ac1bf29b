"""Other rules over the same prompts: the generic ones by hand, those of the tasks, and what examples do with them."""

import pytest
import torch

from recover.models.host import Prompts
from recover.tasks import (
    AnswerLikelihood,
    ChoiceMargin,
    Examples,
    LogitDifference,
    OtherRule,
    all_rules,
    generic_rules,
    ioi,
)
from recover.tasks.probe_heads import PooledProbe
from recover.types import InputError

OWN = torch.tensor([7, 5, 7, 9, 5])
"""Two answers are equally common; the smaller token is the commonest."""


def told(rules):
    return {rule.name: rule.targets.tolist() for rule in rules}


def examples(behavior, n, **fields):
    ids = torch.arange(2 * n).reshape(n, 2)
    return Examples(
        [f"e{row}" for row in range(n)], Prompts(ids, torch.ones_like(ids, dtype=torch.bool)), behavior, **fields
    )


def test_generic_rules_by_hand():
    rules = told(generic_rules(LogitDifference(OWN, torch.ones_like(OWN)), None, seed=0))
    (other,) = set(rules.pop("always another answer"))
    assert other in (7, 9)
    # 5 -> 7 -> 9 -> 5, by the tokens' order.
    assert rules == {"always the commonest answer": [5] * 5, "the next answer in a fixed cycle": [9, 7, 9, 5, 7]}


def test_another_answer_is_drawn_by_the_seed():
    behavior = LogitDifference(OWN, torch.ones_like(OWN))
    drawn = [told(generic_rules(behavior, None, seed))["always another answer"] for seed in range(20)]
    assert {row[0] for row in drawn} == {7, 9}
    assert drawn == [told(generic_rules(behavior, None, seed))["always another answer"] for seed in range(20)]


def test_with_two_answers_no_third_is_always_given():
    rules = told(generic_rules(LogitDifference(torch.tensor([3, 4, 3]), torch.ones(3, dtype=torch.long)), None, 0))
    assert rules == {"always the commonest answer": [3] * 3, "the next answer in a fixed cycle": [4, 3, 4]}


def test_where_all_have_one_target_two_others_are_always_given():
    behavior = PooledProbe(torch.tensor([1, 1]), 3, torch.arange(4))
    rules = told(generic_rules(behavior, None, seed=3))
    # The cycle gives 2 to all, and is left out where a constant rule gives that already.
    assert {"always another answer", "always yet another answer"} <= set(rules)
    assert len(rules) in (2, 3)
    given = [row[0] for row in rules.values()]
    assert len(set(given)) == len(given)
    assert set(given) <= {0, 2, 3}
    assert told(generic_rules(LogitDifference(torch.tensor([6, 6]), torch.tensor([1, 2])), None, 0)) == {}


def test_second_choice_is_the_likeliest_other_known_target():
    logits = torch.zeros(5, 12)
    logits[:, 1] = 9  # known to nobody
    logits[:, 7], logits[:, 5], logits[:, 9] = 3, 2, 1
    rules = told(generic_rules(AnswerLikelihood(OWN), logits, 0))
    assert rules["the model's second choice"] == [5, 7, 5, 7, 7]


def test_second_choice_in_the_columns_of_the_behavior():
    others = torch.tensor([[5, 9], [9, 7], [9, 5], [5, 7], [7, 9]])
    logits = torch.tensor([[0, 1, 2], [0, 5, 4], [9, 2, 1], [0, 3, 1], [0, 2, 1]]).float()
    rules = told(generic_rules(ChoiceMargin(OWN, others), logits, 0))
    # The largest of the two other columns: 9, 9, 9, 5, 7.
    assert rules["the model's second choice"] == [9, 9, 9, 5, 7]
    few = generic_rules(LogitDifference(OWN, torch.tensor([5, 7, 5, 7, 7])), logits[:, :2], 0)
    assert "the model's second choice" not in told(few)
    with pytest.raises(InputError, match="base logits"):
        generic_rules(ChoiceMargin(OWN, others), logits[:, :2], 0)


def test_a_tasks_rules_come_first_and_none_is_told_twice():
    own = LogitDifference(OWN, torch.ones_like(OWN))
    given = [OtherRule("itself", OWN), OtherRule("five", torch.full((5,), 5)), OtherRule("one", torch.ones_like(OWN))]
    asked = examples(own, 5, rules=given)
    names = [rule.name for rule in all_rules(asked, None, 0)]
    assert names == ["five", "one", "always another answer", "the next answer in a fixed cycle"]
    assert [rule.name for rule in all_rules(asked, None, 0, most=1)] == ["five"]


def test_examples_carry_rules_and_hash_them_where_there_are_some():
    own, rule = LogitDifference(OWN, torch.ones_like(OWN)), OtherRule("the reverse", OWN.flip(0))
    bare, ruled = examples(own, 5), examples(own, 5, rules=(rule,))
    part = ruled.select(torch.tensor([4, 0]))
    assert told(part.rules) == {"the reverse": [7, 5]}
    assert bare.sha256 != ruled.sha256
    assert bare.sha256 == examples(own, 5, rules=()).sha256
    with pytest.raises(InputError, match="'the reverse' has 2 answers for 5 examples"):
        examples(own, 5, rules=part.rules)
    with pytest.raises(InputError, match="one of the two"):
        OtherRule("nothing")


def test_ioi_picks_other_names(monkeypatch):
    asked = [
        ioi.IOIExample.of("Paul met Mary, Paul gave it to", "Mary", "Paul", "BABA"),
        ioi.IOIExample.of("Anna met John, John gave it to", "Anna", "John", "ABBA"),
    ]
    numbers = {"Mary": 1, "Paul": 2, "Anna": 3, "John": 4}
    monkeypatch.setattr(ioi, "token_id", lambda tokenizer, name, prompt: numbers[name])
    rules = told(ioi.other_rules(None, asked))
    assert rules == {"the subject": [2, 4], "the first name": [2, 3], "the second name": [1, 4]}
