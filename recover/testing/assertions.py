"""What tests assert of a checked defense: each names the figure, the bound and the folder of the artifacts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from recover.protocol.reasons import because
from recover.protocol.records import ExampleRecord
from recover.protocol.verdict import certified_norm
from recover.protocol.verdict_model import Recovery, Verdict
from recover.report.finished import read_records

BELIEVED = ("RECOVERABLE", "NOT_RECOVERED_AT_BUDGET")


@dataclass(frozen=True)
class Checked:
    """What checks of one defense found, one for each seed.

    Attributes:
        name: of the DEFENSE.yaml, or as it was given.
        verdicts: one for each seed.
        folders: their artifacts.
    """

    name: str
    verdicts: tuple[Verdict, ...]
    folders: tuple[Path, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict of the first seed."""
        return self.verdicts[0]

    def __iter__(self) -> Iterator[tuple[Verdict, Path]]:
        return zip(self.verdicts, self.folders, strict=True)


def assert_recoverable(checked: Checked, at_least: float = 0.0) -> None:
    """The defense is recoverable, on more than `at_least` of the valid flips where that is given."""
    __tracebackhide__ = True
    expected = f"at least {at_least:.0%}" if at_least else "some"
    for verdict, folder in _believed(checked, expected):
        found = verdict.recovery
        if verdict.verdict != "RECOVERABLE" or (found.rate or 0.0) < at_least:
            _fail(f"{_rate(found)}; expected {expected}", verdict, folder)


def assert_not_recovered(checked: Checked, budget: float | None = None) -> None:
    """No valid flip is brought back by a perturbation of norm at most `budget`, by default the one that was searched.

    Holds where the search says so that it was to be believed; a run that says nothing fails.
    """
    __tracebackhide__ = True
    expected = "none recovered" if budget is None else f"none recovered at {budget:g}"
    for verdict, folder in _believed(checked, expected):
        found = verdict.recovery
        bound = found.budget if budget is None else budget
        if bound > found.budget:
            _fail(f"searched to a norm of {found.budget:g} only; expected {expected}", verdict, folder)
        records = read_records(folder) if verdict.verdict == "RECOVERABLE" else ()
        if back := [size for size in map(_size, records) if size <= bound]:
            rate = f"{len(back)} of {found.searched} valid flips are brought back by a perturbation of norm at most"
            _fail(f"{rate} {bound:g}, the smallest of norm {min(back):.3g}; expected none", verdict, folder)


def assert_content(checked: Checked, expected: bool = True) -> None:
    """The answers can still be read from the defended state; with `expected=False`, it is known that they cannot."""
    __tracebackhide__ = True
    _known(checked, "content", expected)


def assert_rule(checked: Checked, expected: bool = True) -> None:
    """The behavior's own rule comes back more easily than others; with `expected=False`, it is known not to."""
    __tracebackhide__ = True
    _known(checked, "rule", expected)


def _known(checked: Checked, which: Literal["content", "rule"], expected: bool) -> None:
    __tracebackhide__ = True
    for verdict, folder in _believed(checked, f"{which}: {expected}"):
        value = verdict.content if which == "content" else verdict.rule
        if verdict.verdict != "RECOVERABLE" or value is not expected:
            why = next((one for one in because(verdict) if one.startswith(which)), "no shared perturbation was read")
            known = "unknown" if value is None else value
            _fail(f"{which} is {known} ({why}); expected {expected}", verdict, folder)


def assert_drift_below(checked: Checked, bound: float) -> None:
    """The clamped features moved by at most this share of their size on every valid flip, and some were searched.

    A feature that moved from zero has no such share, and fails.
    """
    __tracebackhide__ = True
    expected = f"at most {bound:g}"
    for verdict, folder in _believed(checked, expected):
        certificates = (record.certificate for record in read_records(folder))
        drifts = [_number(one.relative_drift) for one in certificates if one is not None]
        worst = max(drifts, default=None)
        if worst is None or not worst <= bound:
            over = f" on {sum(not one <= bound for one in drifts)} of {len(drifts)} valid flips"
            shown = "no certificate" if worst is None else f"a relative drift of {worst:.2e}, and too much{over}"
            _fail(f"{shown}; expected {expected}", verdict, folder)


def assert_attribution(checked: Checked, part: str, at_least: float) -> None:
    """Replaying this part of the perturbations alone brings the behavior back at this rate or more."""
    __tracebackhide__ = True
    expected = f"at least {at_least:.0%}"
    for verdict, folder in _believed(checked, expected):
        parts = {str(name): one for name, one in verdict.attribution.parts.items()} if verdict.attribution else {}
        if part not in parts:
            known = f"it has: {', '.join(parts)}" if parts else "this run has none"
            _fail(f"no part {part!r} in its attribution ({known}); expected {expected}", verdict, folder)
        if (rate := parts[part].replay.rate) < at_least:
            _fail(f"replay of {part} alone brings back {rate:.0%}; expected {expected}", verdict, folder)


def _believed(checked: Checked, expected: str) -> Iterator[tuple[Verdict, Path]]:
    """The verdicts with their folders; one that says nothing either way fails."""
    __tracebackhide__ = True
    for verdict, folder in checked:
        if verdict.verdict not in BELIEVED:
            reasons = "; ".join(verdict.reasons)
            _fail(f"the run says nothing either way ({reasons}); expected {expected}", verdict, folder)
        yield verdict, folder


def _fail(what: str, verdict: Verdict, folder: Path) -> None:
    __tracebackhide__ = True
    pytest.fail(f"{verdict.verdict}: {what}\nartifacts: {folder}", pytrace=False)


def _rate(found: Recovery) -> str:
    low, high = found.wilson95
    rate = f"{found.recovered} of {found.searched} valid flips recovered ({found.rate:.0%}; 95% interval "
    return f"{rate}{low:.0%} to {high:.0%}) at budget {found.budget:g}"


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def _size(record: ExampleRecord) -> float:
    """The smallest norm by certificate that brings the behavior back; infinite where none does."""
    within = _number(record.certificate.norm) if record.certificate is not None and record.back else math.inf
    return min(within, certified_norm(record))
