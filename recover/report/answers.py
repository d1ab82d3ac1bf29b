"""What a stranger asks of a run, answered in sentences from `verdict.json` alone.

1. What was clamped?  2. Was the behavior recoverable?  3. Is that specific to the behavior?  4. What could be wrong
with this run? The last lists what the run's own figures give cause for, worst first, and then what no run can rule out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from recover.protocol.reasons import deciding
from recover.protocol.verdict_model import Verdict
from recover.report.figures import number, percent
from recover.report.words import SPECIFIC, clamps

__all__ = ["answers", "cautions", "parsed", "task_of"]

TASKS = {
    "ioi": "indirect object identification: after 'When Mary and John went out, John gave a book to', saying Mary",
    "refusal": "answering a request that the defense makes the model refuse",
    "choice": "picking the right letter of a multiple-choice question",
    "cloze": "filling in the right word",
    "probe": "being of a class, as a linear probe reads it",
}
FEW = 20
"""Valid flips below which an interval is wide: at 20 of 20 it still reaches down to 84%."""


def parsed(config: str) -> Any:
    """What the text of a `config.yaml` holds; None where it is no YAML."""
    try:
        return yaml.safe_load(config)
    except yaml.YAMLError:
        return None


def task_of(config: Any) -> str | None:
    """The behavior that a configuration asks about, in words; None where it names none."""
    name = config.get("task") if isinstance(config, Mapping) else None
    if not isinstance(name, str):
        return None
    return f"{name} ({TASKS[name]})" if name in TASKS else name


def answers(verdict: Mapping[str, Any], config: Any = None) -> list[tuple[str, list[str]]]:
    """The four questions, each with its sentences.

    Args:
        verdict: what `verdict.json` holds.
        config: what `config.yaml` holds, for the name of the behavior.
    """
    return [
        ("What was clamped?", _clamped(verdict, task_of(config))),
        ("Was the behavior recoverable?", _recoverable(verdict)),
        ("Is that specific to the behavior?", _specific(verdict)),
        ("What could be wrong with this run?", cautions(verdict)),
    ]


def _clamped(verdict: Mapping[str, Any], task: str | None) -> list[str]:
    counts = verdict["counts"]
    told = [f"In {verdict['provenance']['model'].partition(' ')[0]}: {'; '.join(clamps(verdict['threat_model']))}."]
    if task is not None:
        told.append(f"The behavior: {task}.")
    return [
        *told,
        f"Without the clamp {counts['base']} of {counts['n']} examples show the behavior, with it "
        f"{counts['defended']}; {counts['valid_flips']} are valid flips (shown without, not with), and everything else "
        "is about these.",
    ]


def _recoverable(verdict: Mapping[str, Any]) -> list[str]:
    found, name = verdict["recovery"], verdict["verdict"]
    if name == "INVALID":
        return ["Not answered: the question could not be asked here (see what failed)."]
    if name == "INCONCLUSIVE":
        return ["Not answered: a check of the run itself failed, so that its figures show nothing either way."]
    low, high = found["wilson95"]
    rate = (
        f"on {found['recovered']} of {found['searched']} valid flips ({percent(found['rate'])}; 95% interval "
        f"{percent(low)} to {percent(high)})"
    )
    allowed = f"a perturbation of norm at most {found['budget']:g}, which the clamped features cannot read,"
    if name == "NOT_RECOVERED_AT_BUDGET":
        return [f"Not by this search: {allowed} brought it back {rate}. A larger budget or another search may."]
    smallest = verdict["minimum_norm"] or {}
    told = [f"Yes: with the clamp held, {allowed} brings it back {rate}."]
    if smallest.get("median") is not None:
        share = percent(smallest["median_over_residual"])
        told.append(
            f"Half of the examples need no more than norm {number(smallest['median'])}, {share} of the residual."
        )
    return told


def _specific(verdict: Mapping[str, Any]) -> list[str]:
    if verdict["verdict"] != "RECOVERABLE":
        return ["Not asked: only what is RECOVERABLE can be specific."]
    words = {True: "Yes", False: "No", "unknown": "Unknown"}[verdict["specific"]]
    because = deciding(Verdict.model_validate(verdict))
    reason = because.partition(": ")[2] if because else SPECIFIC[verdict["specific"]]
    told = [f"{words}: {reason}."]
    transfer = verdict["transfer"]
    if transfer is not None and "refused" not in transfer:
        own, shuffled = transfer["readings"]["own"], transfer["readings"]["shuffled"]
        told.append(
            f"One perturbation shared by all prompts brings the behavior back on {own['hits']} of {own['n']} prompts "
            f"it was not fitted to; fitted to shuffled targets, on {shuffled['hits']} of {shuffled['n']}."
        )
    return told


def cautions(verdict: Mapping[str, Any]) -> list[str]:
    """What the run's own figures give cause to doubt, worst first; then what is true of any run."""
    found, counts, told = verdict["recovery"], verdict["counts"], []
    failed = [gate for gate in verdict["gates"] if gate["passed"] is False]
    missing = [gate["name"] for gate in verdict["gates"] if gate["passed"] is None]
    told += [f"The gate '{gate['name']}' failed: {gate['detail']}." for gate in failed]
    if missing:
        told.append(f"{len(missing)} of {len(verdict['gates'])} gates were not run: {', '.join(missing)}.")
    if found["searched"]:
        told += _of_the_search(verdict)
    transfer = verdict["transfer"]
    if transfer is not None and "refused" in transfer:
        told.append(f"Transfer, on which specificity rests, was not run: {transfer['refused']}.")
    if counts["strict_flips"] != counts["valid_flips"]:
        told.append(
            "Transfer is read with a stricter predicate than the rest, so that its counts are of other examples "
            f"({counts['strict_flips']} flip by it)."
        )
    told.append(
        "True of any run: it is about these prompts, this SAE and one seed of the controls; the search is white-box, "
        "and what it does not find may still be there."
    )
    return told


def _of_the_search(verdict: Mapping[str, Any]) -> list[str]:
    found, controls, told = verdict["recovery"], verdict["controls"], []
    if found["searched"] < FEW:
        told.append(f"Only {found['searched']} valid flips: the intervals are wide.")
    if (below := found["below_threshold_share"]) is None:
        told.append("The SAE's features compete, so that the constraint alone does not pin the clamped ones.")
    elif below > 0.5:
        told.append(
            f"{percent(below)} of the clamped features sit below their threshold, where they read zero whatever "
            f"happens: that they did not move shows little."
        )
    if found["back_but_features_moved"]:
        told.append(
            f"On {found['back_but_features_moved']} examples the behavior is back but clamped features moved; these "
            "are not counted."
        )
    placebo, features, unbounded = controls["placebo"], controls["placebo_features"], controls["unbounded"]
    if placebo is not None and placebo["rate"] > 0.5 * placebo["own_rate"]:
        told.append(
            f"An unrelated target is reached on {percent(placebo['rate'])} at this budget: the rate of recovery alone "
            "is no evidence about the behavior."
        )
    if placebo is None:
        told.append("No unrelated target was searched for: nothing tells how easily any answer could be written.")
    if Verdict.model_validate(verdict).random_features_suppress:
        told.append(f"Random features suppress nearly as much ({percent(features['suppressed_rate'])}).")
    if unbounded is not None and unbounded["rate"] < 1:
        told.append(f"Even without a budget the search recovers only {percent(unbounded['rate'])}.")
    return told
