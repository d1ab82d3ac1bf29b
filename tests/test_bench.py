"""The bench of a check: what it makes for one defense is not taken for another's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recover.defenses.clamps import Set
from recover.planted import KINDS
from recover.protocol.bench import Bench
from recover.protocol.plan import Plan
from recover.types import Surface


@pytest.fixture
def bench() -> Bench:
    world = KINDS["write_only"](0)
    return Bench(world.model, world.model, world.defense, world.examples, world.budget, Plan(), 64)


def test_a_bench_with_another_defense_makes_its_own_batches(bench: Bench) -> None:
    """The clamp of the other writes what was there: nothing flips, whatever the first one's batches say."""
    (clamp,) = bench.defense.clamps
    first, pool = bench.batch(0), bench.pool
    other = replace(bench, defense=replace(bench.defense, clamps=(replace(clamp, mode=Set(0.0)),)))
    assert not torch.equal(other.batch(0).under, first.under)
    assert other.batch(0).target.defense == other.defense
    assert bench.batch(0) is first
    assert bench.pool is pool
    assert "pool" not in vars(replace(bench))


def test_a_bench_entered_elsewhere_makes_its_own_batches(bench: Bench) -> None:
    assert bench.batch(0).target.surface == Surface()
    other = bench.entered_at(Surface(placement="before_clamp"))
    assert other.batch(0).target.surface == other.surface == Surface(placement="before_clamp")
    assert other.surface.first == other.surface
