"""`report.md`: a verdict for a pull request, and the figures by which runs are compared.

The page is GitHub-flavored Markdown by `templates/report.md.j2`. What the user named is escaped.
"""

from __future__ import annotations

from recover.numerics.formats import counted, norm, number, percent, tiny
from recover.protocol.reasons_knowledge import KNOWN, clustered
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
    smallest, known, utility = verdict.minimum_norm, verdict.knowledge, verdict.fit.utility
    placebo, recoverable = controls.placebo, verdict.verdict == "RECOVERABLE"
    losses = (None, None) if utility is None else (utility.loss_off, utility.loss_on)

    return [
        ("verdict", verdict.verdict),
        ("content", KNOWN[verdict.content] if recoverable else "-"),
        ("rule", KNOWN[verdict.rule] if recoverable else "-"),
        ("valid flips", f"{counts.valid_flips} of {counts.n}"),
        ("recovered", counted(found.recovered, found.searched, found.wilson95, "")),
        ("unrelated target reached", "-" if placebo is None else f"{percent(placebo.rate)} of {placebo.n}"),
        ("budget", number(found.budget)),
        ("median smallest norm", "-" if smallest is None else norm(smallest.median)),
        ("... of the residual norm", "-" if smallest is None else percent(smallest.median_over_residual)),
        ("largest drift", "-" if not found.searched else tiny(found.drift_max)),
        ("unseen flips right again", "-" if known is None else clustered(known.content.back)),
        ("... norm", "-" if known is None else norm(known.norm)),
        ("nearest other rule", "-" if known is None or not known.rule.others else known.rule.others[0].name),
        ("loss on neutral text", "-" if None in losses else f"{losses[0]:.2f} to {losses[1]:.2f}"),
        (
            "failed validity checks",
            ", ".join(gate.name for gate in verdict.gates if gate.passed is False) or "none",
        ),
    ]
