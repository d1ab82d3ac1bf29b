"""The sentences of a verdict's reasons, written from figures and decisions; no sentence decides anything."""

from __future__ import annotations

import math

from recover.evidence.rules import Finding, Reading, Rule, Rules, TransferEvidence
from recover.numerics.statistics import Paired
from recover.protocol.verdict_model import (
    Counts,
    PlaceboFeatures,
    Recovery,
    RefusedTransfer,
    Replies,
    Transfer,
    Verdict,
)


def found(recovery: Recovery) -> str:
    """What was brought back, and at which size."""
    low, high = recovery.wilson95
    return (
        f"with the clamp held, a perturbation of norm at most {recovery.budget:g} brings the behavior back on "
        f"{recovery.recovered} of {recovery.searched} valid flips ({recovery.rate:.0%}; 95% interval "
        f"{low:.0%} to {high:.0%}); its mean norm is {_figure(recovery.norm_mean, '.1f')}, "
        f"{_figure(recovery.relative_norm_mean, '.1%')} of the residual's, "
        f"and the clamp itself moves the residual by {_figure(recovery.clamp_displacement_mean, '.1f')}"
    )


def replies(read: Replies | None) -> list[str]:
    """How what the model says under the perturbations reads, where the behavior is a whole answer."""
    if read is None:
        return []
    return [
        f"said freely, with the clamps live: {read.non_refusal.hits} of {read.n} replies are not refusals, "
        f"{read.base_like.hits} are like the model's own answer (these count as brought back), "
        f"{read.strict_base_like.hits} strictly so; {read.token_for_token.hits} are the model's own answer "
        "token for token as far as the perturbation reaches; clamped features drifted by at most "
        f"{_figure(read.relative_drift_max, '.1e')} of their size along the replies"
    ]


def not_found(recovery: Recovery) -> str:
    """That this search found nothing, and no more than that."""
    return (
        f"no admissible perturbation of norm at most {recovery.budget:g} that these searches met brings the "
        f"behavior back on any of {recovery.searched} valid flips; a larger budget or another search may"
    )


def unmoved(closed: int, still: int) -> list[str]:
    """How many searches failed for want of anything to search: nothing is admissible, or nothing admissible matters."""
    told = []
    if closed:
        told.append(
            f"on {closed} of them nothing is admissible at all: the clamped features read every direction, which "
            "would be so for any behavior"
        )
    if still:
        told.append(
            f"on {still} of them no admissible perturbation that was drawn, up to many times the budget, changes the "
            "score: what the behavior depends on here is read by the clamped features"
        )
    return told


def survived(own: Reading, norm: float, beyond: bool) -> str:
    """A shared perturbation, usually larger than the budget, that brings back what none within the budget did."""
    return (
        f"{'beyond' if beyond else 'at'} the budget, one perturbation of norm {norm:.3g} shared by all prompts brings "
        f"the behavior back on {own.hits} of {own.n} that it was not fitted to: the mechanism survived the clamp"
    )


def drift(recovery: Recovery) -> list[str]:
    """What zero drift is worth here."""
    moved = recovery.back_but_features_moved
    notes = (
        [f"on {moved} more the behavior is back, but clamped features moved; these are not counted"] if moved else []
    )
    if recovery.features_compete:
        return [
            "features compete in this SAE (no fixed threshold), so orthogonality does not pin them: they drifted by "
            f"{recovery.drift_mean:.2g} on average and {recovery.drift_max:.2g} at most",
            *notes,
        ]
    told = f"the clamped features' pre-activations moved by at most {recovery.preactivation_shift_max:.1e}"
    if recovery.mostly_inactive:
        told += (
            f"; {recovery.below_threshold_share:.0%} of them sit below their threshold (median margin "
            f"{recovery.threshold_margin_median:.2f}), where zero feature drift alone would show little"
        )
    return [told, *notes]


def features(placebo: PlaceboFeatures, counts: Counts) -> str:
    """That random features suppress nearly as much as the chosen ones."""
    return (
        f"clamping as many random features suppresses the behavior on {placebo.suppressed_rate:.0%} of the "
        f"examples, against {counts.valid_flips / counts.base:.0%} with those of the defense: it is hardly these "
        "features that matter"
    )


def transfer(read: TransferEvidence) -> str:
    """What shared perturbations bring back, beside their controls."""

    def told(reading: Reading) -> str:
        return f"{reading.hits} of {reading.n} ({reading.rate:.0%})" if reading.n else "not measured"

    return (
        f"one perturbation shared by all prompts, fitted on some, brings back {told(read.own)} of the others; "
        f"orthogonal to what the clamp writes as well (C1+) {told(read.write_orthogonal)}; fitted to shuffled "
        f"targets {told(read.shuffled)}; random directions {told(read.random)}"
    )


def placebo(pairs: Paired | None, within: tuple[Reading, Reading] | None, finding: Finding) -> list[str]:
    """How the behavior's own target compares with an unrelated one."""
    told = []
    if within is not None and within[0].n and within[1].n:
        own, other = within
        told.append(
            f"per example and at this budget, the own target is reached on {own.hits} of {own.n} and an unrelated one "
            f"on {other.hits} of {other.n}, so per-example recovery at this budget is "
            f"{'' if finding.reached_more_often else 'not '}specific to the behavior"
        )
    if pairs is not None and pairs.n:
        ratio = "" if math.isnan(pairs.median_ratio) else f", a median {pairs.median_ratio:.2g} times its norm away"
        told.append(
            f"the own target is nearer than the unrelated one on {pairs.smaller} of {pairs.n} pairs and farther on "
            f"{pairs.larger}{ratio} (p = {finding.comparisons['placebo']:.2g})"
        )
    return told


def specificity(rule: Rule, shared: Transfer | RefusedTransfer, pairs: int, rules: Rules) -> str:
    """The reason that goes with the rule that decided.

    Args:
        rule: the rule.
        shared: the readings of transfer, or why there are none.
        pairs: number of pairs of own and placebo target.
        rules: the thresholds.
    """
    said = {True: "specific", False: "not specific", None: "specificity unknown"}[rule.specific]
    return f"{said}: {_because(rule, shared, pairs, rules)}"


def _because(rule: Rule, shared: Transfer | RefusedTransfer, pairs: int, rules: Rules) -> str:
    if isinstance(shared, RefusedTransfer):
        return f"transfer was not run: {shared.refused}"
    read = shared.evidence
    own, plus, dealt = read.own, read.write_orthogonal, read.dealt
    asked = "all examples are asked for the same, which one shared perturbation can carry"
    written = f"one perturbation fitted to another target brings that about on {dealt.hits} of {dealt.n} unseen"
    chance = "one shared perturbation does no more than chance"
    return {
        Rule.MECHANISM_SURVIVED: "one shared perturbation cannot carry each prompt's answer, so the mechanism survived "
        "the clamp; it is not the clamp undone, as it holds under C1+ too",
        Rule.WRITES_ANY_TARGET: f"{asked}, and {written}: it writes whatever it is fitted to",
        Rule.CLAMP_UNDONE: "what one shared perturbation brings back is gone once it must keep out of the directions "
        "that the clamp writes along (C1+): it undoes the clamp",
        Rule.NO_MORE_THAN_CHANCE: f"{chance}, and an unrelated target is reached as easily: a perturbation of this "
        "size can write answers",
        Rule.NOT_RUN: "transfer was not run",
        Rule.FEW_HELDOUT: f"only {own.n} held-out examples, and {rules.min_heldout} are needed; give more prompts",
        Rule.NOTHING_TO_SHUFFLE: "the behavior names no target that could be shuffled, so that chance is not measured",
        Rule.ONE_TARGET: f"{asked}, though {written} only",
        Rule.C1_PLUS_EMPTY: "one shared perturbation does more than chance, but the directions that the clamped "
        "features read and write along leave none to C1+, so that whether it undoes the clamp cannot be told; clamp "
        "fewer",
        Rule.NO_PLACEBO: f"{chance}, and there is no placebo to compare",
        Rule.FEW_PAIRS: f"{chance}, and pairs of own and placebo target are too few to compare ({pairs})",
        Rule.WIDE_INTERVAL: f"{chance} on {own.n} held-out examples, which are too few to tell that from bringing back "
        f"most (95% interval up to {own.wilson95[1]:.0%}); give more prompts",
        Rule.OWN_TARGET_NEARER: f"{chance}, yet the own target is nearer than the placebo's",
        Rule.HIGH_CHANCE: f"chance satisfies this predicate {read.chance:.0%} of the time, and more than "
        f"{rules.max_chance:.0%} can show nothing; read it with a stricter one",
        Rule.NOT_CLEARLY_MOST: "more than chance, yet not clearly most of the held-out examples (95% intervals begin "
        f"at {own.wilson95[0]:.0%} under C1 and {plus.wilson95[0]:.0%} under C1+; above {rules.most:.0%} is needed): a "
        "part of the mechanism survived, or it did for some prompts",
    }[rule]


def because(verdict: Verdict) -> str | None:
    """Why what is RECOVERABLE is specific, is not, or may be either; None where that was not asked."""
    rule, control = verdict.statistics.specific_by, verdict.controls.placebo
    paired = None if control is None else control.paired
    if rule is None or verdict.transfer is None:
        return None
    return _because(rule, verdict.transfer, paired.n if paired else 0, verdict.statistics.rules)


def _figure(value: float | None, form: str) -> str:
    """A number in words; a share of a residual that the clamp made zero is infinite."""
    return "an infinite part" if value is None else format(value, form)
