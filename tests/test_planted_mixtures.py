"""What the makers of mixtures claim, held against the worlds by PyTorch alone, as in `test_planted`."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recover.planted import MIXTURES, Planted
from recover.planted.meaning import KAPPA, shared_route, write_only
from recover.planted.mixtures import (
    centered,
    corner,
    half_erased,
    partly_erased,
    some_routes,
    undone_and_route,
    weak_predicate,
)
from recover.planted.selftest import PLAN
from recover.protocol.checking import check
from recover.types import InputError
from tests.test_planted import ByHand, admissible_noise, held, plus, slack, undo, without, zeros

SEEDS = range(4)
MIXED = pytest.mark.parametrize("kind", list(MIXTURES.values()), ids=list(MIXTURES))
SEED = pytest.mark.parametrize("seed", SEEDS)


def read_along(world: Planted, *columns: int) -> list[Tensor]:
    """For each coordinate that the readout reads, the direction in which an admissible delta moves it, `[d_model]`."""
    leaf, by_hand = zeros(world).requires_grad_(True), ByHand(world)
    by_hand.logits(leaf)
    return [
        without(held(world), torch.autograd.grad(by_hand.read[0, column], leaf, retain_graph=True)[0])[0]
        for column in columns
    ]


def answers_of(world: Planted) -> Tensor:
    tokens = world.examples.behavior.tokens
    assert tokens is not None
    return tokens[:, 0]


def given(world: Planted, delta: Tensor) -> Tensor:
    """The likeliest of the answers and `none` at `delta`."""
    tokens = world.examples.behavior.tokens
    assert tokens is not None
    return ByHand(world).logits(delta)[:, : tokens.shape[1]].argmax(dim=1)


@MIXED
@SEED
def test_every_example_is_a_valid_flip(kind: Callable[..., Planted], seed: int) -> None:
    world = kind(seed)
    assert (slack(world, ByHand(world, clamp=False).logits()) > 0.1).all()
    assert (slack(world, ByHand(world).logits()) < -0.05).all()


@MIXED
@SEED
def test_the_sae_explains_its_site(kind: Callable[..., Planted], seed: int) -> None:
    world = kind(seed)
    by_hand, sae = ByHand(world, clamp=False), world.defense.clamps[0].sae
    by_hand.logits()
    x = by_hand.states[1]
    missed = x - sae.decode(sae.encode(x.float())).double()
    assert missed.square().sum() < 0.1 * (x - x.mean(dim=0)).square().sum()


@MIXED
def test_the_seed_decides_everything(kind: Callable[..., Planted]) -> None:
    one, same, other = kind(3), kind(3), kind(3 + 30)
    assert torch.equal(one.model.module.embedding.weight, same.model.module.embedding.weight)
    assert (one.budget, one.variant, one.content) == (same.budget, same.variant, same.content)
    assert not torch.equal(one.model.module.embedding.weight, other.model.module.embedding.weight)


@MIXED
@pytest.mark.parametrize("n_prompts", [9, 40])
def test_sizes_are_free(kind: Callable[..., Planted], n_prompts: int) -> None:
    world = kind(1, d_model=60, n_answers=4, n_context=9, n_prompts=n_prompts, length=2, vocab=80, depth=3)
    assert world.model.d_model == 60
    assert tuple(world.examples.prompts.ids.shape) == (n_prompts, 2)
    assert world.model.module.head.out_features == 80
    assert (slack(world, ByHand(world, clamp=False).logits()) > 0).all()
    assert (slack(world, ByHand(world).logits()) < 0).all()


@MIXED
@SEED
def test_the_shared_delta_recovers_just_the_rows_it_is_said_to(kind: Callable[..., Planted], seed: int) -> None:
    world = kind(seed)
    if world.shared is None:
        assert world.variant == "distractor"
        return
    shared = world.shared.double()
    rows = torch.ones(len(world.examples.ids), dtype=torch.bool) if world.shared_rows is None else world.shared_rows
    assert float(shared.norm()) <= world.budget
    assert_close(without(held(world), shared), shared, atol=1e-5, rtol=0)
    assert torch.equal(slack(world, ByHand(world).logits(shared.expand_as(zeros(world)))) > 0, rows)


@MIXED
def test_the_checker_recovers_what_can_be(kind: Callable[..., Planted]) -> None:
    world = kind(0)
    assert world.smallest_norm is not None
    said = check(world.model, world.defense, world.examples, world.budget, plan=PLAN)
    assert said.verdict == "RECOVERABLE"
    assert said.recovery.recovered == int(torch.isfinite(world.smallest_norm).sum())


def test_what_may_be_said_of_each() -> None:
    assert half_erased(0).allowed == partly_erased(0).allowed == {True, False, None}
    assert undone_and_route(0).allowed == shared_route(0).allowed == {True}
    assert write_only(0).allowed == {False}
    assert weak_predicate(0).allowed == {False, None}


# Of half spaces.


def test_the_corner_of_two_half_spaces_by_hand() -> None:
    """`x >= 3` with `y >= 4`, with `y >= -1`, with `x + y >= 8` (nearest alone), with `x + y >= 4` (corner 3, 1)."""
    x, y = torch.eye(2, dtype=torch.float64)
    slacks = torch.tensor([[-3, -4], [-3, 1], [-3, -8], [-3, -4]], dtype=torch.float64)
    walls = torch.stack([torch.stack([x, other]) for other in (y, y, x + y, x + y)])
    assert_close(corner(slacks, walls), torch.tensor([25, 9, 32, 10], dtype=torch.float64).sqrt())


def test_centered_by_hand() -> None:
    y = torch.tensor([[1.0, 3.0, 10.0, 20.0], [0.0, 0.0, -1.0, 1.0]])
    assert_close(centered(y, 2), torch.tensor([[-1.0, 1.0, -5.0, 5.0], [0.0, 0.0, -1.0, 1.0]]))
    assert_close(centered(y[:1], 4), torch.tensor([[-7.5, -5.5, 1.5, 11.5]]))


def plane(world: Planted) -> tuple[Tensor, Tensor]:
    """Unit directions `[batch d_model]`: opens the gate; writes each prompt's answer (in a group, above the other)."""
    target, rows = answers_of(world), torch.arange(len(world.examples.ids))
    n = int(world.examples.behavior.tokens.shape[1]) - 1  # type: ignore[union-attr]
    if world.name == "half_erased":  # groups of two: copies of 3 groups, 6 members, the gate
        e = torch.stack(read_along(world, *range(n // 2, n // 2 + n)))
        writes = e[target] - e[target ^ 1]
    else:
        writes = torch.stack(read_along(world, *range(n)))[target]
    (opens,) = read_along(world, -1)
    opens = opens.expand(len(rows), -1)
    return opens / opens.norm(dim=1, keepdim=True), writes / writes.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", [half_erased, partly_erased])
@SEED
def test_opening_and_writing_together_need_the_norm_given(kind: Callable[..., Planted], seed: int) -> None:
    """Every direction between the two is tried; and no ascent from the nearest leads back inside."""
    world = kind(seed)
    assert world.smallest_norm is not None
    opens, writes = plane(world)
    assert ((opens * writes).sum(dim=1).abs() < 1e-5).all()
    length = world.smallest_norm.double()[:, None]
    within, beyond = torch.full((len(opens),), -math.inf), torch.full((len(opens),), -math.inf)
    best = torch.zeros_like(opens)
    for angle in torch.linspace(-0.05, math.pi / 2 + 0.05, 300).tolist():
        way = math.cos(angle) * opens + math.sin(angle) * writes
        value = slack(world, ByHand(world).logits(0.99 * length * way))
        best = torch.where((value > within)[:, None], way, best)
        within = torch.maximum(within, value)
        beyond = torch.maximum(beyond, slack(world, ByHand(world).logits(1.01 * length * way)))
    assert (within < 0).all()
    assert (beyond > 0).all()
    for step in range(60):
        leaf = (0.99 * length * best).requires_grad_(True)
        value = slack(world, ByHand(world).logits(leaf))
        assert (value < 0).all()
        gradient = without(held(world), torch.autograd.grad(value.sum(), leaf)[0])
        best = best + 0.3 / (1 + step) * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-9)
        best = best / best.norm(dim=1, keepdim=True)


GATES = [some_routes, undone_and_route, weak_predicate]


@pytest.mark.parametrize("kind", GATES)
@SEED
def test_one_half_space_needs_the_norm_given(kind: Callable[..., Planted], seed: int) -> None:
    world = kind(seed)
    assert world.smallest_norm is not None
    target, other = world.examples.behavior.tokens[:, :2].T  # type: ignore[index]
    n = int(max(answers_of(world).max(), other.max())) + 1
    if kind is weak_predicate:
        e = torch.stack(read_along(world, *range(n)))
        way = e[target] - e[other]
    else:
        way = read_along(world, -2 if kind is some_routes else -1)[0].expand_as(zeros(world))
    way = way / way.norm(dim=1, keepdim=True)
    finite = torch.isfinite(world.smallest_norm)
    length = torch.where(finite, world.smallest_norm.double(), world.budget)[:, None]
    assert torch.equal(slack(world, ByHand(world).logits(1.001 * length * way)) > 0, finite)
    assert (slack(world, ByHand(world).logits(0.999 * length * way)) < 0).all()
    for _ in range(20):
        shorter = admissible_noise(world, 1.0) * 0.99 * length
        assert (slack(world, ByHand(world).logits(shorter)) < 0).all()
    assert world.budget > float(length.max()) or bool((~finite).any())


# Of one kind each.


@SEED
def test_half_erased_keeps_the_group_and_gives_a_group_one_member(seed: int) -> None:
    world = half_erased(seed)
    target, group = answers_of(world), answers_of(world) // 2
    logits = ByHand(world).logits()[:, :6]
    for one in range(3):  # up to how far the gate is closed, prompts of a group have the same logits
        same = logits[group == one]
        apart = same - same[:, :1]
        assert_close(apart, apart[:1].expand_as(apart), atol=1e-5, rtol=0)
    assert world.shared is not None
    assert world.shared_rows is not None
    opened = given(world, world.shared.double().expand_as(zeros(world)))
    assert torch.equal(opened // 2, group)
    assert torch.equal(opened == target, world.shared_rows)
    assert int(world.shared_rows.sum()) == 12
    for _ in range(20):
        one = world.shared.double() + admissible_noise(world, 1.0)[:1]
        answer = ByHand(world).logits(one.expand_as(zeros(world)))[:, :6].argmax(dim=1)  # `none` aside
        assert all(len(set(answer[group == g].tolist())) == 1 for g in range(3))
        assert int((answer == target).sum()) <= 12


def test_half_erased_has_groups_of_any_size() -> None:
    world = half_erased(5, n_answers=9, members=3, n_prompts=27)
    assert world.shared_rows is not None
    assert int(world.shared_rows.sum()) == 9
    with pytest.raises(InputError, match="7 answers do not fill groups of 2"):
        half_erased(0, n_answers=7)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@SEED
def test_partly_erased_keeps_a_share_of_the_answers(share: float, seed: int) -> None:
    world = partly_erased(seed, share=share)
    survives, target = world.shared_rows, answers_of(world)
    assert survives is not None
    assert world.shared is not None
    assert int(survives.sum()) == 24 * share
    logits = ByHand(world).logits()[:, :6]
    erased, kept = logits[~survives], logits[survives]
    assert_close(erased, erased[:, :1].expand_as(erased), atol=1e-5, rtol=0)
    assert torch.equal(kept.argmax(dim=1), target[survives])
    wide = slack(world, ByHand(world).logits(5 * world.shared.double().expand_as(zeros(world))))
    assert_close(wide[~survives], torch.full_like(wide[~survives], -0.25), atol=1e-5, rtol=0)  # `none` is ahead
    assert (wide[survives] > 0.5).all()
    # What is written beside goes to one answer, whoever asks.
    (write,) = read_along(world, 2)
    both = 2 * world.shared.double() + 0.9 * write / write.norm().square()
    back = slack(world, ByHand(world).logits(both.expand_as(zeros(world)))) > 0
    assert torch.equal(back, survives | (target == 2))


@SEED
def test_some_routes_end_at_a_complete_bottleneck(seed: int) -> None:
    world = some_routes(seed)
    closed = torch.isinf(world.smallest_norm)  # type: ignore[arg-type]
    assert torch.equal(~closed, world.shared_rows)
    assert (world.content, world.never_erased) == (None, True)
    (opens,) = read_along(world, -2)
    for length in (1.0, 10.0, 1e3):
        wide = length * opens / opens.norm()
        assert (slack(world, ByHand(world).logits(wide.expand_as(zeros(world))))[closed] < -0.5).all()
        for _ in range(10):
            noise = admissible_noise(world, length) + wide
            assert (slack(world, ByHand(world).logits(noise))[closed] < 0).all()


def test_in_each_sort_every_answer_comes_up_as_often() -> None:
    for world in (partly_erased(1, share=0.5), some_routes(1, share=0.5, n_prompts=24)):
        assert world.shared_rows is not None
        for rows in (world.shared_rows, ~world.shared_rows):
            assert answers_of(world)[rows].bincount().tolist() == [2] * 6


def test_the_share_of_routes_is_drawn_or_given() -> None:
    shares = {float(some_routes(seed).shared_rows.double().mean()) for seed in range(12)}  # type: ignore[union-attr]
    assert shares == {0.25, 0.5, 0.75, 0.875}
    given = some_routes(0, share=0.6, n_prompts=10).shared_rows
    assert given is not None
    assert int(given.sum()) == 6
    for maker in (some_routes, partly_erased):
        with pytest.raises(InputError, match="which leaves one sort empty"):
            maker(0, share=0.999, n_prompts=10)


@SEED
def test_undone_and_route_opens_both_ways_and_stays_open_to_one(seed: int) -> None:
    world = undone_and_route(seed)
    assert world.shared is not None
    shared = world.shared.double()
    assert_close(without(plus(world), shared), shared, atol=1e-5, rtol=0)
    assert (slack(world, ByHand(world).logits(undo(world))) > 0).all()
    # Pythagoras: what C1+ takes from the gate's gradient is the part that undoes.
    leaf, by_hand = zeros(world).requires_grad_(True), ByHand(world)
    by_hand.logits(leaf)
    (u,) = torch.autograd.grad(by_hand.read[:, -1].sum(), leaf)
    under, beside = without(held(world), u), without(plus(world), u)
    apart = under.square().sum(dim=1) - beside.square().sum(dim=1)
    assert_close(apart, torch.full_like(apart, 1 / (4 * KAPPA**2)), rtol=1e-4, atol=0)
    assert world.smallest_norm is not None
    longer = world.smallest_norm.double() * under.norm(dim=1) / beside.norm(dim=1)
    way = beside / beside.norm(dim=1, keepdim=True) * longer[:, None]
    assert float(longer.max()) < world.budget
    assert (slack(world, ByHand(world).logits(1.001 * way)) > 0).all()
    assert (slack(world, ByHand(world).logits(0.999 * way)) < 0).all()


@pytest.mark.parametrize("variant", ["distractor", "prior"])
@SEED
def test_a_weak_predicate_is_met_with_nothing_known(variant: str, seed: int) -> None:
    world = weak_predicate(seed, variant=variant)
    target, other = world.examples.behavior.tokens.T  # type: ignore[union-attr]
    logits = ByHand(world).logits()[:, :6]
    # Leave out what is known of the other: what is left is the same for all prompts.
    blind = logits.clone()
    if variant == "distractor":
        blind[torch.arange(len(other)), other] = logits[torch.arange(len(other)), target]
    assert_close(blind, blind[:1].expand_as(blind), atol=1e-5, rtol=0)
    rates = []
    for _ in range(60):
        one = admissible_noise(world, world.budget)[:1].expand_as(logits.new_zeros(len(target), world.model.d_model))
        rates.append(float((slack(world, ByHand(world).logits(one)) > 0).double().mean()))
    if variant == "distractor":
        assert 0.2 < sum(rates) / len(rates) < 0.55
        assert world.shared is None
    else:
        assert max(rates) > 0.5
        assert world.shared is not None
    assert world.never_content


def test_what_is_drawn_comes_up() -> None:
    favorites = {frozenset(answers_of(world)[world.shared_rows].tolist()) for world in map(half_erased, range(6))}
    assert len(favorites) > 1
    assert {weak_predicate(seed).variant for seed in range(6)} == {"distractor", "prior"}
    assert {some_routes(seed).variant for seed in range(6)} == {"error", "features"}
    assert {undone_and_route(seed).variant for seed in range(6)} == {"error", "features"}
