"""Configurations: what a good file resolves to, and the one line that a bad one gets."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from recover.evidence.rules import Rules
from recover.evidence.transfer import FitSchedule
from recover.protocol.plan import Plan, TransferPlan
from recover.run.config import DEFAULTS, Selection, load_config
from recover.search.ascent import Schedule
from recover.types import InputError, Surface

IOI = Path(__file__).parent.parent / "analyses" / "ioi_smollm2.yaml"

GOOD = """\
model: smollm2
clamps:
  - sae: smollm2-l15
    features: {select: attribution, top: 64}
    mode: set
    value: -5.0
skip_first: 1
task: ioi
prompts: {n: 64, seed: 0}
search: {budget: 20.0}
"""


@pytest.fixture
def write(tmp_path):
    """Write GOOD to a file, one passage replaced."""

    def edited(old="", new="", text=GOOD):
        assert text.count(old) >= 1
        path = tmp_path / "defense.yaml"
        path.write_text(text.replace(old, new, 1))
        return path

    return edited


def test_committed_analysis_is_the_issue_setting():
    config = load_config(IOI)
    (clamp,) = config.clamps
    assert (config.model, config.task, clamp.sae) == ("smollm2", "ioi", "smollm2-l15")
    assert clamp.features == Selection(select="attribution", top=64)
    assert (clamp.mode, clamp.value, clamp.only_active, clamp.positions) == ("set", -5.0, True, "all")
    assert config.skip_first == 1
    assert (config.prompts.n, config.prompts.seed, config.prompts.file) == (64, 0, None)
    assert (config.search.budget, config.search.placement) == (20.0, "after_clamp")


def test_no_file_is_the_committed_analysis():
    assert load_config() == load_config(IOI)


def test_defaults_are_filled_in(write):
    config = load_config(write())
    assert config == load_config()
    assert (config.dtype, config.device, config.batch_size) == ("float32", "auto", "auto")
    assert (config.search.positions, config.search.sites) == (None, "first")


def test_resolved_file_reads_back_equal(write, tmp_path):
    config = load_config(write("{select: attribution, top: 64}", "[7, 3]"), {"device": "cpu", "batch_size": 4})
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.dump_yaml())
    assert load_config(resolved) == config
    assert yaml.safe_load(config.dump_yaml())["clamps"][0]["features"] == [7, 3]


def test_flags_override_the_file_and_none_does_not(write):
    flags = {"search.budget": 3, "clamps.value": 0.0, "prompts.seed": None, "clamps.features": [1, 2]}
    config = load_config(write(), flags)
    assert (config.search.budget, config.clamps[0].value, config.prompts.n) == (3.0, 0.0, 64)
    assert config.clamps[0].features == (1, 2)


def test_flags_change_every_clamp_and_leave_the_defaults_alone(write):
    second = "  - {sae: other, features: [1], mode: scale, value: 2.0}\nskip_first"
    config = load_config(write("skip_first", second), {"clamps.value": 0.5})
    assert [clamp.value for clamp in config.clamps] == [0.5, 0.5]
    load_config(None, {"clamps.value": 0.5})
    assert DEFAULTS["clamps"][0]["value"] == -5.0


OWN = "python:task_of_mine:task"
OWN_TASK = """
from __future__ import annotations

def task(model, *, domain: str, twice: bool = False, progress=None):
    raise NotImplementedError
"""


def test_options_are_those_of_the_task_and_of_its_types(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task_of_mine.py").write_text(OWN_TASK)

    def read(prompts):
        return load_config(write("task: ioi\nprompts: {n: 64, seed: 0}", f"task: {OWN}\nprompts: {prompts}"))

    config = read("{domain: rivers, twice: true}")
    assert config.prompts.model_dump(exclude_none=True) == {"seed": 0, "domain": "rivers", "twice": True}
    for prompts, why in [
        ("{domain: 3}", r"prompts\.domain: must be a valid string \(given: 3\)"),
        ("{twice: true}", r"prompts\.domain: this key is required"),
        ("{domain: rivers, n: 3}", r"prompts\.n: the task .* has no such option; it has: domain, twice"),
        ("{domain: rivers, seed: 3}", r"prompts\.seed: the task .* has no such option"),
        ("{domain: rivers, progress: 3}", r"prompts\.progress: the task .* has no such option"),
    ]:
        with pytest.raises(InputError, match=why):
            read(prompts)


@pytest.mark.parametrize("text", ["1e1", "1.0e+1", "10", "+1E1"])
def test_numbers_in_every_usual_spelling(write, text):
    assert load_config(write("20.0", text)).search.budget == 10.0


@pytest.mark.parametrize(
    ("old", "new", "where", "why"),
    [
        ("model:", "modle:", "modle", "did you mean 'model'?"),
        ("top:", "tap:", "clamps[0].features.tap", "did you mean 'top'?"),
        ("mode:", "mod:", "clamps[0].mod", "did you mean 'mode'?"),
        ("budget:", "buget:", "search.buget", "did you mean 'budget'?"),
        ("task:", "zzz: 1\ntask:", "zzz", "known keys: model, clamps"),
        ("task:", "3: 1\ntask:", "3", "unknown key"),
        ("task: ioi\n", "", "task", "required"),
        ("    mode: set\n", "", "clamps[0].mode", "required"),
        ("20.0", "0", "search.budget", "greater than 0"),
        ("20.0", "-1.5", "search.budget", "greater than 0"),
        ("20.0", ".nan", "search.budget", "finite"),
        ("20.0", ".inf", "search.budget", "finite"),
        ("20.0", "'20'", "search.budget", "number"),
        ("20.0", "true", "search.budget", "number"),
        ("-5.0", ".nan", "clamps[0].value", "finite"),
        ("{select: attribution, top: 64}", "[3, -2]", "clamps[0].features[1]", "(given: -2)"),
        ("{select: attribution, top: 64}", "[3, 9, 3]", "clamps[0].features", "feature 3 is listed more"),
        ("{select: attribution, top: 64}", "[]", "clamps[0].features", "must not be empty"),
        ("{select: attribution, top: 64}", "7", "clamps[0].features", "must be a list"),
        ("{select: attribution, top: 64}", "[true]", "clamps[0].features[0]", "integer"),
        ("attribution", "magic", "clamps[0].features.select", "'attribution'"),
        ("top: 64", "top: 0", "clamps[0].features.top", "greater than 0"),
        ("mode: set", "mode: sett", "clamps[0].mode", "'set', 'scale' or 'floor'"),
        ("value: -5.0", "positions: answr\n    value: 1", "clamps[0].positions", "'answer'"),
        ("n: 64", "n: 6.5", "prompts.n", "integer"),
        ("seed: 0", "seed: -1", "prompts.seed", "greater than or equal to 0"),
        ("seed: 0", "templates: [ABAB]", "prompts.templates[0]", "'BABA' or 'ABBA'"),
        ("{n: 64, seed: 0}", "[64]", "prompts", "section"),
        ("task:", "device: gpu\ntask:", "device", "cuda"),
        ("task:", "dtype: float16\ntask:", "dtype", "'bfloat16'"),
        ("task:", "batch_size: 0\ntask:", "batch_size", "whole number from 1"),
        ("task:", "batch_size: true\ntask:", "batch_size", "whole number from 1"),
        ("smollm2\n", "''\n", "model", "must not be empty"),
        ("{budget: 20.0}", "{budget: 20.0, curve: [1.0, 0]}", "search.curve[1]", "greater than 0"),
        ("{budget: 20.0}", "{budget: 20.0, curve: 1.0}", "search.curve", "must be a list"),
        ("task:", "controls: {seed: -1}\ntask:", "controls.seed", "greater than or equal to 0"),
        ("task:", "controls: {seed: 2147483648}\ntask:", "controls.seed", "less than 2147483648"),
        ("task:", "controls: {random_drws: 1}\ntask:", "controls.random_drws", "did you mean 'random_draws'?"),
        ("task:", "controls: {random_draws: 0}\ntask:", "controls.random_draws", "greater than 0"),
        ("task:", "controls: {placebo_features: -1}\ntask:", "controls.placebo_features", "greater than or equal to 0"),
        ("task:", "controls: {max_loss_increase: .inf}\ntask:", "controls.max_loss_increase", "finite"),
        ("task:", "transfer: {folds: 3}\ntask:", "transfer.folds", "1 or 2"),
        ("task:", "transfer: {norms: [-0.5]}\ntask:", "transfer.norms[0]", "greater than 0"),
        ("task:", "transfer: {shuffles: 0}\ntask:", "transfer.shuffles", "greater than 0"),
        ("task:", "transfer: [0.5]\ntask:", "transfer", "section"),
        ("task:", "rules: {alpha: 1.5}\ntask:", "rules.alpha", "less than or equal to 1"),
        ("task:", "rules: {most: -0.5}\ntask:", "rules.most", "greater than or equal to 0"),
        ("task:", "rules: {min_heldout: 0}\ntask:", "rules.min_heldout", "greater than 0"),
        ("task:", "rules: {min_heldot: 1}\ntask:", "rules.min_heldot", "did you mean 'min_heldout'?"),
    ],
)
def test_bad_values_are_named_in_one_line(write, old, new, where, why):
    path = write(old, new)
    with pytest.raises(InputError) as raised:
        load_config(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: {where}: ")
    assert why in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: a\nclamps: ]\n", 2),
        ("model: a\nmodel: b\n", 2),
        ("model: a\n\ttask: b\n", 2),
        ("model: a\n? [b]\n: c\n", 2),
        ("model: a\nclamps:\n  - sae: x\n    sae: y\n", 4),
        ("model: !!python/name:os.system\n", 1),
    ],
)
def test_bad_yaml_is_named_by_line(write, text, line):
    path = write(text=text)
    with pytest.raises(InputError) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"{path}, line {line}: not valid YAML (")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"text", b"\xff\xfe\x00", b"model: \x00"])
def test_files_that_are_no_configuration(tmp_path, content):
    path = tmp_path / "defense.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"^[^\n]*defense.yaml[^\n]*$"):
        load_config(path)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "none.yaml")


def test_bad_flags_are_named(write):
    with pytest.raises(InputError, match=r"^flags: search.budget: must be greater than 0"):
        load_config(None, {"search.budget": -1.0})
    with pytest.raises(InputError, match=r"defense.yaml and flags: search.budget: must be greater than 0"):
        load_config(write(), {"search.budget": -1.0})


def test_by_default_the_plan_is_that_of_the_library():
    assert load_config().plan() == Plan()


def test_every_setting_of_the_protocol_reaches_its_plan(write):
    """Each key of the four sections, and nothing else of the plan."""
    sections = """\
search: {budget: 20.0, placement: before_clamp, steps: 19, restarts: 0, curve: [0.5, 1.0]}
transfer: {norms: [0.3], folds: 1, splits: 5, rules: 2, scales: [0.5, 1.0], shuffles: 2, draws: 13, steps: 17}
rules: {alpha: 0.05, rule_alpha: 0.04, fit_alpha: 0.03, share: 0.3, most: 0.6, max_chance: 0.2, min_heldout: 9}
controls: {seed: 7, random_draws: 11, planted_routes: 4, placebo_features: 0, max_loss_increase: 0.25}
"""
    assert load_config(write("search: {budget: 20.0}\n", sections)).plan() == replace(
        Plan(),
        seed=7,
        curve=(0.5, 1.0),
        random_draws=11,
        planted_routes=4,
        placebo_features=0,
        max_loss_increase=0.25,
        schedule=Schedule(steps=19, restarts=0, seed=7),
        surface=Surface(placement="before_clamp"),
        transfer=TransferPlan(
            norms=(0.3,),
            folds=1,
            splits=5,
            rules=2,
            scales=(0.5, 1.0),
            shuffles=2,
            draws=13,
            fit=FitSchedule(steps=17),
        ),
        rules=Rules(alpha=0.05, rule_alpha=0.04, fit_alpha=0.03, share=0.3, most=0.6, max_chance=0.2, min_heldout=9),
    )


def test_a_section_may_be_given_in_part(write):
    plan = load_config(write("task:", "rules: {alpha: 0.05}\ntask:"), {"controls.seed": 3}).plan()
    assert load_config(None, {"search.sites": "every"}).plan().surface == Surface("every")
    assert plan == replace(Plan(), seed=3, schedule=Schedule(seed=3), rules=Rules(alpha=0.05))


def test_configurations_are_frozen(write):
    with pytest.raises(ValueError, match="frozen"):
        load_config(write()).search.budget = 1.0


CHANGES = {
    "model": "other",
    "task": "refusal",
    "dtype": "bfloat16",
    "skip_first": 0,
    "clamps.sae": "other",
    "clamps.features": [1],
    "clamps.mode": "floor",
    "clamps.value": 1.0,
    "clamps.only_active": False,
    "clamps.positions": "last",
    "prompts.n": 7,
    "prompts.seed": 1,
    "prompts.file": "mine.jsonl",
    "search.budget": 1.0,
    "search.placement": "before_clamp",
    "search.steps": 1,
    "search.curve": [0.5, 1.0],
    "controls.seed": 1,
    "controls.random_draws": 10,
    "controls.planted_routes": 10,
    "controls.placebo_features": 0,
    "controls.max_loss_increase": 1.0,
    "transfer.norms": [0.5],
    "transfer.folds": 1,
    "transfer.splits": 1,
    "transfer.rules": 2,
    "transfer.scales": [1.0],
    "transfer.shuffles": 2,
    "transfer.draws": 10,
    "transfer.steps": 10,
    "rules.alpha": 0.05,
    "rules.most": 0.6,
    "rules.max_chance": 0.2,
    "rules.min_heldout": 9,
    "rules.rule_alpha": 0.2,
    "rules.fit_alpha": 0.2,
    "rules.share": 0.3,
    "rules.correlate": 0.9,
    "rules.correlate_alpha": 0.1,
    "rules.trace": 0.2,
    "rules.tie": 0.1,
    "rules.found": 0.8,
    "search.positions": "answer",
    "search.sites": "every",
    "search.restarts": 3,
    "certificates": "float64",
}
OPTIONS = {
    ("ioi", "templates"): ["BABA"],
    ("ioi", "candidates"): 20,
    ("ioi", "frames"): 1,
    ("refusal", "forced_tokens"): 3,
    ("refusal", "reply_tokens"): 9,
    ("refusal", "declined"): 5,
}
CONTRAST = {"clamps.features": {"select": "contrast", "top": 3}}


@pytest.mark.parametrize(("key", "value"), CHANGES.items())
def test_fingerprint_changes_with_the_result(key, value):
    assert load_config(None, {key: value}).fingerprint() != load_config().fingerprint()


@pytest.mark.parametrize(("option", "value"), OPTIONS.items())
def test_fingerprint_changes_with_an_option_of_the_task(option, value):
    task, key = option
    changed = load_config(None, {"task": task, f"prompts.{key}": value})
    assert changed.fingerprint() != load_config(None, {"task": task}).fingerprint()


def test_fingerprint_keeps_through_what_cannot_change_the_result(write):
    config = load_config()
    assert load_config(None, {"device": "cuda:1", "batch_size": 3, "threads": 4}).fingerprint() == config.fingerprint()
    assert load_config(write("20.0", "2e1")).fingerprint() == config.fingerprint()
    assert config.fingerprint(model="a") != config.fingerprint(model="b") != config.fingerprint()


def test_every_setting_is_fingerprinted_or_named_as_harmless():
    settings = set()
    for name, value in load_config().canonical().items():
        section = value[0] if name == "clamps" else value
        settings |= {f"{name}.{key}" for key in section} if isinstance(section, dict) else {name}
    assert settings == {*CHANGES, "clamps.unit", "device", "device_map", "batch_size", "threads", "published"}


def test_a_mean_is_of_features_by_contrast():
    by_mean = load_config(None, {**CONTRAST, "clamps.unit": "mean"})
    assert by_mean.fingerprint() != load_config(None, CONTRAST).fingerprint()
    with pytest.raises(InputError, match=r"clamps\[0\]: unit: mean is for features by contrast"):
        load_config(None, {"clamps.unit": "mean"})


def test_a_delta_at_every_site_enters_after_the_clamps():
    with pytest.raises(InputError, match=r"search\.placement: a delta at every clamped site"):
        load_config(None, {"search.sites": "every", "search.placement": "before_clamp"})
