"""`report.md`: a verdict for a pull request, and the figures by which runs are compared.

The page is GitHub-flavored Markdown by `templates/report.md.j2`. What the user named is escaped.
"""

from __future__ import annotations

from typing import Literal

from recover.evidence.rules import Reading
from recover.numerics.formats import counted, norm, number, percent, tiny
from recover.protocol.verdict_model import Verdict
from recover.report import published
from recover.report.answers import answer_questions, parsed
from recover.report.rendering import render
from recover.report.text import RESULTS
from recover.report.words import headline

__all__ = ["summary_rows", "to_markdown"]


def to_markdown(verdict: Verdict, config: str = "") -> str:
    """The page.

    Args:
        verdict: the verdict.
        config: the text of `config.yaml`, for the name of the behavior.
    """
    results = [gate.passed for gate in verdict.gates]
    return render(
        "report.md.j2",
        verdict=verdict,
        headline=headline(verdict),
        answers=answer_questions(verdict, parsed(config)),
        summary=summary_rows(verdict),
        published=published.told(verdict),
        source=verdict.published[0].source if verdict.published else "",
        results=RESULTS,
        counts=", ".join(f"{results.count(result)} {name}" for result, name in RESULTS.items()),
    )


def summary_rows(verdict: Verdict) -> list[tuple[str, str]]:
    """The figures by which runs are compared; a dash where that part was not run."""
    counts, found, controls = verdict.counts, verdict.recovery, verdict.controls
    smallest, ran, utility = verdict.minimum_norm, verdict.shared, verdict.fit.utility
    placebo, recoverable = controls.placebo, verdict.verdict == "RECOVERABLE"
    losses = (None, None) if utility is None else (utility.loss_off, utility.loss_on)

    def read(name: Literal["write_orthogonal", "shuffled"]) -> str:
        one: Reading | None = getattr(ran.readings, name) if ran is not None else None
        return "-" if one is None else counted(one.hits, one.n)

    return [
        ("verdict", verdict.verdict),
        ("content", {True: "yes", False: "no", None: "unknown"}[verdict.content] if recoverable else "-"),
        ("valid flips", f"{counts.valid_flips} of {counts.n}"),
        ("recovered", counted(found.recovered, found.searched, found.wilson95, "")),
        ("unrelated target reached", "-" if placebo is None else f"{percent(placebo.rate)} of {placebo.n}"),
        ("budget", number(found.budget)),
        ("median smallest norm", "-" if smallest is None else norm(smallest.median)),
        ("... of the residual norm", "-" if smallest is None else percent(smallest.median_over_residual)),
        ("largest drift", "-" if not found.searched else tiny(found.drift_max)),
        ("transfer to held-out prompts", "-" if ran is None else counted(ran.hits, ran.n, ran.wilson95, "")),
        ("... under C1+", read("write_orthogonal")),
        ("... with shuffled targets", read("shuffled")),
        ("loss on neutral text", "-" if None in losses else f"{losses[0]:.2f} to {losses[1]:.2f}"),
        (
            "failed validity checks",
            ", ".join(gate.name for gate in verdict.gates if gate.passed is False) or "none",
        ),
    ]
