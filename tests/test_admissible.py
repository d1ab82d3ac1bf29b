"""The admissible space: by hand, in planted worlds, and against the Jacobian of hooks on the plain module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from recover.defenses.clamps import Clamp, Defense, Floor, Mode, Scale, Set
from recover.defenses.defended import Defended, defend
from recover.evidence.certificate import certify
from recover.models.host import Model, Prompts
from recover.numerics.subspaces import NullSpace
from recover.planted.layers import two_layers
from recover.planted.network import Linear, Network
from recover.saes.activations import ReLU
from recover.saes.sae import SAE
from recover.search.ascent import find_perturbation
from recover.search.constraints.first_order import JacobianOrthogonal, admissible, jacobian
from recover.search.constraints.linear import EncoderOrthogonal
from recover.search.gradient_free import reexamined
from recover.search.minimum import smallest_perturbation
from recover.tasks.behaviors import LogitDifference
from recover.types import Placement, Site, Surface
from tests.by_hand import Edits, clamped, defense_of, sae_lens_sae
from tests.models import D_MODEL, left_padded, plain_forward, plain_lm, tiny_lm, token_rows

BEHAVIOR = LogitDifference(torch.tensor([3, 9, 27, 40]), torch.tensor([5, 1, 30, 2]))
S = (2, 7, 11, 19)


def defended_worlds(world: Any) -> Defended:
    return defend(world.model, world.defense, world.examples.prompts, world.examples.behavior)


def projectors(space: JacobianOrthogonal, pos: int, d_model: int) -> Tensor:
    """`[batch pos*d_model pos*d_model]`, by projecting each axis."""
    axes = torch.eye(pos * d_model, dtype=torch.float64).reshape(-1, pos, d_model)
    batch = len(space.rows)
    return torch.stack([space.project(axis.expand(batch, -1, -1)).flatten(1) for axis in axes], dim=1)


# One site


@pytest.mark.parametrize("n_pos", [1, 2])
def test_at_one_site_it_is_c1(n_pos: int) -> None:
    sae = sae_lens_sae("standard")
    edits: Edits = {Site(1): [(sae, (2, 7), Set(-2.0), True, "all"), (sae, (11,), Scale(0.0), False, "last")]}
    defense = defense_of(edits)
    defended = defend(Model(tiny_lm()), defense, left_padded(token_rows()), BEHAVIOR, n_pos=n_pos)
    space = admissible(defended)
    assert isinstance(space, EncoderOrthogonal)
    assert torch.equal(space.directions, sae.W_enc[:, [2, 7, 11]])
    assert space.select(torch.tensor([1])) is space
    plus = admissible(defended, write_orthogonal=True)
    assert isinstance(plus, EncoderOrthogonal)
    assert torch.equal(plus.directions, torch.cat([sae.W_enc[:, [2, 7, 11]], sae.W_dec[[2, 7, 11]].T], dim=1))


# By hand


def axis_sae(site: Site) -> SAE:
    """Feature `i` reads dimension `i`, and writes it and the next one."""
    eye, zero = torch.eye(4), torch.zeros(4)
    return SAE(eye, zero, eye + eye.roll(1, dims=1), zero, ReLU(), site, "standard", "")


def linear_world(*maps: Tensor, clamps: tuple[tuple[int, int, Mode], ...]) -> Defended:
    """Blocks `h J^T`, the first of them the identity; `clamps` are (site, feature, mode). All features are active."""
    blocks = [Linear(torch.eye(4)), *(Linear(J) for J in maps), Linear(torch.eye(4))]
    tokens = torch.tensor([[0, 1], [1, 2]])
    embedding = torch.tensor([2.0, 9.0, 2.0, 2.0]).expand(3, 4)
    network = Network(embedding, blocks, torch.zeros(3, 4), torch.zeros(3)).eval().requires_grad_(False)
    prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    saes = {site: axis_sae(Site(site)) for site, *_ in clamps}
    defense = Defense(tuple(Clamp(saes[site], (feature,), mode) for site, feature, mode in clamps))
    return defend(Model(network), defense, prompts, LogitDifference(torch.tensor([0, 1]), torch.tensor([1, 2])))


SHEAR = torch.eye(4)
SHEAR[1, 2] = 2.0
"""`h_1 + 2 h_2` arrives in the place of `h_1`."""
LATER = torch.eye(4)
LATER[2, 1] = 1.0
DELTA = torch.tensor([5.0, 5.0, 5.0, 1.0]).expand(2, 1, 4)


def by_axis(*values: float) -> Tensor:
    return torch.tensor(values).expand(2, 1, 4)


@pytest.mark.parametrize("mode", [Scale(-1.0), Set(0.0), Set(-3.0), Floor(9.0)], ids=str)
def test_a_linear_case_by_hand(mode: Mode) -> None:
    """Feature 0 at site 1 holds `e0`; feature 1 at site 2 reads `(0, 1, 2, 0)` of delta, whatever its clamp writes.

    Of (5, 5) along axes 1 and 2, `(1, 2)` reads 15: taking off 15/5 times it leaves (2, -1).
    """
    defended = linear_world(SHEAR, clamps=((1, 0, Set(0.0)), (2, 1, mode)))
    assert_close(jacobian(defended), torch.tensor([0.0, 1.0, 2.0, 0.0]).expand(2, 1, 1, 4))
    space = admissible(defended)
    assert isinstance(space, JacobianOrthogonal)
    assert space.dimensions.tolist() == [2, 2]
    assert_close(space.project(DELTA), by_axis(0.0, 2.0, -1.0, 1.0))
    assert_close(space.violation(DELTA), torch.full((2,), (5.0**2 + 15.0**2) ** 0.5))
    assert space.violation(space.project(DELTA)).max() < 1e-6
    # C1+: feature 0 writes along axes 0 and 1; beside these, what the second site reads is axis 2.
    plus = admissible(defended, write_orthogonal=True)
    assert_close(plus.project(DELTA), by_axis(0.0, 0.0, 0.0, 1.0))


def test_a_third_site_is_seen_through_the_second() -> None:
    """At site 3 axis 2 has `h_2 + (h_1 + 2 h_2)` and what the clamp at site 2 adds, which is held with the rest."""
    clamps = ((1, 0, Set(0.0)), (2, 1, Scale(-1.0)), (3, 2, Set(7.0)))
    space = admissible(linear_world(SHEAR, LATER, clamps=clamps))
    assert_close(space.project(DELTA), by_axis(0.0, 0.0, 0.0, 1.0))
    # Without the clamp between, it is the row (0, 1, 3, 0): 20 of (5, 5), so that 20/10 times it is taken off.
    space = admissible(linear_world(SHEAR, LATER, clamps=(clamps[0], clamps[2])))
    assert_close(space.project(DELTA), by_axis(0.0, 3.0, -1.0, 1.0))


def test_a_clamp_between_is_live_in_what_is_read_above_it() -> None:
    """Doubled at site 2, feature 1 is added to axes 1 and 2 once more: at axis 2 of site 3 arrives `h_2 + h_1`."""
    clamps = ((1, 0, Set(0.0)), (2, 1, Scale(2.0)), (3, 2, Set(7.0)))
    rows = jacobian(linear_world(torch.eye(4), torch.eye(4), clamps=clamps))
    assert_close(rows[0, :, 0], torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]))


def test_what_a_block_takes_out_need_not_be_held() -> None:
    """A feature that no delta reaches has a row of zeros; one that a float32 rounding reaches counts as such."""
    for leak in (0.0, 1e-7):
        J = torch.eye(4)
        J[1, 1] = leak
        space = admissible(linear_world(J, clamps=((1, 0, Set(0.0)), (2, 1, Scale(0.0)), (2, 2, Scale(0.0)))))
        assert_close(space.project(DELTA), by_axis(0.0, 5.0, 0.0, 1.0))


# Spaces of given rows


def rows_and_first(seed: int, batch: int, k: int, pos: int = 2) -> tuple[EncoderOrthogonal, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = EncoderOrthogonal(torch.randn(6, 2, generator=generator))
    return first, torch.randn(batch, k, pos, 6, generator=generator)


def test_each_example_has_the_null_space_of_its_own_rows() -> None:
    """Against one null space of all columns, C1 at each position and the rows together; the ranks differ."""
    first, rows = rows_and_first(0, 4, 3)
    rows[1, 2] = rows[1, 0] * -3
    rows[2, 1:] = 0
    rows[3, :2] = torch.cat([first.directions.T, 0 * first.directions.T], dim=1).reshape(2, 2, 6)
    space = JacobianOrthogonal.of(first, rows, torch.ones(3))
    assert space.dimensions.tolist() == [8 - 3, 8 - 2, 8 - 1, 8 - 1]
    columns = torch.block_diag(first.directions, first.directions)
    for own, projector in zip(rows, projectors(space, 2, 6), strict=True):
        held = NullSpace.of(torch.cat([columns, own.reshape(3, 12).T], dim=1))
        assert_close(projector, held.project(torch.eye(12, dtype=torch.float64)), atol=1e-6, rtol=0)


def test_a_selection_projects_as_the_whole() -> None:
    first, rows = rows_and_first(1, 5, 3)
    space, delta = JacobianOrthogonal.of(first, rows, torch.ones(3)), torch.randn(5, 2, 6)
    some = torch.tensor([3, 0, 3])
    assert_close(space.select(some).project(delta[some]), space.project(delta)[some])
    assert_close(space.select(some).violation(delta[some]), space.violation(delta)[some])
    assert not torch.allclose(space.select(some).project(delta[:3]), space.project(delta)[:3])


def test_a_small_encoder_is_held_as_exactly_as_a_large_one() -> None:
    """What counts is what the blocks pass on, not how large the feature is."""
    first, rows = rows_and_first(2, 2, 2)
    scale = torch.tensor([1.0, 1e-7])
    space = JacobianOrthogonal.of(first, rows * scale[:, None, None], scale)
    assert space.dimensions.tolist() == [6, 6]
    delta = space.project(torch.randn(2, 2, 6))
    assert (torch.einsum("bpd,brpd->br", delta, rows).abs() < 1e-5).all()


def test_where_nothing_is_left_nothing_is_given() -> None:
    """Exactly: a rounding would be scaled up to the budget by a search. The others keep what they have."""
    first, rows = rows_and_first(3, 3, 10)
    rows[1] = 0
    space = JacobianOrthogonal.of(first, rows, torch.ones(10))
    projected = space.project(torch.randn(3, 2, 6))
    assert projected[[0, 2]].count_nonzero() == 0
    assert projected[1].norm() > 0.1


def test_little_that_is_left_is_precise() -> None:
    """A delta almost inside what is held: what remains of it is seen by nothing, relative to itself."""
    first, rows = rows_and_first(4, 2, 3)
    space = JacobianOrthogonal.of(first, rows, torch.ones(3))
    free = space.project(torch.randn(2, 2, 6, dtype=torch.float64))
    inside = torch.einsum("br,brpd->bpd", torch.randn(2, 3).double(), rows.double()) + first.directions[:, 0].double()
    delta = space.project(inside + 1e-6 * free)
    assert_close(delta, 1e-6 * free, atol=1e-13, rtol=1e-6)
    assert (space.violation(delta) < 1e-12 * delta.flatten(1).norm(dim=1)).all()


def test_a_row_that_is_not_finite_is_not_held() -> None:
    first, rows = rows_and_first(5, 2, 2)
    rows[1, 0, 0, 0] = torch.nan
    space = JacobianOrthogonal.of(first, rows, torch.ones(2))
    assert space.dimensions.tolist() == [6, 7]
    assert space.project(torch.randn(2, 2, 6)).isfinite().all()


# In a real model, against hooks


CASES: dict[str, tuple[str, int, Placement, int, Edits]] = {
    "one position": (
        "llama",
        1,
        "after_clamp",
        0,
        {
            Site(1): [(sae_lens_sae("standard"), S, Set(-2.0), True, "all")],
            Site(3): [(sae_lens_sae("standard", seed=1), (0, 5), Scale(-1.0), True, "all")],
        },
    ),
    "three positions, three sites": (
        "gemma3",
        3,
        "after_clamp",
        1,
        {
            Site(0): [(sae_lens_sae("standard"), S, Set(-2.0), True, "all")],
            Site(2): [
                (sae := sae_lens_sae("standard", seed=1), (0, 5), Set(1.0), False, "last"),
                (sae, (3,), Scale(2.0), True, "all"),
            ],
            Site(3, "post"): [(sae_lens_sae("standard", seed=2), (1, 4), Floor(1.5), False, "all")],
        },
    ),
    "before the clamp": (
        "gpt2",
        2,
        "before_clamp",
        0,
        {
            Site(1): [(sae_lens_sae("standard"), S, Scale(-2.0), True, "all")],
            Site(2): [(sae_lens_sae("standard", seed=1), (0, 5, 8), Set(-1.0), True, "all")],
        },
    ),
}


def entering_by_hand(
    module: nn.Module, ids: Tensor, push: Tensor, edits: Edits, placement: str, skip: int
) -> list[Tensor]:
    """Clamped pre-activations `[n_pos k]` entering each later site, one list entry an edit, by hooks alone."""
    first, seen = min(edits, key=lambda site: site.index), {}

    def change(site: Site) -> Any:
        def at(h: Tensor) -> Tensor:
            seen[site] = h
            extra = torch.cat([torch.zeros(len(h) - len(push), D_MODEL), push]) if site == first else 0
            if placement == "before_clamp":
                return clamped(h + extra, edits[site], skip)
            return clamped(h, edits[site], skip) + extra

        return at

    plain_forward(module, ids, {site: change(site) for site in edits})
    return [
        (seen[site][-len(push) :] @ sae.W_enc + sae.b_enc - sae.b_dec @ sae.W_enc)[:, list(chosen)]
        for site, here in edits.items()
        if site != first
        for sae, chosen, *_ in here
    ]


@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_jacobian_of_hooks_on_the_plain_module(name: str) -> None:
    family, n_pos, placement, skip, edits = CASES[name]
    module, rows = tiny_lm(family), token_rows()
    defense = defense_of(edits, skip_first=skip)
    defended = defend(
        Model(module), defense, left_padded(rows), BEHAVIOR, n_pos=n_pos, surface=Surface(placement=placement)
    )
    ours, nothing = jacobian(defended), torch.zeros(n_pos, D_MODEL)
    for ids, own in zip(rows, ours, strict=True):

        def read(push: Tensor, ids: Tensor = ids) -> Tensor:
            return torch.cat([pre.flatten() for pre in entering_by_hand(module, ids, push, edits, placement, skip)])

        expected = torch.autograd.functional.jacobian(read, nothing)  # type: ignore[no-untyped-call]
        assert_close(own, expected, atol=2e-4 * expected.abs().max().item(), rtol=1e-3)
        assert expected.flatten(1).norm(dim=1).min() > 0.1
    assert len(ours[0]) == n_pos * sum(len(edit[1]) for site in list(edits)[1:] for edit in edits[site])
    space = admissible(defended)
    projected = space.project(torch.randn(4, n_pos, D_MODEL))
    assert (space.violation(projected) < 1e-4 * ours.flatten(1).norm(dim=1) * projected.flatten(1).norm(dim=1)).all()
    apart = projectors(space, n_pos, D_MODEL)  # type: ignore[arg-type]
    assert (apart[0] - apart[1]).norm() > 0.1  # the spaces differ: each example has its own Jacobian


def test_in_a_curved_model_what_moves_is_of_second_order() -> None:
    """A tenth of an admissible delta moves a feature of the later site a hundredth as far; of another, a tenth."""
    family, n_pos, placement, skip, edits = CASES["one position"]
    module, rows = tiny_lm(family, scale=5.0), token_rows()
    defended = defend(Model(module), defense_of(edits), left_padded(rows), BEHAVIOR)
    noise = torch.randn(4, n_pos, D_MODEL, generator=torch.Generator().manual_seed(1))
    c1 = EncoderOrthogonal.of(*defended.defense.at(Site(1))).project(noise)
    for delta, order in ((admissible(defended).project(noise), 2), (c1, 1)):
        moves = []
        for size in (0.3, 0.03):
            scaled = size * delta / delta.norm(dim=2, keepdim=True)
            pair = [
                entering_by_hand(module, ids, push, edits, placement, skip)[0]
                for some in (scaled, 0 * scaled)
                for ids, push in zip(rows, some, strict=True)
            ]
            moves.append(torch.stack([(a - b).norm() for a, b in zip(pair[:4], pair[4:], strict=True)]))
        assert_close(torch.log10(moves[0] / moves[1]), torch.full((4,), float(order)), atol=0.35, rtol=0)


class Stubborn(torch.autograd.Function):
    """Twice the input; its backward branches on values, which no batched gradient can."""

    @staticmethod
    def forward(ctx, value):  # type: ignore[no-untyped-def]
        return 2 * value

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return 2 * gradient if gradient.abs().sum() >= 0 else gradient


class StubbornBlock(nn.Module):
    def __init__(self, block: nn.Module, stubborn: bool) -> None:
        super().__init__()
        self.block, self.stubborn = block, stubborn

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.block(hidden)
        return Stubborn.apply(hidden) if self.stubborn else 2 * hidden  # type: ignore[no-untyped-call]


def test_a_model_that_knows_no_batched_gradient_is_asked_row_by_row() -> None:
    edits: Edits = {
        Site(1): [(sae_lens_sae("standard"), S, Set(-2.0), False, "all")],
        Site(2): [(sae_lens_sae("standard", seed=1), (0, 5), Scale(-1.0), True, "all")],
    }
    rows = []
    for stubborn in (True, False):
        module = plain_lm()
        module.stack[1] = StubbornBlock(module.stack[1], stubborn)
        prompts = left_padded(token_rows((6, 6, 6, 6)))
        rows.append(jacobian(defend(Model(module), defense_of(edits), prompts, BEHAVIOR, n_pos=2)))
    assert_close(*rows)
    assert rows[0].abs().max() > 0.1


def test_many_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    family, n_pos, placement, skip, edits = CASES["three positions, three sites"]
    defense = defense_of(edits, skip_first=skip)
    defended = defend(
        Model(tiny_lm(family)),
        defense,
        left_padded(token_rows()),
        BEHAVIOR,
        n_pos=n_pos,
        surface=Surface(placement=placement),
    )
    whole = jacobian(defended)
    monkeypatch.setattr("recover.search.constraints.first_order.ELEMENTS_AT_ONCE", 4 * 4 * 3 * D_MODEL)
    assert_close(jacobian(defended), whole)


def test_the_space_of_some_examples_is_theirs_in_the_whole_batch() -> None:
    _, n_pos, _, _, edits = CASES["one position"]
    defended = defend(Model(tiny_lm()), defense_of(edits), left_padded(token_rows()), BEHAVIOR, n_pos=n_pos)
    some = torch.tensor([2, 0])
    delta = torch.randn(2, n_pos, D_MODEL)
    assert_close(
        admissible(defended).select(some).project(delta),
        admissible(defended.select(some)).project(delta),
        atol=1e-4,
        rtol=1e-4,
    )


# Planted worlds of two layers


@pytest.mark.parametrize("seed", range(8))
def test_the_space_of_two_planted_layers_is_the_one_of_their_construction(seed: int) -> None:
    world = two_layers(seed)
    space = admissible(defended_worlds(world))
    assert isinstance(space, JacobianOrthogonal)
    assert set(space.dimensions.tolist()) == {world.admissible.dimension}
    known = world.admissible.project(torch.eye(world.model.d_model, dtype=torch.float64))
    assert_close(projectors(space, 1, world.model.d_model), known.expand(10, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(8))
def test_two_planted_layers_are_recovered_with_every_feature_held(seed: int) -> None:
    world = two_layers(seed)
    prompts, behavior = world.examples.prompts, world.examples.behavior
    defended = defended_worlds(world)
    space = admissible(defended)
    found = find_perturbation(defended, defended.zero_delta, space, world.budget)
    found = reexamined(defended, found, space, world.budget)
    facts = certify(world.model, world.defense, prompts, behavior, found.delta)
    assert facts.shows.all()
    assert facts.held.all()
    smallest = smallest_perturbation(defended, defended.zero_delta, space)
    assert world.smallest_norm is not None
    assert_close(smallest.norm, world.smallest_norm, rtol=0.01, atol=0)
    assert certify(world.model, world.defense, prompts, behavior, smallest.delta).held.all()


@pytest.mark.parametrize("seed", range(3))
def test_c1_at_the_first_of_two_layers_alone_is_caught_by_the_certificate(seed: int) -> None:
    world = two_layers(seed)
    defended = defended_worlds(world)
    first = EncoderOrthogonal.of(*world.defense.at(world.defense.sites[0]))
    found = find_perturbation(defended, defended.zero_delta, first, world.budget)
    facts = certify(world.model, world.defense, world.examples.prompts, world.examples.behavior, found.delta)
    assert (facts.constraint_residual < 1e-6).all()
    assert not facts.held.any()
