"""`report.html`: one page that answers a stranger's questions, self-contained, without script, light and dark.

1. The verdict in words and four answers, from `verdict.json` alone.
2. A chapter for each step of the argument: an opening that explains its terms, its figures, each with how it is read
   and the numbers behind it, and its facts as tables.
3. Validity checks, threat model, statistics, provenance, configuration and a glossary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from recover.protocol.records import ExampleRecord
from recover.protocol.verdict_model import Verdict
from recover.report.answers import answer_questions, parsed
from recover.report.evidence_figures import figures_of
from recover.report.figures import Figure
from recover.report.rendering import render
from recover.report.svg import draw, legend, marker
from recover.report.text import RESULTS, Rows, Section, sections
from recover.report.words import headline, prose

__all__ = ["to_html"]


@dataclass(frozen=True)
class Chapter:
    """A chapter of the page: its figures, and its sections of facts."""

    name: str
    title: str
    opening: str
    figures: Sequence[Figure]
    sections: Sequence[Section]


def to_html(
    verdict: Verdict,
    config: str,
    records: Sequence[ExampleRecord] = (),
    features: Sequence[Sequence[int]] = (),
) -> str:
    """A self-contained page: no script, nothing fetched.

    Args:
        verdict: the verdict.
        config: the text of `config.yaml`.
        records: the lines of `examples.jsonl`, for the figures with a dot for each example.
        features: of each clamp, as `run.json` has them.
    """
    values = verdict.to_dict()
    return render(
        "report.html.j2",
        verdict=verdict,
        headline=headline(verdict),
        answers=answer_questions(verdict, parsed(config)),
        chapters=_chapters(verdict, records),
        draw=lambda figure: Markup(draw(figure)),
        legend=legend,
        marker=lambda tone: Markup(marker(tone)),
        results=RESULTS,
        threat=rows_of(values["threat_model"], leave=("clamps",)),
        statistics=rows_of(values["statistics"]),
        provenance=rows_of(values["provenance"], leave=("phases",)),
        features=list(zip(verdict.threat_model.clamps, features, strict=False)),
        terms=prose().terms,
        config=config,
    )


def rows_of(values: Mapping[str, Any], leave: Sequence[str] = ()) -> Rows:
    """Names and values of a section of `verdict.json` as they stand."""

    def plain(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key.replace('_', ' ')} {plain(item)}" for key, item in value.items()) or "none"
        if isinstance(value, list | tuple):
            return ", ".join(map(plain, value)) or "none"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return [(name.replace("_", " "), plain(value)) for name, value in values.items() if name not in leave]


def _chapters(verdict: Verdict, records: Sequence[ExampleRecord]) -> list[Chapter]:
    drawn, facts = figures_of(verdict, records), sections(verdict)
    chapters = [
        Chapter(
            name,
            words.title,
            words.opening,
            [drawn[key] for key in words.figures if key in drawn],
            [facts[key] for key in words.sections if key in facts and facts[key].rows],
        )
        for name, words in prose().chapters.items()
    ]
    return [chapter for chapter in chapters if chapter.figures or chapter.sections]
