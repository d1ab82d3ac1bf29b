"""Laws of what is stored: records, configurations, fingerprints, sites, and the verdict that records support."""

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
from scipy.stats import binomtest

from property_tests.guards import guards
from recover.evidence.readings import Reading
from recover.evidence.rules import Rules
from recover.protocol.records import CertificateRecord, ExampleRecord, PlaceboRecord, SearchRecord, SmallestRecord
from recover.protocol.verdict_model import Verdict
from recover.run.config import Config, load_config
from recover.search.ascent import Status
from recover.search.solvers import SOLVERS
from recover.types import InputError, Site
from tests.hand_made import at_smallest, certified, conclude, flip, missed, placebo, transfer
from tests.readings_by_hand import other, table

finite = st.floats(allow_nan=False, allow_infinity=False)
norms = st.floats(min_value=0, allow_nan=False)
LISTS = ("preactivation_shift", "threshold_margin")
COUNTS = ("dormant", "reactivated")


@st.composite
def certificates(draw: st.DrawFn, numbers: st.SearchStrategy[float] = finite) -> CertificateRecord:
    k = draw(st.integers(1, 3))
    values: dict[str, Any] = {}
    for field in fields(CertificateRecord):
        if field.name in ("shows", "held"):
            values[field.name] = draw(st.booleans())
        elif field.name in LISTS:
            values[field.name] = tuple(draw(st.lists(numbers | st.none(), min_size=k, max_size=k)))
        else:
            values[field.name] = draw(numbers if field.name in COUNTS else numbers | st.none())
    return CertificateRecord(**values)


def shortened(facts: CertificateRecord) -> SmallestRecord:
    return SmallestRecord(**{field.name: getattr(facts, field.name) for field in fields(SmallestRecord)})


searched = st.builds(
    SearchRecord,
    status=st.sampled_from([status.name for status in Status]),
    steps=st.integers(0, 500),
    score=finite,
    slack=finite,
    smallest=norms,
    winner=st.none() | st.sampled_from(list(SOLVERS)),
    by_solver=st.dictionaries(st.text(), norms, max_size=4),
    draws_reached=st.floats(0, 1),
)
compared = st.builds(PlaceboRecord, slack=finite, smallest=norms, within=st.booleans())
records = st.builds(
    ExampleRecord,
    id=st.text(min_size=1),
    base_slack=finite,
    defended_slack=finite,
    strict_base_slack=finite,
    strict_defended_slack=finite,
    search=st.none() | searched,
    certificate=st.none() | certificates(),
    smallest=st.none() | certificates().map(shortened),
    placebo=st.none() | compared,
    write_orthogonal=st.none() | compared,
    reached_at=st.none() | st.dictionaries(st.text(), st.booleans(), max_size=3),
    longer=st.none() | st.booleans(),
    undefended=st.none() | st.booleans(),
    text=st.none() | st.text(),
)


@guards(
    ExampleRecord.from_json,
    "values = json.loads(line)\n",
    "values = json.loads(line, parse_float=lambda text: round(float(text), 6))\n",
)
@given(records)
def test_a_record_is_read_back_as_it_was_written(record: ExampleRecord) -> None:
    """To the last digit, whatever the text holds; and it is one line of strict JSON."""
    line = record.to_json()
    assert "\n" not in line
    assert ExampleRecord.from_json(line) == record
    json.loads(line, parse_constant=pytest.fail)
    assert ("text" in json.loads(line)) == (record.text is not None)


@guards("recover.protocol.records.Number", "math.nan if value is None else value", "0.0 if value is None else value")
@given(records, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_value_that_is_not_finite_is_read_back_as_nan(record: ExampleRecord, bad: float) -> None:
    """No comparison with NaN holds, so the behavior shows neither at base nor when defended."""
    line = replace(record, base_slack=bad).to_json()
    json.loads(line, parse_constant=pytest.fail)
    read = ExampleRecord.from_json(line)
    assert math.isnan(read.base_slack)
    assert not read.shows_at_base
    assert not read.valid_flip


@guards("recover.protocol.records.Norm", "math.inf if value is None else value", "math.nan if value is None else value")
@given(records, st.sampled_from([math.nan, math.inf]))
def test_a_norm_that_is_not_finite_is_read_back_as_infinity(record: ExampleRecord, bad: float) -> None:
    """Infinity is larger than any budget."""
    record = replace(record, placebo=PlaceboRecord(0.0, bad, False))
    line = record.to_json()
    json.loads(line, parse_constant=pytest.fail)
    read = ExampleRecord.from_json(line)
    assert read.placebo is not None
    assert read.placebo.smallest == math.inf


moderate = st.floats(-1e3, 1e3)
sizes = st.floats(0, 1e3) | st.just(math.inf)
placebos = st.none() | sizes.map(placebo)
BUDGETS = (1.0, 2.5, 5.0, 10.0, 20.0, 40.0)


@st.composite
def wild_flips(draw: st.DrawFn, record: ExampleRecord) -> ExampleRecord:
    """This flip, searched, with a certificate that may say anything, and need not agree with the search."""
    facts, smallest = draw(certificates(st.floats(0, 1e3))), draw(certificates(st.floats(0, 1e3)))
    facts = replace(facts, reactivated=0.0, dormant=2.0, defended_slack=record.defended_slack)
    by_solver = {name: draw(sizes) for name in SOLVERS}
    least = min(by_solver.values())
    winner = None if math.isinf(least) else min(by_solver, key=by_solver.__getitem__)
    status, steps = draw(st.sampled_from([status.name for status in Status])), draw(st.integers(0, 9))
    search = SearchRecord(status, steps, 1.0, draw(moderate), least, winner, by_solver, draw(st.floats(0, 1)))
    return replace(
        record,
        search=search,
        certificate=facts,
        smallest=shortened(smallest),
        placebo=draw(placebos),
        write_orthogonal=draw(placebos),
        reached_at={f"{budget:g}": draw(st.booleans()) for budget in BUDGETS},
        longer=draw(st.booleans()),
        undefended=draw(st.booleans()),
    )


@st.composite
def tame_flips(draw: st.DrawFn, name: str) -> ExampleRecord:
    """A flip that was searched as it should be, though features may have moved."""
    near = draw(st.sampled_from([0.5, 3.0, 8.0, 30.0, math.inf]))
    facts = {
        "norm": draw(st.sampled_from([0.5, 4.0, 15.0, 20.0])),
        "held": draw(st.sampled_from([True, True, False])),
        "displacement": draw(st.sampled_from([1.0, 8.0, None])),
    }
    if draw(st.booleans()):
        record = flip(name, near=min(near, 16.0), **facts)
    else:
        record = missed(name, near=near, status=draw(st.sampled_from(["EXHAUSTED", "UNMOVED"])), **facts)
    record = at_smallest(record, held=draw(st.sampled_from([True, True, False])))
    return replace(record, placebo=draw(placebos), write_orthogonal=draw(placebos))


@st.composite
def runs(draw: st.DrawFn) -> list[ExampleRecord]:
    """Records as a check leaves them: certificates of valid flips, of one number of features, and of no others."""
    found, wild = [], draw(st.sampled_from([True, False, False]))
    for index in range(draw(st.integers(1, 8))):
        record = ExampleRecord(f"e{index}", *(draw(moderate) for _ in range(4)))
        if draw(st.booleans()):
            record = replace(record, base_slack=1.0, defended_slack=-draw(st.floats(0, 9)))
        if record.valid_flip:
            record = draw(wild_flips(record) if wild else tame_flips(record.id))
        found.append(record)
    if draw(st.sampled_from([True, False, False])):
        found.append(certified(draw(tame_flips("longer than the budget")), norm=25.0))
    return found


@st.composite
def recovered_runs(draw: st.DrawFn) -> list[ExampleRecord]:
    """Flips that a search brought back within the budget, and nothing that would keep a verdict from saying so."""
    near = draw(st.lists(st.sampled_from([0.5, 3.0, 8.0]), min_size=1, max_size=8))
    return [replace(flip(f"e{index}", near=norm), placebo=draw(placebos)) for index, norm in enumerate(near)]


BACK, STILL = (0, 4, 11, 14, 15, 16, 17, 20, 24), (0, 3, 4, 6)


@st.composite
def readings(draw: st.DrawFn) -> dict[str, Any]:
    """What shared perturbations made of 24 flips and 6 others: nothing, a part, or all comes back."""
    found = table(
        back=draw(st.sampled_from(BACK)),
        still=draw(st.sampled_from(STILL)),
        dealt=Reading(draw(st.sampled_from([0, 25, 26])), 100),
        planted=draw(st.sampled_from([None, Reading(8, 8), Reading(4, 8)])),
    )
    others = tuple(other("another", found.own, norm) for norm in draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]))))
    return {"transfer": transfer(), "table": replace(found, others=others)}


def _size(norm: float | None) -> float:
    return math.inf if norm is None else norm


def verdict_of(records: list[ExampleRecord], read: dict[str, Any] | None = None) -> Verdict:
    return conclude(*records, curve=BUDGETS, **(read or {}))


def back_with_the_clamp_held(record: ExampleRecord) -> bool:
    """By the certificate of the delta within the budget, or by that of a smaller one that is within it as well."""
    main, least = record.certificate, record.smallest
    if main is not None and main.shows and main.held:
        return True
    return least is not None and least.shows and least.held and least.norm is not None and least.norm <= 20


def rounded(value: Any) -> Any:
    """Leave out the last digits, which depend on the order of a sum."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


@guards(
    "recover.protocol.verdict.counts",
    "base=sum(r.shows_at_base for r in records)",
    "base=int(records[0].shows_at_base)",
)
@given(runs(), st.randoms())
def test_a_verdict_does_not_depend_on_the_order_of_records_and_counts_them_once(
    found: list[ExampleRecord], random: Any
) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)
    one, other = verdict_of(found), verdict_of(shuffled)
    assert one.verdict == other.verdict
    for name in ("recovery", "minimum_norm", "curve", "controls"):
        ours, theirs = (one.to_dict()[name], other.to_dict()[name])
        assert rounded(ours) == rounded(theirs), name
    assert one.counts == other.counts
    flips = [record for record in found if record.base_slack > 0 and not record.defended_slack > 0]
    back = [record for record in flips if back_with_the_clamp_held(record)]
    assert (one.counts.valid_flips, one.recovery.recovered) == (len(flips), len(back))
    low, high = one.recovery.wilson95
    assert not flips or low <= one.recovery.rate <= high


@guards("recover.protocol.gates._held", "residual <= MAX_CONSTRAINT_RESIDUAL and longest <= budget", "True")
@given(runs())
def test_a_verdict_says_no_more_than_its_gates_and_certificates_support(found: list[ExampleRecord]) -> None:
    """INVALID and INCONCLUSIVE name a gate that failed; RECOVERABLE needs one certificate, whatever the solver says."""
    verdict = verdict_of(found)
    failed = {gate.name for gate in verdict.gates if gate.passed is False and gate.decides is not None}
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
    long = [r.certificate for r in found if r.certificate and (r.certificate.norm is None or r.certificate.norm > 20)]
    assert not long or verdict.verdict in ("INVALID", "INCONCLUSIVE")
    assert not any(word in " ".join(verdict.reasons) for word in ("robust", "safe"))
    json.dumps(verdict.to_dict(), allow_nan=False)


@guards(
    "recover.protocol.verdict.nearest",
    "if c is not None and c.shows and c.held]",
    "if c is not None and c.shows]",
)
@given(runs())
def test_a_larger_budget_of_the_curve_holds_no_fewer_and_only_what_is_certified(found: list[ExampleRecord]) -> None:
    """Rates rise, and are shares of the flips."""
    verdict = verdict_of(found)
    near = []
    for record in found:
        if record.search is not None:
            both = [c for c in (record.certificate, record.smallest) if c is not None and c.shows and c.held]
            near.append(min((c.norm for c in both if c.norm is not None), default=math.inf))
    rates = [point.rate for point in verdict.curve]
    assert rates == sorted(rates)
    assert len(rates) == (len(BUDGETS) if near else 0)
    for point in verdict.curve:
        low, high = point.wilson95
        assert low <= point.rate <= high
        assert point.rate == sum(norm <= point.budget for norm in near) / len(near)
    assert (verdict.minimum_norm is None) == (not near)
    if verdict.minimum_norm is not None:
        low, high = verdict.minimum_norm.quartiles
        assert _size(low) <= _size(verdict.minimum_norm.median) <= _size(high)
        first, last = verdict.minimum_norm.interval95
        assert _size(first) <= _size(last)
        assert verdict.minimum_norm.unreached == sum(math.isinf(norm) for norm in near)


@guards(
    "recover.protocol.verdict.decide",
    'content=known.content.by.content if known is not None and kind == "RECOVERABLE" else None',
    "content=known.content.by.content if known is not None else None",
)
@guards(
    "recover.evidence.content._reason",
    "found.back.interval95[0] > rules.share",
    "found.back.interval95[1] > rules.share",
)
@guards("recover.evidence.content._reason", "table.dealt.rate > rules.max_chance", "table.dealt.rate > 1")
@guards("recover.evidence.content._reason", "found.kept.rate <= rules.most", "found.kept.rate < 0")
@given(runs() | recovered_runs() | recovered_runs(), readings())
def test_only_of_what_is_recoverable_the_answers_can_be_read_and_only_where_most_come_back(
    found: list[ExampleRecord], shared: dict[str, Any]
) -> None:
    """Whatever was read; and the verdict itself does not depend on it."""
    verdict, without, read = verdict_of(found, shared), verdict_of(found), shared["table"]
    assert verdict.verdict == without.verdict
    assert without.content is without.rule is None
    if verdict.content is None and verdict.rule is None:
        return
    assert verdict.verdict == "RECOVERABLE"
    assert read.dealt.rate <= Rules().max_chance
    back, still = (int(read.right[0][rows].sum()) for rows in (read.flips, ~read.flips))
    if verdict.content:
        assert binomtest(back, 24).proportion_ci(0.95, method="wilson").low > Rules().share
    if verdict.content or verdict.rule:
        assert still > Rules().most * 6
    if verdict.content is False:
        # At most 15 % of 24 beyond the first: none, by Clopper and Pearson.
        assert back <= 1
        assert read.planted == Reading(8, 8)
    if verdict.rule:
        assert all(float(one.norms[0, 0]) == 2.0 for one in read.others)


seeds, shares = st.integers(0, 9), st.floats(0.01, 1)


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
        "task": draw(st.sampled_from(["ioi", "python:recover.tasks.ioi:make_examples"])),
        "prompts": draw(st.fixed_dictionaries({"n": st.integers(1, 99)}, optional={"seed": st.integers(0, 9)})),
        "search": {
            "budget": draw(st.floats(1e-3, 1e3)),
            "steps": draw(st.integers(1, 500)),
            "curve": draw(st.lists(st.floats(0.1, 10), max_size=3)),
        },
        "controls": draw(st.fixed_dictionaries({}, optional={"seed": seeds, "placebo_features": st.integers(0, 5)})),
        "transfer": draw(
            st.fixed_dictionaries(
                {}, optional={"norms": st.lists(shares, max_size=3), "folds": st.sampled_from([1, 2])}
            )
        ),
        "rules": draw(st.fixed_dictionaries({}, optional={"alpha": shares, "min_heldout": st.integers(1, 99)})),
        "device": draw(st.sampled_from(["auto", "cpu", "cuda", "cuda:1"])),
        "batch_size": draw(st.sampled_from(["auto", 1, 7])),
    }


@guards(
    Config.dump_yaml,
    "return yaml.safe_dump(self.canonical(), sort_keys=False)",
    'return yaml.safe_dump({**self.canonical(), "skip_first": 3}, sort_keys=False)',
)
@given(configurations())
def test_a_configuration_is_read_back_from_its_yaml_unchanged(values: dict[str, Any]) -> None:
    config = Config.model_validate(values)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(config.dump_yaml())
        again = load_config(path)
    assert again == config
    assert again.plan() == config.plan()
    assert again.fingerprint(model="a") == config.fingerprint(model="a")


@guards("recover.run.config.HARMLESS", 'HARMLESS = ("device",', 'HARMLESS = ("skip_first", "model", "device",')
@given(configurations(), st.data())
def test_a_fingerprint_is_of_what_can_change_a_result_and_of_nothing_else(
    values: dict[str, Any], data: st.DataObject
) -> None:
    """The order of keys, the device and the batch size do not change it."""
    own = Config.model_validate(values).fingerprint(model="a")
    reversed_keys = Config.model_validate(dict(reversed(values.items())))
    elsewhere = Config.model_validate({**values, "device": "mps", "batch_size": 3})
    assert reversed_keys.fingerprint(model="a") == elsewhere.fingerprint(model="a") == own
    changed = copy.deepcopy(values)
    whats = "model budget steps seed value mode skip_first curve control_seed folds alpha identity"
    match data.draw(st.sampled_from(whats.split())):
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
        case "curve":
            changed["search"]["curve"] = [*changed["search"]["curve"], 3.0]
        case "control_seed":
            changed["controls"]["seed"] = changed["controls"].get("seed", 0) + 1
        case "folds":
            changed["transfer"]["folds"] = 3 - changed["transfer"].get("folds", 2)
        case "alpha":
            changed["rules"]["alpha"] = 0.5 * changed["rules"].get("alpha", 0.01)
        case _:
            assert Config.model_validate(values).fingerprint(model="b") != own
            return
    assert Config.model_validate(changed).fingerprint(model="a") != own


@guards(
    "recover.run.config._Section._known_keys",
    "shown = str(key) if str(key).isprintable() else ascii(key)",
    "shown = str(key)",
)
@given(configurations(), st.text(min_size=1, max_size=8))
def test_a_key_that_is_not_known_is_refused_in_one_line(values: dict[str, Any], key: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps({**values, "x" + key: 1}))
        with pytest.raises(InputError) as refused:
            load_config(path)
    assert len(str(refused.value).splitlines()) == 1


@guards(Site.index, 'return self.layer + (self.point == "post")', "return self.layer")
@given(st.integers(0, 999), st.sampled_from(["pre", "post"]), st.integers(0, 999))
def test_a_site_is_read_back_from_its_name_and_after_a_block_is_before_the_next(
    layer: int, point: Any, other: int
) -> None:
    site = Site(layer, point)
    assert Site.from_hook_name(site.hook_name) == site
    assert Site(layer, "post").index == Site(layer + 1, "pre").index
    assert (Site(layer, point).index < Site(other, point).index) == (layer < other)
