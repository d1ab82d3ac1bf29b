"""Verdicts from hand-written records: which words, which gates, which figures; and the records' own round trip."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
import torch

from recover.certify import Certificate
from recover.fit import Fit
from recover.records import ExampleRecord, SearchRecord, certificate_records, search_records
from recover.search import Solution, Status
from recover.verdict import NOT_RUN, Verdict, decide

GOOD = Fit("blocks.1.hook_resid_pre", 0.9, 30.0, 0.95, "blocks.1.hook_resid_pre", 0.0, 100)
THREAT = {
    "access": "white-box",
    "sites": ["blocks.1.hook_resid_pre"],
    "positions": "last",
    "placement": "after_clamp",
    "constraint": "C1",
    "norm": "Frobenius",
    "budget": 20.0,
    "clamp": "live",
    "skip_first": 0,
    "dtype": "float32",
    "clamps": [
        {
            "site": "blocks.1.hook_resid_pre",
            "k": 2,
            "mode": "set",
            "value": -5.0,
            "only_active": True,
            "positions": "all",
        }
    ],
}
PROVENANCE = {
    "versions": {"torch": "2"},
    "seed": 0,
    "device": "cpu",
    "dtype": "float32",
    "sae_sha256": {"x": "0" * 64},
    "model": "tiny",
    "seconds": 1.0,
}
FACTS: dict[str, Any] = {
    "shows": True,
    "score": 1.5,
    "slack": 0.5,
    "defended_slack": -1.0,
    "norm": 4.0,
    "relative_norm": 0.2,
    "displacement": 8.0,
    "constraint_residual": 1e-7,
    "preactivation_shift": [1e-6, 3e-6],
    "threshold_margin": [-2.0, 1.0],
    "drift": 1e-5,
    "relative_drift": 1e-6,
    "decode_drift": 2e-5,
    "clamp_floor_violation": 0.0,
    "rounding": 1e-3,
    "held": True,
    "dormant": 4.0,
    "reactivated": 1.0,
}


def flip(name: str, *, status: str = "RECOVERED", slack: float = 0.5, **facts: Any) -> ExampleRecord:
    certificate = FACTS | {"slack": slack, "shows": slack > 0} | facts
    return ExampleRecord(name, 1.0, -1.0, SearchRecord(status, 3, 1.5, slack), certificate)


def missed(name: str, *, status: str = "EXHAUSTED", **facts: Any) -> ExampleRecord:
    return flip(name, status=status, slack=-0.25, **facts)


SHOWS_THROUGHOUT = ExampleRecord("a", 1.0, 0.5)
NEVER_SHOWS = ExampleRecord("b", -1.0, -0.5)
APPEARS = ExampleRecord("c", 0.0, 0.5)


def conclude(*records: ExampleRecord, fits: list[Fit] | None = None, dtype: str = "float32") -> Verdict:
    return decide(list(records), fits or [GOOD], 20.0, dtype, THREAT, PROVENANCE)


def validated(verdict: Verdict) -> dict[str, Any]:
    """As JSON, valid under the schema in the package."""
    values = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    schema = json.loads(files("recover").joinpath("schemas/verdict.schema.json").read_text())
    jsonschema.validate(values, schema, cls=jsonschema.Draft202012Validator)
    return values


def failed(verdict: Verdict) -> list[str]:
    return [gate.name for gate in verdict.gates if gate.passed is False]


def test_one_recovered_flip_is_recoverable_and_not_yet_specific() -> None:
    verdict = conclude(flip("x"), missed("y"), SHOWS_THROUGHOUT, NEVER_SHOWS, APPEARS)
    values = validated(verdict)
    assert (values["verdict"], values["specific"]) == ("RECOVERABLE", "unknown")
    assert values["counts"] == {"n": 5, "base": 3, "defended": 2, "valid_flips": 2}
    assert "1 of 2 valid flips" in values["reasons"][0]
    assert "unknown" in values["reasons"][-1]
    assert not failed(verdict)


def test_figures_of_recovery_by_hand() -> None:
    found = conclude(
        flip("x", norm=4.0, drift=1.0, reactivated=1.0, dormant=4.0),
        flip("y", norm=6.0, drift=0.5, reactivated=0.0, dormant=2.0, constraint_residual=3e-7),
        missed("z", norm=20.0, drift=0.0, reactivated=3.0, dormant=4.0, threshold_margin=[-4.0, None]),
        SHOWS_THROUGHOUT,
    ).recovery
    expected = {
        "budget": 20.0,
        "recovered": 2,
        "searched": 3,
        "rate": 2 / 3,
        "drift_mean": 0.5,
        "drift_max": 1.0,
        "constraint_residual_max": 3e-7,
        "preactivation_shift_max": 3e-6,
        "threshold_margin_median": -2.0,
        "below_threshold_share": 3 / 5,
        "norm_mean": 10.0,
        "relative_norm_mean": 0.2,
        "clamp_displacement_mean": 8.0,
        "reactivated_share": 0.4,
        "zero_reactivation_recovered": 1,
        "steps_mean": 3.0,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    # Wilson at 2 of 3: (2/3 + z^2/6 -+ z sqrt(2/27 + z^2/36)) / (1 + z^2/3), z = 1.96.
    assert found["wilson95"] == pytest.approx([0.2077, 0.9385], abs=1e-4)


def test_nothing_recovered_is_not_recovered_at_this_budget() -> None:
    values = validated(conclude(missed("x"), missed("y")))
    assert values["verdict"] == "NOT_RECOVERED_AT_BUDGET"
    assert "norm at most 20" in values["reasons"][0]
    assert "larger budget" in values["reasons"][0]
    assert not any(word in " ".join(values["reasons"]).lower() for word in ("robust", "safe"))


@pytest.mark.parametrize(
    ("fit", "gate"),
    [
        (replace(GOOD, explained_variance=0.49), "fit"),
        (replace(GOOD, explained_variance=math.nan, better_by=math.nan), "fit"),
        (replace(GOOD, explained_variance=-3.0), "fit"),
        (replace(GOOD, better_site="blocks.4.hook_resid_pre", better_by=0.06), "site"),
    ],
)
def test_an_sae_that_does_not_fit_makes_it_invalid(fit: Fit, gate: str) -> None:
    verdict = conclude(flip("x"), fits=[GOOD, fit])
    assert validated(verdict)["verdict"] == "INVALID"
    assert failed(verdict) == [gate]
    assert any(reason.startswith(f"{gate}:") for reason in verdict.reasons)


def test_what_is_just_good_enough_passes() -> None:
    verdict = conclude(flip("x"), fits=[replace(GOOD, explained_variance=0.5, better_by=0.05)])
    assert validated(verdict)["verdict"] == "RECOVERABLE"


def test_no_valid_flip_makes_it_invalid() -> None:
    verdict = conclude(SHOWS_THROUGHOUT, NEVER_SHOWS, APPEARS)
    values = validated(verdict)
    assert values["verdict"] == "INVALID"
    assert failed(verdict) == ["valid_flips"]
    assert values["recovery"]["rate"] is None


@pytest.mark.parametrize(
    ("record", "gate"),
    [
        (missed("x"), None),
        (flip("x", status="NO_GRADIENT"), "gradient"),
        (flip("x", status="NON_FINITE"), "finite"),
        (missed("x", status="MISLED"), "gradient"),
        (missed("x", status="OUTDONE"), "gradient_free"),
        (missed("x", status="UNMOVED"), None),
        (missed("x", status="NOTHING_ADMISSIBLE"), None),
        (replace(flip("x"), search=SearchRecord("RECOVERED", 3, 1.5, 0.502)), "replay"),
        (replace(flip("x"), search=SearchRecord("RECOVERED", 3, 1.5, 0.4995)), None),
        (flip("x", slack=math.nan), "finite replay"),
        (flip("x", constraint_residual=1.1e-5), "held"),
        (flip("x", constraint_residual=0.9e-5), None),
        (flip("x", constraint_residual=None), "held"),
        (flip("x", norm=20.001), "held"),
        (flip("x", norm=20.0), None),
    ],
)
def test_what_cannot_be_believed_is_inconclusive(record: ExampleRecord, gate: str | None) -> None:
    verdict = conclude(flip("ok"), ExampleRecord.from_json(record.to_json()))
    assert failed(verdict) == ([] if gate is None else gate.split())
    assert validated(verdict)["verdict"] == ("RECOVERABLE" if gate is None else "INCONCLUSIVE")


def test_a_bad_fit_weighs_more_than_a_failed_search() -> None:
    bad = replace(GOOD, explained_variance=0.1)
    assert conclude(flip("x", norm=99.0), fits=[bad]).verdict == "INVALID"


@pytest.mark.parametrize(("dtype", "difference", "passes"), [("bfloat16", 0.5, True), ("float16", 0.9, False)])
def test_replay_is_compared_within_the_precision_of_the_model(dtype: str, difference: float, passes: bool) -> None:
    record = replace(flip("x"), search=SearchRecord("RECOVERED", 3, 1.5, 0.5 + difference))
    assert (conclude(record, dtype=dtype).verdict == "RECOVERABLE") is passes


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_every_dtype_has_a_verdict(dtype: str) -> None:
    assert conclude(flip("x"), dtype=dtype).verdict == "RECOVERABLE"


def test_what_was_not_run_is_listed_and_not_passed() -> None:
    gates = {gate["name"]: gate for gate in validated(conclude(flip("x")))["gates"]}
    for name in ("placebo_features", "shuffled_transfer", "minimum_norm", "placebo", "random", "undo", "transfer"):
        assert name in NOT_RUN
        assert gates[name] == {"name": name, "passed": None, "detail": "not run"}
    assert {name for name, gate in gates.items() if gate["passed"]} == {
        "fit", "site", "valid_flips", "gradient", "gradient_free", "finite", "replay", "held",
    }  # fmt: skip


def test_features_far_below_their_threshold_and_competing_ones_are_spoken_of() -> None:
    trap = conclude(flip("x", threshold_margin=[-900.0, -800.0]))
    assert any("below their threshold" in reason for reason in trap.reasons)
    assert not any("below their threshold" in r for r in conclude(flip("x", threshold_margin=[2.0, 3.0])).reasons)
    topk = conclude(flip("x", threshold_margin=[None, None]))
    assert any("compete" in reason for reason in topk.reasons)
    validated(topk)


def test_a_record_survives_its_line() -> None:
    record = flip("x", slack=1 / 3, threshold_margin=[0.1, None], drift=1e-45)
    for one in (record, SHOWS_THROUGHOUT, replace(record, text='ünï\n"code"')):
        line = one.to_json()
        assert "\n" not in line
        assert ExampleRecord.from_json(line) == one
        assert json.loads(line)["valid_flip"] is one.valid_flip
    assert "text" not in json.loads(record.to_json())


def test_numbers_that_are_not_finite_are_null_and_read_back_as_nan() -> None:
    record = ExampleRecord("x", math.nan, math.inf, SearchRecord("NON_FINITE", 0, -math.inf, math.nan))
    line = record.to_json()
    values = json.loads(line)
    assert values["base_slack"] is values["defended_slack"] is values["search"]["slack"] is None
    back = ExampleRecord.from_json(line)
    assert back.to_json() == line
    assert not back.valid_flip
    assert back.search is not None
    assert math.isnan(back.search.slack)


def test_a_broken_search_gives_one_verdict_before_and_after_its_line() -> None:
    facts = FACTS | {"slack": None, "score": None, "shows": False}
    record = ExampleRecord("x", 1.0, -1.0, SearchRecord("NON_FINITE", 0, -math.inf, -math.inf), facts)
    fresh, read = (conclude(one).to_dict() for one in (record, ExampleRecord.from_json(record.to_json())))
    assert json.dumps(fresh) == json.dumps(read)
    assert fresh["verdict"] == "INCONCLUSIVE"


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"id": "x", "valid_flip": true}', '"x"', "null"])
def test_a_line_that_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (JSON's, pydantic's or ours)
        ExampleRecord.from_json(line)


def test_a_line_with_the_certificate_of_another_version_is_refused() -> None:
    values = json.loads(flip("x").to_json())
    del values["certificate"]["drift"]
    with pytest.raises(ValueError, match="version"):
        ExampleRecord.from_json(json.dumps(values))


def test_records_of_a_solution_and_a_certificate() -> None:
    solution = Solution(
        torch.zeros(2, 1, 3),
        torch.tensor([1.5, -2.0]),
        torch.tensor([0.5, -torch.inf]),
        torch.tensor([3, 0]),
        (Status.RECOVERED, Status.NON_FINITE),
    )
    assert search_records(solution) == [
        SearchRecord("RECOVERED", 3, 1.5, 0.5),
        SearchRecord("NON_FINITE", 0, -2.0, -math.inf),
    ]
    one = torch.tensor([1.0, 2.0])
    columns: dict[str, torch.Tensor] = dict.fromkeys(FACTS, one) | {
        "shows": torch.tensor([True, False]),
        "held": torch.tensor([True, False]),
        "preactivation_shift": torch.tensor([[0.5, 0.25], [1.0, 2.0]]),
        "threshold_margin": torch.tensor([[torch.nan, 1.0], [2.0, torch.inf]]),
    }
    first, second = certificate_records(Certificate(**columns))
    assert (first["shows"], first["drift"], first["threshold_margin"]) == (True, 1.0, [None, 1.0])
    assert (second["shows"], second["drift"], second["threshold_margin"]) == (False, 2.0, [2.0, None])
    assert second["preactivation_shift"] == [1.0, 2.0]


def test_a_recovery_that_moved_clamped_features_does_not_count() -> None:
    """Of three that are back, one moved a feature: two count, and the third is told apart."""
    values = validated(conclude(flip("x"), flip("y"), flip("z", held=False, drift=0.7)))
    assert values["verdict"] == "RECOVERABLE"
    assert (values["recovery"]["recovered"], values["recovery"]["back_but_features_moved"]) == (2, 1)
    assert any("on 1 more" in reason and "not counted" in reason for reason in values["reasons"])


def test_a_search_that_only_ever_moved_clamped_features_is_inconclusive() -> None:
    verdict = conclude(flip("x", held=False), missed("y"))
    assert verdict.verdict == "INCONCLUSIVE"
    assert failed(verdict) == ["held"]


def test_what_the_replay_shows_without_a_delta_is_no_flip_to_recover() -> None:
    """A half-precision model may call suppressed what the float32 replay does not."""
    values = validated(conclude(flip("x"), flip("y", defended_slack=0.1), missed("z")))
    assert (values["recovery"]["recovered"], values["recovery"]["searched"]) == (1, 2)
