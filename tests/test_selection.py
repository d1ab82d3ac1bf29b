"""Attribution against finite differences in float64 on the plain module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from recover.behavior import ChoiceMargin, LogitDifference
from recover.model import Model
from recover.sae import from_sae_lens
from recover.selection import attribution, largest
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
    found = attribution(Model(tiny_lm("gpt2")), single, SITE, left_padded(rows), behavior)
    assert_close(found.double(), expected, atol=2e-3, rtol=1e-3)


def test_padding_counts_for_nothing_and_batches_add_up() -> None:
    model, rows = Model(tiny_lm()), token_rows((9, 3, 4))
    sae, behavior = from_sae_lens(sae_lens_sae("standard")), LogitDifference(TARGET, OTHER[:, 0])
    together = attribution(model, sae, SITE, left_padded(rows), behavior)
    alone = [
        attribution(model, sae, SITE, left_padded([ids]), behavior.select(torch.tensor([row])))
        for row, ids in enumerate(rows)
    ]
    assert_close(together, torch.stack(alone).sum(dim=0), atol=1e-4, rtol=1e-4)


def test_weights_get_no_gradient() -> None:
    module = tiny_lm().requires_grad_(True)
    behavior = LogitDifference(TARGET, OTHER[:, 0])
    sae, prompts = from_sae_lens(sae_lens_sae("standard")), left_padded(token_rows((4, 4, 4)))
    attribution(Model(module), sae, SITE, prompts, behavior)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_largest_orders_by_value_and_then_by_index() -> None:
    values = torch.tensor([0.5, -3.0, 2.0, 0.5, 0.0, 7.0])
    assert largest(values, 4) == (5, 2, 0, 3)
    assert largest(values, 1) == (5,)


def test_more_features_than_are_positive_are_refused() -> None:
    with pytest.raises(InputError, match="top 5 asked, but only 4"):
        largest(torch.tensor([0.5, -3.0, 2.0, 0.5, 0.0, 7.0]), 5)
