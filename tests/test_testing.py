"""The pytest plugin as a user's suite meets it: assertions pass on planted defenses of one kind, fail on the other."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import tiny
import yaml

from recover import testing
from recover.cli import main
from recover.protocol.records import ReplyRecord
from recover.protocol.verdict_model import AttributionFigures, PartFigures, Rate
from recover.run.config import load_config
from tests.hand_made import GOOD, SHOWS_THROUGHOUT, certified, conclude, flip

pytest_plugins = ["pytester"]

PLUGIN = ("-p", "recover_pytest")
"""By its module, whether or not the package is installed so that pytest finds it by itself."""
HEAD = """
import os
from dataclasses import replace

import pytest
import recover.run.runner
from recover.saes.activations import TopK
from recover.protocol.plan import Plan, TransferPlan
from recover.planted import KINDS
from recover.search.ascent import Schedule
from recover.testing import *
from recover.evidence.transfer import FitSchedule

LIGHT = Plan(random_draws=20, planted_routes=1, placebo_features=0, curve=(0.5, 1.0), sample=2,
             transfer=TransferPlan(norms=(0.6,), splits=1, rules=1, scales=(1.0,), draws=5, fit=FitSchedule(steps=30)))

def checked(check_defense, kind):
    world = KINDS[kind](0)
    return check_defense(
        world.defense, model=world.model, examples=world.examples, budget=world.budget, plan=LIGHT, name=kind
    )

def competing(check_defense):
    "Features compete for a few places, so that one that no perturbation moves by itself can be pushed out."
    world = KINDS["shared_route"](0)
    (clamp,) = world.defense.clamps
    defense = replace(world.defense, clamps=(replace(clamp, sae=replace(clamp.sae, activation=TopK(4))),))
    return check_defense(
        defense, model=world.model, examples=world.examples, budget=3 * world.budget, name="competing",
        plan=replace(LIGHT, schedule=Schedule(20, restarts=0)),
    )
"""
ROOT = Path(__file__).parent.parent


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Runs a suite with the plugin, in a folder of its own."""
    # pytester forgets what a suite imported, and parts of torch cannot be imported twice.
    monkeypatch.setattr("_pytest.pytester.SysModulesSnapshot.restore", lambda self: None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(tests: str, *arguments: str, run=pytester.runpytest_inprocess) -> pytest.RunResult:
        name = f"test_{hashlib.sha256(f'{pytester.path}{tests}'.encode()).hexdigest()[:8]}"  # imported but once
        pytester.makepyfile(**{name: HEAD + tests})
        return run(*PLUGIN, f"{name}.py", *arguments)

    return run


FAILURES = {
    "shut_is_not_recoverable": (
        'assert_recoverable(checked(check_defense, "complete_bottleneck"))',
        "NOT_RECOVERED_AT_BUDGET: 0 of 10 valid flips recovered (0%; 95% interval 0% to 28%) at budget 14.6*; "
        "expected some",
    ),
    "open_is_recovered": (
        'assert_not_recovered(checked(check_defense, "shared_route"), budget=4.9)',
        "RECOVERABLE: 24 of 24 valid flips are brought back by a perturbation of norm at most 4.9, the smallest of "
        "norm 2.87; expected none",
    ),
    "shut_is_not_specific": (
        'assert_content(checked(check_defense, "complete_bottleneck"))',
        "NOT_RECOVERED_AT_BUDGET: content is unknown (no shared perturbation was read); expected True",
    ),
    "write_only_is_not_specific": (
        'assert_content(checked(check_defense, "write_only"))',
        "RECOVERABLE: content is False (content false: at most *% of unseen flips*); expected True",
    ),
    "a_shared_route_is_specific": (
        'assert_content(checked(check_defense, "shared_route"), expected=False)',
        "RECOVERABLE: content is True (content true: one shared perturbation*); expected False",
    ),
    "features_that_compete_move": (
        "assert_drift_below(competing(check_defense), 1e-3)",
        "RECOVERABLE: a relative drift of 1.00e+00, and too much on * of 18 valid flips; expected at most 0.001",
    ),
    "it_went_by_the_error": (
        'assert_attribution(checked(check_defense, "error_bypass"), part="free", at_least=0.9)',
        "RECOVERABLE: replay of free alone brings back 0%; expected at least 90%",
    ),
    "it_went_by_features": (
        'assert_attribution(checked(check_defense, "feature_bypass"), part="error", at_least=0.9)',
        "RECOVERABLE: replay of error alone brings back 0%; expected at least 90%",
    ),
    "nothing_was_brought_back": (
        'assert_attribution(checked(check_defense, "complete_bottleneck"), part="full", at_least=0.9)',
        "NOT_RECOVERED_AT_BUDGET: replay of full alone brings back 0%; expected at least 90%",
    ),
    "no_such_part": (
        'assert_attribution(checked(check_defense, "shared_route"), part="nowhere", at_least=0.5)',
        "RECOVERABLE: no part 'nowhere' in its attribution (it has: full, error, *); expected at least 50%",
    ),
    "a_bound_beyond_the_search": (
        'assert_not_recovered(checked(check_defense, "complete_bottleneck"), budget=1e9)',
        "NOT_RECOVERED_AT_BUDGET: searched to a norm of 14.6* only; expected none recovered at 1e+09",
    ),
}
"""By the name of a test: what it asserts, and what it says of it."""


def test_each_assertion_passes_on_one_kind_and_fails_on_the_other_naming_figure_bound_and_folder(suite):
    failing = "".join(f"\ndef test_{name}(check_defense):\n    {body}\n" for name, (body, _) in FAILURES.items())
    result = suite(f"""
def test_open_pass(check_defense):
    found = checked(check_defense, "shared_route")
    assert_recoverable(found, at_least=0.9)
    assert_content(found)
    assert_drift_below(found, 1e-3)

def test_shut_pass(check_defense):
    assert_not_recovered(checked(check_defense, "complete_bottleneck"))

def test_a_budget_below_what_is_needed(check_defense):
    found = checked(check_defense, "shared_route")
    assert_not_recovered(found, budget=1e-3)

def test_write_only_pass(check_defense):
    assert_content(checked(check_defense, "write_only"), expected=False)

def test_error_pass(check_defense):
    assert_attribution(checked(check_defense, "error_bypass"), part="error", at_least=0.9)

def test_features_pass(check_defense):
    assert_attribution(checked(check_defense, "feature_bypass"), part="free", at_least=0.9)
{failing}""", "--recovery-json", "told/verdicts.json", "--recovery-report", "reports", "-rN")  # fmt: skip
    result.assert_outcomes(passed=6, failed=len(FAILURES))
    lines = result.stdout.lines
    for name, (_, told) in FAILURES.items():
        at = next(number for number, line in enumerate(lines) if re.fullmatch(rf"_+ test_{name} _+", line))
        failure = lines[at + 1 : at + 3]  # these two lines and no traceback
        assert matches(failure[0], told), failure
        assert matches(failure[1], "artifacts: /*/objects-*"), failure
        assert (Path(failure[1].removeprefix("artifacts: ")) / "report.html").is_file()
        assert lines[at + 3].startswith(("___", "---", "==="))
    # One search for each defense, told in a table.
    names = {"complete_bottleneck", "competing", "error_bypass", "feature_bypass", "shared_route", "write_only"}
    told = json.loads(Path("told/verdicts.json").read_text())
    assert {one["name"] for one in told} == names
    assert len(told) == len(names)
    assert len(list(Path("reports").glob("*/report.html"))) == len(told)
    result.stdout.fnmatch_lines(
        [
            "*= recovery =*",
            "defense * seed  verdict * brought back * content  artifacts",
            "complete_bottleneck  0 * NOT_RECOVERED_AT_BUDGET  0 of 10 at 14.6* - * .pytest_cache/d/recover/objects-*",
            "shared_route * RECOVERABLE * 24 of 24 at 4.98958 * true * .pytest_cache/d/recover/objects-*",
            "write_only * RECOVERABLE * 24 of 24 at * false *",
        ]
    )


def matches(line, pattern):
    """As `fnmatch_lines` reads a pattern, but that `[` is itself."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), line) is not None


def write(folder, records):
    (folder / "examples.jsonl").write_text("".join(record.to_json() + "\n" for record in records))


@pytest.mark.parametrize(("norm", "budget", "back"), [(12.0, 20.0, 1), (12.0, 11.0, 0)])
def test_a_whole_answer_is_back_where_what_is_said_is_like_the_own(tmp_path, norm, budget, back):
    """Though not token for token, so that no smallest norm is certified."""
    reply = ReplyRecord(False, False, False, True, False, 0.0, 0.0)
    said = certified(flip("a", near=math.inf), shows=False, norm=norm)
    write(tmp_path, [replace(said, answered=True, refused=True, reply=reply)])
    found = testing.Checked("by hand", (conclude(flip("a")),), (tmp_path,))
    if not back:
        testing.assert_not_recovered(found, budget=budget)
        return
    with pytest.raises(
        pytest.fail.Exception, match=r"1 of 1 valid flips are brought back .* of norm 12; expected none"
    ):
        testing.assert_not_recovered(found, budget=budget)


def test_drift_and_attribution_are_held_to_their_bounds(tmp_path):
    drifts = [1e-4, 0.25, 1e-5]
    records = [flip(str(row), relative_drift=one) for row, one in enumerate(drifts)]
    write(tmp_path, [*records, SHOWS_THROUGHOUT])
    figures = dict.fromkeys(PartFigures.model_fields) | {"knockout": Rate.of([False])}
    parts = {"error": PartFigures(**figures | {"replay": Rate.of([True] * 3 + [False])})}
    attribution = AttributionFigures(n=4, top_k=16, effect_mean=1.0, gap=0.0, integrated_gap=0.0, parts=parts)
    verdict = conclude(flip("a"), transfer={"refused": "several sites"}).model_copy(update={"attribution": attribution})
    found = testing.Checked("by hand", (verdict,), (tmp_path,))
    testing.assert_drift_below(found, 0.25)
    testing.assert_attribution(found, part="error", at_least=0.75)
    where = rf"\nartifacts: {re.escape(str(tmp_path))}"
    with pytest.raises(
        pytest.fail.Exception, match=rf"a relative drift of 2.50e-01.* 1 of 3 .*; expected at most 0.2{where}"
    ):
        testing.assert_drift_below(found, 0.2)
    with pytest.raises(pytest.fail.Exception, match=rf"replay of error alone .* 75%; expected at least 80%{where}"):
        testing.assert_attribution(found, part="error", at_least=0.8)
    write(tmp_path, [flip("a", relative_drift=None)])  # from zero
    with pytest.raises(pytest.fail.Exception, match=rf"drift of inf, .* on 1 of 1 valid flips; .* most 0.5{where}"):
        testing.assert_drift_below(found, 0.5)
    with pytest.raises(
        pytest.fail.Exception, match=rf"no shared perturbation was fitted: several sites\); expected True{where}"
    ):
        testing.assert_content(found)
    invalid = conclude(flip("a"), fits=[replace(GOOD, explained_variance=0.1)])
    unsaid = testing.Checked("by hand", (invalid,), (tmp_path,))
    for assertion in (testing.assert_not_recovered, testing.assert_recoverable, testing.assert_content):
        with pytest.raises(pytest.fail.Exception, match=r"says nothing either way \(fit: .* 0.100 of the"):
            assertion(unsaid)


def test_a_later_session_searches_nothing_and_seeds_are_checked_each(suite, monkeypatch):
    tests = """
def test_shut(check_defense):
    found = checked(check_defense, "complete_bottleneck")
    assert len(found.verdicts) == 2
    assert len({one.provenance.control_seed for one in found.verdicts}) == 2
    assert_not_recovered(found)
"""
    result = suite(tests, "--recovery-seeds", "2", "--recovery-dir", "kept")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"complete_bottleneck  {seed} * kept/objects-*" for seed in (0, 1)])
    assert len(list(Path("kept").glob("objects-*/verdict.json"))) == 2

    def searched(*_, **__):
        raise AssertionError("searched again")

    monkeypatch.setattr("recover.run.runner.check", searched)
    suite(tests, "--recovery-seeds", "2", "--recovery-dir", "kept").assert_outcomes(passed=1)


def test_bad_input_is_one_line_and_marks_say_why_they_skip(suite, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("recover.models.hub.hub_reachable", lambda: False)
    result = suite("""
def test_no_file(check_defense):
    check_defense("nowhere.yaml")

@pytest.mark.gpu
def test_gpu(): ...

@pytest.mark.hub
def test_hub(): ...

@pytest.mark.slow
def test_slow(): ...
""", "-rs", "--strict-markers")  # fmt: skip
    result.assert_outcomes(failed=1, skipped=2, passed=1)
    result.stdout.fnmatch_lines(["_* test_no_file _*", "*/nowhere.yaml: cannot be read (No such file or directory)"])
    assert "Traceback" not in result.stdout.str()
    assert "recover/testing/defenses.py" not in result.stdout.str()
    result.stdout.fnmatch_lines(["SKIPPED * needs a CUDA device", "SKIPPED * needs the Hugging Face hub"])
    result = suite("""
@pytest.mark.gpus
def test_gpu(): ...
""", "--strict-markers")  # fmt: skip
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*'gpus' not found in `markers` configuration option*"])


@pytest.mark.parametrize("machine", ["torch.cuda.is_available", "recover.models.hub.hub_reachable"])
def test_a_mark_whose_machine_is_there_does_not_skip(suite, monkeypatch, machine):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("recover.models.hub.hub_reachable", lambda: False)
    monkeypatch.setattr(machine, lambda: True)
    suite("""
@pytest.mark.gpu
def test_gpu(): ...

@pytest.mark.hub
def test_hub(): ...
""").assert_outcomes(passed=1, skipped=1)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny model and its SAEs."""
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def own(pytester, monkeypatch, saved):
    """A suite that `recover init` writes, edited for the tiny model that lies beside it; and what runs it."""
    monkeypatch.setattr("_pytest.pytester.SysModulesSnapshot.restore", lambda self: None)
    monkeypatch.delitem(sys.modules, "test_defense", raising=False)
    assert main(["init", "suite"]) == 0
    for name in ("model", "sae"):
        shutil.copytree(saved / name, f"suite/{name}")
    searches = []

    def edit(**changes):
        template = yaml.safe_load(Path("suite/defense.yaml").read_text())
        settings = tiny.configuration(Path(), **changes)  # names the model and the SAE by where they are beside it
        Path("suite/defense.yaml").write_text(yaml.safe_dump(template | settings))

    def check(*arguments, **options):
        searches.append(arguments)
        return real(*arguments, **options)

    real = import_module("recover.run.runner").check
    monkeypatch.setattr("recover.run.runner.check", check)
    edit.run = lambda *arguments, **how: pytester.runpytest_inprocess(*PLUGIN, *arguments, **how)
    edit.searches = searches
    return edit


EVERY = list(range(tiny.D_SAE))
"""All features, of which any direction of the residual moves some: a bottleneck by construction."""


def test_a_suite_that_init_writes_is_green_on_a_bottleneck(own):
    own(clamps__features=EVERY, clamps__only_active=True)
    result = own.run("suite")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["defense.yaml * NOT_RECOVERED_AT_BUDGET  0 of 11 at 100 *"])
    assert len(own.searches) == 1


def test_a_suite_that_init_writes_is_red_where_it_is_bypassed_and_checks_again_what_changed(own, capfd, monkeypatch):
    own(search__budget=20.0)
    result = own.run("suite")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["RECOVERABLE: * of * valid flips are brought back by * norm at most 20, *; expected none"]
    )
    assert "recover: checking defense.yaml" in capfd.readouterr().err
    assert len(own.searches) == 1

    # Nothing changed; from wherever it is started.
    monkeypatch.chdir("suite")
    own.run("test_defense.py", "--rootdir", "..").assert_outcomes(passed=1, failed=1)
    monkeypatch.chdir("..")
    assert "recover: checking" not in capfd.readouterr().err
    assert len(own.searches) == 1

    # A key of the file; then an SAE under the same name, with the same folder for its run.
    own(search__budget=19.0)
    own.run("suite", "-k", "clamp_held").assert_outcomes(passed=1, deselected=1)
    assert len(own.searches) == 2
    other = tiny.signed_basis()
    other.b_enc.data += 1e-3
    other.save_model("suite/sae")
    own.run("suite", "-k", "clamp_held").assert_outcomes(passed=1, deselected=1)
    assert len(own.searches) == 3
    tiny.save_model(Path("suite/model"), seed=3)
    own.run("suite", "-k", "clamp_held")
    assert len(own.searches) == 4


def test_what_init_writes_is_not_written_over_and_every_key_is_known(pytester, capsys):
    assert main(["init", "suite"]) == 0
    assert "Edit the two marked lines of suite/defense.yaml" in capsys.readouterr().out
    assert Path("suite/defense.yaml").read_text().count("EDIT") == 2
    assert load_config("suite/defense.yaml").clamps[0].features == (12, 345, 678)
    assert main(["init", "suite"]) == 2
    assert "suite/defense.yaml: already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"search__budgett": 20.0}, "*/suite/defense.yaml: search.budgett: unknown key; did you mean 'budget'?"),
        ({"clamps__features": [4, 64]}, "clamps[0], SAE '*/suite/sae': *64*"),
        ({"clamps__sae": "nowhere"}, "SAE 'nowhere' is not a name of ours, a folder or release:sae_id; *"),
        ({"model": "./nowhere"}, "model './nowhere': there is no such folder"),
    ],
)
def test_what_a_file_says_wrong_is_told_in_one_line(own, changes, told):
    own(**changes)
    result = own.run("suite")
    result.assert_outcomes(errors=2)
    lines = result.stdout.lines
    at = next(number for number, line in enumerate(lines) if re.match(r"_+ ERROR at setup of", line))
    assert matches(lines[at + 1], told), lines[at + 1]
    assert lines[at + 2].startswith("___")
    assert not own.searches


def test_an_interrupted_check_goes_on_in_the_next_session(own, monkeypatch):
    own()
    runner, finished = import_module("recover.run.runner"), []
    real, keep = runner.check, runner.RunFolder.keep

    def dies(folder, unit, *arguments):
        keep(folder, unit, *arguments)
        finished.append(unit)
        if len(finished) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner.RunFolder, "keep", dies)
        result = own.run("suite", no_reraise_ctrlc=True)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    begun, finished[:] = list(finished), []
    monkeypatch.setattr(
        runner.RunFolder, "keep", lambda folder, unit, *rest: (finished.append(unit), keep(folder, unit, *rest))[1]
    )
    assert runner.check is real
    own.run("suite").assert_outcomes(passed=1, failed=1)
    assert len(begun) == 4
    assert not set(begun) & set(finished)


def test_workers_of_xdist_share_one_search_and_one_table(suite, pytester):
    pytester.makeconftest("import beartype")  # before nnsight, as in our own
    result = suite(
        """
def counted(*arguments, **options):
    with open("searches", "a") as file:
        file.write(f"{os.environ['PYTEST_XDIST_WORKER']}\\n")
    return real(*arguments, **options)

real = recover.run.runner.check
recover.run.runner.check = counted

@pytest.mark.parametrize("number", range(4))
def test_shut(check_defense, number):
    assert_not_recovered(checked(check_defense, "complete_bottleneck"))
    with open("workers", "a") as file:
        file.write(f"{os.environ['PYTEST_XDIST_WORKER']}\\n")

def test_open(check_defense):
    assert_not_recovered(checked(check_defense, "shared_route"))
""",
        "-n2",
        "--dist=load",
        "--recovery-json=told.json",
        "--recovery-report=reports",
        run=pytester.runpytest_subprocess,
    )
    result.assert_outcomes(passed=4, failed=1)
    assert set(Path("workers").read_text().split()) == {"gw0", "gw1"}
    assert len(Path("searches").read_text().split()) == 2
    assert [one["name"] for one in json.loads(Path("told.json").read_text())].count("complete_bottleneck") == 1
    assert len(list(Path("reports").glob("*/verdict.json"))) == 2
    result.stdout.fnmatch_lines(["*= recovery =*", "complete_bottleneck * 0 of 10 *", "shared_route * 24 of 24 *"])
    assert sum(line.startswith(("complete_", "shared_")) for line in result.stdout.lines) == 2


def test_a_session_that_checks_nothing_loads_neither_the_package_nor_torch(pytester):
    """What pytest loads by itself is the module that the entry point names."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert entries == {PLUGIN[-1]: PLUGIN[-1]}
    pytester.makepyfile(
        test_light="""
import sys

def test_light():
    assert not {"recover", "torch", "nnsight"} & set(sys.modules)
"""
    )
    code = (
        f"import sys, pytest; sys.path.insert(0, {str(ROOT)!r}); sys.exit(pytest.main([*{PLUGIN!r}, 'test_light.py']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "recovery" not in done.stdout


@pytest.mark.parametrize("given", ["0", "two"])
def test_seeds_are_a_count(pytester, monkeypatch, given):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    result = pytester.runpytest_subprocess(*PLUGIN, "--recovery-seeds", given)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--recovery-seeds: '{given}' is not a whole number from 1"])


@pytest.mark.parametrize("loaded", [("-p", "recover.testing"), ("-p", "recover.testing", "-p", "recover_pytest")])
def test_the_plugin_is_found_by_the_name_of_the_package_too(pytester, monkeypatch, loaded):
    """Where it is not installed, and where it is; once in either case."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile("def test_it(check_defense): assert check_defense is not None")
    done = pytester.runpytest_subprocess(*loaded)
    done.assert_outcomes(passed=1)
