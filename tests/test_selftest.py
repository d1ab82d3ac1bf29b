"""The selftest: no miss where the checker works, a miss where it is broken, and what it prints."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from recover import cli, selftest
from recover.constraint import EncoderOrthogonal
from recover.planted import KINDS
from recover.selftest import Outcome

KNOWN = {
    "complete_bottleneck": "NOT_RECOVERED_AT_BUDGET",
    "error_bypass": "RECOVERABLE",
    "feature_bypass": "RECOVERABLE",
    "two_layers": "RECOVERABLE",
}


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return selftest.selftest(range(2))


def test_every_kind_is_judged_and_none_is_missed(outcomes: list[Outcome]) -> None:
    assert [(one.kind, one.seed) for one in outcomes] == [(kind, seed) for kind in KINDS for seed in range(2)]
    assert not [one for one in outcomes if one.miss]
    for one in outcomes:
        if one.kind in KNOWN:
            assert one.given == KNOWN[one.kind]
        assert one.norm_error is None or one.norm_error < 1e-3
        assert (one.norm_error is None) == (one.kind == "hard_readout")


def outcome(**changes: Any) -> Outcome:
    plain = Outcome("kind", "", 0, ("RECOVERABLE",), "RECOVERABLE", 0.001, 0.1, ("because",))
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("changes", "miss"),
    [
        ({}, False),
        ({"given": "NOT_RECOVERED_AT_BUDGET"}, True),
        ({"given": "INCONCLUSIVE"}, True),
        ({"given": "INCONCLUSIVE", "expected": ("RECOVERABLE", "INCONCLUSIVE")}, False),
        ({"norm_error": 0.02}, True),
        ({"norm_error": float("inf")}, True),
        ({"norm_error": float("nan")}, True),
        ({"norm_error": None}, False),
        ({"expected": ("RECOVERABLE (specific)",), "given": "RECOVERABLE (specific)"}, False),
        ({"expected": ("RECOVERABLE (specific)",), "given": "RECOVERABLE (not specific)"}, True),
        ({"expected": ("RECOVERABLE (not specific)",), "given": "RECOVERABLE (specific unknown)"}, True),
        ({"expected": ("RECOVERABLE (specific)",), "given": "RECOVERABLE (pending)"}, False),
        ({"expected": ("RECOVERABLE (specific)",), "given": "NOT_RECOVERED_AT_BUDGET (pending)"}, True),
    ],
)
def test_what_counts_as_a_miss(changes: dict[str, Any], miss: bool) -> None:
    assert outcome(**changes).miss is miss


def test_the_report_by_hand() -> None:
    text = selftest.report(
        [
            outcome(kind="one", norm_error=0.001),
            outcome(kind="one", norm_error=0.004, seed=1),
            outcome(kind="two", variant="odd", given="INCONCLUSIVE", norm_error=None, seconds=2.0),
        ]
    )
    assert text == (
        "expected \\ given  INCONCLUSIVE  RECOVERABLE\n"
        "RECOVERABLE                  1            2\n"
        "\n"
        "kind  worlds  misses  norm error  seconds\n"
        "one        2       0      0.400%      0.2\n"
        "two        1       1           -      2.0\n"
        "\n"
        "1 misses in 3 worlds; norm error: largest relative error of the smallest norm.\n"
        "MISS two odd seed 0: INCONCLUSIVE, expected RECOVERABLE\n"
        "     because"
    )


def test_pending_is_said_while_it_lasts(outcomes: list[Outcome]) -> None:
    text = selftest.report(outcomes)
    assert ("pending:" in text) == any(one.kind in selftest.PENDING for one in outcomes)


def broken_projection(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EncoderOrthogonal, "project", lambda self, delta: delta)


def long_norms(patch: pytest.MonkeyPatch) -> None:
    real = selftest.smallest_norm

    def longer(*args: Any) -> Any:
        found = real(*args)
        return replace(found, norm=1.02 * found.norm)

    patch.setattr(selftest, "smallest_norm", longer)


def one_layer_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(selftest, "_admissible", lambda world: EncoderOrthogonal.of(world.defense.clamps[0]))


@pytest.mark.parametrize(
    ("kind", "breakage"),
    [
        ("complete_bottleneck", broken_projection),
        ("error_bypass", broken_projection),
        ("error_bypass", long_norms),
        ("feature_bypass", long_norms),
        ("two_layers", long_norms),
        ("two_layers", one_layer_forgotten),
        ("degenerate_geometry", broken_projection),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_broken_checker_is_noticed(
    kind: str, breakage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breakage(monkeypatch)
    found = selftest.selftest([3], [kind])
    assert [one.miss for one in found] == [True]
    assert f"MISS {kind}" in selftest.report(found)


def test_without_the_second_opinion_hard_readouts_are_lied_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("recover.check"), "reexamined", lambda _, solution, *__: solution)
    assert any(one.given == "NOT_RECOVERED_AT_BUDGET" and one.miss for one in selftest.selftest([2], ["hard_readout"]))


def test_threads_are_given_back() -> None:
    threads = torch.get_num_threads()
    told: list[tuple[str, int, int]] = []
    selftest.selftest([0], ["complete_bottleneck"], lambda *args: told.append(args))
    assert torch.get_num_threads() == threads
    assert told == [("planted worlds", 1, 1)]


def few(monkeypatch: pytest.MonkeyPatch, outcomes: list[Outcome]) -> None:
    monkeypatch.setattr(cli, "selftest", lambda seeds, progress: [one for one in outcomes if one.seed in seeds])


def test_the_command_prints_saves_and_exits(
    outcomes: list[Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch, outcomes)
    file = tmp_path / "outcomes.json"
    assert cli.main(["selftest", "--seeds", "2", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "0 misses in 18 worlds" in out
    assert "expected \\ given" in out
    saved = json.loads(file.read_text())
    assert (saved["misses"], len(saved["worlds"])) == (0, 18)
    assert {world["kind"] for world in saved["worlds"]} == set(KINDS)
    assert set(saved["worlds"][0]) >= {"kind", "seed", "expected", "given", "norm_error", "miss", "why"}

    few(monkeypatch, [outcome(norm_error=float("inf"))])
    assert cli.main(["selftest", "--json", str(file)]) == 1
    assert "1 misses" in capsys.readouterr().out
    assert json.loads(file.read_text())["worlds"][0]["norm_error"] is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seeds", "0"], "'0' is not a whole number from 1"),
        (["--seeds", "x"], "'x' is not a whole number from 1"),
        (["--json", "/no/such/folder/file.json"], "there is no folder /no/such/folder"),
        (["--sedes", "1"], "did you mean --seeds?"),
    ],
)
def test_unusable_input_is_told_in_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["selftest", *arguments])
    except SystemExit as exit_:
        status = exit_.code  # type: ignore[assignment]
    assert status == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
