"""Losses under a defense against clamps made by hooks on the plain module, and what the shipped passages are."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from recover.defenses.clamps import Clamp, Defense, Scale, Set
from recover.defenses.utility import MAX_INCREASE, measure_utility
from recover.models.host import Model
from recover.models.names import LoadedModel
from recover.saes.names import load_sae
from recover.saes.sae import from_sae_lens
from recover.tasks import ioi
from recover.tasks.prose import NEUTRAL
from recover.types import InputError, Site
from tests.by_hand import Edits, clamped, defense_of, sae_lens_sae
from tests.models import left_padded, plain_forward, tiny_lm, token_rows
from tests.test_fit import ROWS as TAUGHT
from tests.test_fit import taught

ROWS = token_rows((9, 5, 7, 1, 6), seed=5)
S = (2, 7, 11, 19)
CASES: dict[str, tuple[str, int, Edits]] = {
    "everywhere": ("llama", 0, {Site(1): [(sae_lens_sae("standard"), S, Set(-2.0), True, "all")]}),
    "first tokens spared": ("llama", 2, {Site(1): [(sae_lens_sae("jumprelu"), S, Set(3.0), False, "all")]}),
    "two sites": (
        "gpt2",
        1,
        {
            Site(1): [(sae_lens_sae("topk"), S, Scale(3.0), True, "all")],
            Site(3, "post"): [(sae_lens_sae("standard", seed=1), (0, 5), Set(2.0), False, "prompt")],
        },
    ),
}


def losses(module: nn.Module, edits: Edits, skip_first: int = 0) -> Tensor:
    """Cross-entropy of every token but the first of each passage, by hooks on the plain module."""
    found = []
    for ids in ROWS:
        changes = {site: lambda h, here=here: clamped(h, here, skip_first) for site, here in edits.items()}
        log_probabilities = plain_forward(module, ids, changes)[0].log_softmax(dim=-1)
        found += [-log_probabilities[t - 1, ids[t]] for t in range(1, len(ids))]
    return torch.stack(found)


def defended(value: float = -2.0, **options: int) -> Defense:
    return defense_of({Site(1): [(sae_lens_sae("standard"), S, Set(value), True, "all")]}, **options)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_hooks_on_the_plain_module(name: str) -> None:
    family, skip_first, edits = CASES[name]
    module = tiny_lm(family)
    found = measure_utility(Model(module), defense_of(edits, skip_first=skip_first), left_padded(ROWS))
    off, on = losses(module, {}), losses(module, edits, skip_first)
    assert found.tokens == len(off) == sum(len(ids) - 1 for ids in ROWS)
    assert found.loss_off == pytest.approx(float(off.mean()), rel=1e-4)
    assert found.loss_on == pytest.approx(float(on.mean()), rel=1e-4)
    assert float((on - off).abs().mean()) > 0.1
    assert found.increase == pytest.approx(float(on.mean() - off.mean()), abs=1e-3)


def test_a_clamp_at_the_last_position_acts_on_each_token_in_turn() -> None:
    module, sae = tiny_lm(), sae_lens_sae("standard")
    at_last: Edits = {
        Site(1): [
            (sae, S[:2], Set(-2.0), True, "last"),
            (sae, S[2:3], Set(-3.0), False, "last"),
            (sae, S[3:], Set(1.0), False, "all"),
        ]
    }
    everywhere: Edits = {
        site: [(*clamp[:4], "all") for clamp in here]  # type: ignore[misc]
        for site, here in at_last.items()
    }
    found = measure_utility(Model(module), defense_of(at_last, skip_first=1), left_padded(ROWS))
    assert found.loss_on == pytest.approx(float(losses(module, everywhere, 1).mean()), rel=1e-4)


def test_a_site_that_the_sae_does_not_name_is_kept() -> None:
    model, sae = Model(tiny_lm()), from_sae_lens(sae_lens_sae("standard"))
    found, expected = (
        measure_utility(
            model,
            Defense((Clamp(replace(sae, site=None), S, Set(-2.0), positions=positions, site=Site(2)),)),
            left_padded(ROWS),
        )
        for positions in ("last", "all")
    )
    assert found == expected


def test_a_clamp_that_changes_nothing_costs_nothing() -> None:
    defense = Defense((Clamp(from_sae_lens(sae_lens_sae("standard")), S, Scale(1.0)),))
    found = measure_utility(Model(tiny_lm()), defense, left_padded(ROWS))
    assert (found.increase, found.broken) == (0.0, False)


def test_broken_is_above_what_is_allowed() -> None:
    """Of a model that has something to lose: one at chance may do better when it is told less."""
    model, defense, neutral = Model(taught(tiny_lm())), defended(40.0), left_padded(TAUGHT)
    found = measure_utility(model, defense, neutral)
    assert found.increase > MAX_INCREASE
    assert found.broken
    assert not measure_utility(model, defense, neutral, max_increase=found.increase).broken
    assert measure_utility(model, defense, neutral, max_increase=found.increase - 1e-6).broken


def test_the_default_is_a_doubled_perplexity() -> None:
    assert math.exp(MAX_INCREASE) == pytest.approx(2)


def test_a_loss_that_is_not_a_number_is_broken() -> None:
    found = measure_utility(Model(tiny_lm()), defended(3e38), left_padded(ROWS))
    assert math.isnan(found.increase)
    assert found.broken


def test_batches_do_not_change_the_figures() -> None:
    model, defense, neutral = Model(tiny_lm("gpt2")), defended(), left_padded(ROWS)
    whole, pairs = measure_utility(model, defense, neutral), measure_utility(model, defense, neutral, batch_size=2)
    assert vars(pairs) == {
        key: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value for key, value in vars(whole).items()
    }


def test_passages_of_one_token_are_refused() -> None:
    with pytest.raises(InputError, match="second token"):
        measure_utility(Model(tiny_lm()), defended(), left_padded(token_rows((1, 1))))


@pytest.mark.parametrize(("site", "positions", "message"), [(9, "all", r"blocks\.9"), (1, "answer", "`answer`")])
def test_a_defense_that_does_not_fit_is_refused(site: int, positions: str, message: str) -> None:
    defense = defense_of({Site(site): [(sae_lens_sae("standard"), S, Set(-2.0), True, positions)]})
    with pytest.raises(InputError, match=message):
        measure_utility(Model(tiny_lm()), defense, left_padded(ROWS))


def test_there_are_24_different_passages_of_two_or_three_sentences() -> None:
    assert len(set(NEUTRAL)) == len(NEUTRAL) == 24
    for passage in NEUTRAL:
        assert 2 <= len(re.findall(r"[.!?](?: |$)", passage)) <= 3
        assert 25 <= len(passage.split()) <= 45
        assert passage == " ".join(passage.split())
        assert passage.isascii()


def test_passages_name_nobody_that_the_tasks_name() -> None:
    words = {word.lower() for passage in NEUTRAL for word in re.findall(r"[A-Za-z]+", passage)}
    assert not words & {name.lower() for name in ioi.NAMES}


@pytest.mark.model
def test_a_real_model_is_broken_by_a_violent_clamp_and_not_by_the_shipped_kind(smollm2: LoadedModel) -> None:
    model, sae = Model(smollm2.module, smollm2.tokenizer), load_sae("smollm2-l15")
    neutral = model.tokenize(NEUTRAL[:6])
    features = (3794, 3969, 3874, 1086, 601, 4382, 3710, 1310)  # the first of those that the shipped analysis selects
    gentle, violent = (
        measure_utility(model, Defense((Clamp(sae, features, Set(value)),), skip_first=1), neutral)
        for value in (-5.0, -1000.0)
    )
    assert gentle.loss_off == violent.loss_off < 5  # of log(49152) = 10.8 where nothing is known
    assert abs(gentle.increase) < 0.1
    assert not gentle.broken
    assert violent.increase > 2
    assert violent.broken
