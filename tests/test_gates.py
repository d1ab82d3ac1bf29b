"""Each gate at its bound, by records made by hand: where it passes and fails, and what that makes of a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from recover.defenses.utility import Utility
from recover.protocol.gates import SEARCH_GATES, flips_gate, health_gates, search_gates, tolerated, utility_gate
from recover.protocol.records import ExampleRecord
from recover.protocol.verdict_model import Counts, Gate, Health
from tests.hand_made import BUDGET, SHOWS_THROUGHOUT, certified, conclude, failed, flip, missed, searched, validated

INF = math.inf


def gate(name: str, *records: ExampleRecord, dtype: str = "float32") -> Gate:
    """The gate of this name, of these records."""
    (found,) = (one for one in search_gates(records, BUDGET, dtype) if one.name == name)
    return found


def of(n: int, *records: ExampleRecord) -> list[ExampleRecord]:
    """These records, and as many that are well as make `n`."""
    return [*records, *(flip(f"well {row}") for row in range(n - len(records)))]


def decides(name: str, *records: ExampleRecord) -> None:
    """Of these records this gate fails, no other does, and it decides."""
    verdict = conclude(*records)
    assert failed(verdict) == [name]
    values = validated(verdict)
    assert values["verdict"] == "INCONCLUSIVE"
    assert values["reasons"][0].startswith(f"{name}: ")


def test_records_that_are_well_pass_every_gate() -> None:
    gates = search_gates(of(3), BUDGET, "float32") + health_gates(Health(n=8, finite_differences=8, error_channel=8))
    assert [one.name for one in gates] == list(SEARCH_GATES)
    assert all(one.passed is True for one in gates)
    assert {one.name for one in gates if one.decides is None} == {"norm_at_budget"}


@pytest.mark.parametrize(("n", "may_fail"), [(0, 0), (9, 0), (10, 1), (20, 1), (39, 1), (40, 2), (100, 5)])
def test_a_share_may_fail_and_of_ten_always_one(n: int, may_fail: int) -> None:
    assert tolerated(n) == may_fail


@pytest.mark.parametrize("status", ["NO_GRADIENT", "MISLED"])
def test_gradient(status: str) -> None:
    """One of forty is one too many: what a gradient hides, it may hide on the others."""
    decides("gradient", *of(40, missed("x", status=status)))
    for other in ("EXHAUSTED", "STALLED", "UNMOVED", "NOTHING_ADMISSIBLE"):
        assert gate("gradient", missed("x", status=other)).passed
    both = gate("gradient", missed("x", status="NO_GRADIENT"), missed("y", status="MISLED"), flip("z"))
    assert both.detail.startswith("1 of 3 searches met a zero gradient")
    assert "score; 1 met a gradient that does not predict" in both.detail


def test_gradient_free_where_a_draw_was_better() -> None:
    decides("gradient_free", *of(40, missed("x", status="OUTDONE")))


def won(name: str, by_gradient: float, smallest: float = 2.0) -> ExampleRecord:
    """A flip that random draws came closest to."""
    norms = {"ascent": by_gradient, "adam": INF, "smallest_norm": INF, "random": smallest}
    return searched(flip(name, near=smallest), winner="random", by_solver=norms)


def test_gradient_free_where_a_draw_came_closer() -> None:
    """By a tenth, and on more than is tolerated."""
    assert gate("gradient_free", won("x", 2.2)).passed
    decides("gradient_free", won("x", 2.21))
    decides("gradient_free", won("x", INF))
    assert gate("gradient_free", *of(10, won("x", 2.21))).passed
    assert not gate("gradient_free", *of(10, won("x", 2.21), won("y", 2.21))).passed
    assert gate("gradient_free", *of(40, won("x", 2.21), won("y", 2.21))).passed
    assert gate("gradient_free", searched(won("x", INF), winner="adam")).passed
    # One that counts as both is one.
    assert (
        "on 1 of 1 examples a gradient-free search"
        in gate("gradient_free", searched(won("x", INF), status="OUTDONE")).detail
    )


@pytest.mark.parametrize("facts", [{"slack": None}, {"drift": None}, {"preactivation_shift": [1e-6, None]}])
def test_finite(facts: dict[str, Any]) -> None:
    assert not gate("finite", *of(40, certified(flip("x"), **facts))).passed


def test_finite_is_the_search_as_well_and_not_ratios_nor_thresholds() -> None:
    decides("finite", *of(40, flip("x", status="NON_FINITE")))
    assert gate("finite", flip("x", relative_drift=None, relative_norm=None, threshold_margin=[None, -1.0])).passed


@pytest.mark.parametrize(
    ("dtype", "allowed"), [("float64", 1e-3), ("float32", 1e-3), ("float16", 0.25), ("bfloat16", 1.0)]
)
def test_replay(dtype: str, allowed: float) -> None:
    for sign in (1, -1):
        at, beyond = (searched(flip("x", slack=0.0), slack=sign * share * allowed) for share in (1.0, 1.001))
        assert gate("replay", at, dtype=dtype).passed
        assert not gate("replay", *of(40, beyond), dtype=dtype).passed
    assert not gate("replay", searched(flip("x"), slack=math.nan), dtype=dtype).passed


def test_replay_that_finds_nothing_suppressed() -> None:
    shown = flip("x", defended_slack=0.1)
    decides("replay", shown)
    found = gate("replay", shown, flip("y", defended_slack=0.0))
    assert found.passed
    assert "on 1 of 2 the replay shows the behavior with the clamp alone" in found.detail
    assert "with the clamp alone" not in gate("replay", flip("x")).detail


@pytest.mark.parametrize(
    ("facts", "passes"),
    [
        ({"constraint_residual": 1e-5}, True),
        ({"constraint_residual": 1.001e-5}, False),
        ({"constraint_residual": None}, False),
        ({"norm": BUDGET}, True),
        ({"norm": 20.001}, False),
        ({"norm": None}, False),
    ],
)
def test_held(facts: dict[str, Any], passes: bool) -> None:
    """Of every delta, that of a search that failed among them."""
    for record in (flip("x", **facts), missed("x", **facts)):
        assert gate("held", *of(40, record)).passed is passes


def test_held_where_all_that_came_back_moved_features() -> None:
    decides("held", flip("x", held=False), missed("y"))
    assert gate("held", flip("x", held=False), flip("y")).passed
    assert gate("held", missed("x", held=False)).passed
    assert "held still on 1 of 2" in gate("held", flip("x", held=False), flip("y"), missed("z")).detail


def reached(name: str, near: float = 3.0, **budgets: bool) -> ExampleRecord:
    return replace(flip(name, near=near), reached_at={key.removeprefix("b"): found for key, found in budgets.items()})


def test_monotone_in_budget_is_of_the_worst_case_over_solvers() -> None:
    """That one ascent lost something at a larger budget is told; another solver found it there."""
    lost = reached("x", b5=True, b10=False, b20=True)
    found = gate("monotone_in_budget", lost, flip("y"))
    assert found.passed
    assert "on 1, steepest ascent alone lost at a larger budget" in found.detail
    whole = gate("monotone_in_budget", reached("x", b5=False, b10=True, b20=True))
    assert whole.passed
    assert "ascent" not in whole.detail


def test_monotone_in_budget_where_one_budget_came_closer_than_the_smallest_norm() -> None:
    """By more than the hundredth to which a smallest norm is known."""
    assert gate("monotone_in_budget", reached("x", near=5.05, b5=True, b20=True)).passed
    closer = reached("x", near=5.06, b5=True, b20=True)
    decides("monotone_in_budget", closer)
    decides("monotone_in_budget", reached("x", near=INF, b5=True, b10=False, b20=False))
    assert gate("monotone_in_budget", *of(10, closer)).passed
    assert not gate("monotone_in_budget", *of(10, closer, replace(closer, id="y"))).passed
    assert gate("monotone_in_budget", replace(flip("x"), reached_at=None)).passed


def test_doubled_steps() -> None:
    """Only what the search did not recover can be recovered by more steps."""
    more = replace(missed("x"), longer=True)
    decides("doubled_steps", more)
    assert gate("doubled_steps", *of(10, more)).passed
    assert not gate("doubled_steps", *of(10, more, replace(more, id="y"))).passed
    assert gate("doubled_steps", replace(flip("x"), longer=True), replace(missed("y"), longer=None)).passed


def test_undefended() -> None:
    """A way back that is known to exist, and was not found."""
    lost = replace(flip("x"), undefended=False)
    decides("undefended", *of(9, lost))
    assert gate("undefended", *of(10, lost)).passed
    assert not gate("undefended", *of(10, lost, replace(lost, id="y"))).passed
    assert (
        "the search recovers 1 of 2" in gate("undefended", lost, flip("y"), replace(flip("z"), undefended=None)).detail
    )


def test_unbounded() -> None:
    """Without a budget everything must come back, or it must be known why it cannot."""
    lost = missed("x", near=INF)
    decides("unbounded", lost, missed("y"))
    for status in ("STALLED", "NON_FINITE", "OUTDONE", "RECOVERED"):
        assert not gate("unbounded", missed("x", near=INF, status=status)).passed
    for status in ("NOTHING_ADMISSIBLE", "UNMOVED"):
        honest = missed("x", near=INF, status=status)
        assert gate("unbounded", honest, missed("y")).passed
        assert not gate("unbounded", honest, lost).passed
        assert conclude(honest).verdict == "NOT_RECOVERED_AT_BUDGET"


def test_unbounded_says_nothing_against_what_was_recovered() -> None:
    """By certificate: with the clamp held, of a flip that the replay agrees is one."""
    lost = missed("x", near=INF)
    found = gate("unbounded", lost, flip("y"))
    assert found.passed
    assert "with no budget 1 of 2 are recovered; for 1 the reason is unknown" in found.detail
    for facts in ({"held": False}, {"shows": False}, {"defended_slack": 0.1}):
        assert not gate("unbounded", lost, flip("y", **facts)).passed


@pytest.mark.parametrize(("norm", "passes"), [(19.79, True), (19.8, False), (20.0, False)])
def test_norm_at_budget_is_a_caution(norm: float, passes: bool) -> None:
    """From 99 % of the budget."""
    verdict = conclude(flip("x", norm=20.0), missed("y", norm=norm))
    (found,) = (one for one in verdict.gates if one.name == "norm_at_budget")
    assert (found.passed, found.decides) == (passes, None)
    assert verdict.verdict == "RECOVERABLE"
    assert not failed(verdict)
    assert (found.detail in verdict.reasons) is not passes
    assert found.detail.startswith(f"{int(not passes)} of 1 failed searches")


@pytest.mark.parametrize("status", ["UNMOVED", "NOTHING_ADMISSIBLE"])
def test_a_budget_stops_nothing_where_nothing_would_help(status: str) -> None:
    found = gate("norm_at_budget", missed("x", status=status, norm=20.0, near=math.inf), missed("y"))
    assert (found.passed, found.detail[:28]) == (True, "0 of 2 failed searches ended")


@pytest.mark.parametrize("name", ["finite_differences", "error_channel"])
def test_gradients_account_for_values_on_all_of_a_small_sample(name: str) -> None:
    well = {"n": 8, "finite_differences": 8, "error_channel": 8}
    for n, right, passes in ((8, 8, True), (8, 7, False), (10, 9, True), (10, 8, False), (40, 38, True)):
        health = dict.fromkeys(well, n) | {name: right}
        verdict = conclude(flip("x"), health=health)
        assert failed(verdict) == ([] if passes else [name])
        assert validated(verdict)["verdict"] == ("RECOVERABLE" if passes else "INCONCLUSIVE")
        (found,) = (one for one in verdict.gates if one.name == name)
        assert found.detail.endswith(f"on {right} of {n} examples")


def test_health_that_was_not_measured_did_not_pass() -> None:
    assert [(one.name, one.passed) for one in health_gates(None)] == [
        ("finite_differences", None),
        ("error_channel", None),
    ]


def test_valid_flips() -> None:
    for flips in (0, 1):
        found = flips_gate(Counts(n=3, base=3, defended=0, valid_flips=flips, strict_flips=flips))
        assert (found.passed, found.decides) == (flips > 0, "INVALID")
        assert found.detail.startswith(f"{flips} of 3 examples")
    assert conclude(SHOWS_THROUGHOUT, flip("x")).verdict == "RECOVERABLE"


@pytest.mark.parametrize(
    ("utility", "passed"),
    [(Utility(3.0, 3.5, 0.5, 9, False), True), (Utility(3.0, 5.0, 2.0, 9, True), False), (None, None)],
)
def test_utility_is_a_caution(utility: Utility | None, passed: bool | None) -> None:
    found = utility_gate(utility, 1.0)
    assert (found.passed, found.decides) == (passed, None)


def test_nothing_searched_runs_no_gate_of_the_search() -> None:
    gates: Sequence[Gate] = conclude(SHOWS_THROUGHOUT).gates
    assert [one.name for one in gates if one.passed is None] == ["suppression", "utility", *SEARCH_GATES]
