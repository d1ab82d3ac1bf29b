"""Shared deltas, on landscapes whose best shared delta is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recover.defenses.defended import defend
from recover.evidence.transfer import FitSchedule, Pool, Problem, derangement, fit_shared, halves, random_shared
from recover.planted import KINDS, Planted
from recover.search.constraints.first_order import admissible
from recover.search.constraints.linear import EncoderOrthogonal
from recover.search.constraints.pinned import Pinned
from recover.types import InputError, Surface

NAMES = [f"e{i}" for i in range(24)]


def pool_of(world: Planted) -> Pool:
    return Pool((defend(world.model, world.defense, world.examples.prompts, world.examples.behavior),))


@pytest.fixture(scope="module")
def route() -> tuple[Planted, Pool, EncoderOrthogonal]:
    world = KINDS["shared_route"](0)
    pool = pool_of(world)
    space = admissible(pool.parts[0])
    assert isinstance(space, EncoderOrthogonal)
    return world, pool, space


def test_the_known_shared_delta_is_found_and_reads_on_the_other_half(
    route: tuple[Planted, Pool, EncoderOrthogonal],
) -> None:
    world, pool, space = route
    assert world.shared is not None
    fitted, read = (pool.select(rows) for rows in halves(world.examples.ids, seed=0))
    (delta,) = fit_shared(fitted, [Problem(space, world.budget)])
    assert bool((read.slack(delta[None]) > 0).all())
    # The closed form: only the part along the route opens the gate, and it must be as long as the longest needs.
    along = float((delta.flatten() * world.shared.flatten()).sum() / world.shared.norm())
    assert world.smallest_norm is not None
    assert along >= 0.99 * float(world.smallest_norm.max())
    assert float(delta.norm()) <= world.budget
    assert float(space.violation(delta[None]).max()) <= 1e-5


def test_a_problem_does_not_depend_on_which_others_there_are(route: tuple[Planted, Pool, EncoderOrthogonal]) -> None:
    world, pool, space = route
    plus = admissible(pool.parts[0], write_orthogonal=True)
    problems = [Problem(space, world.budget), Problem(plus, world.budget), Problem(space, 0.5 * world.budget)]
    schedule = FitSchedule(steps=10)
    together = fit_shared(pool, problems, schedule)
    for at, problem in enumerate(problems):
        torch.testing.assert_close(fit_shared(pool, [problem], schedule)[0], together[at], atol=1e-4, rtol=1e-4)
    assert float(torch.stack([plus.violation(d[None]) for d in together[1:2]]).max()) <= 1e-5


def test_batches_are_one_pool(route: tuple[Planted, Pool, EncoderOrthogonal]) -> None:
    _, pool, space = route
    one, two = pool.select(torch.arange(10)), pool.select(torch.arange(10, 24))
    split = Pool((one.parts[0], two.parts[0]))
    deltas = random_shared(space, 2.0, 3, pool.shape, torch.device("cpu"), seed=1)
    torch.testing.assert_close(split.slack(deltas), pool.slack(deltas))
    rows = torch.tensor([3, 9, 10, 20])
    torch.testing.assert_close(split.select(rows).slack(deltas), pool.slack(deltas)[:, rows])
    assert torch.equal(split.select(rows).targets, pool.targets[rows])  # type: ignore[index]
    assert split.residual_norm == pytest.approx(pool.residual_norm)


def test_slack_asked_of_other_targets_is_theirs(route: tuple[Planted, Pool, EncoderOrthogonal]) -> None:
    _, pool, space = route
    delta = random_shared(space, 2.0, 1, pool.shape, torch.device("cpu"), seed=1)
    own = pool.targets
    assert own is not None
    other = (own + 1) % 6
    # By hand: the logit of the other answer minus the largest of all the rest.
    part = pool.parts[0]
    logits = part.suffix.logits(part.suffix.residual + delta)[:, :7]
    rest = logits.clone().scatter(1, other[:, None], -torch.inf).amax(dim=1)
    by_hand = logits.gather(1, other[:, None])[:, 0] - rest
    torch.testing.assert_close(pool.slack(delta, other)[0], by_hand, atol=1e-5, rtol=1e-5)


def test_random_directions_are_admissible_and_of_the_norm(route: tuple[Planted, Pool, EncoderOrthogonal]) -> None:
    _, pool, space = route
    drawn = random_shared(space, 3.0, 50, pool.shape, torch.device("cpu"), seed=0)
    torch.testing.assert_close(drawn.flatten(1).norm(dim=1), torch.full((50,), 3.0), rtol=1e-5, atol=0)
    assert float(space.violation(drawn).max()) <= 1e-5
    assert torch.equal(drawn, random_shared(space, 3.0, 50, pool.shape, torch.device("cpu"), seed=0))
    assert not torch.equal(drawn, random_shared(space, 3.0, 50, pool.shape, torch.device("cpu"), seed=1))


def test_halves_are_two_that_do_not_depend_on_the_order() -> None:
    fitted, read = halves(NAMES, seed=0)
    assert sorted([*fitted.tolist(), *read.tolist()]) == list(range(24))
    assert len(fitted) == len(read) == 12
    turned = NAMES[::-1]
    again, _ = halves(turned, seed=0)
    assert {turned[row] for row in again.tolist()} == {NAMES[row] for row in fitted.tolist()}
    assert halves(NAMES, seed=1)[0].tolist() != fitted.tolist()
    assert [len(part) for part in halves(["a"], seed=0)] == [1, 0]


@pytest.mark.parametrize("sizes", [[1], [3, 3], [2, 10], [10, 2], [6, 6, 6, 6], [24, 1, 1, 1], [1, 2, 3, 4, 5]])
def test_no_group_is_in_both_halves_and_either_has_one(sizes: list[int]) -> None:
    groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    ids = [f"e{row}" for row in range(len(groups))]
    for seed in range(10):
        parts = halves(ids, seed, groups)
        there = [{groups[row] for row in part.tolist()} for part in parts]
        assert sorted(row for part in parts for row in part.tolist()) == list(range(len(ids)))
        assert not there[0] & there[1]
        assert there[0]
        assert there[1] or len(sizes) == 1
        if sizes == [6, 6, 6, 6]:
            assert [len(part) for part in parts] == [12, 12]


@pytest.mark.parametrize("counts", [(4, 4, 4), (6, 3, 3), (1,) * 12, (2, 2)])
def test_a_derangement_leaves_no_target_where_it_was(counts: tuple[int, ...]) -> None:
    targets = torch.tensor([token for token, n in enumerate(counts) for _ in range(n)])
    for seed in range(5):
        shuffled = derangement(targets, NAMES[: len(targets)], seed)
        assert sorted(shuffled.tolist()) == sorted(targets.tolist())
        assert not bool((shuffled == targets).any())


def test_a_derangement_of_a_majority_keeps_as_few_as_must_be() -> None:
    # Five of seven are equal: at least three must meet their own.
    targets = torch.tensor([0, 0, 0, 0, 0, 1, 2])
    assert int((derangement(targets, NAMES[:7], 0) == targets).sum()) == 3


def test_without_targets_nothing_can_be_shuffled(route: tuple[Planted, Pool, EncoderOrthogonal]) -> None:
    class Untargeted:
        tokens = None

        def score(self, logits: Tensor) -> Tensor:
            return logits[:, 0]

        slack = score

        def select(self, rows: Tensor) -> Untargeted:
            return self

    world, _, space = route
    pool = Pool((defend(world.model, world.defense, world.examples.prompts, Untargeted()),))
    assert pool.targets is None
    with pytest.raises(InputError, match="names no target"):
        fit_shared(pool, [Problem(space, 1.0, torch.zeros(24, dtype=torch.long))])


def test_pinned_examples_are_asked_for_other_targets_too(route: tuple[Planted, Pool, EncoderOrthogonal]) -> None:
    """At one site a free part is the whole delta, so that both kinds of pool read the same."""
    world, pool, space = route
    examples = world.examples
    whole = defend(world.model, world.defense, examples.prompts, examples.behavior, surface=Surface("every"))
    pinned = Pool((Pinned.of(whole),))
    assert pool.targets is not None
    targets = derangement(pool.targets, examples.ids, 0)
    drawn = random_shared(space, world.budget, 3, pool.shape, torch.device("cpu"), 0)
    torch.testing.assert_close(pinned.slack(drawn, targets), pool.slack(drawn, targets))
    assert not torch.allclose(pinned.slack(drawn), pool.slack(drawn, targets), atol=0.1)
    shuffled = [Problem(space, world.budget, targets)]
    few = FitSchedule(steps=3)
    torch.testing.assert_close(fit_shared(pinned, shuffled, few), fit_shared(pool, shuffled, few), atol=1e-3, rtol=1e-3)
