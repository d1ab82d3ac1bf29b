"""Laws of the parts of a delta: they add up, so do their effects, and the order of features does not matter."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from property_tests.guards import guards
from property_tests.rounding import assert_within, eps
from property_tests.strategies import POINTWISE, SEEDS, Scene, costly, randn, scenes
from recover.defenses.defended import defend
from recover.evidence.attribution.linear_error import LinearError
from recover.evidence.attribution.parts import LEAVES, attribute, first_order, gradient, parts_of, split
from recover.saes.sae import SAE
from recover.types import Surface
from tests.pinned_world import pinned_layers


def linear_map(d_model: int, seed: int) -> LinearError:
    """Any linear map counts as one that predicts the error."""
    return LinearError(randn(d_model, d_model, seed=seed, dtype=torch.float64), 0.0, 0.0)


def parts(scene: Scene, top_k: int, linear: LinearError | None) -> dict[str, Tensor]:
    held = torch.cat([clamp.indices for clamp in scene.defense.clamps])
    sae = scene.defense.clamps[0].sae
    state = scene.residual().to(sae.dtype)
    return split(sae, held, state, scene.delta().to(sae.dtype), linear, top_k)


def sizes(scene: Scene, found: dict[str, Tensor]) -> Tensor:
    """How large the numbers are that were added and taken away."""
    every = torch.stack([part.double().abs() for part in found.values()])
    return every.sum(dim=0) + scene.delta().double().abs()


@guards(split, "error = delta - torch.stack(list(parts.values())).sum(dim=0)", 'error = delta - parts["clamped"]')
@given(scenes(clamps=2), st.integers(1, 20), st.booleans(), SEEDS)
def test_the_parts_add_up_to_the_delta(scene: Scene, top_k: int, mapped: bool, seed: int) -> None:
    """For every SAE, whether or not its error is predicted: up to the rounding of sums of a few terms."""
    found = parts(scene, top_k, linear_map(scene.sae.d_model, seed) if mapped else None)
    assert tuple(found) == LEAVES
    whole = torch.stack(list(found.values())).double().sum(dim=0)
    assert_within(whole, scene.delta().to(whole), 8 * eps(found["error_rest"].dtype) * sizes(scene, found) + 1e-300)


@guards(split, "    free[held] = False\n", "    free[: len(held)] = False\n")
@given(scenes(architectures=POINTWISE, clamps=2, geometries=("generic",)), st.integers(1, 20), SEEDS)
def test_the_order_of_features_changes_no_part(scene: Scene, top_k: int, seed: int) -> None:
    """The features of the SAE written in another order, and the clamps with them: which is which does not matter."""
    sae: SAE = scene.defense.clamps[0].sae
    order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(seed))
    held = torch.cat([clamp.indices for clamp in scene.defense.clamps])
    state, delta = (x.to(sae.dtype) for x in (scene.residual(), scene.delta()))
    ours = split(sae, held, state, delta, None, top_k)
    theirs = split(sae.select(order), order.argsort()[held], state, delta, None, top_k)
    # Sums over features in another order: of each term, no more than `d_sae` roundings; pre-activations alike.
    reach = (state.abs() + delta.abs()).double() @ sae.W_enc.abs().double() + sae.b_enc.abs().double() + 1
    bound = 32 * sae.d_sae * eps(sae.dtype) * (20 * reach @ sae.W_dec.abs().double() + delta.abs().double())
    moved = (sae.encode(state + delta) - sae.encode(state)).norm(dim=1) * sae.W_dec.norm(dim=1)
    ranked = moved.masked_fill(~_free(sae, held), -1).sort(dim=1, descending=True).values
    last = min(top_k, sae.d_sae) - 1
    tied = ranked[:, last] - ranked[:, min(last + 1, sae.d_sae - 1)] <= 1e-4 * ranked[:, 0].abs()
    for name in LEAVES:
        rows = ~tied if name in ("top_k", "other") else torch.ones_like(tied)
        assert_within(theirs[name][rows], ours[name][rows], bound[rows])


def _free(sae: SAE, held: Tensor) -> Tensor:
    free = torch.ones(sae.d_sae, dtype=torch.bool)
    free[held] = False
    return free


@guards(split, "* sae.W_dec.norm(dim=1)", "/ sae.W_dec.norm(dim=1)")
@guards(split, "size = size.where(free, -1.0)", "size = size + 0")
@given(scenes(architectures=POINTWISE, clamps=2, kinds=("normal", "huge")), st.integers(1, 4))
def test_the_largest_features_include_no_clamped_one_and_leave_no_larger_one(scene: Scene, top_k: int) -> None:
    """Of an orthonormal count: a part with one feature more is the part with one less and that feature's."""
    fewer, more = (parts(scene, k, None) for k in (top_k, top_k + 1))
    sae = scene.defense.clamps[0].sae
    held = torch.cat([clamp.indices for clamp in scene.defense.clamps])
    state, delta = (x.to(sae.dtype) for x in (scene.residual(), scene.delta()))
    change = (sae.encode(state + delta) - sae.encode(state)) * _free(sae, held)
    size = change.norm(dim=1) * sae.W_dec.norm(dim=1)
    order = size.argsort(dim=1, descending=True)
    left = torch.stack([row[keep[top_k:]] for row, keep in zip(size, order, strict=True)])
    added = (more["top_k"] - fewer["top_k"]).flatten(1).norm(dim=1)
    largest = left.amax(dim=1) if left.shape[1] else torch.zeros(len(size))
    bound = 64 * sae.d_sae * eps(sae.dtype) * (size.sum(dim=1) + 1).double()
    assert_within(added, largest, bound)


@guards(attribute, "first_order(along, part), *replay, *knockout", "first_order(along, part), *knockout, *replay")
@costly(4)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(6, 16), st.integers(1, 30), SEEDS)
def test_in_a_linear_model_the_effect_of_each_part_is_what_its_replay_does(
    seed: int, n_sites: int, width: int, top_k: int, noise: int
) -> None:
    """To first order and integrated; the effects of the parts add up to that of the delta, up to rounding (1 %)."""
    world = pinned_layers(seed, n_sites=n_sites, d_model=width, k=2, d_sae=width + 5, n_prompts=3)
    defended = defend(world.model, world.defense, world.prompts, world.behavior, surface=Surface("every"))
    delta = randn(*defended.zero_delta.shape, seed=noise)
    linear = {site: linear_map(width, noise + place) for place, site in enumerate(world.defense.sites)}
    found = attribute(defended, delta, linear, top_k=top_k, points=2)
    scale = sum(view.first_order.abs() for name, view in found.views.items() if name in LEAVES)
    for name, view in found.views.items():
        for effect in (view.first_order, view.integrated, view.replay_score - found.defended):
            assert_within(effect, view.integrated, 0.01 * scale + 1e-3)
        if name != "full":
            taken = found.recovered - view.knockout_score
            assert_within(taken, view.first_order, 0.01 * scale + 1e-3)
    assert_within(found.views["full"].first_order, found.effect, 0.01 * scale + 1e-3)


@guards(
    split,
    'return parts | {"error_linear": predicted, "error_rest": error - predicted}',
    'return parts | {"error_linear": predicted, "error_rest": error + delta}',
)
@costly(4)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 30), SEEDS)
def test_first_order_effects_add_up(seed: int, n_sites: int, top_k: int, noise: int) -> None:
    """For any gradient, the effects of the parts add up to the effect of the whole delta."""
    world = pinned_layers(seed, n_sites=n_sites, d_model=8, k=2, d_sae=14, n_prompts=2)
    defended = defend(world.model, world.defense, world.prompts, world.behavior, surface=Surface("every"))
    delta = randn(*defended.zero_delta.shape, seed=noise)
    leaves = parts_of(defended, delta, None, top_k=top_k).leaves
    for slope in (gradient(defended, delta, 0), gradient(defended, delta, 3), randn(*delta.shape, seed=noise + 1)):
        each = torch.stack([first_order(slope, part) for part in leaves.values()])
        assert_within(each.sum(dim=0), first_order(slope, delta), 1e-4 * (each.abs().sum(dim=0) + 1).double())


@guards(
    "recover.evidence.attribution.parts.entering",
    "moved = defended.perturbed(delta) - defended.suffix.residual",
    "moved = delta",
)
@costly(4)
@given(st.integers(0, 10**6), st.integers(1, 2), SEEDS)
def test_the_parts_of_a_delta_before_the_clamp_are_those_of_its_change_after_the_clamp(
    seed: int, k: int, noise: int
) -> None:
    """Replayed in full it gives the same logits, and its parts add up to that change."""
    world = pinned_layers(seed, n_sites=1, d_model=8, k=k + 1, d_sae=14, n_prompts=2)
    defended = defend(
        world.model, world.defense, world.prompts, world.behavior, surface=Surface(placement="before_clamp")
    )
    delta = randn(*defended.zero_delta.shape, seed=noise)
    found = attribute(defended, delta, points=1)
    assert_within(found.views["full"].replay_score, defended(delta)[0], 1e-3 * (defended(delta)[0].abs() + 1).double())
