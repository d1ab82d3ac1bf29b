"""`report.md`: a verdict for a pull request: what was found, its figures in one table, and the gates.

Plain GitHub-flavored Markdown; what the user named is escaped, so that it cannot break the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from recover.protocol.verdict_model import Verdict
from recover.report import published
from recover.report.answers import answers, cautions, parsed
from recover.report.figures import number, percent
from recover.report.text import RESULTS
from recover.report.words import headline

__all__ = ["summary_rows", "to_markdown"]


def to_markdown(verdict: Mapping[str, Any], config: str = "") -> str:
    """The page.

    Args:
        verdict: what `verdict.json` holds.
        config: the text of `config.yaml`, for the name of the behavior.
    """
    clamped, recoverable, specific, _ = answers(verdict, parsed(config))
    said = headline(verdict)
    lines = [f"## recover: {verdict['verdict']}", "", f"**{_escaped(said[0].upper() + said[1:])}.**", ""]
    for question, told in (clamped, recoverable, specific):
        lines += [f"**{question}** {_escaped(' '.join(told))}", ""]
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {name} | {_escaped(value)} |" for name, value in summary_rows(verdict)]
    if rows := verdict.get("published"):
        lines += ["", f"**Published: {_escaped(rows[0]['source'])}**", "", "| | |", "| --- | --- |"]
        lines += [
            f"| {result} | {_escaped(figures)} |" for result, figures in published.told(Verdict.model_validate(verdict))
        ]
    lines += ["", "**What could be wrong with this run?**", "", *(f"- {_escaped(one)}" for one in cautions(verdict))]
    lines += ["", f"<details><summary>Gates: {_counted(verdict)}</summary>", "", "| gate | result | detail |"]
    lines += ["| --- | --- | --- |"]
    for result in (False, True, None):
        lines += [
            f"| {gate['name']} | {RESULTS[result]} | {_escaped(gate['detail'])} |"
            for gate in verdict["gates"]
            if gate["passed"] is result
        ]
    return "\n".join([*lines, "", "</details>", ""])


def summary_rows(verdict: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures by which runs are compared; a dash where that part was not run."""
    counts, found, controls = verdict["counts"], verdict["recovery"], verdict["controls"]
    smallest, transfer, utility = verdict["minimum_norm"], verdict["transfer"], verdict["fit"]["utility"]
    ran = transfer if transfer is not None and "refused" not in transfer else None
    readings = None if ran is None else ran["readings"]
    placebo, specific = controls["placebo"], verdict["specific"]
    losses = None if utility is None else (utility["loss_off"], utility["loss_on"])
    return [
        ("verdict", verdict["verdict"]),
        ("specific", {True: "yes", False: "no"}.get(specific, "unknown") if _recovered(verdict) else "-"),
        ("valid flips", f"{counts['valid_flips']} of {counts['n']}"),
        ("brought back", _rate(found["recovered"], found["searched"], found["wilson95"])),
        ("unrelated target", "-" if placebo is None else f"{percent(placebo['rate'])} of {placebo['n']}"),
        ("budget", number(found["budget"])),
        ("smallest norm, median", "-" if smallest is None else _norm(smallest["median"])),
        ("... of the residual", "-" if smallest is None else percent(smallest["median_over_residual"])),
        ("drift, largest", "-" if not found["searched"] else _tiny(found["drift_max"])),
        ("transfer, held out", "-" if ran is None else _rate(ran["hits"], ran["n"], ran["wilson95"])),
        ("... under C1+", "-" if readings is None else _reading(readings["write_orthogonal"])),
        ("... shuffled targets", "-" if readings is None else _reading(readings["shuffled"])),
        ("loss on neutral text", "-" if losses is None or None in losses else f"{losses[0]:.2f} to {losses[1]:.2f}"),
        ("failed gates", ", ".join(gate["name"] for gate in verdict["gates"] if gate["passed"] is False) or "none"),
    ]


def _recovered(verdict: Mapping[str, Any]) -> bool:
    return bool(verdict["verdict"] == "RECOVERABLE")


def _rate(hits: int, n: int, bounds: Any) -> str:
    if not n:
        return "-"
    return f"{hits} of {n} ({percent(hits / n)}; {percent(bounds[0])} to {percent(bounds[1])})"


def _reading(reading: Mapping[str, int]) -> str:
    return f"{reading['hits']} of {reading['n']} ({percent(reading['hits'] / reading['n'])})" if reading["n"] else "-"


def _norm(value: float | None) -> str:
    return "not reached" if value is None else number(value)


def _tiny(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.1e}"


def _counted(verdict: Mapping[str, Any]) -> str:
    results = [gate["passed"] for gate in verdict["gates"]]
    return ", ".join(f"{results.count(result)} {RESULTS[result]}" for result in (False, True, None))


def _escaped(text: str) -> str:
    """With what Markdown, or HTML within it, would read as its own signs."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")
