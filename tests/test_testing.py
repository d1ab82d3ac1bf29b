"""The pytest plugin as a user's suite meets it: assertions pass on planted defenses of one kind, fail on the other."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from recover import testing
from recover.cli import main
from recover.config import load_config
from recover.records import ReplyRecord
from tests.hand_made import SHOWS_THROUGHOUT, certified, flip, missed

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
PLUGIN = ("-p", "no:recover", "-p", "recover.testing")
"""By its module, whether or not the package is installed so that pytest finds it by itself."""
HEAD = """
import pytest
from recover.plan import Plan, TransferPlan
from recover.planted import KINDS
from recover.testing import *
from recover.transfer import FitSchedule

LIGHT = Plan(random_draws=20, placebo_features=0, curve=(0.5, 1.0), sample=2,
             transfer=TransferPlan(norms=(), folds=2, shuffles=1, draws=20, fit=FitSchedule(steps=30)))

def checked(check_defense, kind):
    world = KINDS[kind](0)
    return check_defense(
        world.defense, model=world.model, examples=world.examples, budget=world.budget, plan=LIGHT, name=kind
    )
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Runs a suite with the plugin, in a folder of its own."""
    # pytester forgets what a suite imported, and parts of torch cannot be imported twice.
    monkeypatch.setattr("_pytest.pytester.SysModulesSnapshot.restore", lambda self: None)

    def run(tests: str, *arguments: str) -> pytest.RunResult:
        name = f"test_{hashlib.sha256(f'{pytester.path}{tests}'.encode()).hexdigest()[:8]}"  # imported but once
        pytester.makepyfile(**{name: HEAD + tests})
        return pytester.runpytest_inprocess(*PLUGIN, f"{name}.py", *arguments)

    return run


def test_each_assertion_passes_on_one_kind_and_fails_on_the_other_naming_figure_bound_and_folder(suite, pytester):
    result = suite("""
def test_open_pass(check_defense):
    found = checked(check_defense, "shared_route")
    assert_recoverable(found, at_least=0.9)
    assert_specific(found)
    assert_drift_below(found, 1e-3)
    assert_attribution(found, part="full", at_least=0.99)

def test_shut_pass(check_defense):
    assert_not_recovered(checked(check_defense, "complete_bottleneck"))

def test_a_budget_below_what_is_needed(check_defense):
    found = checked(check_defense, "shared_route")
    assert_not_recovered(found, budget=1e-3)

def test_shut_is_not_recoverable(check_defense):
    assert_recoverable(checked(check_defense, "complete_bottleneck"))

def test_open_is_recovered(check_defense):
    assert_not_recovered(checked(check_defense, "shared_route"))

def test_shut_is_not_specific(check_defense):
    assert_specific(checked(check_defense, "complete_bottleneck"))

def test_write_only_is_not_specific(check_defense):
    found = checked(check_defense, "write_only")
    assert_specific(found, expected=False)
    assert_specific(found)

def test_a_bound_beyond_the_search(check_defense):
    assert_not_recovered(checked(check_defense, "complete_bottleneck"), budget=1e9)

def test_no_such_part(check_defense):
    assert_attribution(checked(check_defense, "shared_route"), part="nowhere", at_least=0.5)
""", "--recovery-json", "told/verdicts.json", "--recovery-report", "reports")  # fmt: skip
    result.assert_outcomes(passed=3, failed=6)
    text = result.stdout.str()
    for told in (
        "NOT_RECOVERED_AT_BUDGET: 0 of * valid flips recovered (0%; 95% interval * at budget *; expected some",
        "RECOVERABLE: * of * valid flips are brought back by a perturbation of norm at most *; expected none",
        "NOT_RECOVERED_AT_BUDGET: specific is *; expected True",
        "RECOVERABLE: specific is False; expected True",
        "NOT_RECOVERED_AT_BUDGET: searched to a norm of * only; expected none recovered at 1e+09",
        "RECOVERABLE: no part 'nowhere' in its attribution; *",
        "artifacts: */objects-*",
    ):
        result.stdout.fnmatch_lines([f"*{told}*" if not told.startswith("*") else told])
    assert "Traceback" not in text
    # One search for each defense, told in a table.
    told = json.loads(Path("told/verdicts.json").read_text())
    assert sorted(one["name"] for one in told) == ["complete_bottleneck", "shared_route", "write_only"]
    result.stdout.fnmatch_lines(["shared_route * RECOVERABLE * specific: True*"])
    assert len(list(Path("reports").glob("*/report.html"))) == 3


def write(folder, records):
    (folder / "examples.jsonl").write_text("".join(record.to_json() + "\n" for record in records))


@pytest.mark.parametrize(("norm", "budget", "back"), [(12.0, 20.0, 1), (12.0, 11.0, 0)])
def test_a_whole_answer_is_back_where_what_is_said_is_like_the_own(tmp_path, norm, budget, back):
    """Though not token for token, so that no smallest norm is certified."""
    reply = ReplyRecord(False, False, False, True, False, 0.0, 0.0)
    said = certified(flip("a", near=math.inf), shows=False, norm=norm)
    write(tmp_path, [replace(said, answered=True, refused=True, reply=reply)])
    verdict = {"verdict": "RECOVERABLE", "recovery": {"budget": 20.0, "searched": 1}}
    found = testing.Checked("by hand", (verdict,), (tmp_path,))
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
    parts = {"error": {"replay": {"rate": 0.75}}, "clamped": {"replay": {"rate": 0.0}}}
    verdict = {"verdict": "RECOVERABLE", "attribution": {"parts": parts}}
    found = testing.Checked("by hand", (verdict,), (tmp_path,))
    testing.assert_drift_below(found, 0.25)
    testing.assert_attribution(found, part="error", at_least=0.75)
    where = rf"\nartifacts: {re.escape(str(tmp_path))}"
    with pytest.raises(pytest.fail.Exception, match=rf"a relative drift of 2.50e-01; expected at most 0.2{where}"):
        testing.assert_drift_below(found, 0.2)
    with pytest.raises(pytest.fail.Exception, match=rf"replay of error alone .* 75%; expected at least 80%{where}"):
        testing.assert_attribution(found, part="error", at_least=0.8)
    unsaid = testing.Checked("by hand", ({"verdict": "INVALID", "reasons": ["fit: 0.1"]},), (tmp_path,))
    for assertion in (testing.assert_not_recovered, testing.assert_recoverable, testing.assert_specific):
        with pytest.raises(pytest.fail.Exception, match=r"says nothing either way \(fit: 0.1\)"):
            assertion(unsaid)


def test_a_later_session_searches_nothing_and_seeds_are_checked_each(suite, monkeypatch):
    tests = """
def test_shut(check_defense):
    found = checked(check_defense, "complete_bottleneck")
    assert len(found.verdicts) == 2
    assert len({one["provenance"]["control_seed"] for one in found.verdicts}) == 2
    assert_not_recovered(found)
"""
    suite(tests, "--recovery-seeds", "2", "--recovery-dir", "kept").assert_outcomes(passed=1)
    assert len(list(Path("kept").glob("objects-*/verdict.json"))) == 2

    def searched(*_, **__):
        raise AssertionError("searched again")

    monkeypatch.setattr("recover.objects.check", searched)
    suite(tests, "--recovery-seeds", "2", "--recovery-dir", "kept").assert_outcomes(passed=1)


def test_bad_input_is_one_line_and_marks_say_why_they_skip(suite, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("recover.testing.hub_reachable", lambda: False)
    result = suite("""
def test_no_file(check_defense):
    check_defense("nowhere.yaml")

@pytest.mark.gpu
def test_gpu(): ...

@pytest.mark.hub
def test_hub(): ...
""", "-rs", "--strict-markers")  # fmt: skip
    result.assert_outcomes(failed=1, skipped=2)
    result.stdout.fnmatch_lines(["*nowhere.yaml: cannot be read*"])
    result.stdout.fnmatch_lines(["*needs a CUDA device*"])


@pytest.mark.parametrize("back", [True, False])
def test_a_suite_that_init_writes_is_red_or_green_for_the_right_reason(pytester, monkeypatch, capsys, back):
    """As written, on a run made by hand; the real run is that of `recover check`, tested elsewhere."""
    monkeypatch.setattr("_pytest.pytester.SysModulesSnapshot.restore", lambda self: None)
    assert main(["init", "suite"]) == 0
    assert "Edit the two marked lines of suite/defense.yaml" in capsys.readouterr().out
    assert load_config("suite/defense.yaml").clamps[0].features == (12, 345, 678)
    assert main(["init", "suite"]) == 2
    assert "suite/defense.yaml: is there already" in capsys.readouterr().err

    def check(config, folder):
        folder.mkdir(parents=True)
        write(folder, [flip("a", near=2.0) if back else missed("a")])
        recovery = {"budget": config.search.budget, "recovered": int(back), "searched": 1}
        verdict = "RECOVERABLE" if back else "NOT_RECOVERED_AT_BUDGET"
        return {"verdict": verdict, "specific": back or None, "reasons": [], "recovery": recovery}

    monkeypatch.setattr("recover.testing.run_check", check)
    monkeypatch.chdir("suite")
    monkeypatch.delitem(sys.modules, "test_defense", raising=False)
    result = pytester.runpytest_inprocess(*PLUGIN, "test_defense.py")
    result.assert_outcomes(passed=2 - back, failed=int(back))
    told = "RECOVERABLE: 1 of 1 valid flips are brought back by * at most 20, the smallest of norm 2; expected none"
    result.stdout.fnmatch_lines([told if back else "defense.yaml * NOT_RECOVERED_AT_BUDGET * 0/1 at 20 *"])


ONE_RUN = """
import json
import time
import recover.testing

def check(config, folder):
    if not folder.exists():  # a second look at once would make it again
        time.sleep(1)
        folder.mkdir(parents=True)
        with (folder.parent / "made").open("a") as log:
            log.write("once ")
    recovery = {"budget": config.search.budget, "recovered": 1, "searched": 1, "rate": 1.0}
    return {"verdict": "RECOVERABLE", "specific": None, "reasons": [], "recovery": recovery}

recover.testing.run_check = check
"""


def test_other_plugins_load_after_ours(pytester, monkeypatch):
    """In a process of its own, as pytest loads them in the order in which packages happen to be installed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile("def test_it(): pass")
    pytester.runpytest_subprocess(*PLUGIN, "-p", "anyio").assert_outcomes(passed=1)


@pytest.mark.slow
def test_workers_of_xdist_search_once_and_the_controller_tells(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["init", "."]) == 0
    pytester.makeconftest(ONE_RUN)
    asked = HEAD + "def test_it(check_defense): assert_recoverable(check_defense('defense.yaml'))"
    pytester.makepyfile(test_one=asked, test_other=asked)
    arguments = ("-n", "2", "--dist", "loadfile", "--recovery-dir", "runs", "--recovery-json", "verdicts.json")
    result = pytester.runpytest_subprocess(*PLUGIN, *arguments, "test_one.py", "test_other.py")
    result.assert_outcomes(passed=2)
    assert Path("runs/made").read_text() == "once "
    assert [one["name"] for one in json.loads(Path("verdicts.json").read_text())] == ["defense.yaml"]
    result.stdout.fnmatch_lines(["defense.yaml * RECOVERABLE * 1/1 at 20*"])
