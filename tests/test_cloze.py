"""Facts asked in several ways: what is shipped, the strict filter on a model run by hand, and a user's own files."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from recover.models.host import Model
from recover.models.names import LoadedModel
from recover.tasks import cloze
from recover.tasks.cloze import Fact
from recover.tasks.ioi import token_id
from recover.types import InputError, Site
from tests.models import VOCAB, plain_forward, tiny_lm


class Words:
    """A token is a word."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1 + sum(map(ord, word)) % (VOCAB - 1) for word in text.split()]}


def fact(number: int, domain: str, answer: str) -> Fact:
    ways = (f"one {number} is", f"many say that {number} is", f"so {number} {number} is")
    return Fact(f"f{number}", domain, "r", ways, answer)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tiny_lm(scale=4.0), Words())


@pytest.fixture(scope="module")
def facts(model: Model) -> list[Fact]:
    """Each answered by what the model says first to its first paraphrase, among letters; so that some are known."""
    letters = [chr(97 + place) for place in range(8)]
    tokens = [Words()(letter)["input_ids"][0] for letter in letters]
    given = []
    for number in range(24):
        logits = plain_forward(model.module, torch.tensor(Words()(f"one {number} is")["input_ids"]))[0][-1]
        answer = letters[int(logits[tokens].argmax())]
        given.append(fact(number, "ab"[number % 2], answer))
    return given


def right(model: Model, facts: list[Fact], one: Fact) -> bool:
    """By hand: the answer's logit above that of every other answer of the domain, in each paraphrase."""
    answers = {Words()(other.answer)["input_ids"][0] for other in facts if other.domain == one.domain}
    own = Words()(one.answer)["input_ids"][0]
    for text in one.prompts:
        logits = plain_forward(model.module, torch.tensor(Words()(text)["input_ids"]))[0][-1]
        if not all(logits[own] > logits[other] for other in answers - {own}):
            return False
    return True


def test_a_fact_is_known_that_is_right_in_every_way(model: Model, facts: list[Fact]) -> None:
    expected = [one.id for one in facts if right(model, facts, one)]
    assert 0 < len(expected) < len(facts)
    assert [one.id for one in cloze.known(model, facts).facts] == expected


def write(path: Path, facts: list[Fact]) -> Path:
    rows = [{"domain": f.domain, "relation": f.relation, "prompts": list(f.prompts), "answer": f.answer} for f in facts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_examples_are_the_paraphrases_of_the_domain_to_forget(model: Model, facts: list[Fact], tmp_path: Path) -> None:
    file = write(tmp_path / "facts.jsonl", facts)
    found = cloze.make_examples(model, file=file, forget="a")
    own = {f"line-{row + 1}": one for row, one in enumerate(facts) if one.domain == "a" and right(model, facts, one)}
    assert set(found.groups or ()) == set(own)
    assert Counter(found.groups or ()) == dict.fromkeys(own, 3)
    assert found.texts is not None
    assert found.strict is not None
    for row, (name, text) in enumerate(zip(found.ids, found.texts, strict=True)):
        one, way = name.split("/")
        assert text == own[one].prompts[int(way)]
        assert found.prompts.ids[row][found.prompts.mask[row]].tolist() == Words()(text)["input_ids"]
        assert int(found.strict.target[row]) == Words()(own[one].answer)["input_ids"][0]  # type: ignore[attr-defined]
    # All are right without a defense; and what features are selected from is of the one domain and of the other.
    assert bool((found.behavior.slack(model.run(found.prompts, tokens=found.behavior.tokens).logits) > 0).all())
    kept = sum(right(model, facts, one) for one in facts if one.domain == "b")
    assert found.contrast is not None
    assert (len(found.contrast.shown), len(found.contrast.hidden)) == (3 * len(own), 3 * kept)
    few = cloze.make_examples(model, file=file, forget="a", n=1, seed=3)
    assert len(few.ids) == 3
    assert set(few.ids) <= set(found.ids)
    assert few.contrast is not None
    assert len(few.contrast.shown) == 3 * len(own)  # features do not depend on what is drawn


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_right_under_an_edit_is_that_of_the_edited_model(model: Model, facts: list[Fact], sign: int) -> None:
    """With one state before the head whatever was asked, one letter of each domain is right, all others wrong."""
    given = [Fact(f.id, f.domain, f.relation, f.prompts, "abcd"[n % 4]) for n, f in enumerate(facts)]
    asked = cloze._asked(model, given)
    state = sign * torch.linspace(-1, 1, model.d_model)
    logits = model.module.lm_head(model.module.model.norm(state))
    expected = []
    for one in asked.facts:
        answers = {Words()(other.answer)["input_ids"][0] for other in given if other.domain == one.domain}
        best = max(answers, key=lambda token: float(logits[token]))
        expected.append((Words()(one.answer)["input_ids"][0] == best,) * 3)
    assert len(set(expected)) == 2
    site = Site(model.n_layers - 1, "post")
    assert cloze.right(model, asked, {site: lambda h, _: state.expand_as(h)}) == expected


def test_right_is_told_by_paraphrase_and_in_the_order_of_the_facts(model: Model) -> None:
    """Facts of many lengths, so that the order in which they are asked is another one."""
    given = [
        Fact(f"f{n}", "a", "r", ("so " * (n % 3) + f"one {n} is", f"{n} say {n + 1} many", f"that {3 * n}"), answer)
        for n, answer in enumerate("abcdefgh" * 3)
    ]
    expected = [
        tuple(right(model, given, Fact(f.id, f.domain, f.relation, (text,), f.answer)) for text in f.prompts)
        for f in given
    ]
    assert len(set(expected)) > 2
    assert cloze.right(model, cloze._asked(model, given)) == expected


def test_what_cannot_be_asked_is_refused_in_one_line(model: Model, facts: list[Fact], tmp_path: Path) -> None:
    file = write(tmp_path / "facts.jsonl", facts)
    with pytest.raises(InputError, match=r"prompts\.forget: there is no domain 'c'"):
        cloze.make_examples(model, file=file, forget="c")
    # Asked the same in two ways round, each answer the other's: at most one of the two can be right.
    answers = sorted({one.answer for one in facts})[:2]
    twice = [Fact("x", "u", "r", facts[0].prompts[:2], answer) for answer in answers]
    wrong = next(one for one in twice if not right(model, twice, one))
    rival = next(one for one in twice if one is not wrong)
    given = [wrong, Fact("y", "u", "s", ("so",), "a"), Fact("z", "v", "r", rival.prompts[:1], rival.answer)]
    asked = [Fact(one.id, one.domain, "r", one.prompts, one.answer) for one in given]
    with pytest.raises(InputError, match="knows no fact of 'v' in all its ways"):
        cloze.make_examples(model, file=write(tmp_path / "u.jsonl", asked), forget="v")
    with pytest.raises(InputError, match="of 1 facts none has an answer that is one token"):
        cloze.known(model, [Fact("x", "a", "r", ("one is",), "two words")])
    with pytest.raises(InputError, match="of 1 facts none has an answer that is one token"):
        cloze.known(model, facts[:1])  # no second answer that it could be told from


GOOD: dict[str, Any] = {
    "domain": "rivers",
    "prompts": ["The Rhine flows into the", "At last the Rhine joins the"],
    "answer": "sea",
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"domain": ""}, '"domain" must be there and hold text'),
        ({"answer": 3}, '"answer" must be there and hold text'),
        ({"prompts": []}, '"prompts" must hold a list of texts'),
        ({"prompts": "The Rhine"}, '"prompts" must hold a list of texts'),
        ({"prompts": ["The Rhine "]}, "a prompt ends in white space"),
        ({"prompts": ["A", "A"]}, "a prompt is given twice"),
        ({"relation": 3}, '"relation" must hold text'),
        ({"prompts": GOOD["prompts"]}, "asks the same as line 1"),
    ],
)
def test_a_malformed_row_is_refused_by_number_and_without_its_text(tmp_path: Path, change: Any, why: str) -> None:
    path = tmp_path / "facts.jsonl"
    bad = {**GOOD, "prompts": ["Something else that is", "Words in another"], **change}
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(bad) + "\n")
    with pytest.raises(InputError, match=rf"line 3: .*{why}") as error:
        cloze.load_file(path)
    assert "Rhine" not in str(error.value)


@pytest.mark.parametrize("text", ["", "\n\n", "[1]\n", "{\n"])
def test_what_holds_no_facts_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match="fact file"):
        cloze.load_file(path)


def test_shipped_facts_are_many_and_well_formed() -> None:
    facts = cloze.shipped()
    assert len(facts) >= 200
    assert len({one.domain for one in facts}) >= 4
    assert len({one.id for one in facts}) == len(facts)
    assert len({one.prompts for one in facts}) == len(facts)
    for one in facts:
        assert len(one.prompts) == len(set(one.prompts)) == 4
        assert all(text == text.strip() and "{" not in text for text in one.prompts)
        assert len(one.answer.split()) == 1
        assert not any(re.search(rf"\b{one.answer}\b", text, re.IGNORECASE) for text in one.prompts)
    forgotten = Counter(one.domain for one in facts)
    assert max(forgotten.values()) >= 40


@pytest.mark.model
def test_shipped_answers_are_one_token_and_a_relation_has_several(smollm2: LoadedModel) -> None:
    """Every answer is one token after each of its prompts, and no relation has one answer for all."""
    facts = cloze.shipped()
    for one in facts:
        assert len({token_id(smollm2.tokenizer, one.answer, text) for text in one.prompts}) == 1
    answers: dict[str, set[str]] = {}
    for one in facts:
        answers.setdefault(one.relation, set()).add(one.answer)
    assert min(map(len, answers.values())) >= 3


@pytest.mark.model
def test_no_wording_has_an_attention_sink_behind_its_first_token(smollm2: LoadedModel) -> None:
    """Such a token has many times the norm of others, no SAE describes it, and a clamp there is no edit of features."""
    model, site = Model(smollm2.module, smollm2.tokenizer), Site(15)
    of_relation = {one.relation: one for one in cloze.shipped()}
    prompts = model.tokenize([text for one in of_relation.values() for text in one.prompts])
    norms = model.run(prompts, read=[site]).residuals[site].norm(dim=-1)
    behind = norms[prompts.positions > 0]
    assert float(norms[prompts.positions == 0].amin()) > 5 * float(behind.median())
    assert float(behind.amax()) < 5 * float(behind.median())


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_knows_what_is_shipped(smollm2: LoadedModel) -> None:
    """All answers compete; of the facts every seventh is asked."""
    model, facts = Model(smollm2.module, smollm2.tokenizer), cloze.shipped()
    some = [one for row, one in enumerate(facts) if row % 7 == 0]
    others = [Fact(one.id, one.domain, one.relation, one.prompts[:1], one.answer) for one in facts if one not in some]
    kept = {one.id for one in cloze.known(model, [*some, *others]).facts}
    assert [one.id for one in some if one.id not in kept] == []


def test_other_rules_are_another_member_and_another_relation(model: Model) -> None:
    rows = [("capital", "France", 9), ("capital", "Spain", 4), ("language", "France", 7), ("language", "Chile", 3)]
    facts = [Fact(f"f{row}", "a", kind, ("x",), str(token), subject) for row, (kind, subject, token) in enumerate(rows)]
    asked = cloze.Asked(facts, torch.tensor([9, 4, 7, 3]), torch.tensor([[4, 6], [9, 6], [3, 3], [7, 7]]))
    another, elsewhere = cloze.other_rules(asked)
    # Capitals 4 -> 6 -> 9 -> 4, languages 3 -> 7 -> 3.
    assert another.targets is not None
    assert another.targets.tolist() == [4, 6, 3, 7]
    # France's capital and language change places; Spain and Chile stand in one relation.
    assert elsewhere.targets is not None
    assert elsewhere.targets.tolist() == [7, 6, 9, 7]
    assert [rule.name for rule in cloze.other_rules(asked.select([0, 1, 3]))] == ["another member of the relation"]
