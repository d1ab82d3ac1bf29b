"""What a check makes of shared deltas: totals over folds made by hand, and certificates of a planted route."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch

from recover.evidence.certificate import Certificate
from recover.evidence.rules import Reading, TransferEvidence
from recover.planted import KINDS
from recover.protocol import heldout
from recover.protocol.bench import Bench
from recover.protocol.heldout import summary
from recover.protocol.plan import Plan
from recover.protocol.verdict_model import Transfer

SCHEMA = Transfer.model_json_schema()
Folds = list[tuple[dict[str, Any], dict[str, Any]]]


def one(
    kind: str, budget: float, hits: int, n: int, weak: tuple[int, int], cosine: float | None, dealt: int = 0
) -> dict[str, Any]:
    counts = {"hits": hits, "n": n, "weak_hits": weak[0], "weak_n": weak[1]}
    counts |= {"dealt_hits": dealt, "dealt_n": n if kind == "shuffled" else 0}
    return {"kind": kind, "budget": budget, **counts, "norm": budget, "undo_cosine": cosine}


def certified(hits: int, n: int, moved: int, shift: float | None, residual: float | None) -> dict[str, Any]:
    return {
        "hits": hits,
        "n": n,
        "back_but_features_moved": moved,
        "preactivation_shift_max": shift,
        "constraint_residual_max": residual,
    }


def folds() -> Folds:
    """Of nine flips: fitted on five and read on four, and the other way round; at norms 5 and 12.5 of 50."""
    first_fit = {
        "transfer/0/c1/5/0": {"fitted": 2, "n": 5},
        "transfer/0/c1/12.5/0": {"fitted": 5, "n": 5},
        "transfer/0/c1_plus/5/0": {"fitted": 0, "n": 5},
        "transfer/0/c1_plus/12.5/0": {"fitted": 1, "n": 5},
        "transfer/0/shuffled/5/0": {"fitted": 0, "n": 5},
        "transfer/0/shuffled/12.5/0": {"fitted": 1, "n": 5},
        "transfer/0/shuffled/12.5/1": {"fitted": 2, "n": 5},
    }
    second_fit = {name.replace("/0/", "/1/", 1): {"fitted": 3, "n": 4} for name in first_fit}
    first = {
        "readings": [
            {"budget": 5.0, "random": {"hits": 1, "n": 40}, "undo": {"hits": 0, "n": 4}},
            {"budget": 12.5, "random": {"hits": 2, "n": 40}, "undo": {"hits": 1, "n": 4}},
        ],
        "fits": [
            one("c1", 5.0, 1, 4, (2, 3), 0.9),
            one("c1", 12.5, 4, 4, (3, 3), 0.25),
            one("c1_plus", 5.0, 0, 4, (0, 3), 0.0),
            one("c1_plus", 12.5, 3, 4, (2, 3), -0.125),
            one("shuffled", 5.0, 0, 4, (1, 3), 0.5, dealt=4),
            one("shuffled", 12.5, 1, 4, (1, 3), 0.5, dealt=1),
            one("shuffled", 12.5, 0, 4, (2, 3), 0.5, dealt=2),
        ],
        "c1": certified(3, 4, 1, 1e-5, 1e-7),
        "c1_plus": certified(2, 4, 0, 3e-5, 4e-7),
    }
    second = {
        "readings": [
            {"budget": 5.0, "random": {"hits": 0, "n": 50}, "undo": {"hits": 1, "n": 5}},
            {"budget": 12.5, "random": {"hits": 1, "n": 50}, "undo": {"hits": 2, "n": 5}},
        ],
        "fits": [
            one("c1", 5.0, 2, 5, (2, 5), 0.1),
            one("c1", 12.5, 5, 5, (4, 5), -0.5),
            one("c1_plus", 5.0, 1, 5, (1, 5), 0.0),
            one("c1_plus", 12.5, 4, 5, (4, 5), 0.0625),
            one("shuffled", 5.0, 1, 5, (2, 5), 0.5, dealt=5),
            one("shuffled", 12.5, 0, 5, (3, 5), 0.5, dealt=0),
            one("shuffled", 12.5, 1, 5, (1, 5), 0.5, dealt=4),
        ],
        "c1": certified(5, 5, 0, 2e-5, 2e-7),
        "c1_plus": certified(4, 5, 2, 0.0, 3e-7),
    }
    return [(first_fit, first), (second_fit, second)]


def test_the_totals_of_two_folds_by_hand() -> None:
    found = summary(folds(), residual_norm=50.0)
    jsonschema.validate(found.model_dump(mode="json"), SCHEMA, cls=jsonschema.Draft202012Validator)
    expected = {
        "budget": 12.5,
        "relative_norm": 0.25,
        "residual_norm": 50.0,
        "n": 9,
        # By the certificate, whatever the fits' own readings say.
        "hits": 8,
        "heldout_rate": 8 / 9,
        "write_orthogonal_heldout_rate": 6 / 9,
        "train_rate": (5 + 3) / 9,
        "random_rate": 3 / 90,
        "shuffled_rate": 2 / 18,
        # Dealt answers at the last norm: 1 and 2 of 4, 0 and 4 of 5.
        "dealt_rate": 7 / 18,
        "chance_rate": 7 / 18,
        "undo_rate": 3 / 9,
        # The value of the larger size, of the fits at the last norm.
        "undo_cosine": -0.5,
        "write_orthogonal_undo_cosine": -0.125,
        "weak_heldout_rate": 7 / 8,
        "weak_shuffled_rate": 7 / 16,
        "back_but_features_moved": 3,
        "preactivation_shift_max": 3e-5,
        "constraint_residual_max": 4e-7,
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value), name
    # Wilson at 8 of 9, z = 1.96: (8/9 + z^2/18 -+ z sqrt(8/729 + z^2/324)) / (1 + z^2/9).
    assert found.wilson95 == pytest.approx([0.5650, 0.9801], abs=1e-4)
    # At 6 of 9: (2/3 + z^2/18 -+ z sqrt(2/81 + z^2/324)) / (1 + z^2/9).
    assert found.write_orthogonal_wilson95 == pytest.approx([0.3542, 0.8794], abs=1e-4)
    assert found.model_dump()["readings"] == {
        "own": {"hits": 8, "n": 9},
        "write_orthogonal": {"hits": 6, "n": 9},
        "shuffled": {"hits": 2, "n": 18},
        "dealt": {"hits": 7, "n": 18},
        "random": {"hits": 3, "n": 90},
    }


def test_the_curve_of_two_folds_by_hand() -> None:
    """Every point by the readings of the search's own model, so that the points are of one kind."""
    low, high = summary(folds(), residual_norm=50.0).curve
    assert dict(low) == pytest.approx(
        {
            "budget": 5.0,
            "relative_norm": 0.1,
            "train_rate": (2 + 3) / 9,
            "heldout_rate": 3 / 9,
            "write_orthogonal_heldout_rate": 1 / 9,
            "shuffled_rate": 1 / 9,
            "random_rate": 1 / 90,
            "undo_rate": 1 / 9,
            "weak_heldout_rate": 4 / 8,
            "weak_shuffled_rate": 3 / 8,
        }
    )
    assert dict(high) == pytest.approx(
        {
            "budget": 12.5,
            "relative_norm": 0.25,
            "train_rate": (5 + 3) / 9,
            "heldout_rate": 9 / 9,
            "write_orthogonal_heldout_rate": 7 / 9,
            "shuffled_rate": 2 / 18,
            "random_rate": 3 / 90,
            "undo_rate": 3 / 9,
            "weak_heldout_rate": 7 / 8,
            "weak_shuffled_rate": 7 / 16,
        }
    )


def test_what_the_rules_of_evidence_are_given() -> None:
    found = summary(folds(), residual_norm=50.0)
    assert found.evidence == TransferEvidence(
        Reading(8, 9), Reading(6, 9), Reading(2, 18), Reading(7, 18), Reading(3, 90)
    )


def test_one_fold_is_its_own_total() -> None:
    found = summary(folds()[:1], residual_norm=50.0)
    assert (found.hits, found.n, found.train_rate, found.undo_cosine) == (3, 4, 1.0, 0.25)
    assert found.readings.random == Reading(2, 40)


def test_a_behavior_without_targets_has_no_shuffled_rate() -> None:
    given = folds()
    for _, read in given:
        read["fits"] = [fit for fit in read["fits"] if fit["kind"] != "shuffled"]
    found = summary(given, residual_norm=50.0)
    assert found.shuffled_rate is None
    assert found.weak_shuffled_rate is None
    # Chance is what is left of it.
    assert found.chance_rate == pytest.approx(3 / 90)
    assert found.readings.shuffled == found.readings.dealt == Reading(0, 0)
    jsonschema.validate(found.model_dump(mode="json"), SCHEMA, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", ["preactivation_shift_max", "constraint_residual_max"])
def test_a_largest_value_that_was_not_finite_is_not_known(name: str) -> None:
    given = folds()
    given[0][1]["c1"][name] = None
    found = summary(given, residual_norm=50.0)
    assert getattr(found, name) is None
    assert found.heldout_rate == pytest.approx(8 / 9)


def test_a_cosine_that_is_no_number_is_left_out() -> None:
    given = folds()
    given[1][1]["fits"][1]["undo_cosine"] = None
    assert summary(given, residual_norm=50.0).undo_cosine == 0.25


@pytest.fixture(scope="module")
def planted() -> tuple[Bench, torch.Tensor]:
    """The bench of a shared route, in batches of 7, and the delta that is known to open it."""
    world = KINDS["shared_route"](0)
    assert world.shared is not None
    bench = Bench(world.model, world.model, world.defense, world.examples, world.budget, Plan(), 7)
    return bench, world.shared


ROWS = torch.tensor([0, 3, 6, 7, 8, 20, 23])


def test_a_shared_delta_is_read_by_certificate_on_the_rows_asked_for(planted: tuple[Bench, torch.Tensor]) -> None:
    bench, delta = planted
    found = heldout._certified(bench, ROWS, delta)
    assert (found["hits"], found["n"], found["back_but_features_moved"]) == (7, 7, 0)
    assert found["constraint_residual_max"] < 1e-5
    nothing = heldout._certified(bench, ROWS, 0 * delta)
    assert (nothing["hits"], nothing["n"]) == (0, 7)


def test_only_what_held_and_was_suppressed_counts(
    planted: tuple[Bench, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each batch (3, 2, 1 and 1 rows) the first moved features, and the last shows with the clamp alone."""
    real = heldout.certify

    def certify(*args: Any, **options: Any) -> Certificate:
        facts = real(*args, **options)
        held, slack = facts.held.clone(), facts.defended_slack.clone()
        held[0], slack[-1] = False, 0.5
        return replace(facts, held=held, defended_slack=slack)

    bench, delta = planted
    monkeypatch.setattr(heldout, "certify", certify)
    found = heldout._certified(bench, ROWS, delta)
    assert (found["hits"], found["n"], found["back_but_features_moved"]) == (1, 3, 2)
    assert heldout._certified(bench, ROWS, 0 * delta)["back_but_features_moved"] == 0


def test_the_largest_shift_is_not_known_where_one_is_no_number(
    planted: tuple[Bench, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = heldout.certify

    def certify(*args: Any, **options: Any) -> Certificate:
        facts = real(*args, **options)
        shift = facts.preactivation_shift.clone()
        shift[0, 0] = torch.nan if len(shift) == 3 else 0.5
        return replace(facts, preactivation_shift=shift)

    bench, delta = planted
    monkeypatch.setattr(heldout, "certify", certify)
    assert math.isnan(heldout._certified(bench, ROWS, delta)["preactivation_shift_max"])
    assert heldout._certified(bench, ROWS[3:], delta)["preactivation_shift_max"] == 0.5
