"""Pinned deltas: against closed forms, against a replay that shares nothing with the search, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from recover.defenses.clamps import Clamp, Defense, Scale, Set
from recover.defenses.defended import Defended, defend
from recover.defenses.speech import say
from recover.evidence.certificate import certify
from recover.models.generation import answered, generate
from recover.models.host import Model
from recover.numerics.metrics import norm
from recover.saes.sae import from_sae_lens
from recover.search.ascent import Schedule
from recover.search.constraints.pinned import Pin, Pinned
from recover.search.pinned import find_pinned, shorten
from recover.tasks.behaviors import ForcedAnswer, LogitDifference
from recover.types import InputError, Site, Surface
from tests.by_hand import sae_lens_sae
from tests.models import D_MODEL, VOCAB, left_padded, tiny_lm, token_rows
from tests.pinned_world import PinnedWorld, pinned_layers

SITES = (Site(1), Site(2), Site(3))


def defended_of(world: PinnedWorld) -> Defended:
    return defend(world.model, world.defense, world.prompts, world.behavior, surface=Surface("every"))


def live(sites: tuple[Site, ...] = SITES) -> Defense:
    """Clamps that scale, and one that sets, at several layers of the tiny models."""
    sae = from_sae_lens(sae_lens_sae("standard"))
    modes = (Scale(3.0), Set(-2.0), Scale(-1.5))
    features = ((2, 7), (11, 19, 4), (5, 1))
    return Defense(
        tuple(Clamp(sae, f, m, True, "all", site) for f, m, site in zip(features, modes, sites, strict=False))
    )


@pytest.mark.parametrize("n_sites", [1, 2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_live_scales_at_several_layers_are_solved_to_closed_form(n_sites: int, seed: int) -> None:
    world = pinned_layers(seed, n_sites=n_sites)
    defended = defended_of(world)
    assert defended.valid_flips.tolist() == list(range(len(world.prompts)))
    pinned, budget = Pinned.of(defended), 3 * float(world.smallest_norm.max())
    found = find_pinned(pinned, budget)
    assert bool((found.norm <= budget).all() & (found.slack > 0).all())
    short = pinned.delta(shorten(pinned, found.free, steps=150))
    assert_close(norm(short), world.smallest_norm, rtol=0.005, atol=0)
    # Replayed as plain vectors by code that knows of no pin.
    facts = certify(world.model, world.defense, world.prompts, world.behavior, short, surface=Surface("every"))
    assert bool(facts.shows.all())
    assert float(facts.preactivation_shift.max()) < 1e-4
    assert float(facts.relative_drift.max()) < 1e-6
    assert_close(facts.norm, norm(short))


def test_nothing_shorter_recovers() -> None:
    """The closed form is a bound: 1 % below it no pinned delta of a careful search shows the behavior."""
    world = pinned_layers(3, n_sites=3)
    pinned = Pinned.of(defended_of(world))
    found = find_pinned(pinned, 0.99 * float(world.smallest_norm.min()))
    assert not bool(found.recovered.any())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_pinned_delta_moves_no_clamped_feature_of_a_real_architecture(family: str) -> None:
    """Of any size, in a fresh teacher-forced run, positions and padding included."""
    model, prompts, defense = Model(tiny_lm(family)), left_padded(token_rows()), live()
    answer = generate(model, prompts, 4)
    forced, behavior = answered(prompts, answer), ForcedAnswer(answer)
    defended = defend(model, defense, forced, behavior, surface=Surface("every"))
    pinned = Pinned.of(defended)
    noise = torch.randn(defended.zero_delta.shape, generator=torch.Generator().manual_seed(0))
    delta = pinned.delta(pinned.free.project(3 * noise))
    facts = certify(model, defense, forced, behavior, delta, surface=Surface("every"))
    assert bool(facts.held.all())
    assert float(facts.preactivation_shift.max()) < 1e-3 * float(norm(delta).min())
    # Free parts alone, without their corrections, do move them.
    bare = certify(model, defense, forced, behavior, pinned.free.project(3 * noise), surface=Surface("every"))
    assert float(bare.preactivation_shift.max()) > 1e-2
    assert not bool(bare.held.any())


def test_parts_are_orthogonal_at_every_site() -> None:
    world = pinned_layers(1, n_sites=3)
    pinned = Pinned.of(defended_of(world))
    free = pinned.free.project(torch.randn(pinned.start.shape, generator=torch.Generator().manual_seed(2)))
    correction = pinned.delta(free) - free
    assert_close(norm(pinned.delta(free)).square(), norm(free).square() + norm(correction).square())
    first, *later = pinned.defended.by_site(correction).values()
    assert float(first.abs().max()) == pytest.approx(0, abs=1e-4)  # nothing comes from below the first
    assert min(float(norm(part).min()) for part in later) > 0.1


def test_the_correction_by_hand() -> None:
    """Feature 0 reads dimension 0 twofold: a reference of 3 from a pre-activation of 1 is one step along it."""
    sae = from_sae_lens(sae_lens_sae("standard"))
    W_enc = torch.zeros_like(sae.W_enc)
    W_enc[0, 0] = 2.0
    clamp = Clamp(
        type(sae)(W_enc, 0 * sae.b_enc, sae.W_dec, 0 * sae.b_dec, sae.activation, Site(0), "standard", ""),
        (0,),
        Set(0.0),
    )
    state = torch.zeros(1, 1, D_MODEL)
    state[..., 0] = 0.5
    expected = torch.zeros(1, 1, D_MODEL)
    expected[..., 0] = 1.0
    assert_close(Pin((clamp,), torch.full((1, 1, 1), 3.0)).correction(state), expected)


def test_a_find_is_shortened_until_it_is_within_the_budget() -> None:
    world = pinned_layers(4, n_sites=3)
    pinned = Pinned.of(defended_of(world))
    free = pinned.free.project(10 * torch.randn(pinned.start.shape, generator=torch.Generator().manual_seed(2)))
    whole = norm(pinned.delta(free))
    within = pinned.within(free, 0.5 * float(whole.min()))
    assert bool((norm(pinned.delta(within)) <= 0.5 * float(whole.min())).all())
    assert float(norm(pinned.delta(within)).min()) > 0.49 * float(whole.min())
    assert torch.equal(pinned.within(free, 2 * float(whole.max())), free)


def test_examples_do_not_see_each_other() -> None:
    world = pinned_layers(5, n_sites=2)
    pinned, rows = Pinned.of(defended_of(world)), torch.tensor([4, 1])
    budget = 2 * float(world.smallest_norm.max())
    together, some = find_pinned(pinned, budget), find_pinned(pinned.select(rows), budget)
    assert_close(some.delta, together.delta[rows], atol=1e-4, rtol=1e-4)


def test_an_answer_is_brought_back_token_for_token_in_free_generation() -> None:
    """Under live clamps that changed it, with the saved vectors alone; drift is pinned there too."""
    model, prompts, defense, steps = Model(tiny_lm(scale=8.0)), left_padded(token_rows()), live(SITES[:2]), 3
    answer = generate(model, prompts, steps)
    clamped = say(model, prompts, steps, defense)
    changed = (clamped != answer).any(dim=1)
    assert bool(changed.any())
    behavior = ForcedAnswer(answer)
    pinned = Pinned.of(defend(model, defense, answered(prompts, answer), behavior, surface=Surface("every")))
    found = find_pinned(pinned, 60.0, Schedule(steps=200))
    back = found.recovered
    assert bool(back[changed].any())
    free = say(model, prompts, steps, defense, found.delta, surface=Surface("every"))
    assert torch.equal(free[back], answer[back])


def test_pinning_needs_a_delta_at_every_site() -> None:
    world = pinned_layers(0)
    with pytest.raises(InputError, match=r'surface=Surface\("every"\)'):
        Pinned.of(defend(world.model, world.defense, world.prompts, world.behavior))
    with pytest.raises(InputError, match="placement"):
        defend(world.model, world.defense, world.prompts, world.behavior, surface=Surface("every", "before_clamp"))
    with pytest.raises(InputError, match="budget"):
        find_pinned(Pinned.of(defended_of(world)), 0.0)


def test_a_forced_answer_reads_every_token() -> None:
    """Log-probabilities and margins by hand: two tokens of weight 2 and 1, a third that is not there."""
    logits = torch.zeros(1, 3, VOCAB)
    logits[0, 0, 5], logits[0, 1, 7], logits[0, 1, 8], logits[0, 2, 1] = 3.0, 2.0, 2.5, 9.0
    behavior = ForcedAnswer(torch.tensor([[5, 7, -1]]), heavy=1, weight=2)
    assert behavior.reads == 3
    first = 3 - torch.log(torch.exp(torch.tensor(3.0)) + VOCAB - 1)
    second = 2 - torch.log(torch.exp(torch.tensor(2.0)) + torch.exp(torch.tensor(2.5)) + VOCAB - 2)
    assert_close(behavior.score(logits), ((2 * first + second) / 3)[None])
    assert behavior.margins(logits).tolist() == [[3.0, -0.5, float("inf")]]
    assert behavior.slack(logits).tolist() == [-0.5]
    assert isinstance(LogitDifference(torch.tensor([1]), torch.tensor([2])).tokens, torch.Tensor)
