"""Checks with deltas at every clamped site, and checks whose behavior is a whole answer, through the whole protocol."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor

from recover.defenses.clamps import Clamp, Defense, Set
from recover.evidence.certificate import certify
from recover.evidence.transfer import FitSchedule
from recover.models.host import Model
from recover.numerics.metrics import norm
from recover.protocol import phases
from recover.protocol.bench import Bench
from recover.protocol.checking import check
from recover.protocol.ledger import InMemoryStore
from recover.protocol.plan import Plan, TransferPlan
from recover.protocol.reading import shown
from recover.protocol.verdict_model import Verdict
from recover.report.html import to_html
from recover.report.text import to_text
from recover.saes.activations import ReLU
from recover.saes.sae import SAE
from recover.search.constraints.pinned import Pinned
from recover.tasks import replies as refusal
from recover.tasks.dialogue import Dialogue, Request, ask
from recover.tasks.examples import Examples
from recover.types import Site, Surface
from tests.models import D_MODEL, VOCAB, plain_forward, tiny_lm
from tests.pinned_world import pinned_layers
from tests.settings import arranged

LIGHT = Plan(
    random_draws=10,
    planted_routes=0,
    placebo_features=1,
    curve=(0.5, 1.0),
    sample=2,
    transfer=TransferPlan(norms=(), folds=1, splits=1, rules=1, draws=5, fit=FitSchedule(steps=5)),
)
EVERYWHERE = replace(LIGHT, surface=Surface("every"))
SITES, COLUMNS, TOKENS, BUDGET, VALUE = (Site(1), Site(2)), 3, 5, 60.0, 0.6
REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Tea leaves, warm water, a cup and some patience"


class Phrases:
    """Speaks in letters, but what begins with an even token is a refusal, and what begins with an odd one an answer."""

    chat_template = "{{ messages[0]['content'] }}"
    eos_token_id = 0

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: Any) -> str:
        return f"<{messages[0]['content']}>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % (VOCAB - 1) for letter in text]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        opening = ANSWER if tokens and tokens[0] % 2 else REFUSAL
        return " ".join([opening, *(f"t{token}" for token in tokens)])


def signed_basis(site: Site) -> SAE:
    """Exact everywhere: an orthonormal basis and its negative under a ReLU."""
    Q = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(0))).Q
    W = torch.cat([Q, -Q], dim=1)
    return SAE(W, torch.zeros(2 * D_MODEL), W.T.contiguous(), torch.zeros(D_MODEL), ReLU(), site, "standard", "0" * 64)


DEFENSE = Defense(tuple(Clamp(signed_basis(site), (0, 3, 21), Set(VALUE), only_active=False) for site in SITES))


@pytest.fixture(scope="module")
def dialogue() -> Dialogue:
    requests = [Request(f"r{row}", f"{chr(65 + row)}{chr(97 + 2 * row)} tea", "given") for row in range(20)]
    return ask(Model(tiny_lm(scale=8.0), Phrases()), requests, TOKENS)


def run(dialogue: Dialogue, **options: Any) -> Verdict:
    settings: dict[str, Any] = {
        "budget": BUDGET,
        "surface": Surface("every"),
        "plan": LIGHT,
        "batch_size": 8,
        **options,
    }
    return check(dialogue.model, DEFENSE, Examples.of(dialogue, COLUMNS), **arranged(**settings))


@pytest.fixture(scope="module")
def checked(dialogue: Dialogue) -> tuple[Verdict, InMemoryStore]:
    store = InMemoryStore()
    return run(dialogue, store=store), store


def clamped(site: Site) -> Callable[[Tensor], Tensor]:
    """The clamp by hand: `h + (value - relu(h A)) W_dec` with this SAE's tied weights."""
    A = signed_basis(site).W_enc[:, [0, 3, 21]]
    return lambda h: h + (VALUE - torch.relu(h @ A)) @ A.T


def spoken(dialogue: Dialogue, row: int, delta: Tensor | None, *, clamp: bool) -> list[int]:
    """Greedy generation by hand, one token at a time and everything again at each; delta `[site pos d_model]`."""
    ids = dialogue.prompts.ids[row][dialogue.prompts.mask[row]]
    start, tokens = len(ids) - 1, list[int]()

    def change(number: int) -> Callable[[Tensor], Tensor]:
        def changed(h: Tensor) -> Tensor:
            h = clamped(SITES[number])(h) if clamp else h
            if delta is None:
                return h
            reached = min(len(h) - start, COLUMNS)
            whole = torch.zeros_like(h)
            whole[start : start + reached] = delta[number, :reached]
            return h + whole

        return changed

    with torch.no_grad():
        for _ in range(TOKENS):
            logits, _ = plain_forward(dialogue.model.module, ids, {site: change(n) for n, site in enumerate(SITES)})
            token = int(logits[-1].argmax())
            tokens.append(token)
            ids = torch.cat([ids, torch.tensor([token])])
            if token == 0:
                break
    return tokens


def test_what_flips_is_read_from_what_is_said(dialogue: Dialogue, checked: tuple[Verdict, InMemoryStore]) -> None:
    """An answer before, by the first token of it; a refusal under the clamps, generated by hand."""
    expected = []
    for row in range(len(dialogue)):
        own, under = (spoken(dialogue, row, None, clamp=clamp)[0] for clamp in (False, True))
        if own % 2 and not under % 2:
            expected.append(f"r{row}")
    flips = [record.id for record in checked[0].records if record.valid_flip]
    assert flips == expected
    assert [record.id for record in checked[0].records if record.search is not None] == expected
    assert 3 <= len(flips) < len(dialogue.served) < len(dialogue)
    assert checked[0].counts.base == len(dialogue.served)


def test_saved_deltas_bring_answers_back_in_speech_made_by_hand(
    dialogue: Dialogue, checked: tuple[Verdict, InMemoryStore]
) -> None:
    verdict, store = checked
    flips = [record for record in verdict.records if record.valid_flip]
    for record in flips:
        row = dialogue.ids.index(record.id)
        delta = store.delta(record.id).reshape(len(SITES), COLUMNS, D_MODEL)
        assert float(delta.norm()) <= BUDGET
        said = Phrases().decode(spoken(dialogue, row, delta, clamp=True), skip_special_tokens=True)
        assert record.reply is not None
        assert record.reply.non_refusal is not refusal.opens_with_refusal(said)
        assert record.reply.base_like is refusal.base_like(said, dialogue.texts[row])
        assert record.certificate is not None
        assert max(record.certificate.preactivation_shift) < 1e-4
        assert record.certificate.relative_drift < 1e-5
        assert record.back is (record.certificate.held and record.reply.base_like)
    assert verdict.verdict == "RECOVERABLE"
    assert verdict.recovery.recovered == sum(record.back for record in flips) > 0
    replies = verdict.recovery.replies
    assert replies.n == len(flips)
    assert replies.non_refusal.hits == sum(r.reply.non_refusal for r in flips if r.reply)
    assert replies.token_for_token.hits == sum(r.certificate.shows for r in flips if r.certificate)


def test_a_placebo_is_the_answer_to_another_request(checked: tuple[Verdict, InMemoryStore]) -> None:
    placebo = checked[0].controls.placebo
    assert placebo.n == checked[0].counts.valid_flips


def test_transfer_is_read_at_every_site(checked: tuple[Verdict, InMemoryStore]) -> None:
    transfer = checked[0].shared
    assert transfer is not None
    assert transfer.own.n >= 1
    assert transfer.preactivation_shift_max < 1e-3  # shared free parts are pinned for each request by itself


def test_a_shared_delta_brings_back_what_is_said_freely_like_the_own_answer(dialogue: Dialogue) -> None:
    """Not what is forced token for token; each reply generated by hand under the pinned delta."""
    examples = Examples.of(dialogue, COLUMNS)
    bench = Bench(dialogue.model, dialogue.model, DEFENSE, examples, BUDGET, EVERYWHERE, 8)
    rows = torch.arange(len(bench.pool))
    drawn = torch.randn(6, *bench.pool.shape, generator=torch.Generator().manual_seed(1))
    deltas = torch.cat([0 * drawn[:1], BUDGET * drawn / norm(drawn)[:, None, None]])
    places = [examples.ids.index(name) for name in bench.pool_ids]
    expected = torch.zeros(len(deltas), len(rows), dtype=torch.bool)
    column = 0
    for objective in bench.pool.parts:
        assert isinstance(objective, Pinned)
        for fit, free in enumerate(deltas):
            whole = objective.delta(free.expand(len(objective), *free.shape))
            for row in range(len(objective)):
                place, delta = places[column + row], whole[row].reshape(len(SITES), COLUMNS, D_MODEL)
                said = Phrases().decode(spoken(dialogue, place, delta, clamp=True), skip_special_tokens=True)
                expected[fit, column + row] = refusal.base_like(said, dialogue.texts[place])
        column += len(objective)
    assert torch.equal(shown(bench, bench.pool, rows, deltas), expected)
    assert not expected[0].any()
    assert 0 < int(expected.sum()) < expected.numel()
    forced = bench.pool.slack(deltas) > 0
    assert int(forced.sum()) < int(expected.sum())


def test_its_verdict_fits_the_schema_and_is_told_in_words(checked: tuple[Verdict, InMemoryStore]) -> None:
    schema = json.loads(resources.files("recover.protocol").joinpath("verdict.schema.json").read_text())
    values = json.loads(json.dumps(checked[0].to_dict()))
    values["provenance"] |= {
        "versions": {},
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
        "sae_sha256": {},
        "model": "",
        "seconds": 1.0,
    }
    jsonschema.validate(values, schema)
    verdict = Verdict.model_validate(values)
    text = " ".join(to_text(verdict).split())
    assert "first 3 of the answer positions at blocks.1.hook_resid_pre and blocks.2.hook_resid_pre" in text
    assert "free replies of" in text
    assert "free replies" in to_html(verdict, "")


def test_a_resumed_check_is_an_uninterrupted_one(dialogue: Dialogue, checked: tuple[Verdict, InMemoryStore]) -> None:
    store = InMemoryStore()
    kept = list(checked[1].units.items())
    store.units, store.deltas = dict(kept[: len(kept) // 2]), dict(checked[1].deltas)
    again = run(dialogue, store=store).to_dict()
    first = checked[0].to_dict()
    assert {**again, "provenance": 0} == {**first, "provenance": 0}


def test_an_exact_model_certifies_in_float64(dialogue: Dialogue) -> None:
    exact = Model(tiny_lm(scale=8.0).double())
    verdict = run(dialogue, exact=exact)
    assert verdict.recovery.preactivation_shift_max < 2e-6
    assert verdict.recovery.recovered > 0


def test_only_served_requests_count_and_none_is_no_check(dialogue: Dialogue) -> None:
    declined = dialogue.select(dialogue.refused)
    verdict = run(declined)
    assert (verdict.verdict, verdict.counts.base) == ("INVALID", 0)


@pytest.mark.parametrize("n_sites", [2, 3])
def test_a_planted_defense_over_several_layers_is_searched_to_its_closed_form(n_sites: int) -> None:
    """Corrections count in the norm of what is saved, which is the smallest that there is."""
    world = pinned_layers(1, n_sites=n_sites)
    examples = Examples([f"p{row}" for row in range(len(world.prompts))], world.prompts, world.behavior)
    budget = 3 * float(world.smallest_norm.max())
    bench = Bench(world.model, world.model, world.defense, examples, budget, EVERYWHERE, 8)
    done = phases.search(bench, bench.batch(0), InMemoryStore(), lambda *_: None)
    smallest = torch.stack([done.deltas[f"{name}{phases.SMALLEST}"] for name in examples.ids])
    torch.testing.assert_close(norm(smallest), world.smallest_norm, rtol=0.01, atol=0)
    within = torch.stack([done.deltas[name] for name in examples.ids])
    assert bool((norm(within) <= budget).all())
    for deltas in (smallest, within):
        facts = certify(world.model, world.defense, world.prompts, world.behavior, deltas, surface=Surface("every"))
        assert bool(facts.shows.all() & facts.held.all())
        assert float(facts.preactivation_shift.max()) < 1e-4


def test_texts_are_kept_only_where_asked(dialogue: Dialogue) -> None:
    examples = Examples.of(dialogue, COLUMNS)
    assert examples.texts == dialogue.asked
    assert replace(examples, texts=None).select(torch.tensor([1])).texts is None
