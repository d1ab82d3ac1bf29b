"""Attribution against finite differences in float64 on the plain module; rates and matches counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from recover.defenses.selection import NEAREST, attribution_of, firing_rates, forgettable, largest, matched
from recover.models.host import Model
from recover.models.names import LoadedModel
from recover.saes.activations import AbsTopK
from recover.saes.names import load_sae
from recover.saes.sae import from_sae_lens
from recover.tasks.behaviors import ChoiceMargin, LogitDifference
from recover.tasks.prose import NEUTRAL
from recover.types import InputError, Site
from tests.by_hand import D_SAE, sae_lens_sae
from tests.models import left_padded, plain_forward, tiny_lm, token_rows

SITE, EPS = Site(2), 1e-5
TARGET, OTHER = torch.tensor([3, 9, 27]), torch.tensor([[5, 8], [1, 2], [30, 44]])


def score(module: nn.Module, ids: Tensor, row: int, pos: int, push: Tensor) -> float:
    """Target logit minus the mean of the others, with `push` added to the residual of one position."""

    def change(h: Tensor) -> Tensor:
        moved = h.clone()
        moved[pos] += push
        return moved

    logits = plain_forward(module, ids, {SITE: change})[0][-1]
    return float(logits[TARGET[row]] - logits[OTHER[row]].mean())


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_attribution_is_activation_times_slope_with_the_error_held(architecture: str) -> None:
    """With the error held, raising a feature by `eps` adds `eps` of its decoder row to the residual, and no more."""
    module, rows = tiny_lm("gpt2").double(), token_rows((5, 3, 4))  # Llama normalizes in float32 whatever it is given
    sae = sae_lens_sae(architecture).double()
    expected = torch.zeros(D_SAE, dtype=torch.float64)
    for row, ids in enumerate(rows):
        activations = sae.encode(plain_forward(module, ids, read=SITE)[1])
        for pos in range(1, len(ids)):  # the first token counts for nothing
            for feature in activations[pos].nonzero().flatten().tolist():
                step = EPS * sae.W_dec[feature]
                rise = score(module, ids, row, pos, step) - score(module, ids, row, pos, -step)
                expected[feature] += activations[pos, feature] * rise / (2 * EPS)
    assert (expected.abs() > 0.01).sum() > 10
    assert (expected > 0).any()
    assert (expected < 0).any()

    single = from_sae_lens(sae_lens_sae(architecture))
    behavior = ChoiceMargin(TARGET, OTHER)
    found = attribution_of(Model(tiny_lm("gpt2")), single, SITE, left_padded(rows), behavior)
    assert_close(found.double(), expected, atol=2e-3, rtol=1e-3)


def test_padding_counts_for_nothing_and_batches_add_up() -> None:
    model, rows = Model(tiny_lm()), token_rows((9, 3, 4))
    sae, behavior = from_sae_lens(sae_lens_sae("standard")), LogitDifference(TARGET, OTHER[:, 0])
    together = attribution_of(model, sae, SITE, left_padded(rows), behavior)
    alone = [
        attribution_of(model, sae, SITE, left_padded([ids]), behavior.select(torch.tensor([row])))
        for row, ids in enumerate(rows)
    ]
    assert_close(together, torch.stack(alone).sum(dim=0), atol=1e-4, rtol=1e-4)


def test_weights_get_no_gradient() -> None:
    module = tiny_lm().requires_grad_(True)
    behavior = LogitDifference(TARGET, OTHER[:, 0])
    sae, prompts = from_sae_lens(sae_lens_sae("standard")), left_padded(token_rows((4, 4, 4)))
    attribution_of(Model(module), sae, SITE, prompts, behavior)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_largest_orders_by_value_and_then_by_index() -> None:
    values = torch.tensor([0.5, -3.0, 2.0, 0.5, 0.0, 7.0])
    assert largest(values, 4) == (5, 2, 0, 3)
    assert largest(values, 1) == (5,)


def test_more_features_than_are_positive_are_refused() -> None:
    with pytest.raises(InputError, match="top 5 asked, but only 4"):
        largest(torch.tensor([0.5, -3.0, 2.0, 0.5, 0.0, 7.0]), 5)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_firing_rates_are_counted_token_by_token(architecture: str) -> None:
    module, rows, sae = tiny_lm("gpt2"), token_rows((9, 3, 1, 6)), sae_lens_sae(architecture)
    fired, tokens = [0] * D_SAE, 0
    for ids in rows:
        for activations in sae.encode(plain_forward(module, ids, read=SITE)[1])[1:]:  # not the first token
            tokens += 1
            for feature in activations.nonzero().flatten().tolist():
                fired[feature] += 1
    assert len(set(fired)) > 5
    found = firing_rates(Model(module), from_sae_lens(sae), SITE, left_padded(rows))
    assert_close(found, torch.tensor(fired) / tokens)


def test_a_feature_fires_at_negative_values_too() -> None:
    """Six of a random AbsTopK SAE's features are active on each token, whatever their sign."""
    sae = replace(from_sae_lens(sae_lens_sae("standard")), activation=AbsTopK(6))
    found = firing_rates(Model(tiny_lm()), sae, SITE, left_padded(token_rows((9, 3, 4))))
    assert_close(found.sum(), torch.tensor(6.0))


def test_batches_do_not_change_firing_rates() -> None:
    model, sae, prompts = Model(tiny_lm()), from_sae_lens(sae_lens_sae("standard")), left_padded(token_rows((9, 3, 6)))
    assert_close(firing_rates(model, sae, SITE, prompts, batch_size=2), firing_rates(model, sae, SITE, prompts))


def test_rates_without_a_second_token_are_refused() -> None:
    with pytest.raises(InputError, match="second token"):
        firing_rates(Model(tiny_lm()), from_sae_lens(sae_lens_sae("standard")), SITE, left_padded(token_rows((1, 1))))


def test_a_match_is_of_the_same_rate_where_there_are_enough() -> None:
    rates = torch.tensor([0.1] * 5 + [0.01] * 5 + [0.0] * 5)
    for seed in range(20):
        found = matched(rates, (10, 3, 5, 4), seed)
        assert found is not None
        assert [feature // 5 for feature in found] == [2, 0, 1, 0]


def test_near_is_by_ratio() -> None:
    """0.15 is 1.5 times 0.1, and 0.1 is 1.67 times 0.06, which is nearer by difference."""
    rates = torch.tensor([0.1] + [0.06] * NEAREST + [0.15] * NEAREST)
    drawn = {found for seed in range(50) if (found := matched(rates, (0,), seed)) is not None}
    assert drawn <= {(feature,) for feature in range(NEAREST + 1, 2 * NEAREST + 1)}
    assert len(drawn) == NEAREST


def test_the_nearest_ten_are_drawn_from_and_no_farther_ones() -> None:
    rates = torch.cat([torch.tensor([0.1]), 0.1 * 1.02 ** torch.arange(1, 41)])
    drawn = [matched(rates, (0,), seed) for seed in range(300)]
    assert set(drawn) == {(feature,) for feature in range(1, NEAREST + 1)}


def test_where_few_are_near_no_farther_ones_are_drawn() -> None:
    rates = torch.tensor([0.1, 0.11, 0.09, 0.12, 0.15, 0.07, 0.2, 0.05])
    assert {matched(rates, (0,), seed) for seed in range(100)} == {(1,), (2,), (3,)}


def test_where_none_is_near_the_nearest_is_drawn() -> None:
    rates = torch.tensor([0.9, 0.5, 0.4, 0.5, 0.3])
    assert {matched(rates, (0,), seed) for seed in range(100)} == {(1,), (3,)}


def test_all_of_one_rate_are_drawn_from() -> None:
    """Not the first ten in the order of their index: rates of few tokens are often equal."""
    rates = torch.tensor([0.1] + [0.101] * 40 + [0.2] * 40)
    drawn = {found for seed in range(600) if (found := matched(rates, (0,), seed)) is not None}
    assert drawn == {(feature,) for feature in range(1, 41)}


def test_what_never_fires_is_drawn_for_a_feature_that_fires_only_when_no_other_is_left() -> None:
    rates = torch.tensor([0.5, 0.5, 0.5, 0.5, *[1e-4] * 3, *[0.0] * 30])
    for seed in range(20):
        found = matched(rates, (0, 1, 2, 3), seed)
        assert found is not None
        assert {4, 5, 6} <= set(found)
        assert sum(rates[list(found)] == 0) == 1


def test_for_a_feature_that_never_fires_the_rarest_is_drawn_when_no_such_other_is_left() -> None:
    rates = torch.tensor([0.0, 0.0, 0.3, 1e-4, 1e-4, *[2e-4] * 30])
    assert {matched(rates, (0,), seed) for seed in range(20)} == {(1,)}
    assert {matched(rates, (0,), seed, excluded=(1,)) for seed in range(40)} == {(3,), (4,)}


def test_matches_are_distributed_as_what_they_match() -> None:
    """The 64 of 4,000 features that fire most, apart from every second; drawn blindly, others fire far less."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.exp(1.5 * torch.randn(4000, generator=generator) - 6).clamp(max=1)
    features = tuple(rates.argsort(descending=True)[:128:2].tolist())
    asked = rates[list(features)].sort().values.log()
    for seed in range(5):
        found = matched(rates, features, seed)
        assert found is not None
        assert len({*found, *features}) == 128
        drawn = rates[list(found)].sort().values.log()
        assert float((drawn - asked).abs().mean()) < 0.1
        assert float((drawn - asked).mean()) == pytest.approx(0, abs=0.1)
        each = (rates[list(found)] / rates[list(features)]).log().abs()
        assert float(each.median()) < 0.1
    blind = rates[torch.randperm(4000, generator=generator)[:64]].sort().values.log()
    assert float((blind - asked).abs().mean()) > 2


def test_a_match_is_a_function_of_its_seed() -> None:
    rates = torch.rand(200, generator=torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    first = matched(rates, range(20), 3)
    torch.rand(3)
    assert matched(rates, range(20), 3) == first
    assert matched(rates, range(20), 4) != first
    torch.random.set_rng_state(before)
    matched(rates, range(20), 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_match_where_the_sae_has_too_few_others() -> None:
    rates = torch.full((10,), 0.1)
    assert sorted(matched(rates, range(5), 0) or ()) == [5, 6, 7, 8, 9]
    assert matched(rates, range(6), 0) is None
    assert matched(rates, range(5), 0, excluded=(9,)) is None
    assert sorted(matched(rates, range(4), 0, excluded=(9, 8, 0)) or ()) == [4, 5, 6, 7]
    assert matched(rates, (), 0) == ()


@pytest.mark.parametrize(("features", "excluded"), [((10,), ()), ((-1,), ()), ((0,), (10,))])
def test_features_that_the_sae_does_not_have_are_refused(features: tuple[int], excluded: tuple[int]) -> None:
    with pytest.raises(InputError, match="0 to 9"):
        matched(torch.full((10,), 0.1), features, 0, excluded)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_rates_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="negative or not finite"):
        matched(torch.tensor([0.1, value, 0.2]), (0,), 0)


@pytest.mark.model
def test_matches_of_a_real_sae_fire_as_often(smollm2: LoadedModel) -> None:
    model, sae = Model(smollm2.module, smollm2.tokenizer), load_sae("smollm2-l15")
    rates = firing_rates(model, sae, Site(15), model.tokenize(NEUTRAL))
    features = tuple(rates.argsort(descending=True)[100:228:2].tolist())
    found = matched(rates, features, 0)
    assert found is not None
    assert float(rates[list(found)].sum() / rates[list(features)].sum()) == pytest.approx(1, abs=0.05)


def test_features_to_forget_fire_there_and_hardly_elsewhere():
    shown = torch.tensor([0.5, 0.0, 0.3, 0.3, 0.9, 0.1])
    hidden = torch.tensor([0.01, 0.0, 0.0, 0.01, 0.02, 0.0])
    assert forgettable(shown, hidden, 3, 0.01) == (0, 2, 3)
    assert forgettable(shown, hidden, 2, 0.02) == (4, 0)
    assert forgettable(shown, hidden, 2, 0.0) == (2, 5)
    with pytest.raises(InputError, match="top 5 asked, but only 4 fire on what is to be forgotten"):
        forgettable(shown, hidden, 5, 0.01)
