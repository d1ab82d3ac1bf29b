"""The prose of the reports: `words.yaml`, typed, and a verdict and its clamps in words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

from recover.evidence.uses import Route
from recover.numerics.formats import number
from recover.protocol.verdict_model import ThreatModel, Verdict

SectionKey = Literal["defense", "accounting", "search", "travel", "controls", "transfer", "published"]
FigureKey = Literal[
    "suppression",
    "rates",
    "replies",
    "norms",
    "budget",
    "sizes",
    "drift",
    "margins",
    "readings",
    "transfer",
    "attribution",
]
EDITS = {"set": "set to {}", "scale": "scaled by {}", "floor": "kept at {} or more"}
SUMMANDS = ("error", "free", "clamped")
"""The parts of a perturbation that add up to it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FigureWords(_Frozen):
    """The title of a figure, and how it is read."""

    title: str
    reading: str


class ChapterWords(_Frozen):
    """A chapter of `report.html`: its title and opening, and which figures and sections of facts stand in it."""

    title: str
    opening: str
    figures: tuple[FigureKey, ...]
    sections: tuple[SectionKey, ...]


class Words(_Frozen):
    """All prose of the reports; see `words.yaml`."""

    meanings: dict[str, str]
    uses: dict[Route, str]
    content: dict[Literal["true", "false", "unknown"], str]
    rule: dict[Literal["true", "false", "unknown"], str]
    tasks: dict[str, str]
    parts: dict[str, str]
    replies: dict[str, str]
    sections: dict[SectionKey, str]
    figures: dict[FigureKey, FigureWords]
    chapters: dict[str, ChapterWords]
    terms: dict[str, str]


@cache
def prose() -> Words:
    """The prose, loaded once."""
    text = resources.files("recover.report").joinpath("words.yaml").read_text(encoding="utf-8")
    return Words.model_validate(yaml.safe_load(text))


def headline(verdict: Verdict) -> str:
    """The meaning of a verdict in one clause, in two where the behavior is recoverable, and what must not be missed.

    A defense that breaks ordinary text, or that leaves most of the behavior, is told of here: a reader of nothing else
    must know.
    """
    utility, counts, told = verdict.fit.utility, verdict.counts, [prose().meanings[verdict.verdict]]
    if verdict.verdict == "RECOVERABLE":
        if verdict.uses is not None:
            told.append(f"{prose().uses[verdict.uses.route]} (norms up to {verdict.uses.norm:g})")
        told += known(verdict)
    if utility is not None and utility.broken and utility.loss_off is not None and utility.loss_on is not None:
        cost = f"from {utility.loss_off:.1f} to {utility.loss_on:.1f} nats per token"
        told.append(f"the defense breaks ordinary text ({cost})")
    failing = {gate.name for gate in verdict.gates if gate.passed is False}
    if "suppression" in failing:
        told.append(f"the defense is weak: {counts.defended} examples show the behavior in spite of it")
    if "above_chance" in failing:
        told.append("without the defense the behavior shows no more often than by chance")
    return "; ".join(told)


def known(verdict: Verdict) -> list[str]:
    """What the model still knows, in two clauses, with the norm at which it was tested."""
    found = verdict.knowledge
    at = "" if found is None else f" (one perturbation of norm {number(found.norm)} for all prompts)"
    content, rule = prose().content[_word(verdict.content)], prose().rule[_word(verdict.rule)]
    return [content + at, rule]


def _word(known: bool | None) -> Literal["true", "false", "unknown"]:
    return "unknown" if known is None else "true" if known else "false"


def clamps(threat: ThreatModel) -> list[str]:
    """Describe each clamp: its features, site, edit and positions."""
    skipped = threat.skip_first
    spared = f" except the first {f'{skipped} tokens' if skipped > 1 else 'token'} of each prompt" if skipped else ""
    return [
        f"{clamp.k} features at {clamp.site}, {EDITS[clamp.mode].format(_values(clamp.value))}"
        f"{' where active' if clamp.only_active else ''}, at {clamp.positions} positions{spared}"
        for clamp in threat.clamps
    ]


def _values(value: float | Sequence[float]) -> str:
    """One value for all features of a clamp, or the range of theirs."""
    if isinstance(value, Sequence):
        return f"{min(value):.3g} to {max(value):.3g} (one per feature)"
    return f"{value:g}"
