"""What a check makes of shared deltas: tables and totals made by hand, and certificates of a planted route."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from recover.evidence.certificate import Certificate
from recover.evidence.readings import NONE, UNREAD, Reading
from recover.planted import KINDS
from recover.protocol import heldout
from recover.protocol.bench import Bench
from recover.protocol.plan import Plan
from recover.protocol.shared_readings import table, transfer
from recover.protocol.verdict_model import Transfer

SCHEMA = Transfer.model_json_schema()
Draw = tuple[dict[str, Any], dict[str, Any]]
BEGUN: dict[str, Any] = {
    "refused": None,
    "residual_norm": 50.0,
    "own": [7, 8, 7, 9],
    "flips": [True, True, True, False],
    "clusters": [0, 1, 0, 2],
    "strata": {"answer 7": [True, False, True, False]},
    "others": [{"name": "the subject", "answers": [8, 7, 8, 7]}],
}


def certified(hits: int, n: int, moved: int, shift: float | None, residual: float | None) -> dict[str, Any]:
    return {
        "hits": hits,
        "n": n,
        "back_but_features_moved": moved,
        "preactivation_shift_max": shift,
        "constraint_residual_max": residual,
    }


def point(budget: float, own: tuple[int, int], random: tuple[int, int], undo: tuple[int, int]) -> dict[str, Any]:
    counts = {"own": own, "random": random, "undo": undo}
    return {"budget": budget} | {name: {"hits": hits, "n": n} for name, (hits, n) in counts.items()}


def draws() -> list[Draw]:
    """Four prompts, of which two are read in each of two draws, at norms 5 and 12.5."""
    first = {
        "rows": [0, 1],
        "shown": [7, 9],
        "below": [NONE, 9],
        "trained": 1.0,
        "norms": [5.0, None],
        "best_norms": [5.0, 12.5],
        "others": [[2.5, 2.5]],
        "dealt": {"hits": 1, "n": 2},
        "shuffled": {"hits": 0, "n": 2},
        "curve": [point(5.0, (0, 2), (1, 40), (0, 2)), point(12.5, (1, 2), (2, 40), (1, 2))],
        "c1": certified(1, 2, 1, 1e-5, 1e-7),
        "c1_plus": certified(0, 2, 0, 3e-5, 4e-7),
        "undo_cosine": 0.25,
        "write_orthogonal_undo_cosine": 0.0,
    }
    second = first | {
        "rows": [2, 3],
        "shown": [7, 9],
        "below": [7, 9],
        "trained": 0.5,
        "norms": [12.5, 5.0],
        "best_norms": [12.5, 5.0],
        "others": [[None, 5.0]],
        "curve": [point(5.0, (1, 1), (0, 20), (0, 1)), point(12.5, (1, 1), (1, 20), (1, 1))],
        "c1": certified(1, 1, 0, 2e-5, 2e-7),
        "undo_cosine": -0.5,
    }
    return [({"planted": {"hits": 1, "n": 2}}, first), ({"planted": {}}, second)]


def test_the_table_of_two_draws_by_hand() -> None:
    found = table(BEGUN, draws())
    assert found.shown.tolist() == [[7, 9, UNREAD, UNREAD], [UNREAD, UNREAD, 7, 9]]
    assert found.below.tolist() == [[NONE, 9, UNREAD, UNREAD], [UNREAD, UNREAD, 7, 9]]
    assert found.norms[0, :2].tolist() == [5.0, math.inf]
    assert np.isnan(found.norms[0, 2:]).all()
    assert found.best_norms[0, :2].tolist() == [5.0, 12.5]
    (subject,) = found.others
    assert (subject.name, subject.answers.tolist()) == ("the subject", [8, 7, 8, 7])
    assert subject.norms[1, 2:].tolist() == [math.inf, 5.0]
    assert (found.dealt, found.planted, found.trained) == (Reading(2, 4), Reading(1, 2), (1.0, 0.5))
    # Prompts 0 and 2 are one cluster, right in both of its readings; prompt 1 shows another answer.
    assert found.by_cluster(found.right, found.flips).tolist() == [1.0, 0.0]
    assert found.rate(found.right, ~found.flips).rate == 1.0
    unplanted = [({"planted": {}}, read) for _, read in draws()]
    assert table(BEGUN, unplanted).planted is None


def test_the_totals_of_two_draws_by_hand() -> None:
    found = transfer(BEGUN, draws())
    jsonschema.validate(found.model_dump(mode="json"), SCHEMA, cls=jsonschema.Draft202012Validator)
    assert (found.budget, found.relative_norm, found.residual_norm) == (12.5, 0.25, 50.0)
    assert (found.own, found.write_orthogonal, found.shuffled) == (Reading(2, 3), Reading(0, 4), Reading(0, 4))
    assert found.heldout_rate == pytest.approx(2 / 3)
    assert found.train_rate == 0.75
    assert (found.undo_cosine, found.write_orthogonal_undo_cosine) == (-0.5, 0.0)  # the larger in size
    assert found.back_but_features_moved == 1
    assert (found.preactivation_shift_max, found.constraint_residual_max) == (3e-5, 4e-7)
    low, high = found.curve
    assert (low.heldout_rate, low.random_rate, low.undo_rate) == pytest.approx((1 / 3, 1 / 60, 0.0))
    assert (high.heldout_rate, high.random_rate, high.undo_rate) == pytest.approx((2 / 3, 3 / 60, 2 / 3))


@pytest.mark.parametrize("name", ["preactivation_shift_max", "constraint_residual_max"])
def test_a_largest_value_that_was_not_finite_is_not_known(name: str) -> None:
    given = draws()
    given[0][1]["c1"] = given[0][1]["c1"] | {name: None}
    assert getattr(transfer(BEGUN, given), name) is None


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
    found, back = heldout._certified(bench, ROWS, delta)
    assert back.all()
    assert (found["hits"], found["n"], found["back_but_features_moved"]) == (7, 7, 0)
    assert found["constraint_residual_max"] < 1e-5
    nothing, _ = heldout._certified(bench, ROWS, 0 * delta)
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
    found, _ = heldout._certified(bench, ROWS, delta)
    assert (found["hits"], found["n"], found["back_but_features_moved"]) == (1, 3, 2)
    assert heldout._certified(bench, ROWS, 0 * delta)[0]["back_but_features_moved"] == 0


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
    assert math.isnan(heldout._certified(bench, ROWS, delta)[0]["preactivation_shift_max"])
    assert heldout._certified(bench, ROWS[3:], delta)[0]["preactivation_shift_max"] == 0.5
