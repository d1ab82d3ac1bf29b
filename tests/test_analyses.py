"""What the sweeps of analyses/ share: points that are kept, and bad input that is told in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recover.config import load_config
from recover.types import InputError

ANALYSES = Path(__file__).parent.parent / "analyses"


@pytest.fixture
def analysis(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import an analysis as Python does that runs it."""
    monkeypatch.syspath_prepend(str(ANALYSES))
    return __import__


def test_a_point_is_made_once(analysis: Any, tmp_path: Path) -> None:
    points, made = analysis("points").Points, []

    def make(value: int) -> dict[str, int]:
        made.append(value)
        return {"value": value}

    first = points.open(tmp_path / "sweep", {"budget": (1, 2)})
    assert first.get("a", lambda: make(1)) == {"value": 1}
    again = points.open(tmp_path / "sweep", {"budget": [1, 2]})  # as JSON has it
    assert again.get("a", lambda: make(2)) == {"value": 1}
    assert again.get("b", lambda: make(3)) == {"value": 3}
    assert made == [1, 3]


def test_a_point_that_fails_is_not_kept(analysis: Any, tmp_path: Path) -> None:
    points = analysis("points").Points.open(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        points.get("a", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert points.get("a", lambda: {"value": 1}) == {"value": 1}


def test_other_settings_and_other_folders_are_refused(analysis: Any, tmp_path: Path) -> None:
    points = analysis("points").Points
    points.open(tmp_path / "sweep", {"budget": 1})
    with pytest.raises(InputError, match="made under other settings"):
        points.open(tmp_path / "sweep", {"budget": 2})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        points.open(tmp_path / "notes", {})
    with pytest.raises(InputError, match="cannot be used"):
        points.open(tmp_path / "notes" / "mine.txt", {})


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (2, [1, 1]), (3, [2, 1]), (12, [6, 6]), (41, [21, 20])])
def test_features_are_spread_evenly(analysis: Any, count: int, expected: list[int]) -> None:
    config = load_config(ANALYSES / "refusal_smollm2.yaml")
    spread = analysis("feature_count").spread(config, count)
    assert [clamp.features.top for clamp in spread.clamps] == expected
    assert [clamp.sae for clamp in spread.clamps] == ["smollm2-l15", "smollm2-l18"][: len(expected)]


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("budget.py", ["--budgets", "-1"], "budget: --budgets: -1 is no norm; give numbers from 0"),
        ("feature_count.py", ["--counts", "0"], "feature_count: --counts: 0 features cannot be raised"),
        ("refusal.py", ["nowhere.yaml"], "refusal: nowhere.yaml: cannot be read"),
    ],
)
def test_bad_input_is_told_in_one_line(script: str, arguments: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, str(ANALYSES / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(said)
    assert "Traceback" not in done.stderr
