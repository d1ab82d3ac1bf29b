"""Laws of what is written down: records, configurations, fingerprints, places, and the verdict that records bear."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recover.certify import Certificate
from recover.config import Config, load_config
from recover.fit import Fit
from recover.records import ExampleRecord, SearchRecord
from recover.search import Status
from recover.types import InputError, Site
from recover.verdict import Verdict, decide

finite = st.floats(allow_nan=False, allow_infinity=False)
LISTS = ("preactivation_shift", "threshold_margin")


@st.composite
def certificates(draw: st.DrawFn, numbers: st.SearchStrategy[float] = finite) -> dict[str, Any]:
    k = draw(st.integers(1, 3))
    values: dict[str, Any] = {}
    for field in fields(Certificate):
        if "Bool" in str(field.type):
            values[field.name] = draw(st.booleans())
        elif field.name in LISTS:
            values[field.name] = draw(st.lists(numbers | st.none(), min_size=k, max_size=k))
        else:
            values[field.name] = draw(numbers | st.none())
    return values


searched = st.builds(
    SearchRecord,
    status=st.sampled_from([status.name for status in Status]),
    steps=st.integers(0, 500),
    score=finite,
    slack=finite,
)
records = st.builds(
    ExampleRecord,
    id=st.text(min_size=1),
    base_slack=finite,
    defended_slack=finite,
    search=st.none() | searched,
    certificate=st.none() | certificates(),
    text=st.none() | st.text(),
)


@given(records)
def test_a_record_survives_its_line(record: ExampleRecord) -> None:
    """To the last digit, whatever the text holds; and it is one line of strict JSON."""
    line = record.to_json()
    assert "\n" not in line
    assert ExampleRecord.from_json(line) == record
    json.loads(line, parse_constant=pytest.fail)
    assert ("text" in json.loads(line)) == (record.text is not None)


@given(records, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_is_read_back_as_not_a_number(record: ExampleRecord, bad: float) -> None:
    """So that no comparison holds of it: neither at base nor when defended does the behavior show."""
    line = replace(record, base_slack=bad).to_json()
    json.loads(line, parse_constant=pytest.fail)
    read = ExampleRecord.from_json(line)
    assert math.isnan(read.base_slack)
    assert not read.shows_at_base
    assert not read.valid_flip


FIT = Fit("blocks.1.hook_resid_pre", 0.9, 3.0, 0.9, "blocks.1.hook_resid_pre", 0.0, 99)
moderate = st.floats(-1e3, 1e3)


@st.composite
def runs(draw: st.DrawFn) -> list[ExampleRecord]:
    """Records as a check leaves them: certificates of valid flips, of one number of features, and of no others."""
    found = []
    for index in range(draw(st.integers(1, 8))):
        base, left = draw(moderate), draw(moderate)
        record = ExampleRecord(f"e{index}", base, left)
        if record.valid_flip:
            certificate = draw(certificates(st.floats(0, 1e3)))
            certificate |= {"reactivated": 0.0, "dormant": 2.0, "defended_slack": left}
            search = SearchRecord("RECOVERED", draw(st.integers(0, 9)), 1.0, draw(moderate))
            record = replace(record, search=search, certificate=certificate)
        found.append(record)
    return found


def verdict_of(records: list[ExampleRecord], budget: float = 10.0) -> Verdict:
    return decide(records, [FIT], budget, "float32", {}, {})


def back_with_the_clamp_held(record: ExampleRecord) -> bool:
    return record.certificate is not None and record.certificate["shows"] and record.certificate["held"]


def rounded(value: Any) -> Any:
    """Without the last digits, which the order of a sum decides."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


@given(runs(), st.randoms())
def test_a_verdict_does_not_depend_on_the_order_of_records_and_counts_them_once(
    found: list[ExampleRecord], random: Any
) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)
    one, other = verdict_of(found), verdict_of(shuffled)
    assert one.verdict == other.verdict
    assert rounded(dict(one.recovery)) == rounded(dict(other.recovery))
    assert one.counts == other.counts
    flips = [record for record in found if record.base_slack > 0 and not record.defended_slack > 0]
    back = [record for record in flips if back_with_the_clamp_held(record)]
    assert (one.counts["valid_flips"], one.recovery["recovered"]) == (len(flips), len(back))
    low, high = one.recovery["wilson95"]
    assert not flips or low <= one.recovery["rate"] <= high


@given(runs())
def test_a_verdict_says_no_more_than_its_gates_and_certificates_bear(found: list[ExampleRecord]) -> None:
    """INVALID and INCONCLUSIVE name a gate that failed; RECOVERABLE needs one certificate, whatever the solver says."""
    verdict = verdict_of(found)
    failed = {gate.name for gate in verdict.gates if gate.passed is False}
    validity = {"fit", "site", "valid_flips"}
    match verdict.verdict:
        case "INVALID":
            assert failed & validity
        case "INCONCLUSIVE":
            assert failed
            assert not failed & validity
        case "RECOVERABLE":
            assert not failed
            assert any(map(back_with_the_clamp_held, found))
        case _:
            assert verdict.verdict == "NOT_RECOVERED_AT_BUDGET"
            assert not failed
            assert not any(map(back_with_the_clamp_held, found))
    long = [
        r.certificate for r in found if r.certificate and (r.certificate["norm"] is None or r.certificate["norm"] > 10)
    ]
    assert not long or verdict.verdict in ("INVALID", "INCONCLUSIVE")
    assert not any(word in " ".join(verdict.reasons) for word in ("robust", "safe"))
    json.dumps(verdict.to_dict(), allow_nan=False)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """What a DEFENSE.yaml may hold."""
    features = st.lists(st.integers(0, 4000), min_size=1, max_size=5, unique=True) | st.builds(
        lambda top: {"select": "attribution", "top": top}, st.integers(1, 99)
    )
    clamp = st.fixed_dictionaries(
        {
            "sae": st.sampled_from(["smollm2-l15", "a:b", "some/folder"]),
            "features": features,
            "mode": st.sampled_from(["set", "scale", "floor"]),
            "value": st.floats(-1e3, 1e3),
        },
        optional={"only_active": st.booleans(), "positions": st.sampled_from(["all", "last", "prompt"])},
    )
    return {
        "model": draw(st.sampled_from(["smollm2", "org/name", "./folder"])),
        "clamps": draw(st.lists(clamp, min_size=1, max_size=2)),
        "task": draw(st.sampled_from(["ioi", "python:module:object"])),
        "prompts": draw(st.fixed_dictionaries({"n": st.integers(1, 99)}, optional={"seed": st.integers(0, 9)})),
        "search": {"budget": draw(st.floats(1e-3, 1e3)), "steps": draw(st.integers(1, 500))},
        "device": draw(st.sampled_from(["auto", "cpu", "cuda", "cuda:1"])),
        "batch_size": draw(st.sampled_from(["auto", 1, 7])),
    }


@given(configurations())
def test_a_configuration_survives_its_yaml(values: dict[str, Any]) -> None:
    config = Config.model_validate(values)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(config.dump_yaml())
        again = load_config(path)
    assert again == config
    assert again.fingerprint(model="a") == config.fingerprint(model="a")


@given(configurations(), st.data())
def test_a_fingerprint_is_of_what_can_change_a_result_and_of_nothing_else(
    values: dict[str, Any], data: st.DataObject
) -> None:
    """Not of the order of keys, the device or the batch size."""
    own = Config.model_validate(values).fingerprint(model="a")
    reversed_keys = Config.model_validate(dict(reversed(values.items())))
    elsewhere = Config.model_validate({**values, "device": "mps", "batch_size": 3})
    assert reversed_keys.fingerprint(model="a") == elsewhere.fingerprint(model="a") == own
    changed = copy.deepcopy(values)
    match data.draw(st.sampled_from(["model", "budget", "steps", "seed", "value", "mode", "skip_first", "identity"])):
        case "model":
            changed["model"] += "x"
        case "budget":
            changed["search"]["budget"] *= 2
        case "steps":
            changed["search"]["steps"] += 1
        case "seed":
            changed["prompts"]["seed"] = changed["prompts"].get("seed", 0) + 1
        case "value":
            changed["clamps"][0]["value"] += 1
        case "mode":
            changed["clamps"][0]["mode"] = "set" if changed["clamps"][0]["mode"] != "set" else "floor"
        case "skip_first":
            changed["skip_first"] = 5
        case _:
            assert Config.model_validate(values).fingerprint(model="b") != own
            return
    assert Config.model_validate(changed).fingerprint(model="a") != own


@given(configurations(), st.text(min_size=1, max_size=8))
def test_a_key_that_is_not_known_is_refused_in_one_line(values: dict[str, Any], key: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps({**values, "x" + key: 1}))
        with pytest.raises(InputError) as refused:
            load_config(path)
    assert len(str(refused.value).splitlines()) == 1


@given(st.integers(0, 999), st.sampled_from(["pre", "post"]), st.integers(0, 999))
def test_a_place_survives_its_name_and_after_a_block_is_before_the_next(layer: int, point: Any, other: int) -> None:
    site = Site(layer, point)
    assert Site.from_hook_name(site.hook_name) == site
    assert Site(layer, "post").index == Site(layer + 1, "pre").index
    assert (Site(layer, point).index < Site(other, point).index) == (layer < other)
