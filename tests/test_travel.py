"""What a check counts of where its finds travel: by hand, through the verdict and on the page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from recover.evidence.attribution.parts import attribute
from recover.numerics.statistics import wilson
from recover.planted.routes import error_bypass, feature_bypass
from recover.protocol import phases, travel
from recover.protocol.bench import Bench
from recover.protocol.ledger import InMemoryStore
from recover.protocol.plan import Plan
from recover.protocol.records import ExampleRecord, PartRecord
from recover.protocol.verdict_model import Rate
from recover.report.text import sections
from recover.tasks.replies import read
from tests.hand_made import conclude, flip, validated
from tests.test_attribution import randn, tiny


def part(norm: float, first: float, along: float, replay: float, knockout: float, **said: bool) -> PartRecord:
    """Slacks are the scores, a logit lower."""
    return PartRecord(norm, first, along, replay, replay - 1, knockout, knockout - 1, **said)


def example(name: str, scale: float, **said: Any) -> ExampleRecord:
    """The delta raises the score from 0 to `2 scale`; three quarters of that are in the error."""
    parts = {
        "full": part(4.0, 3 * scale, 2 * scale, 2 * scale, 0.0),
        "error": part(3.0, 2 * scale, 1.5 * scale, 1.4 * scale, 0.4 * scale, **said),
        "free": part(2.0, scale, 0.5 * scale, 0.6 * scale, 1.6 * scale),
        "top_k": part(1.0, 0.5 * scale, 0.25 * scale, 0.2 * scale, 1.8 * scale),
        "clamped": part(0.0, 0.0, 0.0, 0.0, 2 * scale),
    }
    return replace(flip(name), attribution=parts)


def test_shares_are_of_the_effect_of_all_examples_together_and_rates_of_examples() -> None:
    found = travel.summary([example("a", 1.0), example("b", 3.0), flip("c")])
    assert found is not None
    assert (found.n, found.effect_mean) == (2, 4.0)
    # 12 to first order and 8 integrated, where the effect is 8.
    assert (found.gap, found.integrated_gap) == (-0.5, 0.0)
    error, free, clamped = (found.parts[name] for name in ("error", "free", "clamped"))
    assert error.first_order_share == pytest.approx(2 / 3)
    assert error.integrated_share == pytest.approx(0.75)
    assert error.replay_share == pytest.approx(0.7)
    assert error.knockout_share == pytest.approx(0.2)
    assert error.integrated_share + free.integrated_share + clamped.integrated_share == pytest.approx(1)
    # Scores with the error alone are 1.4 and 4.2, without it 0.4 and 1.2; the behavior shows above 1.
    assert error.replay == Rate(hits=2, rate=1.0, wilson95=wilson(2, 2))
    assert error.knockout == Rate(hits=1, rate=0.5, wilson95=wilson(1, 2))
    assert (free.replay.hits, clamped.replay.hits, clamped.knockout.hits) == (1, 0, 2)
    assert error.said is None
    assert error.norm_mean == 3.0


def test_what_is_said_is_counted_where_it_was_read() -> None:
    records = [
        example("a", 1.0, non_refusal=True, base_like=False),
        example("b", 1.0, non_refusal=True, base_like=True),
    ]
    found = travel.summary(records)
    assert found is not None
    assert found.parts["error"].said.non_refusal.hits == 2
    assert found.parts["error"].said.base_like.hits == 1
    assert found.parts["free"].said is None


def test_where_there_is_nothing_there_is_no_section_and_no_share_of_nothing() -> None:
    assert travel.summary([flip("a")]) is None
    still = travel.summary([example("a", 0.0)])
    assert still is not None
    assert (still.gap, still.parts["error"].integrated_share) == (None, None)


def test_the_verdict_has_a_section_that_its_schema_knows_and_the_page_tells() -> None:
    said = validated(conclude(example("a", 1.0), example("b", 3.0)))
    assert said["attribution"]["parts"]["error"]["integrated_share"] == pytest.approx(0.75)
    rows = dict(sections(conclude(example("a", 1.0), example("b", 3.0)))["travel"].rows)
    assert rows["SAE error"].startswith("75% of the effect on the score; recovers 2 of 2 alone; ")
    assert rows["linear estimate"].startswith("the gradient at the defended state overestimates the effect by 50%")
    nothing = validated(conclude(flip("a")))
    assert nothing["attribution"] is None
    assert sections(conclude(flip("a")))["travel"].rows == []


def test_a_record_with_parts_survives_its_line() -> None:
    record = example("a", 1.0, non_refusal=True, base_like=False)
    assert ExampleRecord.from_json(record.to_json()) == record


def test_values_of_parts_are_those_of_the_attribution() -> None:
    defended = tiny()
    found = attribute(defended, randn(*defended.zero_delta.shape), points=2)
    reads = [read("I can't.", "Yes, of course, here it is."), *[read("Yes, here it is.", "Yes, here it is.")] * 3]
    values = travel.part_values(found, {"error": reads})
    assert [set(row) for row in values] == [set(travel.PARTS)] * 4
    assert values[2]["free"]["replay_slack"] == float(found.views["free"].replay_slack[2])
    assert values[0]["error"]["non_refusal"] is False
    assert values[1]["error"]["base_like"] is True
    assert values[1]["free"]["base_like"] is None
    nowhere = replace(found.views["free"], norm=torch.full((4,), torch.nan))
    broken = replace(found, views={**found.views, "free": nowhere})
    assert travel.part_values(broken)[0]["free"]["norm"] is None


@pytest.mark.parametrize("kind", [error_bypass, feature_bypass], ids=lambda kind: kind.__name__)
def test_the_phase_says_where_the_bypass_of_a_planted_world_is(kind: Any) -> None:
    world, store = kind(3), InMemoryStore()
    bench = Bench(world.model, world.model, world.defense, world.examples, world.budget, Plan(), 64)
    values: dict[str, dict[str, Any]] = {name: {"id": name} for name in world.examples.ids}
    for phase in (phases.accounting, phases.search, phases.certificates, phases.attribution):
        done = phase(bench, bench.batch(0), store, lambda *_: None)
        store.deltas |= done.deltas
        for name, some in done.values.items():
            values[name] |= some
    found = travel.summary([ExampleRecord.of(one) for one in values.values()])
    assert found is not None
    here, there = ("error", "free") if world.bypass == "error" else ("free", "error")
    assert found.parts[here].integrated_share > 0.95
    assert found.parts[here].replay.hits == found.n == len(world.examples.ids)
    assert found.parts[here].knockout.hits == 0
    assert found.parts[there].replay.hits == 0
    assert found.integrated_gap == pytest.approx(0, abs=1e-3)
