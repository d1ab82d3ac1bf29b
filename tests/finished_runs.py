"""Finished runs made by hand, of every verdict, and their folders: what reports are made of, without any model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recover.defenses.utility import Utility
from recover.protocol.records import ExampleRecord, ReplyRecord
from recover.protocol.verdict_model import Verdict
from recover.saes.fit import Fit
from tests.hand_made import SHOWS_THROUGHOUT, certified, conclude, flip, missed, placebo, transfer
from tests.readings_by_hand import table

CONFIG = "model: tiny\ntask: ioi\nprompts: {n: 64, seed: 0}\n"
Run = tuple[Verdict, Sequence[ExampleRecord]]
WHOLE: dict[str, Any] = {
    "utility": Utility(3.0, 3.25, 0.25, 100, False),
    "curve": (2.0, 20.0, 40.0),
    "undo": {"rate": 0.25, "cosine": 0.25, "scales": []},
    "health": {"n": 4, "finite_differences": 4, "error_channel": 4},
    "placebo_features": [{"suppressed": 1, "base": 10, "recovered": 1}],
    "transfer": transfer(
        curve=[transfer()["curve"][0] | {"budget": 20.0, "heldout_rate": 0.3}, transfer()["curve"][0]]
    ),
    "table": table(),
}
REPLY = ReplyRecord(False, False, False, True, False, 1e-8, 1e-7)


def run(*records: ExampleRecord, **evidence: Any) -> Run:
    """A verdict as it is read back from `verdict.json`, and its records."""
    said = conclude(*records, **evidence)
    return Verdict.from_json(json.dumps(said.to_dict(), allow_nan=False)), said.records


def changed(verdict: Verdict, **sections: Any) -> Verdict:
    """The verdict with other plain values for some of its sections, whole or one level down."""
    values = verdict.to_dict()
    for name, section in sections.items():
        values[name] = values[name] | section if isinstance(values[name], dict) else section
    return Verdict.model_validate(values)


def flips(n: int = 12, near: Sequence[float] = (1.5, 3.0, 8.0, 30.0)) -> list[ExampleRecord]:
    """Valid flips whose smallest norms go round `near`, each with a placebo twice as far, half of these unreached."""
    made = []
    for row in range(n):
        size = near[row % len(near)]
        one = (flip if size <= 20 else missed)(f"e{row:03}", near=size, drift=1e-6 * (row % 3))
        other = placebo(math.inf if row % 2 else 2 * size)
        made.append(replace(one, placebo=other, write_orthogonal=placebo(1.25 * size)))
    return made


def many(n: int) -> list[ExampleRecord]:
    """As many flips as a large run has, of 64 features each, no two alike."""
    draw = np.random.default_rng(0)
    made = []
    for row in range(n):
        near = float(np.exp(draw.normal(1.5, 0.6)))
        one = certified(
            flip(f"prompt-{row:04}", near=near),
            drift=float(draw.exponential(1e-6)),
            preactivation_shift=tuple(draw.exponential(1e-6, 64).tolist()),
            threshold_margin=tuple(draw.normal(-4, 2, 64).tolist()),
        )
        made.append(replace(one, placebo=placebo(near * float(draw.uniform(0.7, 2.5))), write_orthogonal=placebo(near)))
    return made


def _several_sites() -> Run:
    """Whole answers, two clamped sites, and where the finds travel."""
    verdict, records = run(
        *(replace(one, answered=True, refused=True, reply=REPLY) for one in flips(8, (3.0,))), **WHOLE
    )
    clamp = verdict.to_dict()["threat_model"]["clamps"][0]
    other = clamp | {"site": "blocks.2.hook_resid_pre", "mode": "floor", "value": [1.0, 2.5]}
    sites = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    threat = {"clamps": [clamp, other], "sites": sites, "delta_sites": sites, "positions": "first 8 of the answer"}
    part = {"replay": {"hits": 6, "rate": 0.75, "wilson95": [0.41, 0.93]}}
    part |= {"knockout": {"hits": 2, "rate": 0.25, "wilson95": [0.07, 0.59]}}
    names = ("first_order_share", "integrated_share", "replay_share", "knockout_share")
    shares = dict.fromkeys(names, 0.5) | {"norm_mean": 3.0, "said": None}
    parts = dict.fromkeys(("full", "error", "free", "clamped"), part | shares)
    travel = {"n": 8, "top_k": 16, "effect_mean": 2.0, "gap": 0.125, "integrated_gap": 0.0, "parts": parts}
    return changed(verdict, threat_model=threat, attribution=travel), records


SHOWING = [replace(SHOWS_THROUGHOUT, id=f"s{row}") for row in range(3)]
RUNS: Mapping[str, Run] = {
    "RECOVERABLE": run(*flips(), *SHOWING, **WHOLE),
    "RECOVERABLE, little run": run(*(flip(str(row)) for row in range(3))),
    "RECOVERABLE, transfer refused": run(*flips(), transfer={"refused": "too few flips"}),
    "RECOVERABLE, several sites": _several_sites(),
    "NOT_RECOVERED_AT_BUDGET": run(*flips(8, (30.0,)), *SHOWING, **WHOLE),
    "INCONCLUSIVE": run(*(certified(one, constraint_residual=0.25) for one in flips()), **WHOLE),
    "INVALID": run(SHOWS_THROUGHOUT),
    "INVALID, bad fit": run(
        *flips(), fits=[Fit("blocks.1.hook_resid_pre", 0.1, 30.0, math.nan, "blocks.1.hook_resid_pre", 0.0, 9)]
    ),
}
"""By name: the verdict, and in what it differs from others of it."""


def folder(path: Path, made: Run, config: str = CONFIG, features: Sequence[Sequence[int]] = ((3, 17),)) -> Path:
    """The artifacts of a run that its reports are made of."""
    verdict, records = made
    path.mkdir(parents=True)
    (path / "verdict.json").write_text(json.dumps(verdict.to_dict()))
    (path / "config.yaml").write_text(config)
    (path / "run.json").write_text(json.dumps({"features": features}))
    (path / "examples.jsonl").write_text("".join(record.to_json() + "\n" for record in records))
    return path
