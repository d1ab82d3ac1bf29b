"""Laws of defenses over several layers: nothing pinned moves, and generation is what it is without them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.guards import guards
from property_tests.strategies import POINTWISE, SEEDS, SAECase, costly
from recover.defenses.clamps import Clamp, Defense, Floor, Scale, Set
from recover.defenses.defended import clamp_edits, defend
from recover.evidence.certificate import certify
from recover.models.generation import answered, generate, n_answer
from recover.models.host import Edit, Model
from recover.numerics.metrics import norm
from recover.search.constraints.pinned import Pinned
from recover.search.pinned import find_pinned, shorten
from recover.tasks.behaviors import ForcedAnswer
from recover.types import Site, Surface
from tests.models import D_MODEL, FAMILIES, N_LAYERS, left_padded, tiny_lm, token_rows
from tests.pinned_world import pinned_layers


@dataclass(frozen=True)
class LayersCase:
    """A tiny model of some family with clamps at several of its layers, prompts and a number of answer tokens."""

    family: str
    lengths: tuple[int, ...]
    layers: tuple[int, ...]
    sae: SAECase
    features: tuple[tuple[int, ...], ...]
    modes: tuple[tuple[str, float], ...]
    positions: str
    skip_first: int
    n_tokens: int
    seed: int
    size: float

    @property
    def model(self) -> Model:
        return Model(tiny_lm(self.family))

    @property
    def defense(self) -> Defense:
        sae = self.sae.sae(torch.float32)
        made = [{"set": Set, "scale": Scale, "floor": Floor}[name](value) for name, value in self.modes]
        clamps = zip(self.features, made, self.layers, strict=False)
        return Defense(
            tuple(Clamp(sae, f, mode, True, self.positions, Site(layer)) for f, mode, layer in clamps),  # type: ignore[arg-type]
            self.skip_first,
        )


@st.composite
def layers_cases(draw: st.DrawFn) -> LayersCase:
    n_sites = draw(st.integers(1, 3))
    modes = st.tuples(st.sampled_from(["set", "scale", "floor"]), st.floats(-3, 3))
    some = st.lists(st.integers(0, 19), min_size=1, max_size=6, unique=True).map(tuple)
    return LayersCase(
        family=draw(st.sampled_from(FAMILIES)),
        lengths=tuple(draw(st.lists(st.integers(2, 8), min_size=1, max_size=3))),
        layers=tuple(sorted(draw(st.permutations(range(N_LAYERS)))[:n_sites])),
        sae=SAECase(draw(st.sampled_from(POINTWISE)), D_MODEL, 20, draw(SEEDS), True, k=6),
        features=tuple(draw(some) for _ in range(n_sites)),
        modes=tuple(draw(modes) for _ in range(n_sites)),
        positions=draw(st.sampled_from(["all", "prompt", "last", "answer"])),
        skip_first=draw(st.integers(0, 1)),
        n_tokens=draw(st.integers(2, 4)),
        seed=draw(SEEDS),
        size=draw(st.sampled_from([0.1, 1.0, 10.0])),
    )


@guards(
    Pinned.run, "added[site] = parts[site] + self.pins[site].correction(widened(pushed))", "added[site] = parts[site]"
)
@costly()
@given(layers_cases())
def test_no_pinned_delta_moves_a_clamped_pre_activation_of_any_layer(case: LayersCase) -> None:
    """In a whole teacher-forced replay that adds plain vectors and knows of no pin."""
    model, prompts, defense = case.model, left_padded(token_rows(case.lengths, seed=case.seed)), case.defense
    answer = generate(model, prompts, case.n_tokens)
    forced, behavior = answered(prompts, answer), ForcedAnswer(answer)
    pinned = Pinned.of(defend(model, defense, forced, behavior, surface=Surface("every")))
    noise = torch.randn(pinned.start.shape, generator=torch.Generator().manual_seed(case.seed))
    delta = pinned.delta(pinned.free.project(case.size * noise))
    facts = certify(model, defense, forced, behavior, delta, surface=Surface("every"))
    # Rounding of what has passed through layers that amplify is larger than that of one state.
    limit = 20 * facts.rounding
    assert bool((facts.preactivation_shift.amax(dim=1) <= limit).all())
    assert bool((facts.constraint_residual <= 1e-5).all())


@guards(shorten, "by_example(stride) * outward", "by_example(stride) * leaf.detach()")
@costly()
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(8, 24), st.data())
def test_the_shortest_pinned_delta_is_the_closed_form(seed: int, n_sites: int, width: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(2, width // 2))
    world = pinned_layers(seed, n_sites=n_sites, d_model=width, k=k, d_sae=k + 5, n_prompts=3)
    pinned = Pinned.of(defend(world.model, world.defense, world.prompts, world.behavior, surface=Surface("every")))
    found = find_pinned(pinned, 4 * float(world.smallest_norm.max()))
    assert bool(found.recovered.all())
    short = norm(pinned.delta(shorten(pinned, found.free, steps=150)))
    assert bool((short >= 0.999 * world.smallest_norm).all())
    assert bool((short <= 1.01 * world.smallest_norm).all())


@guards(Clamp.displacement, "change = self.features_after(z) - z", "change = self.features_after(z)")
@costly()
@given(layers_cases(), st.booleans())
def test_a_defense_that_edits_nothing_generates_the_plain_text(case: LayersCase, use_cache: bool) -> None:
    """Token for token: no edits, and clamps that multiply by one."""
    model, prompts = case.model, left_padded(token_rows(case.lengths, seed=case.seed))
    sae = case.sae.sae(torch.float32)
    idle = Defense(
        tuple(Clamp(sae, f, Scale(1.0), site=Site(layer)) for f, layer in zip(case.features, case.layers, strict=False))
    )
    plain = generate(model, prompts, case.n_tokens)
    edited = generate(
        model,
        prompts,
        case.n_tokens,
        lambda first, last: clamp_edits(idle, n_answer(first, last)),
        use_cache=use_cache,
    )
    assert torch.equal(edited, plain)
    assert torch.equal(generate(model, prompts, case.n_tokens, use_cache=use_cache), plain)


@guards(generate, "edits=edits(step if kept else 0, step)", "edits=edits(step, step)")
@costly()
@given(layers_cases())
def test_live_clamps_give_the_same_text_with_and_without_keys_and_values(case: LayersCase) -> None:
    """And in a batch as alone."""
    model, prompts, defense = case.model, left_padded(token_rows(case.lengths, seed=case.seed)), case.defense

    def edits(first: int, last: int) -> dict[Site, Edit]:
        return clamp_edits(defense, n_answer(first, last))

    kept = generate(model, prompts, case.n_tokens, edits)
    assert torch.equal(generate(model, prompts, case.n_tokens, edits, use_cache=False), kept)
    for row in range(len(prompts)):
        assert torch.equal(generate(model, prompts.select(torch.tensor([row])), case.n_tokens, edits)[0], kept[row])
