"""What the finds use: the decision by hand, and what perturbations do downstream in planted worlds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recover.defenses.clamps import Clamp
from recover.defenses.defended import defend, displaced
from recover.evidence.undoing import undoing
from recover.evidence.uses import Found, Mean, Share, judge_uses
from recover.numerics.subspaces import leading
from recover.planted import KINDS
from recover.protocol.bench import Bench
from recover.protocol.plan import Plan

NOTHING = Found(
    likeness=[0.85] * 10,
    own=[1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0],
    unrelated=[1.5, 1.5, 1.5, 1.5, 1.0, 1.0, 1.0, 1.0],
    unrelated_within=Share(4, 8),
    error=Share(5, 10),
    features=Share(5, 10),
    without_find=Share(5, 10),
    without_clamp=Share(5, 10),
)


def test_what_is_not_shown_is_unknown() -> None:
    uses = judge_uses(NOTHING)
    assert (uses.undone, uses.direct_writing, uses.dormant, uses.outside_sae) == (None,) * 4
    assert uses.route == "unknown"


@pytest.mark.parametrize(
    ("changes", "route"),
    [
        ({"likeness": [0.95] * 10}, "undone"),
        # None of 8 clearly nearer: at most 31 % (Clopper and Pearson, one-sided); 8 of 8 reached: 68 % at least.
        ({"own": [1.0] * 8, "unrelated": [1.05] * 8, "unrelated_within": Share(8, 8)}, "direct_writing"),
        ({"without_find": Share(10, 10), "without_clamp": Share(0, 10)}, "dormant"),
        ({"error": Share(10, 10), "features": Share(0, 10)}, "outside_sae"),
    ],
)
def test_each_use_is_shown_by_its_own_figures(changes: dict[str, object], route: str) -> None:
    assert judge_uses(replace(NOTHING, **changes)).route == route  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"likeness": [0.75] * 10}, "undone"),
        ({"own": [1.0] * 8, "unrelated": [1.2] * 8}, "direct_writing"),
        ({"without_find": Share(0, 10)}, "dormant"),
        ({"error": Share(0, 10)}, "outside_sae"),
    ],
)
def test_each_use_is_denied_by_its_own_figures(changes: dict[str, object], name: str) -> None:
    assert getattr(judge_uses(replace(NOTHING, **changes)), name) is False  # type: ignore[arg-type]


def test_few_examples_show_nothing() -> None:
    few = replace(NOTHING, likeness=[0.95] * 4, error=Share(4, 4), features=Share(0, 4), without_find=Share(4, 4))
    assert judge_uses(few).route == "unknown"


def test_a_test_that_sees_no_use_denies_none() -> None:
    """The behavior survives at base without what the find moves, and as well without what the clamp takes out."""
    assert judge_uses(replace(NOTHING, without_find=Share(10, 10), without_clamp=Share(10, 10))).dormant is None


def test_a_mean_has_its_interval() -> None:
    """Of 1, 2 and 3: the mean 2, the standard error 1 / sqrt 3."""
    mean = Mean.of([1.0, 2.0, 3.0])
    assert mean is not None
    assert (mean.value, mean.n) == (2.0, 3)
    assert (mean.low, mean.high) == pytest.approx((2 - 1.96 / 3**0.5, 2 + 1.96 / 3**0.5), abs=1e-4)
    assert Mean.of([1.0]) is None


@pytest.mark.parametrize(("kind", "alike"), [("shared_route", True), ("undone_clamp", True), ("write_only", False)])
def test_a_gate_that_is_opened_again_moves_the_logits_as_lifting_the_clamp_does(kind: str, alike: bool) -> None:
    """Whichever way it is opened: along the decoders, or past them. A written answer does not."""
    world = KINDS[kind](0)
    defended = defend(world.model, world.defense, world.examples.prompts, world.examples.behavior)
    given = world.shared
    if given is None:
        # The closed form of `write_only`: along the readout of the prompt's own answer, a little past the edge.
        delta = defended.zero_delta.requires_grad_(True)
        (uphill,) = torch.autograd.grad(defended(delta)[0].sum(), delta)
        uphill = world.admissible.project(uphill)
        assert world.smallest_norm is not None
        given = (
            uphill / uphill.flatten(1).norm(dim=1)[:, None, None] * 1.05 * world.smallest_norm[:, None, None].float()
        )
    found = undoing(defended, given.detach().expand_as(defended.zero_delta))
    assert bool((found.likeness > 0.9).all()) is alike
    assert bool((found.likeness < 0.8).all()) is not alike
    assert found.layers.shape[0] == len(world.examples.ids)


def test_lifting_the_clamp_restores_everything() -> None:
    world = KINDS["shared_route"](0)
    defended = defend(world.model, world.defense, world.examples.prompts, world.examples.behavior)
    back = (defended.base - torch.cat([defended.base[:, :-1], defended.suffix.residual], dim=1))[:, -1:]
    found = undoing(defended, back)
    torch.testing.assert_close(found.likeness, torch.ones(len(back)), atol=1e-4, rtol=0)
    assert (found.restored > 0.99).all()


def test_features_that_never_fire_write_nothing() -> None:
    """C1+ holds what the clamp wrote, and no decoder of a feature that is never active."""
    world = KINDS["shared_route"](0)
    (clamp,) = world.defense.clamps
    sae = clamp.sae
    rates = (sae.encode(torch.randn(1, 1, sae.d_model) * 0) != 0).flatten()
    dead = [f for f in range(sae.d_sae) if not rates[f] and f not in clamp.features]
    firing = set()
    for prompts in [world.examples.prompts]:
        residual = world.model.run(prompts, read=[clamp.site]).residuals[clamp.site]
        firing |= set((sae.encode(residual) != 0).any(dim=0).any(dim=0).nonzero().flatten().tolist())
    unused = next(f for f in dead if f not in firing)
    more = Clamp(sae, [*clamp.features, unused], clamp.mode, clamp.only_active, clamp.positions, clamp.site)
    defense = replace(world.defense, clamps=(more,))
    bench = Bench(world.model, world.model, defense, world.examples, world.budget, Plan(), 64)
    basis = bench.written[clamp.site]
    moved = displaced(world.model, world.defense, world.examples.prompts)[clamp.site]
    assert basis.shape[1] == leading(moved, 0.999).shape[1] <= len(clamp.features)
    decoder = sae.W_dec[unused]
    inside = (basis.T @ decoder).norm() / decoder.norm()
    assert inside < 0.9  # the decoder of the dead feature is not among what is forbidden
