"""The published baseline: what its projection and correction are, and how far it drifts."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from recover.baselines.probes import _corrected, _outside, _span, find_probed
from recover.defenses.clamps import Scale, Set
from recover.defenses.defended import defend
from recover.evidence.certificate import certify
from recover.numerics.metrics import norm
from recover.search.ascent import Schedule
from recover.search.constraints.monitor import Jacobian, Monitor
from recover.types import InputError
from tests.models import left_padded, token_rows
from tests.pinned_world import pinned_layers
from tests.test_admissible import SHEAR, linear_world
from tests.test_restoration import normal, tiny


def test_the_span_is_that_of_combinations_of_rows_and_of_the_drift_direction() -> None:
    """Against the table of all rows, those of the first site included."""
    defended = tiny(2)
    monitor = Monitor.of(defended, c1=False)
    leaf = (0.3 * normal(defended.zero_delta).float()).requires_grad_(True)
    watched = monitor.watch(leaf)
    weights = torch.randn(3, watched.pre.shape[1], generator=torch.Generator().manual_seed(0))
    basis = _span(monitor, leaf, watched, weights)
    assert basis.shape == (4, leaf[0].numel(), 4)
    jacobian = Jacobian.at(monitor, leaf, watched, monitor.kept(watched))
    table, rows = jacobian.table(), jacobian.rows
    drift = (monitor.moved(watched.detached())[:, rows, None].double() * table).sum(dim=1)
    expected = torch.cat([weights[:, rows].double() @ table, drift[:, None]], dim=1)
    projector = torch.linalg.pinv(expected) @ expected
    assert_close(basis @ basis.mT, projector, rtol=0, atol=1e-4)
    v = normal(leaf, 2)
    assert_close(
        _outside(basis, v).flatten(1), v.flatten(1) - (projector @ v.flatten(1)[..., None])[..., 0], atol=1e-3, rtol=0
    )


def test_without_drift_its_direction_takes_no_room() -> None:
    defended = tiny(2)
    monitor = Monitor.of(defended, c1=False)
    leaf = defended.zero_delta.requires_grad_(True)
    watched = monitor.watch(leaf)
    basis = _span(monitor, leaf, watched, torch.ones(1, watched.pre.shape[1]))
    assert bool((basis.norm(dim=(1, 2)).round(decimals=4) <= 2**0.5).all())
    assert bool(basis.isfinite().all())


def test_a_correction_is_the_best_step_along_the_drift_direction_by_hand() -> None:
    """Rows e0 and (0, 1, 2, 0) doubled by their clamps: of (1, 2, 2, 1) they read r = (1, 6) and pull back to J^T r.

    Site 1 scales feature 0 before delta enters, so that its row is e0; site 2 scales by 2 what it reads: twice.
    """
    defended = linear_world(SHEAR, clamps=((1, 0, Scale(2.0)), (2, 1, Scale(2.0))))
    monitor = Monitor.of(defended, c1=False)
    J = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 4.0, 0.0]])
    delta = torch.tensor([1.0, 2.0, 2.0, 1.0])
    r = J @ delta
    toward = J.T @ r
    expected = delta - toward * (toward @ toward) / (J @ toward).square().sum()
    found = _corrected(monitor, delta.expand(2, 1, 4))
    assert_close(found, expected.expand(2, 1, 4))


def test_where_probes_span_all_rows_a_gradient_moves_none_of_them_and_corrections_undo_drift() -> None:
    """The two rows above and eight probes; whatever Adam makes of the gradient, corrections bring it back.

    Each is a step of steepest descent on `||J delta||^2` of the best length: with `c` the condition of `J J^T`, here
    20, it leaves at most `((c - 1) / (c + 1))^2` (Kantorovich).
    """
    defended = linear_world(SHEAR, clamps=((1, 0, Scale(2.0)), (2, 1, Scale(2.0))))
    monitor = Monitor.of(defended, c1=False)
    J = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 4.0, 0.0]])
    leaf = defended.zero_delta.requires_grad_(True)
    watched = monitor.watch(leaf)
    weights = torch.randn(8, watched.pre.shape[1], generator=torch.Generator().manual_seed(0))
    v = normal(leaf).float()
    outside = _outside(_span(monitor, leaf, watched, weights), v)
    assert float((outside @ J.T).abs().max()) < 1e-5 * float(norm(v).max())
    delta = torch.tensor([1.0, 2.0, 2.0, 1.0]).expand(2, 1, 4)
    for _ in range(5):
        before, delta = (delta @ J.T).square().sum(dim=(1, 2)), _corrected(monitor, delta)
        assert bool(((delta @ J.T).square().sum(dim=(1, 2)) <= (19 / 21) ** 2 * before * (1 + 1e-5)).all())


def test_it_reports_the_drift_and_recovery_that_a_certificate_measures() -> None:
    """Rounding decides how far Adam drifts, so no bound is put on it: what is reported must be what is measured."""
    defended, budget = tiny(3, rank=6), 1.5
    found = find_probed(defended, budget, Schedule(steps=30))
    facts = certify(defended.suffix.model, defended.defense, left_padded(token_rows()), defended.behavior, found.delta)
    assert_close(found.drift, facts.relative_drift, rtol=1e-2, atol=1e-4)
    assert_close(found.slack, facts.slack, rtol=1e-3, atol=1e-3)
    assert bool((norm(found.delta) <= budget).all())


def test_examples_do_not_see_each_other() -> None:
    """In a linear world: elsewhere Adam makes whole steps of the rounding of a coordinate that counts for nothing."""
    world, rows = pinned_layers(2, n_sites=2), torch.tensor([3, 1])
    defended = defend(world.model, world.defense, world.prompts, world.behavior)
    together, some = (find_probed(one, 2.0, Schedule(steps=6)) for one in (defended, defended.select(rows)))
    assert_close(some.slack, together.slack[rows], atol=1e-3, rtol=1e-3)


def test_a_budget_that_is_none_is_refused() -> None:
    defended = linear_world(SHEAR, clamps=((1, 0, Set(0.0)), (2, 1, Scale(2.0))))
    with pytest.raises(InputError, match="budget"):
        find_probed(defended, -1.0)
