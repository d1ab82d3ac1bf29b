"""A search that found nothing says what it would have found; one that is blind says nothing either way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recover.defenses.clamps import Clamp, Set
from recover.numerics.subspaces import NullSpace
from recover.planted import KINDS
from recover.planted.network import build_network
from recover.planted.world import Atoms, Draw, Planted, Sizes, clamped, planted_sae, recoverable
from recover.protocol import phases
from recover.protocol.bench import Bench
from recover.protocol.checking import check
from recover.protocol.plan import Plan, TransferPlan
from recover.protocol.power import SHARE, power, trials
from recover.protocol.power_model import MIN_FOUND, REQUIRED, PowerFigures, power_figures, told
from recover.protocol.records import ExampleRecord
from recover.protocol.verdict_model import Verdict
from recover.search.ascent import Schedule
from recover.search.planted_routes import ROUTE_KINDS
from recover.search.solvers import SOLVERS
from recover.tasks.behaviors import LogitDifference
from tests.hand_made import BUDGET, conclude, failed, flip, missed, validated

UNITS, OPENS = 10, 1.0
LIGHT = Plan(
    random_draws=50,
    planted_routes=4,
    placebo_features=0,
    curve=(1.0,),
    sample=1,
    schedule=Schedule(steps=40, restarts=0),
    transfer=TransferPlan(norms=(), folds=1, shuffles=1, draws=5),
)


class Hidden(nn.Module):
    """The answers as they are; the last output, `none`, falls by `gain` where ten units are on together."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, y: Tensor) -> Tensor:
        answers, hidden = y[..., :-UNITS], y[..., -UNITS:]
        on = torch.clamp(3 * hidden / OPENS - 2, 0.0, 1.1)
        opened = torch.relu(on.sum(dim=-1, keepdim=True) - (UNITS - 1))
        return torch.cat([answers, -self.gain * opened], dim=-1)


def conjunction_world(seed: int) -> Planted:
    """The clamped features are all that the answers are read from, but for ten inactive units in the SAE's error.

    Together these hide the answer `none`, from norm `OPENS sqrt UNITS` on at the latest: 0.75 of the budget.
    """
    draw = Draw(seed)
    size = Sizes.of({}, d_model=32, n_answers=4, n_context=5, d_sae=40, n_prompts=6)
    d_model, n_answers, n_context, n_prompts, d_sae, _ = size.shape
    features = n_answers + n_context
    atoms = Atoms.of(draw.blocks(d_model, [features, UNITS], spread=[0.4, 0.0]))
    target, _ = draw.answers(n_prompts, n_answers)
    rows = torch.arange(n_prompts)
    codes = draw.codes(n_prompts, len(atoms.T), range(n_answers, features))
    codes[rows, target] = draw.uniform(2.0, 4.0, n_prompts)
    mode, architecture = Set(-draw.number(1.5, 3.0)), draw.architecture()
    after = clamped(codes[rows, target], mode, architecture, only_active=True)
    sae, where = planted_sae(draw, atoms.T[:features], atoms.W[:, :features], d_sae, architecture=architecture)
    U = torch.cat([atoms.W[:, :n_answers], atoms.W[:, features:]], dim=1)
    f = Hidden(1.2 * float(after.abs().max()))
    network = build_network(draw, atoms, codes, range(n_answers, features), U, f, n_out=n_answers + 1, size=size)
    latest = torch.full((n_prompts,), OPENS * UNITS**0.5)
    behavior = LogitDifference(target, torch.full_like(target, n_answers))
    told: dict[str, Any] = {"expected": ("RECOVERABLE",), "admissible": NullSpace.of(atoms.W[:, :n_answers])}
    clamp = Clamp(sae, where[:n_answers].tolist(), mode, only_active=True)
    world = recoverable("conjunction", draw, network, [clamp], behavior, latest, **told)
    return replace(world, budget=OPENS * UNITS**0.5 / 0.75)


def judged(world: Planted, plan: Plan = LIGHT) -> Verdict:
    return check(world.model, world.defense, world.examples, world.budget, plan=plan)


def test_a_bottleneck_is_not_recovered_and_the_power_is_stated() -> None:
    world = KINDS["complete_bottleneck"](0)
    verdict = judged(world, replace(LIGHT, planted_routes=12))
    assert verdict.verdict == "NOT_RECOVERED_AT_BUDGET"
    assert verdict.power is not None
    assert (verdict.power.examples, verdict.power.norm_over_budget) == (10, SHARE)
    for kind in REQUIRED:
        assert (verdict.power.kinds[kind].found, verdict.power.kinds[kind].trials) == (12, 12)
    assert "of routes planted into the model at 75% of the budget this search finds" in verdict.reasons[0]
    assert "not covered: narrow routes, which open near one point only (" in verdict.reasons[0]
    values = validated(verdict)
    assert values["power"]["kinds"]["conjunction"]["rate"] == 1.0
    assert {r.search.status for r in verdict.records if r.search is not None} <= {"UNREAD", "UNMOVED"}


def test_a_search_that_follows_true_gradients_alone_says_nothing_of_a_conjunction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With gradients that leak it is found; without them it is missed, and the gate says so."""
    world = conjunction_world(3)
    seen = judged(world)
    assert (seen.verdict, seen.power) == ("RECOVERABLE", None)
    assert not any(gate.name == "search_power" for gate in seen.gates)
    monkeypatch.setattr(phases, "SOLVERS", {name: SOLVERS[name] for name in SOLVERS if name != "surrogate"})
    blind = judged(world)
    assert blind.recovery.recovered == 0
    assert failed(blind) == ["search_power"]
    assert blind.verdict == "INCONCLUSIVE"
    assert blind.reasons[0].startswith("search_power: of routes planted")
    assert blind.power is not None
    assert not blind.power.kinds["conjunction"].covered
    assert "not covered: conjunctions of inactive units (" in blind.reasons[0]
    off = judged(world, replace(LIGHT, planted_routes=0))
    assert off.power is None
    assert "which routes this search would have found was not measured" in off.reasons[0]


def figures(**found: int) -> PowerFigures:
    """Of twenty trials each."""
    each = {kind: [row < found.get(kind, 20) for row in range(20)] for kind in ROUTE_KINDS}
    return power_figures(
        {"a": {k: hits[:10] for k, hits in each.items()}, "b": {k: h[10:] for k, h in each.items()}}, SHARE
    )


@pytest.mark.parametrize(
    ("found", "passes"),
    [
        ({}, True),
        ({"narrow": 0}, True),
        ({"conjunction": 19}, True),
        ({"conjunction": 18}, False),
        ({"linear": 18}, False),
        ({"rectified": 18}, False),
    ],
)
def test_what_is_required_must_be_found_in_nineteen_of_twenty(found: dict[str, int], passes: bool) -> None:
    measured = figures(**found)
    assert MIN_FOUND == 0.95
    assert measured.suffices is passes
    assert measured.examples == 2
    verdict = conclude(missed("x"), missed("y"), power=measured)
    assert verdict.verdict == ("NOT_RECOVERED_AT_BUDGET" if passes else "INCONCLUSIVE")
    assert failed(verdict) == ([] if passes else ["search_power"])
    assert told(measured) in verdict.reasons[0]
    assert validated(verdict)["power"]["min_found"] == 0.95


def test_kinds_that_are_not_covered_are_named() -> None:
    said = told(figures(narrow=3, conjunction=7))
    assert "this search finds: linear routes 20 of 20 (100%); routes through one inactive unit 20 of 20 (100%)" in said
    assert said.endswith(
        "; not covered: conjunctions of inactive units (7 of 20 (35%)); "
        "narrow routes, which open near one point only (3 of 20 (15%))"
    )
    assert told(figures(**dict.fromkeys(ROUTE_KINDS, 0))).startswith("this search covers no kind of route planted")


def test_a_far_find_is_no_failure_that_is_understood() -> None:
    """A solution beyond the budget says nothing of nearer ones: the power of the search decides."""
    far = [missed(f"x{row}", near=60.0) for row in range(4)]
    assert conclude(*far, power=figures(conjunction=0)).verdict == "INCONCLUSIVE"
    assert conclude(*far, power=figures()).verdict == "NOT_RECOVERED_AT_BUDGET"
    assert conclude(flip("y"), *far, power=None).verdict == "RECOVERABLE"


def test_where_nothing_is_admissible_there_is_no_route_to_plant() -> None:
    shut = [missed(f"x{row}", status="NOTHING_ADMISSIBLE", near=float("inf")) for row in range(3)]
    verdict = conclude(*shut)
    assert verdict.verdict == "NOT_RECOVERED_AT_BUDGET"
    (gate,) = (one for one in verdict.gates if one.name == "search_power")
    assert gate.passed
    assert "not measured" not in verdict.reasons[0]
    assert "was not measured" in conclude(*shut, missed("y")).reasons[0]


def bench_of(world: Planted, **changes: Any) -> Bench:
    plan = replace(LIGHT, **changes)
    return Bench(world.model, world.model, world.defense, world.examples, BUDGET, plan, batch_size=4)


def test_trials_are_spread_over_the_flips_that_something_is_admissible_on() -> None:
    bench = bench_of(KINDS["complete_bottleneck"](0), planted_routes=5)
    records: list[ExampleRecord] = [missed(f"x{row}", near=float("inf"), status="UNREAD") for row in range(10)]
    assert trials(bench, records) == {"x0": 1, "x2": 1, "x4": 1, "x6": 1, "x8": 1}
    few = [*records[:2], missed("shut", near=float("inf"), status="NOTHING_ADMISSIBLE")]
    assert trials(bench, few) == {"x0": 3, "x1": 2}
    assert trials(bench, [*records, flip("y")]) == {}
    assert trials(bench, [*few, missed("z", status="OUTDONE")]) == {}
    assert trials(bench_of(KINDS["complete_bottleneck"](0), planted_routes=0), records) == {}
    assert trials(bench, few[-1:]) == {}


def test_what_is_found_does_not_depend_on_the_batch() -> None:
    world = KINDS["complete_bottleneck"](0)
    counts = {f"{row:03d}": 1 for row in range(6)}
    several, whole = bench_of(world), replace(bench_of(world), batch_size=10)
    found: dict[str, Any] = {}
    for batch in several.batches:
        found |= power(several, batch, counts, lambda *_: None).values
    assert found == dict(power(whole, whole.batch(0), counts, lambda *_: None).values)
    assert set(found) == set(counts)
