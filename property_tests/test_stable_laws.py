"""Laws of searches under C2 and C3: what they promise holds, and a linear score is raised as far as it can be."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from property_tests.guards import guards
from property_tests.strategies import POINTWISE, SEEDS, Scene, costly, randn, scenes
from recover.defenses.clamps import Clamp
from recover.defenses.defended import Defended
from recover.numerics.metrics import norm
from recover.search.ascent import Schedule
from recover.search.constraints.linear import ActivationStable, DecodeStable
from recover.search.stable import find_stable
from recover.types import Site
from tests.test_stable import best_gain, world

BUDGETS = st.sampled_from([0.1, 1.0, 10.0])


def placed(scene: Scene, seed: int) -> tuple[Defended, Tensor]:
    """The clamp of a scene in a linear world, and along what the score rises; one position, the last."""
    case, h = scene.clamp, scene.residual()[:, -1]
    clamp = Clamp(case.sae, case.features, case.mode, case.only_active, "all", Site(1))
    along = randn(*h.shape, seed=seed)
    return world(h, along, clamp), along


@guards("recover.search.stable._Rules._see", "rows, n_equal, drift)", "0 * rows, n_equal, torch.zeros_like(drift))")
@guards(find_stable, "[stricter, defended.zero_delta]", "[stricter + 1.0]")
@costly(30)
@given(scenes(dtypes=("float32",), kinds=("normal", "zero", "duplicate")), st.booleans(), SEEDS, BUDGETS)
def test_a_stable_search_keeps_tolerance_and_budget_and_never_does_worse_than_nothing(
    scene: Scene, c3: bool, seed: int, budget: float
) -> None:
    defended, _ = placed(scene, seed)
    (clamp,) = defended.defense.clamps
    kind = DecodeStable if c3 else ActivationStable
    found = find_stable(defended, kind, budget, Schedule(steps=8, restarts=1), tolerance=1e-3)
    h_def = defended.suffix.residual
    kept = clamp.reference(h_def) @ clamp.decoder if c3 else clamp.reference(h_def)
    # What is written is summed in another order here, so that nothing may be a rounding of it.
    written = norm(clamp.reference(h_def)) * clamp.decoder.norm() if c3 else 0.0
    assert bool((kind(clamp, h_def).violation(found.delta) <= 1.01e-3 * norm(kept) + 1e-6 * written).all())
    assert bool((norm(found.delta) <= budget).all())
    start = defended.behavior.slack(defended.defended_logits)
    assert bool((found.slack >= start - 1e-5 * start.abs()).all())


@guards("recover.search.stable._Rules._see", "torch.where(awake, pre - pre_ref, 0.0)", "(pre - pre_ref)")
@guards("recover.search.stable._Rules._see", "INSIDE * distance_ref.abs()", "0.2 * distance_ref.abs()")
@guards("recover.search.stable._Rules.within", "delta - back, delta)", "delta + back, delta)")
@costly(30)
@given(
    scenes(POINTWISE, dtypes=("float32",), geometries=("generic",), kinds=("normal",)), st.booleans(), SEEDS, BUDGETS
)
def test_a_linear_score_is_raised_as_far_as_quadratic_programming_finds(
    scene: Scene, c3: bool, seed: int, budget: float
) -> None:
    """Under C2; C3 admits no less."""
    defended, along = placed(scene, seed)
    (clamp,) = defended.defense.clamps
    kind = DecodeStable if c3 else ActivationStable
    found = find_stable(defended, kind, budget, Schedule(goal=1e6, steps=60, restarts=0))
    gained = found.slack - defended.behavior.slack(defended.defended_logits)
    h_def = defended.suffix.residual
    awake, gap = clamp.reference(h_def)[:, 0] != 0, (clamp.threshold - clamp.pre_activations(h_def))[:, 0]
    best = torch.tensor([best_gain(along[i], clamp.encoder, awake[i], gap[i], budget) for i in range(len(along))])
    scale = budget * norm(along[:, None])
    assert bool((gained >= 0.98 * best - 2e-3 * scale).all())
    if not c3:
        assert bool((gained <= best + 2e-3 * scale).all())
