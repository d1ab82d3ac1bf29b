"""The toy's facts, what of it is committed, and that it is found by its names."""

from __future__ import annotations

import json
import random
from collections import Counter

from fixtures import toy_facts, train_toy
from recover.models import names
from recover.models.host import Model
from recover.saes import names as sae_names
from recover.types import Site

KNOWN = toy_facts.facts(16, 0)


def test_facts_are_seeded_and_answers_dealt_evenly() -> None:
    assert toy_facts.facts(16, 0) == KNOWN
    assert toy_facts.facts(16, 1) != KNOWN
    assert len({(fact.question, fact.relation.kind) for fact in KNOWN}) == 64
    for relation in toy_facts.RELATIONS:
        dealt = Counter(fact.answer for fact in KNOWN if fact.relation == relation)
        assert sum(dealt.values()) == 16
        assert set(dealt.values()) <= {1, 2}


def test_no_word_of_a_name_tells_the_answer() -> None:
    """Each is in several names, and what is so of these differs."""
    by_word: dict[tuple[str, str], set[str]] = {}
    for fact in KNOWN:
        for word in fact.name.split():
            by_word.setdefault((fact.relation.question, word), set()).add(fact.answer)
    assert sum(len(answers) > 1 for answers in by_word.values()) >= 0.9 * len(by_word)


def test_choices_hold_the_right_answer_anywhere() -> None:
    rng = random.Random(0)
    places = Counter()
    for fact in KNOWN * 20:
        offered = toy_facts.choices(fact, rng)
        assert len(set(offered)) == 4
        assert set(offered) <= set(fact.relation.answers)
        places[offered.index(fact.answer)] += 1
    assert all(256 <= count <= 384 for count in places.values())  # 320, give or take four standard deviations


def test_shipped_questions_are_those_of_the_recipe() -> None:
    recipe = train_toy.ToyRecipe()
    known = toy_facts.facts(recipe.things, recipe.seed)
    for kind in ("forget", "retain"):
        lines = (train_toy.TOY / f"toy-{kind}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == toy_facts.rows(known, kind, recipe.seed)  # type: ignore[arg-type]


def test_what_is_committed_is_small_and_found_by_name() -> None:
    assert sum(path.stat().st_size for path in train_toy.TOY.rglob("*") if path.is_file()) <= 3_000_000
    assert names.shipped_models() == {"toy-choice": train_toy.TOY / "toy-choice"}
    assert names.shipped_questions().keys() == {"toy-forget", "toy-retain"}
    sae = sae_names.load_sae("toy-choice-l1")
    assert (sae.site, sae.d_model) == (Site(1, "pre"), 128)


def test_recorded_figures() -> None:
    figures = json.loads((train_toy.TOY / "figures.json").read_text())
    for counts in figures["strict"].values():
        assert counts["right_in_all_orders"] >= 0.9 * counts["questions"]
    assert figures["held_out"]["all"]["explained_variance"] >= 0.9
    assert figures["held_out"]["all"]["loss_recovered"] >= 0.9


def test_the_sae_explains_the_toy_as_recorded() -> None:
    recipe = train_toy.ToyRecipe()
    loaded = names.resolve_model("toy-choice", "cpu")
    model, sae = Model(loaded.module, loaded.tokenizer), sae_names.load_sae("toy-choice-l1")
    prompts = model.tokenize([text for _, text in train_toy.draw(KNOWN, (40, 0, 0), random.Random(5))])
    x = model.run(prompts, read=[Site(recipe.layer)]).residuals[Site(recipe.layer)][prompts.positions > 0]
    error = (x - sae.decode(sae.encode(x))).square().sum()
    assert float(1 - error / (x - x.mean(0)).square().sum()) > 0.95
