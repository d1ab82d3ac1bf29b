"""Parts of deltas against loops over features, bypasses whose place is known, errors that are linear by making."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recover.defenses.clamps import Clamp, Defense, Set
from recover.defenses.defended import Defended, defend
from recover.evidence.attribution.linear_error import PENALTIES, LinearError, error_activations, fit_linear_error
from recover.evidence.attribution.parts import LEAVES, VIEWS, attribute, entering, gradient, nodes, parts_of, split
from recover.models.host import Model
from recover.planted.routes import error_bypass, feature_bypass
from recover.saes.activations import ReLU
from recover.saes.sae import SAE, from_sae_lens
from recover.search.ascent import find_perturbation
from recover.search.constraints.first_order import admissible
from recover.search.constraints.pinned import Pinned
from recover.tasks.behaviors import LogitDifference
from recover.types import InputError, Site, Surface
from tests.by_hand import Edits, clamped_forward, defense_of, sae_lens_sae
from tests.models import D_MODEL, left_padded, tiny_lm, token_rows

HELD = (2, 7, 11)
BEHAVIOR = LogitDifference(torch.tensor([3, 9, 27, 40]), torch.tensor([5, 1, 30, 2]))
EDITS: Edits = {
    Site(1): [(sae_lens_sae("standard"), HELD, Set(-2.0), True, "all")],
    Site(3): [(sae_lens_sae("jumprelu", 1), (0, 5), Set(1.0), False, "all")],
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(**options: Any) -> Defended:
    prompts, model = left_padded(token_rows()), Model(tiny_lm(scale=5.0))
    return defend(model, defense_of(EDITS), prompts, BEHAVIOR, n_pos=2, **options)


def by_loops(sae: Any, held: tuple[int, ...], state: Tensor, delta: Tensor, top_k: int) -> dict[str, Tensor]:
    """The parts of one example's delta `[pos d_model]`, feature by feature, by sae_lens itself."""
    change = sae.encode(state + delta) - sae.encode(state)
    each = {j: torch.outer(change[:, j], sae.W_dec[j]) for j in range(change.shape[1])}
    free = sorted((j for j in each if j not in held), key=lambda j: -float(each[j].norm()))
    nothing = torch.zeros_like(delta)
    parts = {
        "clamped": sum((each[j] for j in held), nothing),
        "top_k": sum((each[j] for j in free[:top_k]), nothing),
        "other": sum((each[j] for j in free[top_k:]), nothing),
    }
    error = delta - (sae.decode(sae.encode(state + delta)) - sae.decode(sae.encode(state)))
    return parts | {"error_linear": nothing, "error_rest": error}


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("top_k", [1, 3, 50])
def test_parts_are_those_of_a_loop_over_features(architecture: str, top_k: int) -> None:
    module = sae_lens_sae(architecture)
    state, delta = 2 * randn(3, 2, D_MODEL), randn(3, 2, D_MODEL, seed=1)
    ours = split(from_sae_lens(module), torch.tensor(HELD), state, delta, None, top_k)
    for row in range(3):
        theirs = by_loops(module, HELD, state[row], delta[row], top_k)
        for name in LEAVES:
            assert_close(ours[name][row], theirs[name], atol=1e-5, rtol=1e-5)
    assert float(ours["clamped"].abs().max()) > 0.01  # not empty


def test_at_several_sites_parts_are_of_what_is_added_to_the_state_that_arrives() -> None:
    """Whole prompts by hooks, the deltas below live: `h` at the second site is not the defended one."""
    defended = tiny(surface=Surface("every"))
    delta = randn(*defended.zero_delta.shape)
    ours = parts_of(defended, delta, top_k=2)
    module: Any = defended.suffix.model.module
    for row, ids in enumerate(token_rows()):
        _, first = clamped_forward(module, ids, delta[row, :2], EDITS, "after_clamp", 0)
        for site, columns in ((Site(1), slice(0, 2)), (Site(3), slice(2, 4))):
            sae, held = EDITS[site][0][0], EDITS[site][0][1]
            part = delta[row, columns]
            after = first[site][-2:]
            state = after - part if site == Site(1) else after  # a delta by hooks enters at the first site alone
            theirs = by_loops(sae, held, state, part, 2)
            for name in LEAVES:
                assert_close(ours.leaves[name][row, columns], theirs[name], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("placement", ["after_clamp", "before_clamp"])
def test_the_full_delta_replays_the_recovered_score_and_knocked_out_leaves_the_defended_one(placement: Any) -> None:
    defended = tiny(surface=Surface(placement=placement))
    delta = randn(*defended.zero_delta.shape)
    found = attribute(defended, delta, points=2)
    score, slack = defended(delta)
    assert_close(found.views["full"].replay_score, score, atol=1e-4, rtol=0)
    assert_close(found.views["full"].replay_slack, slack, atol=1e-4, rtol=0)
    assert_close(found.views["full"].knockout_score, defended(0 * delta)[0], atol=1e-4, rtol=0)
    assert_close(found.recovered, score, atol=1e-4, rtol=0)
    assert_close(found.defended, defended(0 * delta)[0], atol=1e-6, rtol=0)
    # A part alone, by hand.
    after, moved = entering(defended, delta)
    parts = parts_of(after, moved)
    assert_close(found.views["error"].replay_score, after(parts.view("error"))[0])
    assert_close(found.views["free"].knockout_score, after(moved - parts.view("free"))[0], atol=1e-5, rtol=1e-5)
    assert_close(found.views["free"].norm, (parts.leaves["top_k"] + parts.leaves["other"]).flatten(1).norm(dim=1))
    if placement == "before_clamp":
        assert float((moved - delta).abs().max()) > 0.1  # the clamp took some of it


@pytest.mark.parametrize("kind", [error_bypass, feature_bypass], ids=lambda kind: kind.__name__)
def test_the_effect_is_where_the_bypass_was_planted(kind: Any) -> None:
    """Kinds 2 and 3 over 20 seeds: at least 95 % of the effect, to first order, integrated, and by replay."""
    for seed in range(20):
        world = kind(seed)
        defended = defend(world.model, world.defense, world.examples.prompts, world.examples.behavior)
        solved = find_perturbation(defended, defended.zero_delta, admissible(defended), world.budget)
        assert bool(solved.recovered.all())
        found = attribute(defended, solved.delta)
        place, elsewhere = ("error", "free") if world.bypass == "error" else ("free", "error")
        here, there = found.views[place], found.views[elsewhere]
        assert float(found.share(place).min()) >= 0.95
        assert float((here.first_order / found.views["full"].first_order).min()) >= 0.95
        assert float(((here.replay_score - found.defended) / found.effect).min()) >= 0.95
        assert float(((here.knockout_score - found.defended) / found.effect).abs().max()) <= 0.05
        assert float(((there.replay_score - found.defended) / found.effect).abs().max()) <= 0.05
        # The delta is a little past the edge, and so is the part that carries it.
        assert bool((here.replay_slack > 0).all())
        assert not bool((here.knockout_slack > 0).any())


def test_one_delta_for_all_and_one_each_are_the_same_where_they_are_equal() -> None:
    defended = tiny()
    one = randn(1, *defended.zero_delta.shape[1:])
    together = attribute(defended, one.expand_as(defended.zero_delta).clone(), points=2)
    for row in range(len(defended)):
        alone = attribute(defended.select(torch.tensor([row])), one, points=2)
        for name in VIEWS:
            for key, value in vars(alone.views[name]).items():
                assert_close(getattr(together.views[name], key)[row], value[0], atol=1e-4, rtol=1e-3)


def test_parts_of_a_pinned_delta_hold_its_corrections() -> None:
    """At the second site the correction puts clamped features back: they are a part there, and none at the first."""
    defended = tiny(surface=Surface("every"))
    pinned = Pinned.of(defended)
    delta = pinned.delta(pinned.free.project(randn(*pinned.start.shape)))
    clamped = parts_of(defended, delta).leaves["clamped"]
    assert float(clamped[:, :2].abs().max()) < 1e-5
    found = attribute(defended, delta, points=2)
    assert_close(found.recovered, defended(delta)[0])


def exact_sae(span: int, d_model: int = 8) -> SAE:
    """`relu(x Q) Q^T - relu(-x Q) Q^T`, exact in the span of an orthonormal `Q`: its error is `x (I - Q Q^T)`."""
    Q = torch.linalg.qr(randn(d_model, span)).Q
    both = torch.cat([Q, -Q], dim=1)
    return SAE(both, torch.zeros(2 * span), both.T.clone(), torch.zeros(d_model), ReLU(), Site(1), "standard", "0")


def test_an_error_that_is_linear_is_found_to_be() -> None:
    sae = exact_sae(5)
    fitted = fit_linear_error(sae, randn(400, 8, seed=1) + 3)
    Q = sae.W_enc[:, :5].double()
    assert fitted.r2 > 0.9999
    assert_close(fitted.M, torch.eye(8).double() - Q @ Q.T, atol=1e-3, rtol=0)
    state, delta = randn(2, 3, 8, seed=2), randn(2, 3, 8, seed=3)
    parts = split(sae, torch.tensor([0]), state, delta, fitted, 4)
    assert_close(parts["error_linear"].double(), delta.double() @ (torch.eye(8) - Q @ Q.T), atol=1e-2, rtol=0)
    assert float(parts["error_rest"].abs().max()) < 1e-2


def test_of_an_error_that_is_not_linear_little_is_predicted() -> None:
    """It gives `|x| / 2` for `x`, so that the error is `x - |x| / 2`: linear in `x` but for the part that is even."""
    halved = SAE(
        torch.tensor([[1.0, -1.0], [0.0, 0.0]]),
        torch.zeros(2),
        torch.tensor([[0.5, 0.0], [0.5, 0.0]]),
        torch.zeros(2),
        ReLU(),
        Site(1),
        "standard",
        "0",
    )
    states = torch.cat([randn(3000, 1), torch.zeros(3000, 1)], dim=1)
    fitted = fit_linear_error(halved, states)
    # Variance of x is 1, of |x| / 2 it is (1 - 2 / pi) / 4.
    even = (1 - 2 / math.pi) / 4
    assert fitted.r2 == pytest.approx(1 / (1 + even), abs=0.02)


def test_the_penalty_is_the_one_that_reads_best_on_tokens_left_out() -> None:
    """Ridge regression by the normal equations, for each penalty, on the same two thirds."""
    sae, states = from_sae_lens(sae_lens_sae("jumprelu")), 2 * randn(60, D_MODEL)
    fitted = fit_linear_error(sae, states, seed=3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    kept, used = order[:20], order[20:]
    x, error = states.double(), (states - sae.decode(sae.encode(states))).double()
    x, error = x - x[used].mean(dim=0), error - error[used].mean(dim=0)
    gram = x[used].T @ x[used]
    by_penalty = {}
    for penalty in PENALTIES:
        ridge = gram + penalty * gram.trace() / D_MODEL * torch.eye(D_MODEL).double()
        M = torch.linalg.solve(ridge, x[used].T @ error[used])
        r2 = 1 - float((error[kept] - x[kept] @ M).square().sum() / error[kept].square().sum())
        by_penalty[penalty] = (r2, M)
    best = max(by_penalty, key=lambda penalty: by_penalty[penalty][0])
    assert fitted.penalty == best
    assert PENALTIES[0] < best < PENALTIES[-1]
    assert fitted.r2 == pytest.approx(by_penalty[best][0], abs=1e-9)
    assert_close(fitted.M, by_penalty[best][1], atol=1e-9, rtol=0)


def test_states_to_fit_on_are_those_of_hooks_first_tokens_left_out() -> None:
    module, rows = tiny_lm(scale=5.0), token_rows()
    states = error_activations(Model(module), defense_of(EDITS), left_padded(rows), (Site(1), Site(3)), 3)
    for site, here in states.items():
        theirs = [
            clamped_forward(module, ids, torch.zeros(1, D_MODEL), EDITS, "after_clamp", 0)[1][site] for ids in rows
        ]
        expected = torch.cat([state[1:] for state in theirs])
        assert here.shape == expected.shape
        assert_close(here, expected, atol=2e-4, rtol=1e-4)


def test_the_points_of_the_integral_are_those_of_gauss_and_legendre() -> None:
    assert nodes(0) == [(0.0, 1.0)]
    (left, weight), (right, other) = nodes(2)
    assert (left, right) == (pytest.approx(0.5 - 0.5 / 3**0.5), pytest.approx(0.5 + 0.5 / 3**0.5))
    assert weight == pytest.approx(0.5)
    assert other == pytest.approx(0.5)
    # Exact for polynomials of degree 2 n - 1.
    assert sum(w * x**5 for x, w in nodes(3)) == pytest.approx(1 / 6)


def test_gradients_are_those_at_the_defended_state_and_along_the_delta() -> None:
    defended = tiny()
    delta = randn(*defended.zero_delta.shape)
    leaf = torch.zeros_like(delta).requires_grad_(True)
    (here,) = torch.autograd.grad(defended(leaf)[0].sum(), leaf)
    assert_close(gradient(defended, delta, 0), here)
    halfway = (0.5 * delta).requires_grad_(True)
    (middle,) = torch.autograd.grad(defended(halfway)[0].sum(), halfway)
    assert_close(gradient(defended, delta, 1), middle)


@pytest.mark.parametrize("options", [{"top_k": 0}, {"points": 0}])
def test_counts_below_one_are_refused(options: Mapping[str, int]) -> None:
    with pytest.raises(InputError, match="both must be at least 1"):
        attribute(tiny(), tiny().zero_delta, **options)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="2 tokens to fit it on; give at least 3"):
        fit_linear_error(exact_sae(3), randn(2, 8))


def test_a_linear_map_is_of_its_own_site() -> None:
    defended = tiny(surface=Surface("every"))
    delta = randn(*defended.zero_delta.shape)
    maps = {
        site: LinearError(scale * torch.eye(D_MODEL).double(), 0.0, 0.0)
        for site, scale in ((Site(1), 1.0), (Site(3), 2.0))
    }
    found = parts_of(defended, delta, maps).leaves["error_linear"]
    assert_close(found, torch.cat([delta[:, :2], 2 * delta[:, 2:]], dim=1))


def test_a_clamp_of_several_at_a_site_holds_all_their_features() -> None:
    sae = exact_sae(5)
    defense = Defense((Clamp(sae, (0, 1), Set(0.0)), Clamp(sae, (2,), Set(1.0))))
    held = torch.cat([clamp.indices for clamp in defense.clamps])
    parts = split(sae, held, randn(1, 1, 8), randn(1, 1, 8, seed=1), None, 20)
    change = sae.encode(randn(1, 1, 8) + randn(1, 1, 8, seed=1)) - sae.encode(randn(1, 1, 8))
    assert_close(parts["clamped"], change[..., :3] @ sae.W_dec[:3])
