"""The scripts of analyses/: short, of public names alone, and bad input is told in one line."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import recover
from recover.protocol import ReadOut
from recover.run import Points, load_config, load_run, run_check
from recover.tasks import StillRight
from recover.types import InputError
from tests import tiny

ANALYSES = Path(__file__).parent.parent / "analyses"
SCRIPTS = sorted(ANALYSES.glob("*.py"))
MOST_LINES = 120


def private_names(source: str) -> Iterator[str]:
    """What a script uses of recover that is not public: imports, and attributes of the package."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (one.name for one in node.names if one.name.startswith("recover."))
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "recover":
                package = importlib.import_module(module)
                public = package.__all__ if hasattr(package, "__path__") else ()
                yield from (f"{module}.{one.name}" for one in node.names if one.name not in public)
            case ast.Attribute(value=ast.Name(id="rc")) if node.attr not in recover.__all__:
                yield f"rc.{node.attr}"
            case ast.Attribute() if node.attr.startswith("_"):
                yield node.attr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_an_analysis_is_short_and_of_public_names(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MOST_LINES
    assert list(private_names(source)) == []
    own = {script.stem for script in SCRIPTS}
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {getattr(node, "module", None) or node.names[0].name for node in nodes}
    assert not own & imported


def test_what_is_private_is_found() -> None:
    said = "import recover.types\nimport recover as rc\nfrom recover.search.ascent import clip\nrc.nothing\nx._made"
    assert sorted(private_names(said)) == ["_made", "rc.nothing", "recover.search.ascent.clip", "recover.types"]


@pytest.fixture
def analysis(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import an analysis as Python does that runs it."""
    monkeypatch.syspath_prepend(str(ANALYSES))
    return __import__


def test_a_point_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make(value: int) -> dict[str, int]:
        made.append(value)
        return {"value": value}

    first = Points.open(tmp_path / "sweep", {"budget": (1, 2)})
    assert first.get("a", lambda: make(1)) == {"value": 1}
    again = Points.open(tmp_path / "sweep", {"budget": [1, 2]})  # as JSON has it
    assert again.get("a", lambda: make(2)) == {"value": 1}
    assert again.get("b", lambda: make(3)) == {"value": 3}
    assert made == [1, 3]


def test_a_point_that_fails_is_not_kept(tmp_path: Path) -> None:
    points = Points.open(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        points.get("a", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert points.get("a", lambda: {"value": 1}) == {"value": 1}


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    Points.open(tmp_path / "sweep", {"budget": 1})
    with pytest.raises(InputError, match="made under other settings"):
        Points.open(tmp_path / "sweep", {"budget": 2})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        Points.open(tmp_path / "notes", {})
    with pytest.raises(InputError, match="cannot be used"):
        Points.open(tmp_path / "notes" / "mine.txt", {})


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (2, [1, 1]), (3, [2, 1]), (12, [6, 6]), (41, [21, 20])])
def test_features_are_spread_evenly(analysis: Any, count: int, expected: list[int]) -> None:
    config = load_config(ANALYSES / "refusal_smollm2.yaml")
    spread = analysis("feature_count").spread(config, count)
    assert [clamp.features.top for clamp in spread.clamps] == expected
    assert [clamp.sae for clamp in spread.clamps] == ["smollm2-l15", "smollm2-l18"][: len(expected)]


def found(norm: float, shows: bool = True, held: bool = True, *, within: bool = True) -> dict[str, Any]:
    """A flip as `unlearning.py` keeps it: its smallest delta, and one of norm 20 that is back where `within`."""
    facts = {"relative_drift": 0.25, "constraint_residual": 1e-8}
    return {
        "group": f"g{norm}",
        "within": {"shows": within, "held": held, "norm": 20.0} | facts,
        "smallest": {"shows": shows, "held": held, "norm": norm} | facts,
    }


def test_what_moves_a_clamped_feature_is_back_only_without_a_constraint(analysis: Any) -> None:
    unlearning = analysis("unlearning")
    rows = [found(3.0), found(4.0, held=False), found(50.0, within=False), found(1.0, shows=False)]
    assert [unlearning.certified_norm(row) for row in rows] == [3.0, float("inf"), 50.0, 20.0]
    assert [unlearning.back(row, constrained=True) for row in rows] == [True, False, False, True]
    assert [unlearning.back(row, constrained=False) for row in rows] == [True, True, False, True]
    assert unlearning.line("x", 9, rows, rows)[1:] == ("4", "4 of 9", "3/4", "0.250", "2/4", "2.5e-01", "1.0e-08")
    told = [line.split() for line in unlearning.curve(rows, {"2": 0, "10": 6}).splitlines()[1:]]
    assert [line[1] for line in told] == ["0/4", "0/4", "1/4", "1/4", "2/4", "2/4"]  # at 0, 2, 5, 10, 20 and 40
    assert [line[-1] for line in told] == ["-", "0", "-", "6", "-", "-"]


def test_published_refusals_stand_under_the_headings(analysis: Any) -> None:
    def told(name: str) -> dict[str, list[str]]:
        lines = [ReadOut.published(*one) for one in analysis("refusal").published(load_config(ANALYSES / name)).items()]
        assert {len(line) for line in lines} == {ReadOut.HEADINGS.index("   floor") + len("   floor")}
        return {line[:15].strip(): line[15:].split() for line in lines}

    advbench = told("published/refusal_advbench_gemma2.yaml")
    assert advbench == told("refusal_smollm2.yaml")
    assert advbench["constrained"] == ["24", "23", "15", "12", "-", "-", "-", "0.131", "-", "0.127"]
    assert advbench["soft suffix"] == ["24", "24", "-", "-", "-", "-", "-", "0.815", "-", "-"]
    harmbench = told("published/refusal_harmbench_gemma2.yaml")
    assert harmbench == {"constrained": ["43", "43", "19", "14", "-", "-", "4.9%", "0.108", "-", "0.102"]}


def test_what_is_retained_is_told_by_wording_and_by_fact() -> None:
    said = str(StillRight(5, ((True, True), (True, False), (False, False), (True,))))
    assert "4 of 7 wordings (57.1%)" in said
    assert "2 of 4 items (50.0%) right in every wording" in said
    assert "nothing can be said" in str(StillRight(5, ()))


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("budget.py", ["--budgets", "-1"], "budget: --budgets: a budget must be 0 or more, got -1"),
        ("feature_count.py", ["--counts", "0"], "feature_count: --counts: 0 features cannot be raised"),
        ("refusal.py", ["nowhere.yaml"], "refusal: nowhere.yaml: cannot be read"),
        (
            "unlearning.py",
            [str(ANALYSES / "ioi_smollm2.yaml")],
            f"unlearning: {ANALYSES / 'ioi_smollm2.yaml'}: its task",
        ),
        ("attribution.py", ["nowhere.yaml"], "attribution: nowhere.yaml: cannot be read"),
    ],
)
def test_bad_input_is_told_in_one_line(script: str, arguments: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, str(ANALYSES / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(said)
    assert "Traceback" not in done.stderr


def test_attribution_of_a_finished_run_goes_on_where_it_stopped(
    analysis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny model, checked and looked at twice; the second time nothing is made again."""
    tiny.make(tmp_path / "defense")
    run_check(load_config(tmp_path / "defense" / "defense.yaml"), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    out = tmp_path / "out"

    def printed(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        analysis(name).main()
        return capsys.readouterr().out

    arguments = (str(tmp_path / "run"), "--out", str(out), "--points", "2", "--flips", "5")
    first = printed("attribution", *arguments)
    found = json.loads((out / "attribution.json").read_text())
    table = analysis("attribution_tables").part_rows(found["own"])
    assert table["full"]["replay"] == table["full"]["certified"] == 5
    assert table["full"]["knockout"] == table["clamped"]["replay"] == 0
    # The SAE is exact in the whole residual stream, so nothing is in its error.
    assert table["error"]["integrated"] == pytest.approx(0, abs=1e-3)
    assert table["free"]["integrated"] == pytest.approx(1, abs=1e-3)
    assert found["sanity"] < 1e-4
    assert found["shared"]
    assert "parts of own deltas: 5 valid flips" in printed("attribution_tables", str(out))
    assert (out / "attribution.svg").exists()
    paths = [*arguments[:2], str(tmp_path / "paths"), *arguments[3:]]
    told = printed("paths", *paths)
    carried = json.loads((tmp_path / "paths" / "paths.json").read_text())
    assert {name.split("-")[0] for name in carried} == {"own", "shared"}
    assert sum(carried["own-0"]["paths"]["direct"].values()) == pytest.approx(1, abs=0.02)
    assert (tmp_path / "paths" / "paths.svg").exists()
    monkeypatch.delattr(analysis("attribution"), "attribute")
    for name in ("carried", "name_movers"):
        monkeypatch.delattr(analysis("paths"), name)
    assert printed("attribution", *arguments) == first
    assert printed("paths", *paths) == told
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    run = load_run(tmp_path / "run")
    assert list(run.flips) == [name for name, record in run.records.items() if record.valid_flip]
    assert {len(one.delta) for one in run.shared} == {len(one.examples.ids) for one in run.shared}


def test_shares_of_parts_are_of_all_examples_together(analysis: Any) -> None:
    tables = analysis("attribution_tables")

    def row(effect: float, share: float) -> dict[str, Any]:
        view = {"norm": 1.0, "first_order": share * effect, "integrated": share * effect}
        view |= {"replay_score": share * effect, "replay_slack": share - 0.5, "knockout_slack": 0.5 - share}
        whole = view | {"first_order": 2 * effect, "integrated": effect, "replay_score": effect}
        return {"defended": 0.0, "recovered": effect, "views": dict.fromkeys(tables.VIEWS, view) | {"full": whole}}

    table = tables.part_rows([row(1.0, 0.25), row(3.0, 0.75)])
    assert table["error"]["integrated"] == pytest.approx((0.25 + 2.25) / 4)
    assert table["error"]["first_order"] == pytest.approx((0.25 + 2.25) / 8)
    assert (table["error"]["replay"], table["error"]["knockout"]) == (1, 1)
    assert (table["full"]["gap"], table["full"]["integrated_gap"]) == (-1.0, 0.0)
    assert tables.part_lines(table)[1].split()[:2] == ["full", "delta"]
