"""Multiple choice: orders and prompts, the strict filter on a planted model, and the task on the trained toy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recover.defenses.clamps import Clamp, Defense, Set
from recover.defenses.defended import clamp_edits
from recover.defenses.selection import firing_rates, forgettable
from recover.evidence.transfer import halves
from recover.models import names
from recover.models.host import Model, Prompts, Run
from recover.run.config import load_config
from recover.saes import names as sae_names
from recover.tasks import choice
from recover.tasks.behaviors import ChoiceCrossEntropy, ChoiceMargin, ChoiceOdds, VocabularyMargin, shows
from recover.tasks.choice import ORDERS, ROTATIONS
from recover.tasks.examples import Examples
from recover.tasks.questions import LETTERS, Question, load
from recover.types import InputError
from tests.models import tiny_lm

KNOWN = Question("known", "Which is even?", ("one", "two", "three", "five"), 1)
GUESSED = Question("guessed", "Which is odd?", ("four", "two", "three", "six"), 2)
SHAKY = Question("shaky", "Which is least?", ("nine", "seven", "eight", "six"), 3)


def tokenizer() -> Any:
    """One token a word or mark."""
    split = pre_tokenizers.Whitespace()
    texts = [choice.prompt(question) for question in (KNOWN, GUESSED, SHAKY)]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    core.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


class Answerer(Model):
    """Knows `KNOWN`; says A to `GUESSED`; knows `SHAKY` but for the order in which its answers stand reversed."""

    def __init__(self) -> None:
        words = tokenizer()
        super().__init__(tiny_lm(vocab_size=len(words)), words)
        self.asked = 0

    def run(self, prompts: Prompts, *args: Any, tokens: Any = None, **options: Any) -> Run:
        self.asked += len(prompts)
        logits = torch.zeros(len(prompts), len(self.tokenizer))
        for row, (ids, mask) in enumerate(zip(prompts.ids, prompts.mask, strict=True)):
            said = letter_said(self.tokenizer.decode(ids[mask]))
            logits[row, self.tokenizer.convert_tokens_to_ids(said)] = 1
        return Run(logits.gather(1, tokens), {})


def letter_said(text: str) -> str:
    listed = dict(re.findall(r"([ABCD]) ?\. (\w+)", text))
    letters = {answer: letter for letter, answer in listed.items()}
    if "is even" in text:
        return letters["two"]
    if "is odd" in text:
        return "A"
    return "B" if listed["A"] == "six" and listed["D"] == "nine" and listed["B"] == "eight" else letters["six"]


def test_the_24_orders_are_the_permutations_and_the_first_is_the_given_one() -> None:
    assert len(set(ORDERS)) == 24
    assert {tuple(sorted(order)) for order in ORDERS} == {(0, 1, 2, 3)}
    assert ORDERS[0] == (0, 1, 2, 3)
    assert set(ROTATIONS) <= set(ORDERS)
    for answer in range(4):
        assert sorted(order.index(answer) for order in ROTATIONS) == [0, 1, 2, 3]


def test_a_prompt_lists_the_answers_in_its_order_and_ends_before_the_letter() -> None:
    assert choice.prompt(KNOWN, (1, 0, 3, 2)) == "Which is even?\nA. two\nB. one\nC. five\nD. three\nAnswer:"
    assert choice.order_name((1, 0, 3, 2)) == "BADC"


def test_the_right_letter_is_where_the_right_answer_stands() -> None:
    model = Answerer()
    a, b, c, d = (model.tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS)
    target, others = choice.choices(model, [(KNOWN, (0, 1, 2, 3)), (KNOWN, (1, 0, 3, 2)), (GUESSED, (0, 3, 1, 2))])
    assert target.tolist() == [b, a, d]
    assert others.tolist() == [[a, c, d], [b, c, d], [a, b, c]]


def test_only_what_is_right_in_all_24_orders_is_kept() -> None:
    """`GUESSED` is right in 6 of them, `SHAKY` in 23."""
    model = Answerer()
    every = [(question, order) for question in (GUESSED, SHAKY) for order in ORDERS]
    assert choice.right(model, every).reshape(2, 24).sum(dim=1).tolist() == [6, 23]
    model.asked, told = 0, []
    assert choice.kept(model, [GUESSED, KNOWN, SHAKY], lambda *done: told.append(done)) == [KNOWN]
    assert model.asked < 3 * 24  # what was wrong once is not asked again
    assert told[-1] == ("all 24 orders", 72, 72)


def files(folder: Any, questions: Sequence[Question]) -> str:
    import json

    path = folder / "questions.jsonl"
    rows = [{"question": q.question, "choices": q.choices, "answer": LETTERS[q.answer]} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_examples_are_the_24_orders_of_each_question_kept(tmp_path: Any) -> None:
    name = files(tmp_path, [GUESSED, KNOWN, SHAKY])
    found = choice.make_examples(Answerer(), forget=name, retain=name)
    assert found.ids == [f"line-2/{choice.order_name(order)}" for order in ORDERS]
    assert found.groups == ["line-2"] * 24
    assert found.contrast is not None
    assert len(found.contrast.shown) == len(found.contrast.hidden) == 3 * len(ROTATIONS)
    assert found.texts == [choice.prompt(KNOWN, order) for order in ORDERS]
    only = choice.make_examples(Answerer(), n=2, seed=0, forget=name, retain=name)
    assert len(only.contrast.shown) == 2 * len(ROTATIONS)  # type: ignore[union-attr]


def test_what_the_model_does_not_know_cannot_be_asked(tmp_path: Any) -> None:
    name = files(tmp_path, [GUESSED, SHAKY])
    with pytest.raises(InputError, match="right in all 24 orders of none of these 2 questions"):
        choice.make_examples(Answerer(), forget=name, retain=name)


def test_a_tokenizer_without_letters_is_refused() -> None:
    model = Answerer()
    core = Tokenizer(models.WordLevel({"<unk>": 0, "A": 1, "B": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    with pytest.raises(InputError, match="two of the letters A to D are the same token"):
        choice.behavior(model, [(KNOWN, ORDERS[0])])
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    byte_level = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    byte_level.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, unk_token="<unk>")
    with pytest.raises(InputError, match="the letter A is not a single token after 'Answer:'"):
        choice.behavior(model, [(KNOWN, ORDERS[0])])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("choice_margin", ChoiceMargin),
        ("choice_cross_entropy", ChoiceCrossEntropy),
        ("vocabulary_margin", VocabularyMargin),
    ],
)
def test_objectives_by_name_share_the_predicate(name: str, kind: type[ChoiceMargin]) -> None:
    model = Answerer()
    asked = [(GUESSED, order) for order in ORDERS]
    built = choice.behavior(model, asked, name)
    assert type(built) is kind
    logits = torch.randn(24, len(model.tokenizer), generator=torch.Generator().manual_seed(0))
    letters = torch.cat([built.target[:, None], built.rivals], dim=1)
    seen = logits if built.tokens is None else logits.gather(1, built.tokens)
    assert torch.equal(shows(built, seen), logits.gather(1, letters).argmax(dim=1) == 0)
    with pytest.raises(InputError, match="unknown objective 'margin'"):
        choice.behavior(model, asked, "margin")


@pytest.fixture(scope="module")
def toy() -> Model:
    loaded = names.resolve_model("toy-choice", "cpu")
    return Model(loaded.module, loaded.tokenizer)


@pytest.fixture(scope="module")
def known(toy: Model) -> Examples:
    return choice.make_examples(toy, n=8, forget="toy-forget", retain="toy-retain")


def test_the_toy_knows_most_questions_of_each_kind_in_all_orders(toy: Model) -> None:
    for kind in ("forget", "retain"):
        asked = load(f"toy-{kind}")[::4]
        assert len(choice.kept(toy, asked)) >= 0.75 * len(asked)


def test_orders_of_one_question_are_never_on_both_sides_of_transfer(known: Examples) -> None:
    assert known.groups is not None
    first, second = halves(known.ids, 0, known.groups)
    assert not {known.groups[row] for row in first.tolist()} & {known.groups[row] for row in second.tolist()}


def test_the_shipped_defense_makes_the_toy_forget_one_kind_and_not_the_other(toy: Model, known: Examples) -> None:
    """The clamps of `analyses/choice_toy.yaml`, on an eighth of its questions."""
    config = load_config("analyses/choice_toy.yaml")
    (clamp,) = config.clamps
    sae = sae_names.load_sae(clamp.sae)
    assert sae.site is not None
    whole = choice.make_examples(toy, forget="toy-forget", retain="toy-retain").contrast
    assert whole is not None
    rates = [firing_rates(toy, sae, sae.site, prompts) for prompts in (whole.shown, whole.hidden)]
    features = forgettable(*rates, clamp.features.top, clamp.features.retain)  # type: ignore[union-attr]
    edits = clamp_edits(Defense((Clamp(sae, features, Set(clamp.value)),), config.skip_first))
    right = {}
    for kind in ("forget", "retain"):
        asked = [(question, order) for question in load(f"toy-{kind}")[::4] for order in ORDERS]
        right[kind] = float(choice.right(toy, asked, edits).float().mean())
    assert right["forget"] < 0.5
    assert right["retain"] > 0.9


def test_right_letters_have_more_than_half_on_the_toy(toy: Model, known: Examples) -> None:
    assert isinstance(known.strict, ChoiceOdds)
    logits = toy.run(known.prompts, tokens=known.strict.tokens).logits
    assert float(shows(known.strict, logits).float().mean()) > 0.99


def test_other_rules_follow_a_wrong_option_and_a_letter() -> None:
    model = Answerer()
    # The right answer of KNOWN is its second, of SHAKY its last: the others are the third, and the first.
    asked = [(KNOWN, (0, 1, 2, 3)), (KNOWN, (2, 3, 1, 0)), (SHAKY, (3, 2, 1, 0))]
    other, fixed = choice.other_rules(model, asked)
    letters = dict(zip(choice.letter_tokens(model, KNOWN), LETTERS, strict=True))
    assert other.targets is not None
    assert fixed.targets is not None
    assert [letters[token] for token in other.targets.tolist()] == ["C", "A", "D"]
    assert [letters[token] for token in fixed.targets.tolist()] == ["A", "A", "A"]
