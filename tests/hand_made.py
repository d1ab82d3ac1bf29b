"""Records, fits and readings of transfer made by hand, from which verdicts are drawn without any model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib.resources import files
from typing import Any

import jsonschema

from recover.protocol.plan import Plan
from recover.protocol.records import CertificateRecord, ExampleRecord, PlaceboRecord, SearchRecord, SmallestRecord
from recover.protocol.verdict import Gathered, decide
from recover.protocol.verdict_model import Verdict
from recover.saes.fit import Fit
from tests.readings_by_hand import table

BUDGET = 20.0
GOOD = Fit("blocks.1.hook_resid_pre", 0.9, 30.0, 0.95, "blocks.1.hook_resid_pre", 0.0, 100)
THREAT = {
    "access": "white-box",
    "sites": ["blocks.1.hook_resid_pre"],
    "positions": "last",
    "placement": "after_clamp",
    "constraint": "C1",
    "norm": "Frobenius",
    "budget": BUDGET,
    "clamp": "live",
    "skip_first": 0,
    "delta_sites": ["blocks.15.hook_resid_pre"],
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
    "control_seed": 0,
    "device": "cpu",
    "dtype": "float32",
    "sae_sha256": {"x": "0" * 64},
    "model": "tiny",
    "phases": {"search": 1.0},
    "phase_seconds": 0.5,
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
    "preactivation_shift": (1e-6, 3e-6),
    "threshold_margin": (-2.0, 1.0),
    "drift": 1e-5,
    "relative_drift": 1e-6,
    "decode_drift": 2e-5,
    "clamp_floor_violation": 0.0,
    "rounding": 1e-3,
    "held": True,
    "dormant": 4.0,
    "reactivated": 1.0,
    "displacement_everywhere": 9.0,
}


def flip(name: str, *, status: str = "RECOVERED", slack: float = 0.5, near: float = 3.0, **facts: Any) -> ExampleRecord:
    """A valid flip that came back, with a smallest delta of norm `near`, where the residual has norm 20.

    `facts` are of the certificate of the delta within the budget, whose own norm is 4, or more where `near` is.
    """
    reached = math.isfinite(near)
    size = near if reached else 0.0
    within = max(4.0, 1.25 * size)
    by_solver = {"ascent": 1.05 * near, "adam": 1.04 * near, "smallest_norm": near, "random": 2 * near}
    return ExampleRecord(
        name,
        1.0,
        -1.0,
        1.0,
        -1.0,
        SearchRecord(status, 3, 1.5, slack, near, "smallest_norm" if reached else None, by_solver, 0.0),
        CertificateRecord(
            **_frozen(
                FACTS | {"slack": slack, "shows": slack > 0, "norm": within, "relative_norm": within / 20} | facts
            )
        ),
        SmallestRecord(
            **{field.name: FACTS[field.name] for field in fields(SmallestRecord)}
            | {"shows": reached, "norm": size, "relative_norm": size / 20}
        ),
        reached_at={"2": near <= 2, "20": near <= 20, "40": near <= 40},
        longer=status == "RECOVERED",
        undefended=True,
    )


def _frozen(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}


def missed(name: str, *, status: str = "EXHAUSTED", near: float = 30.0, **facts: Any) -> ExampleRecord:
    """A valid flip that did not come back within the budget, but does at norm `near`."""
    return flip(name, status=status, slack=-0.25, near=near, **{"norm": 15.0, "relative_norm": 0.75} | facts)


def searched(record: ExampleRecord, **changes: Any) -> ExampleRecord:
    """The record, with another account of its search."""
    assert record.search is not None
    return replace(record, search=replace(record.search, **changes))


def certified(record: ExampleRecord, **facts: Any) -> ExampleRecord:
    """The record, with other facts about its delta within the budget."""
    assert record.certificate is not None
    return replace(record, certificate=replace(record.certificate, **_frozen(facts)))


def at_smallest(record: ExampleRecord, **facts: Any) -> ExampleRecord:
    """The record, with other facts about its smallest delta."""
    assert record.smallest is not None
    return replace(record, smallest=replace(record.smallest, **facts))


def placebo(smallest: float) -> PlaceboRecord:
    """What the same search found for an unrelated target."""
    return PlaceboRecord(-1.0, smallest, smallest <= BUDGET)


SHOWS_THROUGHOUT = ExampleRecord("a", 1.0, 0.5, 1.0, 0.5)
NEVER_SHOWS = ExampleRecord("b", -1.0, -0.5, -1.0, -0.5)
APPEARS = ExampleRecord("c", 0.0, 0.5, 0.0, 0.5)


def transfer(own: tuple[int, int] = (40, 40), **changes: Any) -> dict[str, Any]:
    """What shared perturbations bring back on unseen flips, as `shared_readings.transfer` has it."""
    counts = {"own": own, "write_orthogonal": (39, 40), "shuffled": (6, 120)}
    figures = {
        "budget": 60.0,
        "relative_norm": 0.6,
        "residual_norm": 100.0,
        "train_rate": 1.0,
        "undo_cosine": 0.3,
        "write_orthogonal_undo_cosine": 0.2,
        "back_but_features_moved": 0,
        "preactivation_shift_max": 1e-5,
        "constraint_residual_max": 1e-7,
        "curve": [
            {"budget": 60.0, "relative_norm": 0.6, "heldout_rate": 0.95, "random_rate": 0.01, "undo_rate": 0.07},
        ],
    }
    return figures | {name: {"hits": hits, "n": n} for name, (hits, n) in counts.items()} | changes


KNOWN: Mapping[str, Any] = {"transfer": transfer(), "table": table()}
ERASED: Mapping[str, Any] = {"transfer": transfer((0, 40)), "table": table(back=0)}
"""Evidence that the answers can still be read, and that they cannot."""


def conclude(
    *records: ExampleRecord,
    fits: list[Fit] | None = None,
    dtype: str = "float32",
    plan: Plan | None = None,
    provenance: Mapping[str, Any] = PROVENANCE,
    **evidence: Any,
) -> Verdict:
    """The verdict that these records, and what else is given of the evidence, bear."""
    gathered = Gathered(list(records), fits or [GOOD], **{"utility": None} | evidence)
    return decide(gathered, plan or Plan(), BUDGET, dtype, THREAT, provenance)


def validated(verdict: Verdict) -> dict[str, Any]:
    """As JSON, valid under the schema in the package."""
    values: dict[str, Any] = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    schema = json.loads(files("recover.protocol").joinpath("verdict.schema.json").read_text())
    jsonschema.validate(values, schema, cls=jsonschema.Draft202012Validator)
    return values


def failed(verdict: Verdict) -> list[str]:
    """Names of the gates that failed and decide, in order; cautions are left out."""
    return [gate.name for gate in verdict.gates if gate.passed is False and gate.decides is not None]
