"""Controls: placebo targets, the clamp undone, and a search with the clamp off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recover.defenses.defended import Defended, defend
from recover.evidence.controls import Anywhere, Undefended, cosine, displacement, placebo_targets, undone
from recover.planted import KINDS, Planted
from recover.search.ascent import find_perturbation
from recover.search.constraints.first_order import admissible
from recover.tasks.behaviors import ChoiceMargin, LogitDifference


def defended(world: Planted) -> Defended:
    return defend(world.model, world.defense, world.examples.prompts, world.examples.behavior)


@pytest.mark.parametrize("kind", ["write_only", "error_bypass"])
def test_placebo_targets_are_other_targets_that_do_not_show(kind: str) -> None:
    world = KINDS[kind](0)
    target = defended(world)
    behavior = world.examples.behavior
    assert isinstance(behavior, LogitDifference | ChoiceMargin)
    known = behavior.target.tolist()
    drawn = placebo_targets(target, world.examples.ids, known, seed=0)
    assert drawn is not None
    tokens, there = drawn
    assert bool(there.any())
    logits = target.suffix.logits(target.suffix.residual)
    for row in there.nonzero().flatten().tolist():
        token = int(tokens[row])
        assert token in known
        assert token != behavior.target[row]
        if isinstance(behavior, LogitDifference):
            assert token != behavior.other[row]
            assert logits[row, token] <= logits[row, int(behavior.other[row])]


def test_a_placebo_depends_on_the_example_and_the_seed_alone() -> None:
    world = KINDS["write_only"](1)
    target, ids = defended(world), world.examples.ids
    known = [0, 1, 2, 3, 4, 5]
    whole = placebo_targets(target, ids, known, seed=0)
    rows = torch.tensor([7, 2, 11])
    part = placebo_targets(target.select(rows), [ids[row] for row in rows.tolist()], known, seed=0)
    other = placebo_targets(target, ids, known, seed=1)
    assert whole is not None
    assert part is not None
    assert other is not None
    assert torch.equal(part[0], whole[0][rows])
    assert not torch.equal(other[0], whole[0])


def test_no_placebo_where_every_target_is_the_same() -> None:
    world = KINDS["degenerate_geometry"](4, variant="one")
    drawn = placebo_targets(defended(world), world.examples.ids, [0], seed=0)
    assert drawn is not None
    assert not bool(drawn[1].any())


def test_undoing_all_of_the_clamp_brings_back_what_only_undoing_can() -> None:
    world = KINDS["undone_clamp"](0)
    target = defended(world)
    space, moved = admissible(target), displacement(target)
    back = undone(moved, space, 1.0)
    # The clamp wrote KAPPA phi_k along what no encoder sees; taking that back restores the gate of every example.
    assert bool((target(back)[1] > 0).all())
    assert not bool((target(undone(moved, space, 0.25))[1] > 0).any())
    plus = admissible(target, write_orthogonal=True)
    assert float(undone(moved, plus, 1.0).abs().max()) <= 1e-5


def test_displacement_is_what_the_clamp_wrote() -> None:
    world = KINDS["shared_route"](3)
    target = defended(world)
    (clamp,) = world.defense.clamps
    last = target.base[:, -1:]
    torch.testing.assert_close(displacement(target), clamp.apply(last) - last, atol=1e-5, rtol=1e-5)


def test_with_the_clamp_off_zero_is_a_way_back() -> None:
    world = KINDS["shared_route"](0)
    target = defended(world)
    off, start = Undefended.of(target), displacement(target)
    _, slack = off(torch.zeros_like(start))
    base = world.examples.behavior.slack(target.base_logits)
    torch.testing.assert_close(slack, base, atol=1e-4, rtol=1e-4)
    # From where the clamp put the state the behavior is gone, and a search comes back.
    assert bool((off(start)[1] <= 0).all())
    found = find_perturbation(off, start, Anywhere(), float(start.flatten(1).norm(dim=1).max()) * 1.001)
    assert bool((found.slack > 0).all())
    some = off.select(torch.tensor([3, 5]))
    torch.testing.assert_close(some(start[[3, 5]])[0], off(start)[0][[3, 5]], atol=1e-5, rtol=1e-5)


def test_cosine_by_hand() -> None:
    one = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    other = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(cosine(one, other), torch.tensor([0.6, 0.0]))


def test_retargeting_keeps_every_token_once() -> None:
    behavior = ChoiceMargin(torch.tensor([5, 5]), torch.tensor([[1, 2, 3], [1, 2, 3]]))
    turned = behavior.retarget(torch.tensor([2, 9]))
    assert turned.target.tolist() == [2, 9]
    # The old target takes the new one's place; where the new one was no choice, the last one's.
    assert turned.others.tolist() == [[1, 5, 3], [1, 2, 5]]
    assert behavior.retarget(behavior.target).others.tolist() == behavior.others.tolist()
    pair = LogitDifference(torch.tensor([1, 1]), torch.tensor([2, 2])).retarget(torch.tensor([3, 2]))
    assert (pair.target.tolist(), pair.other.tolist()) == ([3, 2], [2, 1])
    assert replace(pair, target=torch.tensor([4, 4])).rivals.tolist() == [[2], [1]]
