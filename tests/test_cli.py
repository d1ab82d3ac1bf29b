"""`recover` as a user meets it: verdicts, exit codes, the one line that bad input gets, and runs that are killed."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import tiny
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoTokenizer

from recover import cli
from recover.defenses import selection
from recover.protocol.folder import CONFIG, DELTAS, EXAMPLES, MARKDOWN, REPORT, RUN, SEEDS, UNITS, VERDICT, RunFolder
from recover.protocol.phases import PHASES
from recover.protocol.plan import Plan
from recover.run import progress, runner, setting
from recover.run.config import load_config
from recover.tasks import ioi
from tests.hand_made import PROVENANCE, SHOWS_THROUGHOUT, conclude, flip, transfer

N, BATCH = 40, 16
SCHEMA = json.loads(resources.files("recover.protocol").joinpath("verdict.schema.json").read_text())
ARTIFACTS = {CONFIG, DELTAS, EXAMPLES, MARKDOWN, REPORT, RUN, UNITS, VERDICT}
TIMES = ("seconds", "phases", "phase_seconds")
"""What of the provenance differs from run to run."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The tiny model, its SAEs and `defense.yaml`."""
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def _no_progress_lines(monkeypatch):
    """However slow this machine is, stderr holds only what is wrong."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", math.inf)


@pytest.fixture
def recover(root, tmp_path, capsys):
    """Run `recover check` on defense.yaml with flags; gives exit status, stdout and stderr."""

    def run(*flags, out=tmp_path / "out", defense=root / "defense.yaml"):
        return call(capsys, "check", defense, "--out", out, *flags)

    return run


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A finished run of defense.yaml in three batches; copy it before changing it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["check", str(root / "defense.yaml"), "--out", str(out), "--batch-size", str(BATCH)]) == 0
    return out


@pytest.fixture
def earlier(finished, tmp_path):
    """A copy of the finished run, where `recover` writes."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def call(capsys, *arguments):
    capsys.readouterr()
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


def refused(result, *parts):
    """Whether it is unusable input, told in one line that has all of these parts."""
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("recover")
    assert len(err) < 400
    for part in parts:
        assert part in err
    return True


def verdict_of(out, *, times=False):
    verdict = json.loads((out / VERDICT).read_text())
    for name in () if times else TIMES:
        del verdict["provenance"][name]
    return verdict


def contents(out):
    """Every file of a folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def lines_of(out):
    return (out / EXAMPLES).read_text().splitlines() if (out / EXAMPLES).exists() else []


def units_of(out, *, times=False):
    """What the units on disk say, by their names."""
    units = {}
    for path in (out / UNITS).glob("*.json") if (out / UNITS).exists() else ():
        unit = json.loads(path.read_text())
        assert path.stem == unit["unit"].replace("/", "-")
        if not times:
            del unit["values"]["seconds"]
        units[unit["unit"]] = unit
    return units


# A whole check


def test_a_whole_check_by_its_defaults(recover, root, tmp_path):
    """All that the defaults ask for, where other tests ask for little of each."""
    settings = tiny.configuration(root)
    del settings["controls"], settings["transfer"], settings["search"]["curve"]
    defense = tmp_path / "defense.yaml"
    defense.write_text(yaml.safe_dump(settings))
    code, said, err = recover("--batch-size", BATCH, defense=defense)
    assert (code, err) == (0, "")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} - {".lock"} == ARTIFACTS
    verdict = verdict_of(out, times=True)
    jsonschema.validate(verdict, SCHEMA)
    assert verdict["verdict"] == "RECOVERABLE"
    assert said.startswith("RECOVERABLE: the behavior can be recovered with the clamp held")
    assert said.endswith(f"Artifacts: {out}\n")

    rows = [json.loads(line) for line in (out / EXAMPLES).read_text().splitlines()]
    flips = [row for row in rows if row["valid_flip"]]
    assert verdict["counts"] == {
        "n": N,
        "base": sum(row["base_slack"] > 0 for row in rows),
        "defended": sum(row["defended_slack"] > 0 for row in rows),
        "valid_flips": len(flips),
        "strict_flips": sum(row["strict_base_slack"] > 0 >= row["strict_defended_slack"] for row in rows),
    }
    assert len(rows) == N
    assert 5 <= len(flips) == sum(row["base_slack"] > 0 >= row["defended_slack"] for row in rows)
    assert verdict["recovery"]["recovered"] == sum(row["certificate"]["shows"] for row in flips) > 0
    for row in rows:
        if not row["valid_flip"]:
            assert {row[part] for part in ("search", "certificate", "smallest", "undefended")} == {None}

    plan, deltas = Plan(), load_file(out / DELTAS)
    shared = {name for name in deltas if name.startswith("transfer/")}
    assert set(deltas) - shared == {row["id"] + suffix for row in flips for suffix in ("", "/smallest")}
    assert {name.split("/")[2] for name in shared} >= {"c1", "c1_plus", "shuffled", "rule"}
    assert {(delta.dtype, delta.shape) for delta in deltas.values()} == {(torch.float32, (1, tiny.D_MODEL))}
    for row in flips:
        assert deltas[row["id"]].norm() == pytest.approx(row["certificate"]["norm"], rel=1e-6)
        assert deltas[row["id"] + "/smallest"].norm() == pytest.approx(row["smallest"]["norm"], rel=1e-6)
        assert row["certificate"]["norm"] <= 100

    assert [point["budget"] / 100 for point in verdict["curve"]] == pytest.approx(plan.curve)
    assert verdict["controls"]["placebo_features"]["draws"] == plan.placebo_features
    assert len(verdict["transfer"]["curve"]) == len(plan.transfer.norms) + 1
    unseen = plan.transfer.splits * sum(
        row["valid_flip"] and row["strict_base_slack"] > 0 >= row["strict_defended_slack"] for row in rows
    )
    assert verdict["transfer"]["own"]["n"] == unseen >= 2
    assert verdict["knowledge"]["fits"] == plan.transfer.splits * plan.transfer.folds
    assert load_config(out / CONFIG) == load_config(defense, {"batch_size": BATCH})


def test_the_units_on_disk_are_the_phases_of_the_batches(finished):
    by_batch = [f"{phase}/{batch}" for phase in ("accounting", *PHASES) for batch in range(3)]
    once = ["fit", "utility", "undo", "health", "placebo_features/0", "transfer", "transfer/0", "transfer/1"]
    units = units_of(finished, times=True)
    assert sorted(units) == sorted([*by_batch, *once])
    # Each names the deltas that it speaks of, and all of those are in the file.
    assert sorted(name for unit in units.values() for name in unit["deltas"]) == sorted(load_file(finished / DELTAS))
    # `examples.jsonl` is what the units say of each example, by its id.
    rows = {row["id"]: row for row in map(json.loads, lines_of(finished))}
    for name in by_batch:
        for example, parts in units[name]["values"]["values"].items():
            assert {key: rows[example][key] for key in parts} == parts
    # And so are the times of the phases.
    provenance = verdict_of(finished, times=True)["provenance"]
    total = sum(unit["values"]["seconds"] for unit in units.values())
    assert sum(provenance["phases"].values()) == pytest.approx(1, abs=1e-4 * len(provenance["phases"]))
    assert provenance["phase_seconds"] == pytest.approx(total, abs=0.06)
    assert provenance["seconds"] >= provenance["phase_seconds"] - 0.1


def test_the_figures_that_are_known_beforehand(finished):
    verdict = verdict_of(finished)
    assert verdict["fit"]["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert verdict["fit"]["l0"] == tiny.D_MODEL
    assert verdict["provenance"]["seed"] == 0
    assert verdict["provenance"]["control_seed"] == 0
    assert verdict["threat_model"]["clamps"] == [
        {"site": tiny.SITE, "k": 6, "mode": "set", "value": 80.0, "only_active": False, "positions": "all"}
    ]
    rows = [json.loads(line) for line in (finished / EXAMPLES).read_text().splitlines()]
    for certificate in (row["certificate"] for row in rows if row["valid_flip"]):
        assert certificate["constraint_residual"] < 1e-6
        assert certificate["drift"] < 1e-3
    names = {gate["name"]: gate["passed"] for gate in verdict["gates"]}
    assert None not in names.values()
    assert all(names[name] is True for name in ("fit", "site", "valid_flips", "gradient", "finite", "replay", "held"))


def test_its_page_can_be_rebuilt(earlier, capsys):
    page = (earlier / REPORT).read_text()
    (earlier / REPORT).unlink()
    assert call(capsys, "report", earlier) == (0, f"{earlier / REPORT}\n", "")
    assert (earlier / REPORT).read_text() == page


@pytest.mark.parametrize(
    ("conditions", "flags", "verdict", "code"),
    [
        (("recoverable",), (), "RECOVERABLE", 1),
        (("inconclusive", "recoverable"), (), "RECOVERABLE", 1),
        (("inconclusive", "invalid"), (), "RECOVERABLE", 0),
        (("recoverable",), ("--budget", "1e-6"), "NOT_RECOVERED_AT_BUDGET", 0),
        (("invalid",), ("--sae", "sae-of-layer-0"), "INVALID", 1),
        ((), ("--sae", "sae-of-layer-0"), "INVALID", 0),
        (("recoverable", "inconclusive"), ("--sae", "sae-of-layer-0"), "INVALID", 0),
        (("inconclusive",), ("--value", "1e38"), "INCONCLUSIVE", 1),
        (("recoverable", "invalid"), ("--value", "1e38"), "INCONCLUSIVE", 0),
    ],
)
def test_exit_status_1_where_a_condition_holds(recover, root, tmp_path, conditions, flags, verdict, code):
    flags = [root / flag if flag.startswith("sae-") else flag for flag in flags]
    conditions = [word for condition in conditions for word in ("--fail-if", condition)]
    status, said, err = recover("--n", 24, *flags, *conditions)
    assert (status, said.split(":")[0], err) == (code, verdict, "")
    jsonschema.validate(verdict_of(tmp_path / "out", times=True), SCHEMA)


def test_an_sae_of_another_layer_is_invalid_with_the_gate_named(recover, root, tmp_path):
    code, said, _ = recover("--sae", root / "sae-of-layer-0", "--n", 24)
    verdict = verdict_of(tmp_path / "out")
    assert (code, verdict["verdict"]) == (0, "INVALID")
    failing = [gate["name"] for gate in verdict["gates"] if gate["passed"] is False]
    assert failing[:2] == ["fit", "site"]
    assert all(gate["decides"] is None for gate in verdict["gates"] if gate["name"] in failing[2:])
    assert f"FAILED              {len(failing)}: fit, site" in said
    # The embedding lies in the span of this SAE, the rest of the stream outside it.
    detail = {gate["name"]: gate["detail"] for gate in verdict["gates"]}["site"]
    explained = verdict["fit"]["explained_variance"]
    assert detail.startswith(f"it explains {1 - explained:.3f} more at blocks.0.hook_resid_pre than at {tiny.SITE}")
    assert verdict["recovery"]["searched"] == 0
    assert not (tmp_path / "out" / DELTAS).exists()
    assert set(units_of(tmp_path / "out")) == {"fit", "utility", "accounting/0"}


def test_a_clamp_that_overflows_is_inconclusive_and_resumes_so(recover, tmp_path):
    """What is infinite becomes null in JSON; a resumed run must read it as the first one did."""
    recover("--value", "3.4e38", "--n", 24)
    out = tmp_path / "out"
    first, records = verdict_of(out), lines_of(out)
    assert first["verdict"] == "INCONCLUSIVE"
    assert {gate["name"] for gate in first["gates"] if gate["passed"] is False} >= {"finite", "replay"}
    assert "only 0 example flips" in first["transfer"]["refused"]
    (out / VERDICT).unlink()
    recover("--value", "3.4e38", "--n", 24)
    assert (verdict_of(out), lines_of(out)) == (first, records)


# Flags


def test_flags_override_the_file(recover, root, tmp_path):
    prompts = tmp_path / "mine.jsonl"
    lines = [{"prompt": "Mary and John left and John gave the key to", "io": "Mary", "subject": "John"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {
        "--mode": "floor",
        "--value": "-3.5",
        "--features": "7,1,2",
        "--positions": "last",
        "--prompts": str(prompts),
        "--n": "1",
        "--seed": "5",
        "--budget": "3",
        "--placement": "before_clamp",
        "--steps": "2",
        "--batch-size": "7",
    }
    code, _, err = recover("--only-active", *(word for pair in flags.items() for word in pair))
    assert (code, err) == (0, "")
    config = load_config(tmp_path / "out" / CONFIG)
    (clamp,) = config.clamps
    assert (clamp.mode, clamp.value, clamp.features, clamp.positions) == ("floor", -3.5, (7, 1, 2), "last")
    assert clamp.only_active is True  # the file has false
    assert clamp.sae == str(root / "sae")
    assert config.prompts.model_dump(include={"n", "seed", "file"}) == {"n": 1, "seed": 5, "file": str(prompts)}
    assert (config.search.budget, config.search.placement, config.search.steps) == (3, "before_clamp", 2)
    assert config.batch_size == 7
    threat = verdict_of(tmp_path / "out")["threat_model"]
    assert (threat["placement"], threat["budget"]) == ("before_clamp", 3)


def test_features_by_attribution_are_selected_once(recover, tmp_path, monkeypatch):
    code, said, _ = recover("--features", "top:8", "--n", 24, "--batch-size", "10")
    assert (code, "8 features at" in said) == (0, True)
    state = json.loads((tmp_path / "out" / RUN).read_text())
    (chosen,) = state["features"]
    assert len(set(chosen)) == 8
    # In one batch as in three: attribution is a sum over prompts.
    assert recover("--features", "top:8", "--n", 24, out=tmp_path / "whole")[0] == 0
    assert json.loads((tmp_path / "whole" / RUN).read_text())["features"] == [chosen]
    (tmp_path / "out" / VERDICT).unlink()
    monkeypatch.setattr(selection, "select_features", None)
    assert recover("--features", "top:8", "--n", 24, "--batch-size", "10")[0] == 0


def test_without_only_active_every_feature_is_edited(recover, root, tmp_path):
    """Half of a signed basis is at zero: `only_active` must make a difference, and the flag must set it."""
    defense = tmp_path / "defense.yaml"
    defense.write_text(yaml.safe_dump(tiny.configuration(root, clamps__only_active=True, clamps__value=0.0)))
    recover("--n", 8, defense=defense, out=tmp_path / "active")
    recover("--n", 8, "--no-only-active", "--value", "3", defense=defense, out=tmp_path / "all")
    clamps = [verdict_of(tmp_path / name)["threat_model"]["clamps"][0] for name in ("active", "all")]
    assert [(c["only_active"], c["value"]) for c in clamps] == [(True, 0.0), (False, 3.0)]


def test_both_placements_find_the_same_under_a_pointwise_sae(recover, tmp_path):
    recover("--n", 24)
    recover("--n", 24, "--placement", "before_clamp", out=tmp_path / "before")
    after, before = (verdict_of(tmp_path / name)["recovery"] for name in ("out", "before"))
    assert before["recovered"] == after["recovered"] > 0
    assert before["norm_mean"] == pytest.approx(after["norm_mean"], rel=1e-3)


def test_bfloat16_end_to_end(recover, tmp_path):
    code, _, err = recover("--dtype", "bfloat16", "--n", 24)
    assert (code, err) == (0, "")
    verdict = verdict_of(tmp_path / "out", times=True)
    jsonschema.validate(verdict, SCHEMA)
    assert verdict["verdict"] == "RECOVERABLE"
    assert (verdict["provenance"]["dtype"], verdict["threat_model"]["dtype"]) == ("bfloat16", "bfloat16")
    assert verdict["recovery"]["constraint_residual_max"] < 1e-5


# Privacy


def pieces(root, n=N):
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    prompts = [example.prompt for example in ioi.generate(tokenizer, n, 0)]
    return [piece.encode() for prompt in prompts for piece in (prompt[:20], prompt[-20:])]


@pytest.mark.parametrize("keep", [False, True])
def test_prompt_text_stays_out_unless_asked_for(recover, root, tmp_path, keep):
    _, said, err = recover("--batch-size", BATCH, *(["--keep-text"] if keep else []))
    written = contents(tmp_path / "out") | {"stdout": said.encode(), "stderr": err.encode()}
    leaks = {name for name, content in written.items() if any(piece in content for piece in pieces(root))}
    kept = {EXAMPLES, *(f"{UNITS}/accounting-{batch}.json" for batch in range(3))}
    assert leaks == (kept if keep else set())


def test_keeping_text_is_another_run(recover, earlier):
    assert refused(recover("--keep-text"), "another configuration (--keep-text is False there and True here)")


# Bad input

GOOD = {"prompt": "Mary and John left and John gave the key to", "io": "Mary", "subject": "John"}


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--budget", "0"], ["search.budget", "greater than 0"]),
        (["--budget", "-1"], ["search.budget", "greater than 0"]),
        (["--budget", "nan"], ["search.budget", "finite"]),
        (["--budget", "inf"], ["search.budget", "finite"]),
        (["--budget", "much"], ["--budget", "'much'"]),
        (["--bugdet", "5"], ["recover check: unknown argument '--bugdet', did you mean --budget?"]),
        (["--steps", "0"], ["search.steps", "greater than 0"]),
        (["--n", "0"], ["prompts.n"]),
        (["--seed", "-1"], ["prompts.seed", "greater than or equal to 0"]),
        (["--seed", str(2**64)], ["prompts.seed", "less than"]),
        (["--control-seed", "-1"], ["controls.seed", "greater than or equal to 0"]),
        (["--control-seed", str(2**31)], ["controls.seed", "less than"]),
        (["--control-seed", "x"], ["--control-seed", "'x'"]),
        (["--seeds", "0"], ["--seeds", "expected a positive whole number, got '0'"]),
        (["--seeds", "-2"], ["--seeds", "expected a positive whole number, got '-2'"]),
        (["--seeds", "two"], ["--seeds", "expected a positive whole number, got 'two'"]),
        (["--batch-size", "0"], ["batch_size: must be auto or a whole number from 1"]),
        (["--batch-size", "²"], ["batch_size"]),
        (["--features", "1,x"], ["--features '1,x'", "3,17,42"]),
        (["--features", "top:many"], ["--features 'top:many'", "top:64"]),
        (["--features", "top:0"], ["features.top", "greater than 0"]),
        (["--features", "3,3"], ["features", "3 is listed more than once"]),
        (["--value", "nan"], ["clamps[0].value", "finite"]),
        (["--mode", "sett"], ["--mode", "'sett'", "choose from"]),
        (["--fail-if", "safe"], ["--fail-if", "'safe'"]),
        (["--dtype", "int8"], ["--dtype", "int8"]),
        (["--device", "gpu"], ["device: must be auto, cpu"]),
        (["--task", "iio"], ["unknown task 'iio'; did you mean 'ioi'?"]),
        (["--task", "python:nowhere:x"], ["task 'python:nowhere:x': cannot be imported (ModuleNotFoundError"]),
        (["--sae", "smolm2-l15"], ["SAE 'smolm2-l15' is not a name of ours", "did you mean 'smollm2-l15'?"]),
        (["--sae", "no-release:x"], ["SAE 'no-release:x' cannot be loaded"]),
        (["--features", "64"], ["clamps[0], SAE '", "feature 64 is out of range", "0..63"]),
    ],
)
def test_bad_values_are_refused_before_the_model_is_loaded(recover, monkeypatch, tmp_path, flags, parts):
    monkeypatch.setattr(setting, "resolve_model", None)
    assert refused(recover(*flags), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--model", "nope"], ["model 'nope' is not a name of ours", "hub cannot be reached"]),
        (["--model", "/none"], ["model '/none': there is no such folder"]),
        (["--device", "cuda:99"], ["device 'cuda:99' cannot be used here"]),
        (["--sae", "{root}/sae-narrow"], ["reads 24 dimensions, the model's residual stream has 32"]),
        (["--sae", "{root}/sae-deep"], ["site blocks.7.hook_resid_pre: the model has 3 blocks"]),
        (["--features", "top:65"], ["top 65 asked", "ask for fewer"]),
        (["--positions", "answer"], ["positions `answer`"]),
        (["--prompts", "/none.jsonl"], ["prompt file /none.jsonl", "No such file"]),
    ],
)
def test_what_does_not_belong_together_is_refused(recover, root, tmp_path, flags, parts):
    assert refused(recover(*(flag.format(root=root) for flag in flags)), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["is empty"]),
        ("\n \n", ["is empty"]),
        (json.dumps(GOOD) + '\n{"prompt": "Mary', ["line 2: not valid JSON"]),
        (json.dumps(GOOD) + "\n[1]", ["line 2: must be a JSON object"]),
        (json.dumps(GOOD | {"io": ""}), ['line 1: the key "io"']),
        (
            json.dumps(GOOD).replace("Mary", "Mary-Lou"),
            ["line 1: the name 'Mary-Lou' is not a single token", "choose another name"],
        ),
    ],
)
def test_bad_prompt_files(recover, tmp_path, text, parts):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    result = recover("--prompts", path)
    assert refused(result, f"prompt file {path}", *parts)
    assert GOOD["prompt"] not in result[2]


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("search:", "serach:", ["serach: unknown key; did you mean 'search'?"]),
        ("controls:", "contorls:", ["contorls: unknown key; did you mean 'controls'?"]),
        ("random_draws: 20", "random_draws: 0", ["controls.random_draws", "greater than 0"]),
        ("folds: 1", "folds: 3", ["transfer.folds", "1 or 2"]),
        ("budget: 100.0", "budget: .nan", ["search.budget", "finite"]),
        ("mode: set", "mode: [", ["line ", "not valid YAML"]),
        ("task: ioi", "task: ioi\ntask: ioi", ["given twice"]),
        ("task: ioi\n", "", ["task: this key is required"]),
    ],
)
def test_bad_configuration_files(recover, root, tmp_path, monkeypatch, old, new, parts):
    monkeypatch.setattr(setting, "resolve_model", None)
    path = tmp_path / "defense.yaml"
    text = (root / "defense.yaml").read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert refused(recover(defense=path), str(path), *parts)


def test_clamps_at_two_sites_are_checked_together(recover, root, tmp_path):
    """What is admissible is the same for all prompts at one site only, so transfer says why it was not run."""
    settings = tiny.configuration(root, search__budget=5.0)
    settings["clamps"].append(settings["clamps"][0] | {"sae": str(root / "sae-of-layer-2")})
    path = tmp_path / "defense.yaml"
    path.write_text(yaml.safe_dump(settings))
    code, said, err = recover("--n", 24, defense=path)
    assert (code, err) == (0, "")
    verdict = verdict_of(tmp_path / "out", times=True)
    jsonschema.validate(verdict, SCHEMA)
    assert verdict["threat_model"]["sites"] == [tiny.SITE, "blocks.2.hook_resid_pre"]
    assert [site["site"] for site in verdict["fit"]["sites"]] == verdict["threat_model"]["sites"]
    assert verdict["recovery"]["searched"] > 0
    why = "several sites are clamped, so that what is admissible differs from prompt to prompt"
    assert verdict["transfer"] == {"refused": why}
    assert why in " ".join(said.split())


def test_missing_files_and_commands(recover, capsys, tmp_path):
    assert refused(recover(defense=tmp_path / "none.yaml"), "none.yaml", "No such file")
    assert refused(recover(defense=tmp_path), str(tmp_path), "directory")
    assert refused(call(capsys), "command")
    assert refused(call(capsys, "chekc"), "'chekc'", "check")
    assert refused(call(capsys, "check"), "--out")
    assert refused(call(capsys, "report", tmp_path / "none"), "none", "no finished run")


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "cfg.json"])
@pytest.mark.parametrize("damage", ["truncate", "overwrite", "remove"])
def test_damaged_saes(recover, root, tmp_path, monkeypatch, file, damage):
    monkeypatch.setattr(setting, "resolve_model", None)
    folder = Path(shutil.copytree(root / "sae", tmp_path / "sae"))
    if damage == "truncate":
        os.truncate(folder / file, 200)
    elif damage == "overwrite":
        (folder / file).write_bytes(b"\xff" * 200)
    else:
        (folder / file).unlink()
    assert refused(recover("--sae", folder), f"SAE folder {folder}: ", file)


# --out


def test_out_that_cannot_be_written(recover, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_setting", None)
    (tmp_path / "file").write_text("mine")
    assert refused(recover(out=tmp_path / "file"), f"--out {tmp_path / 'file'}: cannot be written", "give another")
    assert refused(recover(out=tmp_path / "file" / "below"), "cannot be written", "Not a directory")
    code, said, err = recover(out=tmp_path / ("x" * 300))
    assert (code, said, err.count("\n")) == (2, "", 1)
    assert "cannot be written (File name too long)" in err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["notes.txt", CONFIG, EXAMPLES, ".hidden"])
def test_out_with_files_of_others_is_left_as_it_is(recover, tmp_path, monkeypatch, name):
    monkeypatch.setattr(runner, "load_setting", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    assert refused(recover(), f"holds {name!r} and no run of recover")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {name: "mine"}


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--budget", "5"], "search.budget is 100.0 there and 5.0 here"),
        (["--features", "0,1,2,3,4,9"], "clamps[0].features[5] is 5 there and 9 here"),
        (["--features", "1"], "clamps[0].features is "),
        (["--n", "41"], "prompts.n is 40 there and 41 here"),
        (["--control-seed", "3"], "controls.seed is 0 there and 3 here"),
    ],
)
def test_out_of_another_configuration(recover, earlier, monkeypatch, flags, difference):
    monkeypatch.setattr(runner, "load_setting", None)
    before = contents(earlier)
    assert refused(recover(*flags), str(earlier), f"another configuration ({difference}", "give another folder")
    assert contents(earlier) == before


def test_out_of_other_weights(recover, root, earlier, tmp_path):
    """The same paths, but the SAE that they name has been trained again."""
    kept = shutil.copytree(root / "sae", tmp_path / "kept")
    try:
        sae = tiny.signed_basis()
        sae.W_dec.data[0, 0] += 1e-3
        sae.save_model(root / "sae")
        assert refused(recover(), "other weights, prompts or another version of recover")
    finally:
        shutil.copytree(kept, root / "sae", dirs_exist_ok=True)
    assert recover()[0] == 0


FIT, SEARCH = f"{UNITS}/fit.json", f"{UNITS}/search-1.json"


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        (RUN, lambda text: text[:40], ["run.json is damaged"]),
        (RUN, lambda text: "[]", ["run.json is damaged"]),
        (RUN, lambda text: text.replace('"batch_size":16', '"batch_size":"16"'), ["run.json is damaged (batch_size"]),
        (RUN, lambda text: text.replace('"fingerprint"', '"finger"'), ["run.json is damaged"]),
        (SEARCH, lambda text: text[:50], [f"{SEARCH} is damaged"]),
        (SEARCH, lambda text: "", [f"{SEARCH} is damaged"]),
        (SEARCH, lambda text: "{}\n", [f"{SEARCH} is damaged"]),
        (FIT, lambda text: "7\n", [f"{FIT} is damaged"]),
        (FIT, lambda text: text.replace('"values"', '"valeus"', 1), [f"{FIT} is damaged"]),
        (FIT, lambda text: text.replace('"unit"', '"nuit"'), [f"{FIT} is damaged"]),
        (
            SEARCH,
            lambda text: text.replace("/smallest", "/smalest", 1),
            [f"{SEARCH} is damaged (1 deltas that it speaks of are not there"],
        ),
        (DELTAS, lambda text: "{}", ["deltas.safetensors is damaged"]),
    ],
)
def test_a_damaged_run_is_refused_before_the_model_is_loaded(recover, earlier, monkeypatch, name, change, parts):
    monkeypatch.setattr(runner, "load_setting", None)
    text = (earlier / name).read_text() if name != DELTAS else ""
    (earlier / name).write_text(change(text))
    assert change(text) != text
    assert refused(recover(), str(earlier), *parts, "remove the folder or give another")


def test_damaged_deltas(recover, earlier, monkeypatch):
    monkeypatch.setattr(runner, "load_setting", None)
    os.truncate(earlier / DELTAS, (earlier / DELTAS).stat().st_size - 10)
    assert refused(recover(), "deltas.safetensors is damaged")
    (earlier / DELTAS).unlink()
    lost = len(units_of(earlier)["search/0"]["deltas"])
    assert refused(recover(), f"search-0.json is damaged ({lost} deltas that it speaks of are not there")


def test_lost_records_are_written_again_from_the_units(recover, finished, earlier, monkeypatch):
    """`examples.jsonl` is but a page of what the units hold."""
    (earlier / EXAMPLES).unlink()
    monkeypatch.setattr(RunFolder, "keep", None)
    assert recover("--batch-size", BATCH)[0] == 0
    assert (earlier / EXAMPLES).read_bytes() == (finished / EXAMPLES).read_bytes()
    assert verdict_of(earlier) == verdict_of(finished)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"schema": "recover.verdict/3"}', '{"schema": 3}'])
def test_a_damaged_verdict_is_refused_by_report_and_mended_by_check(recover, finished, earlier, capsys, damage):
    (earlier / VERDICT).write_text(damage)
    assert refused(call(capsys, "report", earlier), f"{earlier}: verdict.json is damaged")
    assert recover("--batch-size", BATCH)[0] == 0
    assert verdict_of(earlier) == verdict_of(finished)


def test_a_verdict_of_another_schema_is_refused_in_a_line_that_names_it_and_what_opens_it(earlier, capsys):
    values = json.loads((earlier / VERDICT).read_text()) | {"schema": "recover.verdict/1"}
    (earlier / VERDICT).write_text(json.dumps(values))
    version = values["provenance"]["versions"]["recover"]
    assert refused(
        call(capsys, "report", earlier),
        f"{earlier}: verdict.json cannot be opened: its schema is 'recover.verdict/1'",
        f"open it with recover {version}, which wrote it",
    )


def test_report_of_an_unfinished_run(earlier, capsys):
    (earlier / VERDICT).unlink()
    assert refused(
        call(capsys, "report", earlier), "no finished run (verdict.json is not there)", "recover check --out"
    )


def test_a_full_disk_is_told_in_one_line(recover, tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert refused(recover("--n", 4), "run.json cannot be written (No space left on device)")
    assert not (tmp_path / "out").exists()


# Interruption


def test_the_same_command_gives_the_same_in_another_folder(recover, finished, tmp_path):
    assert recover("--batch-size", BATCH)[0] == 0
    assert verdict_of(tmp_path / "out") == verdict_of(finished)
    for name in (DELTAS, EXAMPLES, CONFIG):
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes()
    assert units_of(tmp_path / "out") == units_of(finished)


def test_a_finished_run_is_not_run_again(recover, earlier, monkeypatch):
    monkeypatch.setattr(runner, "check", None)
    before = contents(earlier)
    first = recover()
    assert (first[0], first[2]) == (0, "")
    assert first[1].startswith("RECOVERABLE")
    (earlier / REPORT).unlink()
    assert recover("--fail-if", "recoverable") == (1, first[1], "")
    assert contents(earlier) == before


KILLED = -signal.SIGKILL
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["recover.cli", "sae_lens", "transformers.models.llama.modeling_llama"])


def _child(arguments, error, write, sig, late):
    """Run the command line in a child, which sends itself a signal at its `write`-th write."""
    for stream, target in ((1, os.devnull), (2, error)):
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT), stream)
    progress.SECONDS_BETWEEN_LINES = math.inf
    # Tests that run in the background inherit that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    replace, writes = Path.replace, []

    def replaced(path, target):
        writes.append(path)
        if len(writes) == write and not late:
            os.kill(os.getpid(), sig)
        result = replace(path, target)
        if len(writes) == write and late:
            os.kill(os.getpid(), sig)
        return result

    if write:
        Path.replace = replaced
    sys.exit(cli.main(arguments))


@pytest.fixture
def child(root, tmp_path):
    """Start `recover check` as a process of its own; gives the process, and the file that its stderr goes to."""

    def start(out, write=0, sig=signal.SIGKILL, late=False):
        arguments = ["check", str(root / "defense.yaml"), "--out", str(out), "--batch-size", str(BATCH)]
        error = tmp_path / "stderr"
        process = context.Process(target=_child, args=(arguments, str(error), write, sig, late))
        process.start()
        return process, error

    return start


@pytest.fixture
def resumes(recover, finished, monkeypatch):
    """Whether the same command finishes a run as if it had not been killed, computing only what was not finished."""
    computed, keep = [], RunFolder.keep

    def counted(folder, unit, values, deltas):
        computed.append(unit)
        keep(folder, unit, values, deltas)

    monkeypatch.setattr(RunFolder, "keep", counted)

    def resumed(out):
        before = units_of(out, times=True)
        computed.clear()
        code, _, err = recover("--batch-size", BATCH, out=out)
        assert (code, err) == (0, "")
        assert sorted([*before, *computed]) == sorted(units_of(finished))
        after = units_of(out, times=True)
        assert {unit: after[unit] for unit in before} == before
        assert units_of(out) == units_of(finished)
        assert verdict_of(out) == verdict_of(finished)
        for name in (CONFIG, DELTAS, EXAMPLES):
            assert (out / name).read_bytes() == (finished / name).read_bytes()
        assert {path.name for path in out.iterdir()} - {".lock"} == ARTIFACTS
        assert not list(out.rglob(".recover-*"))
        return len(before)

    return resumed


# run.json, config.yaml; fit and utility; deltas before the units of search and of transfer's fit; the other units of
# three batches and of all; examples, deltas, verdict, two reports.
# (Death at every write of a run: property_tests/test_engine_laws.)
WRITES = 2 + 2 + 3 + 6 + 7 * 3 + 3 + 4 + 5


@pytest.mark.parametrize(
    ("write", "done"),
    [
        (1, 0),  # run.json
        (2, 0),  # config.yaml
        (9, 5),  # the first search, whose deltas are written
        (16, 10),  # the last certificates
        (38, 32),  # deltas of transfer
        (43, 35),  # all deltas
        (44, 35),  # the verdict
        (WRITES, 35),  # the last report
        (WRITES + 1, 35),  # none
    ],
)
def test_killed_at_a_write(child, resumes, tmp_path, write, done):
    process, error = child(tmp_path / "out", write)
    process.join()
    assert (process.exitcode, error.read_text()) == (KILLED if write <= WRITES else 0, "")
    assert resumes(tmp_path / "out") == done


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05])
def test_killed_at_any_moment(child, resumes, tmp_path, delay):
    process, _ = child(tmp_path / "out")
    while process.is_alive() and not (tmp_path / "out" / UNITS / "search-0.json").exists():
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    assert resumes(tmp_path / "out") >= 6


@pytest.mark.parametrize(("write", "late"), [(1, False), (9, False), (34, True)])
def test_ctrl_c_is_told_in_one_line(child, resumes, tmp_path, write, late):
    process, error = child(tmp_path / "out", write, signal.SIGINT, late)
    process.join()
    assert process.exitcode == 130
    assert error.read_text() == "recover: interrupted; run the same command again to resume\n"
    resumes(tmp_path / "out")


# Seeds


def test_a_control_seed_is_another_run_of_the_same_prompts(recover, finished, tmp_path):
    assert recover("--batch-size", BATCH, "--control-seed", 1)[0] == 0
    out = tmp_path / "out"
    one, other = verdict_of(finished), verdict_of(out)
    assert load_config(out / CONFIG).controls.seed == 1
    assert (one["provenance"]["control_seed"], other["provenance"]["control_seed"]) == (0, 1)
    assert one["provenance"]["seed"] == other["provenance"]["seed"]
    assert one["counts"] == other["counts"]
    mine, theirs = units_of(finished), units_of(out)
    same = {"fit", "utility", *(f"accounting/{batch}" for batch in range(3))}
    assert all(mine[unit] == theirs[unit] for unit in same)
    assert mine["placebo/0"] != theirs["placebo/0"]
    assert (out / DELTAS).read_bytes() != (finished / DELTAS).read_bytes()


def test_several_seeds_have_a_folder_each_and_are_counted(recover, tmp_path, monkeypatch):
    out = tmp_path / "out"
    code, said, err = recover("--n", 24, "--seeds", 2)
    assert (code, err) == (0, "")
    assert {path.name for path in out.iterdir()} == {"seed-0", "seed-1", SEEDS}
    verdicts = [verdict_of(out / f"seed-{seed}", times=True) for seed in range(2)]
    for seed, verdict in enumerate(verdicts):
        assert {path.name for path in (out / f"seed-{seed}").iterdir()} - {".lock"} == ARTIFACTS
        jsonschema.validate(verdict, SCHEMA)
        assert verdict["provenance"]["control_seed"] == seed
    expected = [{"verdict": "RECOVERABLE", "content": "unknown", "rule": "unknown", "seeds": 2}]
    assert json.loads((out / SEEDS).read_text()) == {"verdicts": expected}
    first, *table = said.splitlines()
    assert first == "2 of 2 seeds: RECOVERABLE, content unknown, rule unknown"
    lines = [line.split() for line in table if re.match(r" *\d+  ", line)]
    assert [line[0] for line in lines] == ["0", "1"]
    for line, verdict in zip(lines, verdicts, strict=True):
        found = verdict["recovery"]
        assert line[1:4] == [str(found["recovered"]), "of", str(found["searched"])]
    assert said.endswith(f"Artifacts: {out}\n")
    # One of them is the run that its seed alone gives.
    assert recover("--n", 24, "--control-seed", 1, out=tmp_path / "alone")[0] == 0
    assert verdict_of(tmp_path / "alone") == verdict_of(out / "seed-1")

    # A later start does what is left, and a third seed is one more; a condition holds if it does of any.
    (out / "seed-1" / VERDICT).unlink()
    (out / "seed-1" / UNITS / "health.json").unlink()
    (out / SEEDS).unlink()
    computed, keep = [], RunFolder.keep
    monkeypatch.setattr(
        RunFolder, "keep", lambda folder, unit, *rest: (computed.append(unit), keep(folder, unit, *rest))
    )
    assert recover("--n", 24, "--seeds", 2, "--fail-if", "recoverable") == (1, said, "")
    assert computed == ["health"]
    assert json.loads((out / SEEDS).read_text()) == {"verdicts": expected}
    assert [verdict_of(out / f"seed-{seed}")["reasons"] for seed in range(2)] == [v["reasons"] for v in verdicts]


def test_seeds_go_on_from_the_control_seed_and_different_verdicts_are_counted_apart(recover, tmp_path, monkeypatch):
    def said(config, out, **_):
        seed = config.controls.seed
        name, content = [("RECOVERABLE", True), ("RECOVERABLE", None), ("INCONCLUSIVE", None)][seed % 3]
        found = transfer((1, 2)) if name == "RECOVERABLE" else None
        made = conclude(flip("x"), transfer=found, provenance=PROVENANCE | {"control_seed": seed})
        changes = {
            "verdict": name,
            "content": content,
            "recovery": made.recovery.model_copy(update={"recovered": seed, "searched": 9}),
        }
        return made.model_copy(update=changes)

    monkeypatch.setattr(runner, "run_check", said)
    (tmp_path / "out").mkdir()
    code, text, _ = recover("--seeds", 4, "--control-seed", 4, "--fail-if", "inconclusive")
    assert code == 1
    assert json.loads((tmp_path / "out" / SEEDS).read_text())["verdicts"] == [
        {"verdict": "RECOVERABLE", "content": "unknown", "rule": "unknown", "seeds": 2},
        {"verdict": "INCONCLUSIVE", "content": "unknown", "rule": "unknown", "seeds": 1},
        {"verdict": "RECOVERABLE", "content": True, "rule": "unknown", "seeds": 1},
    ]
    assert text.splitlines()[0] == "2 of 4 seeds: RECOVERABLE, content unknown, rule unknown"
    assert set(text.splitlines()[1:3]) == {
        "1 of 4 seeds: INCONCLUSIVE",
        "1 of 4 seeds: RECOVERABLE, content true, rule unknown",
    }
    rows = [line.split() for line in text.splitlines() if re.match(r" *\d+  ", line)]
    assert [row[:5] for row in rows][:2] == [["4", "4", "of", "9", "50%"], ["5", "5", "of", "9", "-"]]


def test_seeds_that_cannot_be_counted_are_told_in_one_line(recover, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run_check", lambda *_, **__: conclude(SHOWS_THROUGHOUT))
    (tmp_path / "out" / SEEDS).mkdir(parents=True)
    assert refused(recover("--seeds", 2), f"--out {tmp_path / 'out'}: seeds.json cannot be written")


# The real process


def in_a_process(*arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "recover", *map(str, arguments)]
    root = Path(cli.__file__).parent.parent
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300)


def without_progress(stderr):
    """What is left without the lines that a slow run, on a busy machine, prints every ten seconds."""
    return re.sub(r"recover: [\w ,+]+: \d+ of \d+\n", "", stderr)


def test_as_a_module_with_nothing_but_the_verdict_on_its_streams(root, finished, tmp_path):
    done = in_a_process("check", root / "defense.yaml", "--out", tmp_path / "out", "--batch-size", BATCH)
    assert (done.returncode, without_progress(done.stderr)) == (0, "")
    assert done.stdout.startswith("RECOVERABLE: ")
    assert verdict_of(tmp_path / "out") == verdict_of(finished)


def test_two_processes_cannot_work_in_one_folder(root, tmp_path):
    held = RunFolder(tmp_path / "out")
    done = in_a_process("check", root / "defense.yaml", "--out", tmp_path / "out")
    held.close()
    line = f"recover: --out {tmp_path / 'out'}: another recover is at work there; wait for it or stop it\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


# Progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


def test_progress_is_a_bar_for_each_phase_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.shown() as report:
        report("loading", 0, 1)
        report("loading", 1, 1)
        for done in (0, 16, 40):
            report("accounting", done, 40)
        for done in (0, 3, 2, 5, 5):  # told of its end twice
            report("search", done, 5)
        report("transfer, fit 1 of 2", 7, 60)  # never at its end
    first, second, third, fourth, last = sys.stderr.getvalue().split("\n")
    assert re.search(r"\rloading the model 00:00 *$", first)
    assert re.search(r"finding valid flips: 100%.* 40/40 ", second)
    assert re.search(r"searching for perturbations: 100%.* 5/5 ", third)
    assert re.search(r"fitting one shared perturbation, fit 1 of 2: .* 7/60 ", fourth)
    assert last == ""


def test_progress_is_told_phase_by_phase(recover, monkeypatch):
    """Of a whole run, by what a terminal shows at the end of each bar."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    recover("--n", 24, "--batch-size", 10)
    ends = [line.split("\r")[-1].split("|")[0].strip() for line in terminal.getvalue().split("\n") if line]
    phases = [re.sub(r"( \d\d:\d\d|: +\d+%)$", "", end) for end in ends]
    fold = "transfer, fit 1 of 1"
    told = ["loading", "accounting", *PHASES, "placebo_features", fold]
    assert phases == [progress.title(phase) for phase in told]
    assert not set(told) & set(phases)  # each has words of its own
    assert all(end.endswith("100%") or re.search(r"\d\d:\d\d$", end) for end in ends)


def test_progress_is_a_few_lines_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 10.0)
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.shown() as report:
        report("loading", 0, 1)
        for done in range(1, 7):
            report("transfer, fit 1 of 2", done, 64)
    assert capsys.readouterr().err == (
        "recover: fitting one shared perturbation, fit 1 of 2: 2 of 64\n"
        "recover: fitting one shared perturbation, fit 1 of 2: 5 of 64\n"
    )
