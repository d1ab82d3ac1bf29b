"""The selftest: no miss where the checker works, a miss where it is broken, and what it prints."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recover import cli
from recover.planted import KINDS, MIXTURES, selftest
from recover.planted.selftest import Outcome
from recover.protocol import bench, checking, phases, reading
from recover.search import solvers
from recover.search.constraints.linear import EncoderOrthogonal

KNOWN = {
    "complete_bottleneck": "NOT_RECOVERED_AT_BUDGET",
    "error_bypass": "RECOVERABLE",
    "feature_bypass": "RECOVERABLE",
    "write_only": "RECOVERABLE (content: false)",
    "shared_route": "RECOVERABLE (content: true)",
    "two_layers": "RECOVERABLE",
    "undone_clamp": "RECOVERABLE (content: true)",
    "half_erased": "RECOVERABLE",
    "undone_and_route": "RECOVERABLE (content: true)",
}
WORLDS = (*KINDS, *MIXTURES)


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return selftest.run_selftest(range(2), WORLDS, processes=2)


def test_every_kind_is_judged_and_none_is_missed(outcomes: list[Outcome]) -> None:
    assert [(one.kind, one.seed) for one in outcomes] == [(kind, seed) for kind in WORLDS for seed in range(2)]
    assert not [one for one in outcomes if one.miss]
    for one in outcomes:
        if one.kind in KNOWN:
            assert one.given == KNOWN[one.kind]
        most = 1e-3 if one.kind in KINDS else selftest.TOLERANCE
        assert one.norm_error is None or one.norm_error < most
        assert (one.norm_error is None) == (one.kind == "hard_readout")


@pytest.mark.parametrize("kind", ["complete_bottleneck", "write_only", "two_layers", "weak_predicate"])
def test_worlds_judged_side_by_side_are_judged_as_one_by_one(kind: str, outcomes: list[Outcome]) -> None:
    alone = selftest.run_selftest(range(2), [kind], processes=1)
    assert [replace(one, seconds=0.0) for one in alone] == [
        replace(one, seconds=0.0) for one in outcomes if one.kind == kind
    ]
    assert all(one.seconds > 0 for one in alone)


def test_other_processes_are_started_where_there_are_worlds_enough_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    @contextlib.contextmanager
    def judges(processes: int) -> Iterator[Any]:
        started.append(processes)
        yield lambda worlds: (outcome(kind=kind, seed=seed) for kind, seed in worlds)

    monkeypatch.setattr(selftest, "_judges", judges)
    monkeypatch.setattr(selftest, "cores", lambda: 3)
    told: list[tuple[str, int, int]] = []
    found = selftest.run_selftest(range(4), WORLDS[:10], lambda *args: told.append(args))
    assert [(one.kind, one.seed) for one in found] == [(kind, seed) for kind in WORLDS[:10] for seed in range(4)]
    assert told == [("planted worlds", done, 40) for done in range(1, 41)]
    selftest.run_selftest(range(4), WORLDS[:9])
    assert {one.kind for one in selftest.run_selftest(range(4), processes=7)} == set(KINDS)
    assert started == [3, 1, 7]


def outcome(**changes: Any) -> Outcome:
    plain = Outcome("kind", "", 0, ("RECOVERABLE",), "RECOVERABLE", True, 0.001, 0.1, ("because",))
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("changes", "miss"),
    [
        ({}, False),
        ({"right": False}, True),
        ({"norm_error": 0.02}, True),
        ({"norm_error": float("inf")}, True),
        ({"norm_error": float("nan")}, True),
        ({"norm_error": None}, False),
        ({"norm_error": None, "right": False}, True),
    ],
)
def test_what_counts_as_a_miss(changes: dict[str, Any], miss: bool) -> None:
    assert outcome(**changes).miss is miss


@pytest.mark.parametrize(
    ("kind", "verdict", "content", "given", "miss"),
    [
        ("error_bypass", "RECOVERABLE", None, "RECOVERABLE", False),
        ("error_bypass", "RECOVERABLE", True, "RECOVERABLE", False),  # the construction does not say
        ("error_bypass", "NOT_RECOVERED_AT_BUDGET", None, "NOT_RECOVERED_AT_BUDGET", True),
        ("error_bypass", "INCONCLUSIVE", None, "INCONCLUSIVE", True),
        ("hard_readout", "INCONCLUSIVE", None, "INCONCLUSIVE", False),
        ("complete_bottleneck", "RECOVERABLE", None, "RECOVERABLE", True),
        ("shared_route", "RECOVERABLE", True, "RECOVERABLE (content: true)", False),
        ("shared_route", "RECOVERABLE", False, "RECOVERABLE (content: false)", True),
        ("shared_route", "RECOVERABLE", None, "RECOVERABLE (content: unknown)", True),
        ("shared_route", "NOT_RECOVERED_AT_BUDGET", None, "NOT_RECOVERED_AT_BUDGET", True),
        ("write_only", "RECOVERABLE", False, "RECOVERABLE (content: false)", False),
        ("write_only", "RECOVERABLE", True, "RECOVERABLE (content: true)", True),
        ("write_only", "RECOVERABLE", None, "RECOVERABLE (content: unknown)", True),
        ("weak_predicate", "RECOVERABLE", False, "RECOVERABLE (content: false)", False),
        ("weak_predicate", "RECOVERABLE", None, "RECOVERABLE (content: unknown)", False),
        ("weak_predicate", "RECOVERABLE", True, "RECOVERABLE (content: true)", True),
    ],
)
def test_what_is_right_of_a_world(
    kind: str, verdict: str, content: bool | None, given: str, miss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the checker said of it, and with the norm aside."""
    said = SimpleNamespace(verdict=verdict, content=content, reasons=("because",), records=())
    monkeypatch.setattr(selftest, "check", lambda *_, **__: said)
    monkeypatch.setattr(selftest, "norm_error", lambda *_: 0.0)
    one = selftest.judge((KINDS | MIXTURES)[kind](0), 0)
    assert (one.given, one.miss, one.why) == (given, miss, ("because",))


def test_the_report_by_hand() -> None:
    text = selftest.selftest_report(
        [
            outcome(kind="one", norm_error=0.001),
            outcome(kind="one", norm_error=0.004, seed=1),
            outcome(kind="two", variant="odd", given="INCONCLUSIVE", right=False, norm_error=None, seconds=2.0),
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


def broken_projection(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EncoderOrthogonal, "project", lambda self, delta: delta)


def long_norms(patch: pytest.MonkeyPatch) -> None:
    real = phases.worst_case

    def longer(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        return replace(
            found, smallest=1.02 * found.smallest, delta=found.delta.where(found.delta == 0, 1.02 * found.smallest)
        )

    patch.setattr(phases, "worst_case", longer)


def one_layer_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bench, "admissible", lambda defended, **_: EncoderOrthogonal.of(defended.defense.clamps[0]))


def shuffled_to_themselves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reading, "derangement", lambda targets, *_: targets)


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
        ("half_erased", long_norms),
        ("shared_route", shuffled_to_themselves),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_broken_checker_is_noticed(
    kind: str, breakage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breakage(monkeypatch)
    found = selftest.run_selftest([3], [kind])
    assert [one.miss for one in found] == [True]
    assert f"MISS {kind}" in selftest.selftest_report(found)


def test_without_the_second_opinion_hard_readouts_are_lied_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look without gradients at what failed, no random draws or leaking gradients beside those that are true, and no
    planted routes, which say that such a search is blind.
    """
    monkeypatch.setattr(checking, "trials", lambda *_: {})
    monkeypatch.setattr(solvers, "reexamined", lambda _, solution, *__, **___: solution)
    monkeypatch.setattr(phases, "random_draws", lambda *arguments, **_: solvers.by_ascent(*arguments))
    monkeypatch.setattr(phases, "SOLVERS", {**solvers.SOLVERS, "surrogate": solvers.by_ascent})
    assert any(
        one.given == "NOT_RECOVERED_AT_BUDGET" and one.miss for one in selftest.run_selftest([2], ["hard_readout"])
    )


def test_threads_are_given_back() -> None:
    threads = torch.get_num_threads()
    told: list[tuple[str, int, int]] = []
    selftest.run_selftest([0], ["complete_bottleneck"], lambda *args: told.append(args))
    assert torch.get_num_threads() == threads
    assert told == [("planted worlds", 1, 1)]


def few(monkeypatch: pytest.MonkeyPatch, outcomes: list[Outcome]) -> None:
    monkeypatch.setattr(
        cli,
        "run_selftest",
        lambda seeds, kinds, progress: [
            one for one in outcomes if one.seed in seeds and (one.kind in kinds or one.kind not in WORLDS)
        ],
    )


def test_the_command_prints_saves_and_exits(
    outcomes: list[Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch, outcomes)
    file = tmp_path / "outcomes.json"
    assert cli.main(["selftest", "--seeds", "2"]) == 0
    assert "0 misses in 18 worlds" in capsys.readouterr().out
    assert cli.main(["selftest", "--seeds", "2", "--mixtures", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "0 misses in 28 worlds" in out
    assert "expected \\ given" in out
    saved = json.loads(file.read_text())
    assert (saved["misses"], len(saved["worlds"])) == (0, 28)
    assert {world["kind"] for world in saved["worlds"]} == set(WORLDS)
    assert set(saved["worlds"][0]) >= {"kind", "seed", "expected", "given", "norm_error", "miss", "why"}

    few(monkeypatch, [outcome(norm_error=float("inf"))])
    assert cli.main(["selftest", "--json", str(file)]) == 1
    assert "1 misses" in capsys.readouterr().out
    assert json.loads(file.read_text())["worlds"][0]["norm_error"] is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seeds", "0"], "expected a positive whole number, got '0'"),
        (["--seeds", "x"], "expected a positive whole number, got 'x'"),
        (["--json", "/no/such/folder/file.json"], "the folder /no/such/folder does not exist"),
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
