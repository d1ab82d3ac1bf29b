"""Four questions about a run, answered in sentences from its verdict alone.

1. What was clamped?  2. Was the behavior recoverable?  3. Is the recovery specific to the behavior?  4. What could be
wrong with this run? `doubts` decides which cautions apply; the sentences, worst first, are in `templates/answers.j2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import yaml

from recover.protocol.reasons import because
from recover.protocol.verdict_model import RefusedTransfer, Verdict
from recover.report.rendering import gathered
from recover.report.words import clamps, known, prose

__all__ = ["Doubt", "answer_questions", "cautions", "doubts", "parsed", "task_of"]

Doubt = Literal[
    "few_flips",
    "features_compete",
    "below_threshold",
    "features_moved",
    "placebo_as_easy",
    "no_placebo",
    "random_features",
    "search_incomplete",
    "transfer_refused",
    "stricter_predicate",
]
FEW = 20
"""Below so many valid flips an interval is wide: at 20 of 20 it still reaches down to 84%."""


def parsed(config: str) -> Any:
    """The content of a `config.yaml`; None where it is not YAML."""
    try:
        return yaml.safe_load(config)
    except yaml.YAMLError:
        return None


def task_of(config: Any) -> str | None:
    """The task of a configuration in words; None where it names none."""
    name = config.get("task") if isinstance(config, Mapping) else None
    if not isinstance(name, str):
        return None
    tasks = prose().tasks
    return f"{name} ({tasks[name]})" if name in tasks else name


def answer_questions(verdict: Verdict, config: Any = None) -> list[tuple[str, list[str]]]:
    """The four questions, each with the sentences that answer it.

    Args:
        verdict: the verdict.
        config: the content of `config.yaml`, which names the behavior.
    """
    context = {
        "verdict": verdict,
        "model": verdict.provenance.model.partition(" ")[0],
        "clamps": clamps(verdict.threat_model),
        "task": task_of(config),
        "because": because(verdict) or known(verdict),
        "doubts": doubts(verdict),
    }
    questions = {
        "clamped": "What was clamped?",
        "recoverable": "Was the behavior recoverable?",
        "content": "What does the model still know?",
        "cautions": "What could be wrong with this run?",
    }
    return [(question, _sentences(block, **context)) for block, question in questions.items()]


def cautions(verdict: Verdict) -> list[str]:
    """Why the figures of a run may mislead, worst first; the last holds for any run."""
    return _sentences("cautions", verdict=verdict, doubts=doubts(verdict))


def doubts(verdict: Verdict) -> set[Doubt]:
    """The reasons why the figures of a run may mislead, as keys of the sentences in `templates/answers.j2`."""
    found, controls, counts = verdict.recovery, verdict.controls, verdict.counts
    placebo, unbounded = controls.placebo, controls.unbounded
    of_any_run: dict[Doubt, bool] = {
        "transfer_refused": isinstance(verdict.transfer, RefusedTransfer),
        "stricter_predicate": counts.strict_flips != counts.valid_flips,
    }
    of_a_search: dict[Doubt, bool] = {
        "few_flips": found.searched < FEW,
        "features_compete": found.features_compete,
        "below_threshold": found.mostly_inactive,
        "features_moved": found.back_but_features_moved > 0,
        "placebo_as_easy": placebo is not None and placebo.easily_reached,
        "no_placebo": placebo is None,
        "random_features": verdict.random_features_suppress,
        "search_incomplete": unbounded is not None and (unbounded.rate or 0.0) < 1,
    }
    held = of_any_run | of_a_search if found.searched else of_any_run
    return {doubt for doubt, holds in held.items() if holds}


def _sentences(block: str, **context: Any) -> list[str]:
    return [sentence for (sentence,) in gathered("answers.j2", block, **context)]
