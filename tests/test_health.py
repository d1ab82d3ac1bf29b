"""Probes of the gradient, on landscapes where it is plain what should be said, and on worlds whose gradients are known.

Slopes, shares and limits of detection are worked out by hand from the functions; the probes see values alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recover.defenses.clamps import Set
from recover.defenses.defended import Defended, defend
from recover.models.host import Model
from recover.numerics.subspaces import NullSpace
from recover.planted import KINDS, MIXTURES, Planted
from recover.planted.hard import hard_readout
from recover.planted.routes import error_bypass, feature_bypass
from recover.search.ascent import Feasible
from recover.search.constraints.linear import EncoderOrthogonal
from recover.search.gradient_checks import Agreement, error_channel, finite_differences
from recover.tasks.behaviors import LogitDifference
from recover.types import InputError, Site
from tests.by_hand import defense_of
from tests.landscapes import Anything, Claimed, D, Landscape, Nothing, landscape
from tests.models import D_MODEL, left_padded, tiny_lm, token_rows
from tests.saes import random_sae

EPS = 2.0**-23
REACH = 2.0
FIRST = NullSpace.of(torch.eye(D)[:, :1])
"""Holds `x_0`."""


def probe(slack: Any, *numbers: float, feasible: Any = None, reach: float = REACH, seed: int = 0) -> Agreement:
    made = landscape(slack, *(numbers or (1.0, 1.5)))
    return finite_differences(made, feasible or Anything(), made.zero, reach, seed)


# What agrees.


@pytest.mark.parametrize(
    "slack",
    [
        lambda x, at: x[:, 0] - at,
        lambda x, at: torch.tanh(x.sum(dim=1) - at),
        lambda x, at: at - (x - at[:, None] * torch.eye(D)[0]).norm(dim=1),
        lambda x, at: torch.nn.functional.softplus(3 * x[:, 0] - at) + torch.sin(x).sum(dim=1),
        lambda x, at: x[:, 0] * x[:, 1] * x[:, 2] + x[:, 3] - at,
        lambda x, at: torch.sin(20 * x[:, 0]) - at,
        lambda x, at: 1e4 * at + 1e4 * x[:, 0],
    ],
    ids=["linear", "tanh", "ball", "softplus", "cubic", "bends at a tenth of the reach", "large"],
)
def test_what_is_smooth_agrees(slack: Any) -> None:
    for seed in range(3):
        found = probe(slack, seed=seed)
        assert found.agrees.all()
        assert (found.error <= 0.05).all()
        assert not found.hidden.any()


@pytest.mark.parametrize(
    "slack",
    [
        lambda x, at: torch.relu(x[:, 0]) + x[:, 1] - at,
        lambda x, at: x.abs().sum(dim=1) - at,
        lambda x, at: torch.maximum(x[:, 0], x[:, 1]) - at,
        lambda x, at: x.amax(dim=1) - at,
        lambda x, at: torch.nn.functional.leaky_relu(x, 0.1).sum(dim=1) - at,
        lambda x, at: torch.nn.functional.leaky_relu(x - 0.01, 0.1).sum(dim=1) - at,
        lambda x, at: -torch.relu(0.1 - x).sum(dim=1) - at,
        lambda x, at: x[:, 0] + 5 * torch.relu(x[:, 0] - 0.04) + 60 * at,
    ],
    ids=["relu", "abs", "max", "max of all", "leaky", "a kink near by", "kinks at half a step", "nearer than rounding"],
)
def test_kinks_agree_with_either_side_and_all_between(slack: Any) -> None:
    for seed in range(3):
        assert probe(slack, seed=seed).agrees.all()


def test_the_figures_by_hand() -> None:
    """`f = 3 x_0 - at` at 0: the slope is 3, and `f`, of size `at`, is known to `64 eps (1 + at)`, residual aside."""
    found = probe(lambda x, at: 3 * x[:, 0] - at, 1.0, 7.0)
    assert_close(found.slope, torch.tensor([3.0, 3.0]))
    h = 0.1 * REACH
    expected = [(64 * EPS * (1 + at) + 32 * EPS * 3 * h) / (3 * h) for at in (1.0, 7.0)]
    assert_close(found.noise, torch.tensor(expected), rtol=1e-4, atol=0)
    assert_close(found.step, torch.tensor([h, h]))
    assert (found.error == 0).all()


def test_the_slope_is_the_admissible_one_and_the_larger_of_two_points() -> None:
    tilted = probe(lambda x, at: 3 * x[:, 0] + 4 * x[:, 1] - at, feasible=FIRST)
    assert_close(tilted.slope, torch.tensor([4.0, 4.0]))
    square = probe(lambda x, at: x.square().sum(dim=1) / 2 - at)  # its gradient is the point: 0, and of norm reach / 2
    assert_close(square.slope, torch.tensor([REACH / 2, REACH / 2]))
    assert square.agrees.all()
    # At a distance r from zero the gradient is exp(-r^2) (e_0 - 2 x_0 x), of norm exp(-1) where r = 1.
    hill = probe(lambda x, at: x[:, 0] * torch.exp(-x.square().sum(dim=1)) - at)
    assert_close(hill.slope, torch.ones(2))


def test_what_rounding_leaves_of_a_gradient_is_no_slope() -> None:
    way = torch.linspace(1, 2, D)
    found = probe(lambda x, at: x @ way - at, feasible=NullSpace.of(way[:, None]))
    assert (found.slope == 0).all()
    assert found.agrees.all()


def test_what_the_search_never_sees_is_not_asked_for() -> None:
    """The gradient along `x_0` is wrong, and `x_0` is held."""
    wrong = landscape(lambda x, at: Claimed.apply(x[:, 0] + x[:, 1] - at, x[:, 1] - 5 * x[:, 0]), 1.0)  # type: ignore[no-untyped-call]
    assert finite_differences(wrong, FIRST, wrong.zero, REACH).agrees.all()
    assert not finite_differences(wrong, Anything(), wrong.zero, REACH).agrees.any()


@pytest.mark.parametrize("feasible", [FIRST, Nothing()])
def test_where_nothing_moves_and_no_slope_is_claimed_all_is_well(feasible: Any) -> None:
    for reach in (1e-2, 1.0, 1e3):
        found = probe(lambda x, at: 3 * x[:, 0] - at, feasible=feasible, reach=reach)
        assert found.agrees.all()
        assert (found.slope == 0).all()
        assert torch.isinf(found.noise).all()


# What does not.


def claimed(slack: Any, other: Any) -> Any:
    return lambda x, at: Claimed.apply(slack(x, at), other(x, at))  # type: ignore[no-untyped-call]


def rise(x: Tensor, at: Tensor) -> Tensor:
    return x[:, 0] - at


WRONG = {
    "reversed": (claimed(rise, lambda x, at: -x[:, 0]), 2.0),
    "half of it": (claimed(rise, lambda x, at: x[:, 0] / 2), 0.5),
    "twice": (claimed(rise, lambda x, at: 2 * x[:, 0]), 0.5),
    "another direction": (claimed(rise, lambda x, at: x[:, 1]), 1.0),
    "none at all": (lambda x, at: (x[:, 0] - at).detach() + 0 * x.sum(dim=1), 1.0),
    "cut off": (lambda x, at: (x[:, 0] - at).detach(), 1.0),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_is_found_out_by_as_much_as_it_is_wrong(name: str) -> None:
    """Along the gradient, or where there is none along any direction, values differ from the claim by this share."""
    slack, share = WRONG[name]
    for seed in range(3):
        found = probe(slack, seed=seed)
        assert not found.agrees.any()
        assert (found.error >= share - 0.03).all()


@pytest.mark.parametrize(
    "slack",
    [
        lambda x, at: x[:, 0] + x[:, 1].detach() - at,
        lambda x, at: torch.tanh(x[:, 0]) + torch.relu(x[:, 1] + 1).detach() - at,
        lambda x, at: x[:, 0] + 0.2 * x[:, 1:].sum(dim=1).detach() / (D - 1) ** 0.5 - at,
    ],
    ids=["one of two", "one of two, bent", "a fifth"],
)
def test_a_part_that_is_cut_off_is_missed(slack: Any) -> None:
    for seed in range(3):
        assert not probe(slack, seed=seed).agrees.any()


def test_a_gradient_that_is_wrong_only_away_from_zero_is_found_out() -> None:
    def half_way(x: Tensor, at: Tensor) -> Tensor:
        return torch.where(x.norm(dim=1) < REACH / 4, x[:, 0], -x[:, 0])

    found = probe(claimed(rise, half_way))
    assert not found.agrees.any()
    assert (found.error > 1).all()


def at_zero(slack: Any, other: Any) -> Any:
    """A gradient that is wrong, that of `other`, at zero alone."""
    return claimed(slack, lambda x, at: torch.where(x.norm(dim=1) == 0, other(x), slack(x, at)))


@pytest.mark.parametrize(
    "slack",
    [
        at_zero(lambda x, at: torch.relu(x[:, 0]) - at, lambda x: -x[:, 0] / 2),
        at_zero(lambda x, at: x[:, 0].abs() - at, lambda x: -1.5 * x[:, 0]),
        at_zero(lambda x, at: x[:, 0] + x[:, 1].abs() - at, lambda x: x[:, 0] + 1.5 * x[:, 1]),
    ],
    ids=["below relu", "beyond abs", "beyond abs, on a slope"],
)
def test_a_kink_does_not_excuse_what_lies_outside_of_it(slack: Any) -> None:
    assert not probe(slack).agrees.any()


def test_a_curve_does_not_pass_for_a_kink() -> None:
    """`v_0` is the slope at zero, claimed to be half of it: between `B = v_0 - 10 h` and `F`, which close in on it."""

    def curve(x: Tensor, at: Tensor) -> Tensor:
        return x[:, 0] + 10 * x.square().sum(dim=1) - at

    assert probe(curve).agrees.all()
    assert not probe(at_zero(curve, lambda x: x[:, 0] / 2)).agrees.any()


def test_what_rounding_hides_in_a_fine_step_is_seen_in_a_coarse_one() -> None:
    """`64 eps 1000 = 0.0076`, which is a twenty-sixth of what a step of 0.2 makes, and more than one of 0.006 does."""
    for slack in (WRONG["half of it"][0], WRONG["another direction"][0]):
        raised = lambda x, at, slack=slack: slack(x, at - 1000)  # noqa: E731
        assert not probe(raised).agrees.any()
    assert probe(lambda x, at: x[:, 0] - at + 1000).agrees.all()


@pytest.mark.parametrize(
    ("slack", "hidden"),
    [
        (lambda x, at: torch.sign(x[:, 0] - at) + 0 * x.sum(dim=1), True),
        (lambda x, at: torch.tanh(40 * (x[:, 0] - at)), True),
        (lambda x, at: torch.relu(x[:, 0] - at), True),
        (lambda x, at: torch.relu(x[:, 0] - 100 * at), False),
        (lambda x, at: -at + 0 * x.sum(dim=1), False),
        (lambda x, at: torch.sign(x[:, 0] - at) + 0.5 * x[:, 1], False),
    ],
    ids=["step", "saturated", "flat at first", "flat for good", "constant", "step beside a slope"],
)
def test_what_a_zero_gradient_hides(slack: Any, hidden: bool) -> None:
    """`sqrt(12) reach = 6.9` is how far random directions are followed, so along `x_0` about `reach = 2`."""
    found = probe(slack, 1.0, 1.3)
    assert (found.hidden == hidden).all()
    assert (found.agrees != hidden).all()


@dataclass(frozen=True, eq=False)
class Two:
    """A score and a slack of their own."""

    score: Landscape
    slack: Landscape

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(delta)[0], self.slack(delta)[1]

    def select(self, rows: Tensor) -> Two:
        return Two(self.score.select(rows), self.slack.select(rows))


def test_score_and_slack_are_both_asked() -> None:
    right, wrong = landscape(rise, 1.0, 2.0), landscape(WRONG["reversed"][0], 1.0, 2.0)
    assert finite_differences(Two(right, right), Anything(), right.zero, REACH).agrees.all()
    assert not finite_differences(Two(right, wrong), Anything(), right.zero, REACH).agrees.any()
    assert not finite_differences(Two(wrong, right), Anything(), right.zero, REACH).agrees.any()


def test_values_that_are_not_finite_agree_with_nothing() -> None:
    broken = probe(lambda x, at: x[:, 0] * torch.where(at > 1.2, torch.nan, 1.0), 1.0, 1.5)
    assert broken.agrees.tolist() == [True, False]
    assert broken.error[1] == math.inf


@pytest.mark.parametrize("reach", [0.0, -1.0, math.inf, math.nan])
def test_a_reach_that_is_no_norm_is_refused(reach: float) -> None:
    with pytest.raises(InputError, match="reach must be finite and positive"):
        probe(rise, reach=reach)


# How it asks.


def test_an_example_is_judged_as_it_would_be_alone() -> None:
    def mixed(x: Tensor, at: Tensor) -> Tensor:
        bent = torch.where(at > 1.2, torch.tanh(5 * x[:, 0]), torch.relu(x[:, 1]))
        return torch.where(at > 1.6, Claimed.apply(bent, -bent), bent)  # type: ignore[no-untyped-call]

    numbers = (1.0, 1.4, 1.8)
    together = probe(mixed, *numbers)
    assert together.agrees.tolist() == [True, True, False]
    for row, number in enumerate(numbers):
        alone = probe(mixed, number)
        for field in fields(Agreement):
            assert_close(getattr(alone, field.name)[0], getattr(together, field.name)[row])


class Counted:
    """A landscape that counts what is asked of it, by example."""

    def __init__(self, of: Landscape, origin: Counted | None = None) -> None:
        self.of, self.origin = of, origin or self
        self.counts, self.asked = {"values": 0, "gradients": 0}, [torch.zeros(0, D)]

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        self.origin.counts["gradients" if delta.requires_grad else "values"] += len(delta)
        self.origin.asked.append(delta.detach()[:, 0])
        return self.of(delta)

    def select(self, rows: Tensor) -> Counted:
        return Counted(self.of.select(rows), self.origin)


def test_how_many_passes_it_takes() -> None:
    """Gradients at 2 points; 5 directions at each, ahead and behind, and 4 far away: 28 values, 10 more at a kink."""
    smooth = Counted(landscape(rise, *range(1, 9)))
    assert finite_differences(smooth, Anything(), smooth.of.zero, REACH).agrees.all()
    assert smooth.counts == {"gradients": 2 * 8, "values": 28 * 8}
    along = (torch.cat(smooth.asked) - 0.1 * REACH * torch.eye(D)[0]).norm(dim=1) < 1e-6
    assert along.sum() == 8  # the gradient's own direction is among them
    bent = landscape(lambda x, at: torch.nn.functional.leaky_relu(x[:, 0], 0.1) - at, *range(1, 9))  # at zero only
    kink = Counted(bent)
    assert finite_differences(kink, Anything(), kink.of.zero, REACH, seed=2).agrees.all()
    assert kink.counts == {"gradients": 2 * 8, "values": 38 * 8}


# On worlds.


def admissible(world: Planted) -> Feasible:
    return world.admissible if len(world.defense.sites) > 1 else EncoderOrthogonal.of(*world.defense.clamps)


def defended(world: Planted) -> Defended:
    return defend(world.model, world.defense, world.examples.prompts, world.examples.behavior)


SOUND = {name: kind for name, kind in (KINDS | MIXTURES).items() if name != "hard_readout"}


@pytest.mark.parametrize(("seed", "kind"), list(enumerate(SOUND.values())), ids=list(SOUND))
def test_a_planted_world_agrees_everywhere(seed: int, kind: Callable[..., Planted]) -> None:
    world = kind(seed)
    target = defended(world)
    for found in (
        finite_differences(target, admissible(world), target.zero_delta, world.budget, seed),
        error_channel(target, admissible(world), seed),
        error_channel(target, admissible(world), seed, reach=world.budget),
    ):
        assert found.agrees.all()


@pytest.mark.parametrize("variant", ["tanh", "step", "decoy", "reversed"])
@pytest.mark.parametrize("seed", range(3))
def test_which_hard_readouts_are_found_out(variant: str, seed: int) -> None:
    """A decoy's slope is real, and the step beside it is no steeper than a hundred times that."""
    world = hard_readout(seed, variant=variant)
    target = defended(world)
    found = finite_differences(target, admissible(world), target.zero_delta, world.budget, seed)
    wrong = {"tanh": found.hidden, "step": found.hidden, "reversed": found.error > 0.9, "decoy": found.agrees}[variant]
    assert float(wrong.double().mean()) > 0.5
    assert bool(found.agrees.all()) == (variant == "decoy")


class Lost(Defended):
    """The same values, with a share of the gradient lost that flows through the SAE's error, or its features."""

    part, share = "error", 1.0

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        sae, h = self.defense.clamps[0].sae, self.suffix.residual
        followed = sae.decode(sae.encode(h + delta)) - sae.decode(sae.encode(h))
        left = delta - followed
        lost = left if self.part == "error" else followed
        return super().__call__(delta - self.share * (lost - lost.detach()))

    def select(self, rows: Tensor) -> Lost:
        return lossy(super().select(rows), self.part, self.share)


def lossy(target: Defended, part: str, share: float) -> Lost:
    values = {field.name: getattr(target, field.name) for field in fields(Defended)}
    kind = type("Lost", (Lost,), {"part": part, "share": share})
    return kind(**values)  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_that_is_lost_in_the_error_is_missed_where_the_way_back_is_there(seed: int) -> None:
    by_error, by_features = error_bypass(seed), feature_bypass(seed)
    for share in (1.0, 0.3):
        target = lossy(defended(by_error), "error", share)
        for found in (
            error_channel(target, admissible(by_error), seed),
            finite_differences(target, admissible(by_error), target.zero_delta, by_error.budget, seed),
        ):
            assert not found.agrees.any()
    # Nothing that the readout sees is in the error here, so nothing is lost with it.
    target = lossy(defended(by_features), "error", 1.0)
    assert error_channel(target, admissible(by_features), seed).agrees.all()
    assert finite_differences(target, admissible(by_features), target.zero_delta, by_features.budget, seed).agrees.all()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_lost_in_the_features_is_missed_too_but_not_in_directions_of_the_error(seed: int) -> None:
    world = feature_bypass(seed)
    target = lossy(defended(world), "features", 1.0)
    assert error_channel(target, admissible(world), seed, reach=world.budget).agrees.all()
    assert not finite_differences(target, admissible(world), target.zero_delta, world.budget, seed).agrees.any()


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk", "abstopk"])
def test_the_error_channel_of_every_architecture(architecture: str) -> None:
    """A random transformer and SAE, of whose error the readout sees something whatever it is."""
    options = {"k": 6} if "topk" in architecture else {}
    sae = random_sae(architecture, seed=0, d_model=D_MODEL, d_sae=24, **options)
    defense = defense_of({Site(1): [(sae, (2, 7, 11), Set(-2.0), True, "all")]})
    behavior = LogitDifference(torch.tensor([3, 9, 27, 40]), torch.tensor([5, 1, 30, 2]))
    target = defend(Model(tiny_lm()), defense, left_padded(token_rows()), behavior, n_pos=2)
    feasible = EncoderOrthogonal.of(*target.defense.clamps)
    assert error_channel(target, feasible, reach=0.3).agrees.all()
    assert not error_channel(lossy(target, "error", 1.0), feasible, reach=0.3).agrees.any()
