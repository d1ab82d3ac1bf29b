"""Jacobian search: against dense linear algebra, closed forms of linear worlds, and a replay that knows none of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recover.defenses.clamps import Clamp, Defense, Mode, Scale, Set
from recover.defenses.defended import Defended, defend
from recover.evidence.certificate import certify
from recover.models.host import Model
from recover.numerics.metrics import norm
from recover.planted.layers import two_layers
from recover.saes.sae import from_sae_lens
from recover.search.ascent import Schedule, find_perturbation
from recover.search.constraints.first_order import admissible
from recover.search.constraints.linear import EncoderOrthogonal
from recover.search.constraints.monitor import Jacobian, Monitor, RowSpace, Watched, jacobian_row_space
from recover.search.restored import find_linearized, find_restored, restore
from recover.tasks.behaviors import AnswerLikelihood, LogitDifference
from recover.types import InputError, Site, Surface
from tests.by_hand import Edits, clamped, defense_of, sae_lens_sae
from tests.models import D_MODEL, left_padded, plain_forward, plain_lm, tiny_lm, token_rows
from tests.pinned_world import PinnedWorld, pinned_layers
from tests.test_admissible import SHEAR, linear_world

BEHAVIOR = LogitDifference(torch.tensor([3, 9, 27, 40]), torch.tensor([5, 1, 30, 2]))
FEATURES = ((2, 7, 3), (11, 19, 4), (5, 1, 8))
LIVE = (Scale(3.0), Scale(2.0), Scale(-1.5))


def live(n_sites: int, modes: tuple[Mode, ...] = LIVE, dtype: torch.dtype = torch.float32) -> Defense:
    sae = from_sae_lens(sae_lens_sae("standard"), dtype=dtype)
    return Defense(
        tuple(Clamp(sae, FEATURES[m], modes[m], True, "all", Site(m + 1)) for m in range(n_sites)), skip_first=0
    )


def tiny(n_sites: int = 3, *, family: str = "llama", n_pos: int = 3, rank: int = 12) -> Defended:
    """A defense over several layers, and the token that comes `rank`-th at base as what should be brought back."""
    model, prompts = Model(tiny_lm(family, scale=8.0)), left_padded(token_rows())
    with torch.no_grad():
        target = model.run(prompts).logits.topk(rank + 1).indices[:, rank]
    return defend(model, live(n_sites), prompts, AnswerLikelihood(target), n_pos=n_pos)


def wide(modes: tuple[Mode, ...] = LIVE) -> Defended:
    """In float64, where rounding is no excuse: a model that computes nothing in float32."""
    prompts = left_padded(token_rows((6, 6, 6, 6)))
    later = Site(2, "post")
    clamps = tuple(
        Clamp(c.sae, c.features, c.mode, True, "all", site)
        for c, site in zip(live(3, modes, torch.float64).clamps, (Site(1), Site(2), later), strict=True)
    )
    return defend(Model(plain_lm().double()), Defense(clamps), prompts, BEHAVIOR, n_pos=3)


def at(monitor: Monitor, delta: Tensor, every: bool = True) -> tuple[Jacobian, Watched]:
    leaf = delta.requires_grad_(True)
    watched = monitor.watch(leaf)
    held = torch.ones_like(watched.pre, dtype=torch.bool) if every else monitor.kept(watched)
    return Jacobian.at(monitor, leaf, watched, held), watched


def normal(like: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# What is watched


def test_what_is_watched_is_what_hooks_on_the_plain_module_see_after_the_clamps() -> None:
    """And `J v`, `J^T w` and the table are of the Jacobian of that."""
    sae, modes = sae_lens_sae("standard"), (Scale(3.0), Set(1.5), Scale(-1.5))
    edits: Edits = {Site(m + 1): [(sae, FEATURES[m], modes[m], True, "all")] for m in range(3)}
    module, rows, n_pos = tiny_lm("gemma3"), token_rows(), 2
    defended = defend(Model(module), defense_of(edits), left_padded(rows), BEHAVIOR, n_pos=n_pos)
    monitor = Monitor.of(defended)
    delta = 0.3 * monitor.first.project(normal(defended.zero_delta).float())
    jacobian, watched = at(monitor, delta)
    v, w = normal(delta, 1), normal(watched.pre, 2)
    for row, ids in enumerate(rows):

        def read(push: Tensor, ids: Tensor = ids) -> Tensor:
            seen: dict[Site, Tensor] = {}

            def change(site: Site) -> Any:
                def edit(h: Tensor) -> Tensor:
                    extra = torch.cat([torch.zeros(len(h) - n_pos, D_MODEL), push]) if site == Site(1) else 0
                    seen[site] = clamped(h, edits[site]) + extra
                    return seen[site]

                return edit

            plain_forward(module, ids, {site: change(site) for site in edits})
            b = sae.b_enc - sae.b_dec @ sae.W_enc
            return torch.cat([(seen[Site(m + 1)][-n_pos:] @ sae.W_enc + b)[:, FEATURES[m]].flatten() for m in range(3)])

        pre = read(delta[row].detach())
        assert_close(watched.pre[row], pre, rtol=1e-4, atol=1e-4 * float(pre.abs().max()))
        assert_close(watched.features[row], pre.relu(), rtol=1e-4, atol=1e-4 * float(pre.abs().max()))
        whole = torch.autograd.functional.jacobian(read, delta[row].detach())  # type: ignore[no-untyped-call]
        of = (
            whole[6:].double()
            / sae.W_enc.norm(dim=0)[[f for m in (1, 2) for _ in range(2) for f in FEATURES[m]]][:, None, None].double()
        )
        of = monitor.first.null_space.project(of)
        limit = {"rtol": 1e-3, "atol": 5e-4 * float(of.abs().max())}
        assert_close(jacobian.table()[row], of.flatten(1), **limit)
        assert_close(jacobian.push(v)[row, 6:], torch.einsum("rpd,pd->r", of, v[row]), **limit)
        assert_close(jacobian.pull(w)[row], torch.einsum("rpd,r->pd", of, w[row, 6:]), **limit)
        assert jacobian.push(v)[row, :6].count_nonzero() == 0


def test_drift_is_that_of_the_certificate() -> None:
    defended = tiny()
    monitor, delta = Monitor.of(defended), 0.5 * normal(defended.zero_delta).float()
    facts = certify(defended.suffix.model, defended.defense, left_padded(token_rows()), defended.behavior, delta)
    assert_close(monitor.drift(monitor.watch(delta)), facts.relative_drift, rtol=1e-3, atol=1e-6)
    assert float(facts.relative_drift.min()) > 0.01


# The row space


@pytest.mark.parametrize("dense", [True, False])
def test_projection_and_way_back_are_those_of_the_pseudo_inverse(dense: bool) -> None:
    """Several positions and sites, `P = I - J^+ J` of C1 and all later rows together, to 1e-8 in float64."""
    defended = wide()
    monitor = Monitor.of(defended)
    jacobian, watched = at(monitor, 0.2 * normal(defended.zero_delta))
    space: RowSpace = jacobian_row_space(jacobian, dense=dense, tolerance=1e-11)
    table = jacobian.table()
    assert table.shape[1] == 18
    assert int(torch.linalg.matrix_rank(table).min()) == 18
    A = monitor.first.directions.T
    c1 = torch.block_diag(A, A, A).expand(4, -1, -1)
    both = torch.cat([c1, table], dim=1)
    v, r = normal(defended.zero_delta, 3), normal(watched.pre, 4)
    free = v.flatten(1) - (torch.linalg.pinv(both) @ (both @ v.flatten(1)[..., None]))[..., 0]
    assert_close(space.project(v).flatten(1), free, rtol=0, atol=1e-8)
    back = torch.linalg.pinv(table) @ r[:, 9:, None]
    assert_close(space.solve(r).flatten(1), back[..., 0], rtol=1e-7, atol=1e-7)
    # Idempotent, symmetric, and blind to what is held.
    assert_close(space.project(space.project(v)), space.project(v), rtol=0, atol=1e-8)
    other = normal(defended.zero_delta, 5)
    assert_close((other * space.project(v)).sum(dim=(1, 2)), (space.project(other) * v).sum(dim=(1, 2)))
    assert float(jacobian.push(space.project(v)).abs().max()) < 1e-8


def test_in_float32_the_stated_tolerance_is_kept() -> None:
    defended = tiny(family="gpt2")
    monitor = Monitor.of(defended)
    jacobian, _ = at(monitor, 0.2 * normal(defended.zero_delta).float())
    gain = torch.linalg.matrix_norm(jacobian.table(), ord=2)
    v = normal(defended.zero_delta, 3)
    for dense in (True, False):
        free = jacobian_row_space(jacobian, dense=dense).project(v)
        assert bool((norm(jacobian.push(free)) <= 2e-5 * gain * norm(free)).all())
        assert float((norm(free) / norm(v)).min()) > 0.1


def test_rows_that_are_not_held_take_no_room() -> None:
    """Inactive features below their threshold: they are neither projected out nor moved back."""
    defended = wide()
    monitor = Monitor.of(defended)
    jacobian, watched = at(monitor, torch.zeros_like(normal(defended.zero_delta)), every=False)
    active = (monitor.reference.features != 0)[:, 9:]
    assert 0 < int(active.sum()) < active.numel()
    table = torch.zeros_like(active, dtype=torch.float64)
    table[:, jacobian.rows - 9] = jacobian.table().norm(dim=2)
    assert torch.equal(table > 0, active)
    assert monitor.moved(watched).abs().max() < 1e-9


def test_one_site_is_c1() -> None:
    defended = defend(Model(tiny_lm()), live(1), left_padded(token_rows()), BEHAVIOR, n_pos=2)
    monitor, v = Monitor.of(defended), normal(defended.zero_delta).float()
    jacobian, _ = at(monitor, torch.zeros_like(v))
    expected = EncoderOrthogonal.of(*defended.defense.clamps).project(v)
    assert_close(jacobian_row_space(jacobian).project(v), expected)
    few = Schedule(goal=1e6, steps=3, restarts=0)
    found = find_restored(defended, 5.0, few)
    plain = find_perturbation(defended, defended.zero_delta, EncoderOrthogonal.of(*defended.defense.clamps), 5.0, few)
    assert_close(found.slack, plain.slack, rtol=1e-3, atol=1e-3)


# Restoration


def test_between_linear_blocks_one_step_restores() -> None:
    """Feature 1 of site 2 reads (0, 1, 2, 0): of (0, 2, 2, 1) it has 6, taken back by 6/5 of (0, 1, 2, 0)."""
    defended = linear_world(SHEAR, clamps=((1, 0, Set(0.0)), (2, 1, Scale(2.0))))
    monitor = Monitor.of(defended)
    delta = torch.tensor([0.0, 2.0, 2.0, 1.0]).expand(2, 1, 4)
    back = restore(monitor, delta)
    assert back.steps == 1
    assert_close(back.delta, torch.tensor([0.0, 0.8, -0.4, 1.0]).expand(2, 1, 4))
    assert bool(back.converged.all())
    assert float(back.drift.max()) < 1e-5
    none = restore(monitor, delta, steps=0)
    assert not bool(none.converged.any())
    assert torch.equal(none.delta, delta)
    # Doubled by the clamp, it has moved by 2 x 6 of 2 x (7 + 2 x 2), as the first clamp took 2 off axis 1.
    assert_close(none.drift, torch.full((2,), 12 / 22))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_delta_in_a_curved_model_is_restored_within_c1(family: str, dense: bool) -> None:
    defended = tiny(family=family)
    monitor = Monitor.of(defended)
    length = 0.1 * norm(defended.suffix.residual)
    delta = admissible(defended).project(normal(defended.zero_delta).float())
    delta = delta * (length / norm(delta))[:, None, None]
    assert float(monitor.drift(monitor.watch(delta)).max()) > 2e-3
    back = restore(monitor, delta, dense=dense)
    assert bool(back.converged.all())
    facts = certify(defended.suffix.model, defended.defense, left_padded(token_rows()), defended.behavior, back.delta)
    assert float(facts.relative_drift.max()) <= 1.1e-3
    assert float(facts.constraint_residual.max()) < 1e-6
    assert bool((norm(back.delta - delta) < 0.5 * norm(delta)).all())


def test_what_cannot_be_restored_is_said_to_be_so() -> None:
    defended = tiny()
    monitor = Monitor.of(defended)
    far = restore(monitor, 300 * monitor.first.project(normal(defended.zero_delta).float()), steps=2)
    assert not bool(far.converged.all())
    assert torch.equal(far.converged, far.drift <= 1e-3)
    assert_close(monitor.drift(monitor.watch(far.delta)).detach(), far.drift, rtol=1e-3, atol=1e-4)


# Search


def readout(world: PinnedWorld) -> Tensor:
    """The gradient of the score in delta at the first site, `[batch d_model]`, within what no feature sees."""
    blocks = [block.J.double() for block in world.model.module.blocks]  # type: ignore[union-attr]
    through, rows = torch.eye(len(blocks[0])).double(), []
    for m, clamp in enumerate(world.defense.clamps):
        A, D = clamp.encoder.double(), clamp.decoder.double()
        if m:
            C = torch.eye(len(A)).double() + (clamp.mode.factor - 1) * D.T @ A.T  # type: ignore[union-attr]
            through = C @ blocks[m] @ through
        rows.append(A.T @ through)
    V = world.model.module.head.weight.double()  # type: ignore[union-attr,operator]
    c = (V[world.behavior.target] - V[world.behavior.other]) @ blocks[-1] @ through
    held = torch.linalg.qr(torch.cat(rows).T).Q
    return c - c @ held @ held.T


@pytest.mark.parametrize(
    ("seed", "n_sites", "c1", "dense"),
    [(0, 2, True, True), (1, 3, True, False), (2, 2, False, False), (3, 3, False, True)],
)
def test_linear_worlds_are_solved_to_closed_form(seed: int, n_sites: int, c1: bool, dense: bool) -> None:
    """At any budget the best slack is `budget ||P c|| - gap`, with all features of all sites in the place of C1."""
    world = pinned_layers(seed, n_sites=n_sites)
    defended = defend(world.model, world.defense, world.prompts, world.behavior)
    steep, gap = readout(world).norm(dim=1).float(), -world.behavior.slack(defended.defended_logits)
    smallest = gap / steep
    budget = float(smallest.median())
    found = find_restored(defended, budget, Schedule(goal=1e6, steps=30), c1=c1, dense=dense)
    assert_close(found.slack, budget * steep - gap, rtol=1e-3, atol=1e-3 * float(gap.max()))
    assert float(found.drift.max()) < 1e-5
    assert bool((norm(found.delta) <= budget).all())
    facts = certify(world.model, world.defense, world.prompts, world.behavior, found.delta)
    assert bool(facts.held.all())
    assert_close(facts.slack, found.slack, rtol=1e-3, atol=1e-3)
    # A hundredth below the smallest norm of all nothing is found, a hundredth above the largest everything.
    none = find_restored(defended, 0.99 * float(smallest.min()), c1=c1)
    assert not bool(none.recovered.any())
    whole = find_restored(defended, 1.01 * float(smallest.max()), Schedule(goal=1e-4), c1=c1)
    assert bool(whole.recovered.all())


@pytest.mark.parametrize("seed", range(4))
def test_two_planted_layers_are_recovered_within_their_budget(seed: int) -> None:
    world = two_layers(seed)
    prompts, behavior = world.examples.prompts, world.examples.behavior
    defended = defend(world.model, world.defense, prompts, behavior)
    found = find_restored(defended, world.budget)
    facts = certify(world.model, world.defense, prompts, behavior, found.delta)
    assert bool(facts.shows.all())
    assert float(facts.drift.max()) < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_with_one_jacobian_two_planted_layers_are_recovered_too(seed: int) -> None:
    """Between linear blocks the Jacobian at no delta is that of every delta."""
    world = two_layers(seed)
    prompts, behavior = world.examples.prompts, world.examples.behavior
    defended = defend(world.model, world.defense, prompts, behavior)
    found = find_linearized(defended, world.budget)
    facts = certify(world.model, world.defense, prompts, behavior, found.delta)
    assert bool(facts.shows.all())
    assert float(facts.drift.max()) < 1e-4
    assert bool((facts.norm <= world.budget).all())


@pytest.mark.parametrize("search", [find_restored, find_linearized])
def test_in_a_curved_model_a_certificate_confirms_what_is_found(search: Any) -> None:
    """Live clamps that scale, three sites and positions, replayed in whole passes that know of no search.

    How much is found hangs on where an ascent in a curved model leads, and so on rounding: linear worlds decide that.
    """
    defended, budget = tiny(3, rank=6), 1.5
    allowed = 1e-3 if search is find_restored else 1e-2
    found = search(defended, budget, Schedule(steps=20, restarts=1))
    facts = certify(defended.suffix.model, defended.defense, left_padded(token_rows()), defended.behavior, found.delta)
    assert_close(facts.slack, found.slack, rtol=1e-3, atol=1e-3)
    assert bool((found.slack >= defended.behavior.slack(defended.defended_logits) - 1e-3).all())
    assert bool((facts.relative_drift <= 1.1 * allowed).all())
    assert_close(found.drift, facts.relative_drift, rtol=0.1, atol=2e-5)
    assert bool((facts.norm <= budget).all())
    assert float(facts.constraint_residual.max()) < 1e-6


def test_one_jacobian_too_finds_nothing_where_nothing_is() -> None:
    hopeless = find_linearized(tiny(2, rank=6), 1e-6, Schedule(steps=3))
    assert not bool(hopeless.recovered.any())
    assert bool((hopeless.drift <= 1e-2).all())


def test_an_inactive_feature_is_free_up_to_its_threshold() -> None:
    """Site 2 reads -2 of axis 1 (a bias of -9 to its 7), and the score is axis 1: it may rise by 2 and no further."""
    defended = linear_world(torch.eye(4), clamps=((1, 0, Set(0.0)), (2, 1, Scale(2.0)), (2, 2, Scale(2.0))))
    later = defended.defense.clamps[1:]
    sae = replace(later[0].sae, b_enc=torch.tensor([0.0, -9.0, 0.0, 0.0]))
    clamps = (defended.defense.clamps[0], Clamp(sae, (1, 2), Scale(2.0)))
    model = defended.suffix.model
    with torch.no_grad():
        model.module.head.weight[0, 1] = 1.0  # type: ignore[union-attr,operator]
    behavior = LogitDifference(torch.tensor([0, 0]), torch.tensor([1, 2]))
    defended = defend(model, Defense(clamps), defended.suffix.prompts, behavior)
    start = behavior.slack(defended.defended_logits)
    found = find_restored(defended, 50.0, Schedule(goal=1e6))
    gained = found.slack - start
    assert float(gained.max()) <= 2.0
    assert float(gained.min()) > 0.75 * 2.0
    assert found.drift.count_nonzero() == 0


def test_examples_do_not_see_each_other() -> None:
    """In few steps, so that a rounding stays one however the model curves."""
    defended, rows = tiny(2), torch.tensor([3, 1])
    few = Schedule(goal=1e6, steps=3, restarts=0)
    together, some = (find_restored(one, 4.0, few) for one in (defended, defended.select(rows)))
    assert_close(some.slack, together.slack[rows], atol=1e-3, rtol=1e-3)


def test_an_impossible_search_gives_the_start_back() -> None:
    """A budget that reaches nothing: slack as defended, no drift."""
    defended = tiny()
    found = find_restored(defended, 1e-6, Schedule(steps=3))
    assert_close(found.slack, defended.behavior.slack(defended.defended_logits), atol=1e-3, rtol=1e-3)
    assert not bool(found.recovered.any())


def test_what_it_cannot_do_is_refused() -> None:
    model, prompts, defense = Model(tiny_lm()), left_padded(token_rows()), live(2)
    with pytest.raises(InputError, match="first clamped site alone"):
        Monitor.of(defend(model, defense, prompts, BEHAVIOR, surface=Surface("every")))
    with pytest.raises(InputError, match="after the clamp"):
        find_restored(defend(model, defense, prompts, BEHAVIOR, surface=Surface(placement="before_clamp")), 1.0)
    with pytest.raises(InputError, match="budget"):
        find_restored(defend(model, defense, prompts, BEHAVIOR), 0.0)
