"""A verdict for the terminal, and the rows of figures that every page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recover.numerics.formats import norm, percent
from recover.protocol.verdict_model import Verdict
from recover.report.published import told
from recover.report.rendering import gathered, render
from recover.report.words import SUMMANDS, SectionKey, clamps, headline, prose

__all__ = ["RESULTS", "Rows", "Section", "sections", "seeds_to_text", "to_text"]

RESULTS = {False: "FAILED", True: "passed", None: "not run"}
"""Results of a validity check, worst first."""
Rows = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """Figures under a heading: `rows` of a name and the figures beside it, none where that part was not run."""

    key: SectionKey
    title: str
    rows: Rows


def sections(verdict: Verdict) -> dict[SectionKey, Section]:
    """The figures that a reader needs, by section and in the order of the page."""
    words = prose()
    context = {"verdict": verdict, "clamps": clamps(verdict.threat_model), "prose": words, "summands": SUMMANDS}
    found: dict[SectionKey, Section] = {
        key: Section(key, title, gathered("facts.j2", key, **context))
        for key, title in words.sections.items()
        if key != "published"
    }
    if verdict.published:
        title = f"{words.sections['published']}: {verdict.published[0].source}"
        found["published"] = Section("published", title, told(verdict))
    return found


def to_text(verdict: Verdict) -> str:
    """The page printed at the end of a check."""
    return render(
        "report.txt.j2",
        verdict=verdict,
        headline=headline(verdict),
        sections=sections(verdict).values(),
        results=RESULTS,
    ).rstrip()


def seeds_to_text(verdicts: Sequence[Verdict]) -> str:
    """How many seeds gave each verdict, and a line for each seed."""
    said = [_said(verdict) for verdict in verdicts]
    lines = [
        f"{said.count(one)} of {len(said)} seeds: {one}" for one in dict.fromkeys(sorted(said, key=said.count)[::-1])
    ]
    lines += ["", "seed  recovered  unseen  placebo norm / own  verdict"]
    for verdict, one in zip(verdicts, said, strict=True):
        transfer, placebo, found = verdict.shared, verdict.controls.placebo, verdict.recovery
        norms = "-" if placebo is None else f"{norm(placebo.median_norm)} / {norm(placebo.own_median_norm)}"
        recovered = f"{found.recovered} of {found.searched}"
        unseen = _rate(None if transfer is None else transfer.heldout_rate)
        lines.append(f"{verdict.provenance.control_seed:>4}  {recovered:<9}  {unseen:<6}  {norms:<18}  {one}")
    return "\n".join(lines)


def _said(verdict: Verdict) -> str:
    words = {True: "true", False: "false", None: "unknown"}
    name = verdict.verdict
    return f"{name}, content {words[verdict.content]}, rule {words[verdict.rule]}" if name == "RECOVERABLE" else name


def _rate(value: float | None) -> str:
    return "-" if value is None else percent(value)
