"""The fit's figures against hooks on the plain module, and SAEs of another layer or of nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from recover.models.host import Model
from recover.saes.activations import ReLU
from recover.saes.fit import measure_fit, next_token_loss
from recover.saes.sae import SAE, from_sae_lens
from recover.types import Site
from tests.by_hand import sae_lens_sae
from tests.models import D_MODEL, N_LAYERS, left_padded, plain_forward, tiny_lm, token_rows

MIDDLE = Site(2)
ROWS = token_rows((9, 5, 7, 6, 8, 9, 4, 9), seed=5)


def residuals(module: nn.Module, site: Site) -> Tensor:
    """All residuals but the first of each prompt, `[token d_model]`."""
    return torch.cat([plain_forward(module, ids, read=site)[1][1:] for ids in ROWS])


def variance_explained(x: Tensor, x_hat: Tensor) -> float:
    return float(1 - (x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())


def signed_basis(Q: Tensor, site: Site) -> SAE:
    """`x -> Q Q^T x` as a ReLU SAE: each direction of `Q [d_model n]` and its negative."""
    W = torch.cat([Q, -Q], dim=1)
    return SAE(W, torch.zeros(W.shape[1]), W.T, torch.zeros(D_MODEL), ReLU(), site, "standard", "")


def loss(module: nn.Module, replace_by=None, site: Site = MIDDLE) -> float:
    """Mean cross-entropy of all tokens but the first, the residuals after the first token replaced."""
    losses = []
    for ids in ROWS:
        changes = {} if replace_by is None else {site: lambda h: torch.cat([h[:1], replace_by(h[1:])])}
        log_probabilities = plain_forward(module, ids, changes)[0].log_softmax(dim=-1)
        losses += [-float(log_probabilities[t - 1, ids[t]]) for t in range(1, len(ids))]
    return sum(losses) / len(losses)


def test_figures_are_those_of_sae_lens_and_hooks() -> None:
    module, site, theirs = tiny_lm(), Site(2), sae_lens_sae("jumprelu")
    fit = measure_fit(Model(module), from_sae_lens(theirs), site, left_padded(ROWS))
    x = residuals(module, site)
    features = theirs.encode(x)
    assert fit.site == "blocks.2.hook_resid_pre"
    assert fit.tokens == sum(len(ids) - 1 for ids in ROWS)
    assert_close(fit.explained_variance, variance_explained(x, theirs.decode(features)), atol=1e-4, rtol=1e-4)
    assert_close(fit.l0, float((features != 0).float().sum(dim=1).mean()), atol=1e-4, rtol=0)
    mean = x.mean(dim=0)
    clean, ablated = loss(module), loss(module, lambda h: mean.expand_as(h))
    with_sae = loss(module, lambda h: theirs.decode(theirs.encode(h)))
    if ablated > clean:
        assert_close(fit.loss_recovered, (ablated - with_sae) / (ablated - clean), atol=2e-3, rtol=1e-3)
    else:  # a random model may do better when it is told less
        assert math.isnan(fit.loss_recovered)


def taught(module: nn.Module) -> nn.Module:
    """A model that has something to lose: its head trained, in closed form, to tell the next token."""
    inputs, answers = [], []
    for ids in ROWS:
        final = plain_forward(module, ids, read=Site(N_LAYERS - 1, "post"))[1]
        inputs.append(module.model.norm(final)[:-1])
        answers.append(ids[1:])
    x, y = torch.cat(inputs), torch.cat(answers)
    head = torch.linalg.lstsq(x, torch.nn.functional.one_hot(y, module.config.vocab_size).float() * 8).solution
    module.lm_head.weight = nn.Parameter(head.T, requires_grad=False)
    return module


@pytest.mark.parametrize("rank", [4, 12, D_MODEL])
def test_loss_recovered_is_a_share_of_what_mean_ablation_costs(rank: int) -> None:
    module, site = taught(tiny_lm()), Site(2)
    Q = torch.linalg.svd(residuals(module, site), full_matrices=False).Vh[:rank].T
    fit = measure_fit(Model(module), signed_basis(Q, site), site, left_padded(ROWS))
    mean = residuals(module, site).mean(dim=0)
    clean, ablated = loss(module), loss(module, lambda h: mean.expand_as(h))
    assert ablated > clean + 0.1
    with_sae = loss(module, lambda h: h @ Q @ Q.T)
    assert_close(fit.loss_recovered, (ablated - with_sae) / (ablated - clean), atol=2e-3, rtol=1e-3)
    if rank == D_MODEL:
        assert_close(fit.explained_variance, 1.0, atol=1e-4, rtol=0)
        assert_close(fit.loss_recovered, 1.0, atol=1e-3, rtol=0)
        assert_close(fit.l0, float(D_MODEL), atol=1e-6, rtol=0)


def test_next_token_loss_is_the_mean_over_all_tokens_but_the_first() -> None:
    module = tiny_lm()
    assert next_token_loss(Model(module), [left_padded(ROWS)], {}) == pytest.approx(loss(module), rel=1e-5)


def expected_variances(module: nn.Module, Q: Tensor) -> dict[str, float]:
    sites = [Site(layer) for layer in range(N_LAYERS)]
    return {site.hook_name: variance_explained(x := residuals(module, site), x @ Q @ Q.T) for site in sites}


def test_an_sae_of_another_layer_is_flagged() -> None:
    module, home, used = tiny_lm("gpt2"), Site(0), Site(3)
    Q = torch.linalg.svd(residuals(module, home), full_matrices=False).Vh[:7].T
    expected = expected_variances(module, Q)
    assert max(expected, key=lambda name: expected[name]) == home.hook_name
    prompts = left_padded(ROWS)
    astray = measure_fit(Model(module), signed_basis(Q, home), used, prompts)
    assert astray.better_site == home.hook_name
    difference = expected[home.hook_name] - expected[used.hook_name]
    assert difference > 0.1
    assert_close(astray.better_by, difference, atol=1e-3, rtol=0)
    at_home = measure_fit(Model(module), signed_basis(Q, home), home, prompts)
    assert (at_home.better_site, at_home.better_by) == (home.hook_name, 0.0)
    assert_close(at_home.explained_variance, expected[home.hook_name], atol=1e-4, rtol=0)


def test_after_a_block_and_before_the_next_are_one_place_and_after_the_last_is_one_of_its_own() -> None:
    module, prompts = tiny_lm(), left_padded(ROWS)
    sae = from_sae_lens(sae_lens_sae("standard"))
    pre, post = (measure_fit(Model(module), sae, site, prompts) for site in (Site(2), Site(1, "post")))
    assert pre == post
    last = Site(N_LAYERS - 1, "post")
    x = residuals(module, last)
    fit = measure_fit(Model(module), sae, last, prompts)
    assert fit.site == last.hook_name
    assert_close(fit.explained_variance, variance_explained(x, sae.decode(sae.encode(x))), atol=1e-4, rtol=1e-4)


def test_an_sae_that_writes_nothing_explains_nothing() -> None:
    module, site = tiny_lm(), Site(1)
    sae = from_sae_lens(sae_lens_sae("standard"))
    silent = replace(sae, W_dec=sae.W_dec * 0, b_dec=residuals(module, site).mean(dim=0))
    fit = measure_fit(Model(module), silent, site, left_padded(ROWS))
    assert_close(fit.explained_variance, 0.0, atol=1e-4, rtol=0)


def test_prompts_of_one_token_leave_nothing_to_measure() -> None:
    fit = measure_fit(
        Model(tiny_lm()), from_sae_lens(sae_lens_sae("standard")), Site(1), left_padded(token_rows((1, 1)))
    )
    assert fit.tokens == 0
    assert math.isnan(fit.explained_variance)


def test_batches_do_not_change_the_fit() -> None:
    module = tiny_lm("gpt2")
    Q = torch.linalg.svd(residuals(module, Site(1)), full_matrices=False).Vh[:7].T
    sae, prompts = signed_basis(Q, Site(1)), left_padded(ROWS)
    whole, one_by_one = (measure_fit(Model(module), sae, Site(1), prompts, size) for size in (None, 1))
    for name, value in vars(whole).items():
        other = getattr(one_by_one, name)
        assert other == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value)
