"""What the makers of planted worlds claim, held against the worlds themselves, by PyTorch alone.

Nothing here takes a number from the engine, a search, or the makers' own geometry. A world's network is run block by
block in float64, the clamp is written out as `h + (z' - z) W_dec`, directions are read off the SAE, gradients come from
autograd, and projections from least squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recover.defenses.clamps import Clamp
from recover.numerics.subspaces import NullSpace
from recover.planted import KINDS, Planted
from recover.planted.geometry import VARIANTS as SHAPES
from recover.planted.geometry import degenerate_geometry
from recover.planted.hard import VARIANTS as READOUTS
from recover.planted.hard import hard_readout
from recover.planted.layers import two_layers
from recover.planted.meaning import shared_route, undone_clamp, write_only
from recover.planted.routes import complete_bottleneck, error_bypass, feature_bypass

SEEDS = range(4)
MAKERS = list(KINDS.values())
WORLDS = pytest.mark.parametrize("kind", MAKERS, ids=list(KINDS))
SEED = pytest.mark.parametrize("seed", SEEDS)


class ByHand:
    """A world's network and clamps in float64; `logits(delta)`: last position, `delta` at the first site."""

    def __init__(self, world: Planted, clamp: bool = True) -> None:
        self.module = world.model.module.double()
        self.clamps = {one.site.index: one for one in world.defense.clamps}
        self.clamp, self.skip, self.ids = clamp, world.defense.skip_first, world.examples.prompts.ids
        self.seen: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        self.read = torch.zeros(0)

    def clamped(self, clamp: Clamp, h: Tensor) -> Tensor:
        chosen = clamp.indices
        encoder, decoder = clamp.sae.W_enc[:, chosen].double(), clamp.sae.W_dec[chosen].double()
        pre = h @ encoder + clamp.sae.b_enc[chosen].double()
        level = 0.3 if clamp.sae.architecture == "jumprelu" else 0.0
        z = torch.where(pre > level, pre, 0.0)
        edited = clamp.mode(z)
        change = torch.where(z > 0, edited, z) - z if clamp.only_active else edited - z
        change[:, : self.skip] = 0
        return h + change @ decoder

    def logits(self, delta: Tensor | None = None) -> Tensor:
        h = self.module.embedding(self.ids)
        for index, block in enumerate(self.module.blocks):
            if self.clamp and index in self.clamps:
                h = self.clamped(self.clamps[index], h)
            if delta is not None and index == min(self.clamps):
                h = torch.cat([h[:, :-1], h[:, -1:] + delta[:, None]], dim=1)
            if index in self.clamps:
                clamp = self.clamps[index]
                self.states[index] = h[:, -1]
                self.seen[index] = h[:, -1] @ clamp.encoder.double()
            if index == len(self.module.blocks) - 1:
                self.read = h[:, -1] @ block.U
            h = block(h)
        return self.module.head(h)[:, -1]


def slack(world: Planted, logits: Tensor) -> Tensor:
    """The target's logit minus the largest of the others': of one other, the difference."""
    tokens = world.examples.behavior.tokens
    assert tokens is not None
    chosen = logits.gather(1, tokens)
    return chosen[:, 0] - chosen[:, 1:].amax(dim=1)


def without(A: Tensor, v: Tensor) -> Tensor:
    """`v [batch d_model]` minus its part in the span of the columns of `A`, by least squares."""
    scaled = A / A.norm(dim=0).clamp(min=1e-30)
    left, values, _ = torch.linalg.svd(scaled, full_matrices=False)
    basis = left[:, values > 1e-6]
    return v - v @ basis @ basis.T


def held(world: Planted) -> Tensor:
    """All that a delta must not move, as columns at the first site: by autograd where it is a later site's."""
    first, d_model = world.defense.clamps[0], world.model.d_model
    columns = [first.encoder.double()]
    for clamp in world.defense.clamps[1:]:
        by_hand = ByHand(world)

        def seen(delta: Tensor, by_hand: ByHand = by_hand, index: int = clamp.site.index) -> Tensor:
            by_hand.logits(delta.expand(len(world.examples.ids), -1))
            return by_hand.seen[index][0]

        columns.append(torch.autograd.functional.jacobian(seen, torch.zeros(d_model, dtype=torch.float64)).T)
    return torch.cat(columns, dim=1)


def zeros(world: Planted) -> Tensor:
    return torch.zeros(len(world.examples.ids), world.model.d_model, dtype=torch.float64)


def admissible_noise(world: Planted, length: float) -> Tensor:
    noise = without(held(world), torch.randn_like(zeros(world)))
    return noise * length / noise.norm(dim=1, keepdim=True)


@WORLDS
@SEED
def test_every_example_is_a_valid_flip(kind: Callable[..., Planted], seed: int) -> None:
    world = kind(seed)
    assert (slack(world, ByHand(world, clamp=False).logits()) > 0.1).all()
    assert (slack(world, ByHand(world).logits()) < -0.05).all()


@WORLDS
@SEED
def test_the_sae_explains_its_site(kind: Callable[..., Planted], seed: int) -> None:
    world = kind(seed)
    for clamp in world.defense.clamps:
        by_hand = ByHand(world, clamp=False)
        by_hand.logits()
        x, sae = by_hand.states[clamp.site.index], clamp.sae
        missed = x - sae.decode(sae.encode(x.float())).double()
        assert missed.square().sum() < 0.1 * (x - x.mean(dim=0)).square().sum()


@WORLDS
def test_the_seed_decides_everything(kind: Callable[..., Planted]) -> None:
    one, same, other = kind(3), kind(3), kind(3 + 30)
    assert torch.equal(one.model.module.embedding.weight, same.model.module.embedding.weight)
    assert (one.budget, one.variant, one.expected) == (same.budget, same.variant, same.expected)
    assert not torch.equal(one.model.module.embedding.weight, other.model.module.embedding.weight)


@WORLDS
def test_sizes_are_free(kind: Callable[..., Planted]) -> None:
    world = kind(1, d_model=60, n_answers=3, n_context=9, n_prompts=7, length=2, vocab=80, depth=3)
    assert world.model.d_model == 60
    assert tuple(world.examples.prompts.ids.shape) == (7, 2)
    assert world.model.module.head.out_features == 80
    assert (slack(world, ByHand(world).logits()) < 0).all()


@pytest.mark.parametrize("seed", range(8))
def test_nothing_admissible_moves_a_complete_bottleneck(seed: int) -> None:
    world = complete_bottleneck(seed)
    before = ByHand(world).logits()
    for length in (1.0, 1e3, 1e6):
        assert_close(ByHand(world).logits(admissible_noise(world, length)), before, atol=1e-6 * length, rtol=0)
    assert world.smallest_norm is not None
    assert torch.isinf(world.smallest_norm).all()
    moved = ByHand(world).logits(torch.randn_like(before[:, :1]).expand(-1, world.model.d_model) * 3)
    assert (moved - before).abs().max() > 0.1


MEASURED = [
    *[(kind, seed) for kind in (error_bypass, feature_bypass, two_layers) for seed in range(6)],
    *[(degenerate_geometry, seed) for seed in range(12)],
]


@pytest.mark.parametrize(("kind", "seed"), MEASURED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_smallest_norm_is_that_of_a_half_space(kind: Callable[..., Planted], seed: int) -> None:
    """`y_t - y_o` is affine in delta; the distance of its zero, within what is held, is the answer."""
    world = kind(seed)
    target, other = (token.tolist() for token in world.examples.behavior.tokens.T)  # type: ignore[union-attr]

    def difference(delta: Tensor) -> Tensor:
        by_hand = ByHand(world)
        by_hand.logits(delta)
        y = torch.cat([by_hand.read, torch.zeros_like(by_hand.read[:, :1])], dim=1)
        rows = range(len(y))
        return y[rows, target] - y[rows, other]

    def gradient(at: Tensor) -> Tensor:
        leaf = at.requires_grad_(True)
        return torch.autograd.grad(difference(leaf).sum(), leaf)[0]

    noise = admissible_noise(world, 0.3) if world.variant != "full" else zeros(world)
    u, start = gradient(zeros(world)), difference(zeros(world)).detach()
    assert_close(difference(noise).detach(), start + (u * noise).sum(dim=1), atol=1e-6, rtol=0)
    way = without(held(world), u)
    length = way.norm(dim=1)
    known = torch.where(length > 1e-5, -start / length, math.inf)
    assert world.smallest_norm is not None
    assert_close(world.smallest_norm.double(), known, rtol=1e-5, atol=0)
    if torch.isinf(known).any():
        assert world.expected == ("NOT_RECOVERED_AT_BUDGET",)
        return
    nearest = way / length[:, None] * known[:, None]
    assert (slack(world, ByHand(world).logits(1.001 * nearest)) > 0).all()
    assert (slack(world, ByHand(world).logits(0.999 * nearest)) < 0).all()
    assert world.budget > float(known.max())
    by_hand, moved = ByHand(world), ByHand(world)
    by_hand.logits()
    moved.logits(nearest)
    for index, seen in by_hand.seen.items():
        assert_close(moved.seen[index], seen, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_second_layer_sees_what_the_first_does_not(seed: int) -> None:
    world = two_layers(seed)
    first_only = without(world.defense.clamps[0].encoder.double(), torch.randn_like(zeros(world)))
    still, moved = ByHand(world), ByHand(world)
    still.logits()
    moved.logits(first_only)
    assert_close(moved.seen[1], still.seen[1], atol=1e-5, rtol=0)
    assert (moved.seen[2] - still.seen[2]).abs().max() > 0.01
    both = held(world)
    assert (world.admissible.project(torch.randn(50, world.model.d_model)).double() @ both).abs().max() < 1e-5
    assert world.admissible.rank == torch.linalg.matrix_rank(both, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kind", "place"), [(error_bypass, "error"), (feature_bypass, "features")])
def test_the_bypass_is_where_it_is_said_to_be(kind: Callable[..., Planted], place: str, seed: int) -> None:
    """The nearest delta taken apart (reference: Recovery-path replay): one part recovers, the other changes nothing."""
    world = kind(seed)
    assert world.bypass == place
    sae, by_hand = world.defense.clamps[0].sae, ByHand(world)
    leaf = zeros(world).requires_grad_(True)
    # Of the score, not of `y`: at the edge of where the behavior shows both point the same way.
    target, other = world.examples.behavior.tokens.T  # type: ignore[union-attr]
    by_hand.logits(leaf)
    rows = torch.arange(len(target))
    (u,) = torch.autograd.grad((by_hand.read[rows, target] - by_hand.read[rows, other]).sum(), leaf)
    way = without(held(world), u)
    assert world.smallest_norm is not None
    delta = 1.05 * way / way.norm(dim=1, keepdim=True) * world.smallest_norm.double()[:, None]
    h_def = by_hand.states[1].detach()
    change = sae.encode((h_def + delta).float()) - sae.encode(h_def.float())
    in_features = (change.double() @ sae.W_dec.double()).detach()
    parts = {"features": in_features, "error": delta - in_features}
    before = slack(world, ByHand(world).logits())
    assert (slack(world, ByHand(world).logits(parts.pop(place))) > 0).all()
    (rest,) = parts.values()
    assert_close(slack(world, ByHand(world).logits(rest)), before, atol=1e-4, rtol=0)


@SEED
def test_write_only_erases_the_answer_and_writes_any(seed: int) -> None:
    world = write_only(seed)
    tokens = world.examples.behavior.tokens
    assert tokens is not None
    n_answers = tokens.shape[1] - 1
    erased = ByHand(world).logits()[:, : n_answers + 1]
    assert_close(erased, erased[:1].expand_as(erased), atol=1e-5, rtol=0)
    assert world.smallest_norm is not None
    for wanted in range(n_answers):
        leaf = zeros(world).requires_grad_(True)
        (u,) = torch.autograd.grad(ByHand(world).logits(leaf)[:, wanted].sum(), leaf)
        way = without(held(world), u)
        way = way / way.norm(dim=1, keepdim=True) * world.smallest_norm[:, None]
        written = ByHand(world).logits(1.01 * way)[:, : n_answers + 1]
        assert (written.argmax(dim=1) == wanted).all()
        assert (ByHand(world).logits(0.99 * way)[:, : n_answers + 1].argmax(dim=1) == n_answers).all()
    for _ in range(20):
        one = admissible_noise(world, 3 * world.budget)[:1].expand(len(erased), -1)
        assert len(set(ByHand(world).logits(one)[:, : n_answers + 1].argmax(dim=1).tolist())) == 1


def undo(world: Planted) -> Tensor:
    """The admissible part of what takes the clamp's own displacement back."""
    base, defended = ByHand(world, clamp=False), ByHand(world)
    base.logits()
    defended.logits()
    return without(held(world), base.states[1] - defended.states[1])


def plus(world: Planted) -> Tensor:
    """What C1+ holds: the encoder and the decoder directions of the clamped features."""
    clamp = world.defense.clamps[0]
    return torch.cat([clamp.encoder.double(), clamp.decoder.double().T], dim=1)


@pytest.mark.parametrize("seed", range(8))
def test_a_shared_route_opens_for_all_and_is_not_the_clamp_undone(seed: int) -> None:
    world = shared_route(seed)
    assert world.shared is not None
    shared = world.shared.double()
    assert float(shared.norm()) <= world.budget
    assert_close(without(plus(world), shared), shared, atol=1e-5, rtol=0)
    assert (slack(world, ByHand(world).logits(shared.expand_as(zeros(world)))) > 0).all()
    before = slack(world, ByHand(world).logits())
    for scale in (0.5, 1.0, 2.0):
        assert_close(slack(world, ByHand(world).logits(scale * undo(world))), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(8))
def test_an_undone_clamp_is_undone_and_nothing_else_is_left(seed: int) -> None:
    world = undone_clamp(seed)
    assert (slack(world, ByHand(world).logits(undo(world))) > 0).all()
    for length in (1.0, 10.0, 1000.0):
        for _ in range(10):
            noise = without(plus(world), torch.randn_like(zeros(world)))
            assert (slack(world, ByHand(world).logits(length * noise)) < 0).all()
    if world.shared is not None:
        shared = world.shared.double()
        assert without(plus(world), shared).norm() < 1e-5
        assert (slack(world, ByHand(world).logits(shared.expand_as(zeros(world)))) > 0).all()


@pytest.mark.parametrize("kind", [shared_route, undone_clamp])
@pytest.mark.parametrize("seed", range(6))
def test_a_gate_opens_at_the_norm_given(kind: Callable[..., Planted], seed: int) -> None:
    """Along what opens it: the shared delta's direction, which the derivation shows to be the shortest."""
    world = kind(seed)
    if world.shared is None:
        pytest.skip("no gate in this variant")
    assert world.smallest_norm is not None
    way = (world.shared / world.shared.norm()).double() * world.smallest_norm.double()[:, None]
    assert (slack(world, ByHand(world).logits(1.001 * way)) > 0).all()
    assert (slack(world, ByHand(world).logits(0.999 * way)) < 0).all()
    for _ in range(20):
        shorter = admissible_noise(world, 1.0) * 0.99 * world.smallest_norm.double()[:, None]
        assert (slack(world, ByHand(world).logits(shorter)) < 0).all()


@pytest.mark.parametrize("variant", READOUTS)
@SEED
def test_a_hard_readout_has_a_way_back_and_a_gradient_that_does_not_show_it(variant: str, seed: int) -> None:
    world = hard_readout(seed, variant=variant)
    target = world.examples.behavior.tokens[:, 0]  # type: ignore[index]
    rows = torch.arange(len(target))
    leaf = zeros(world).requires_grad_(True)
    by_hand = ByHand(world)
    logits = by_hand.logits(leaf)
    (u,) = torch.autograd.grad(by_hand.read[rows, target].sum(), leaf, retain_graph=True)
    way = without(held(world), u)
    assert world.smallest_norm is not None
    way = way / way.norm(dim=1, keepdim=True)
    needed = world.smallest_norm.double()[:, None]
    assert (slack(world, ByHand(world).logits(1.001 * needed * way)) > 0).all()
    assert (slack(world, ByHand(world).logits(0.999 * needed * way)) < 0).all()
    assert world.budget > float(needed.max())

    (gradient,) = torch.autograd.grad(slack(world, logits).sum(), leaf, allow_unused=True)
    gradient = zeros(world) if gradient is None else without(held(world), gradient)
    along = (gradient * way).sum(dim=1)
    if variant == "reversed":
        assert (along < -0.1).all()
    else:
        assert (along.abs() < 0.02).all()
    assert (gradient.norm(dim=1) > 0.1).all() == (variant in ("decoy", "reversed"))


@pytest.mark.parametrize("variant", SHAPES)
@SEED
def test_degenerate_encoders_are(variant: str, seed: int) -> None:
    world = degenerate_geometry(seed, variant=variant)
    A = world.defense.clamps[0].encoder.double()
    d_model, k = A.shape
    rank = int(torch.linalg.matrix_rank(A / A.norm(dim=0).clamp(min=1e-30), rtol=1e-6))
    assert world.admissible.rank == rank
    assert NullSpace.of(world.defense.clamps[0].encoder).rank == rank  # rounded to float32, as an SAE's columns are
    match variant:
        case "duplicate":
            assert len(torch.unique(A.T, dim=0)) == rank == k // 2
        case "dependent":
            assert rank < k
            assert (A.norm(dim=0) > 0).all()
        case "zero":
            assert (A.norm(dim=0) == 0).sum() == k - rank
        case "one":
            assert k == 1
        case "all":
            assert k == world.defense.clamps[0].sae.d_sae
            assert rank < min(k, d_model)
        case "full":
            assert k > d_model == rank
            assert torch.isinf(world.smallest_norm).all()  # type: ignore[arg-type]


def test_both_halves_of_the_drawn_choices_come_up() -> None:
    assert {shared_route(seed).variant for seed in range(10)} == {"error", "features"}
    assert {undone_clamp(seed).variant for seed in range(10)} == {"gate", "answers"}
    assert {two_layers(seed).variant for seed in range(10)} == {"error", "features"}
    assert {degenerate_geometry(seed).variant for seed in range(6)} == set(SHAPES)
    assert {hard_readout(seed).variant for seed in range(5)} == set(READOUTS)
    ones = [degenerate_geometry(seed, variant="one").expected[0] for seed in range(12)]
    assert set(ones) == {"RECOVERABLE", "NOT_RECOVERED_AT_BUDGET"}
