"""The sentences of a verdict's reasons, written from figures and decisions; no sentence decides anything."""

from __future__ import annotations

import math

from recover.evidence.rules import Finding, Reading, Rule, Rules, TransferEvidence
from recover.numerics.formats import counted, interval, number, p_value, percent, tiny
from recover.numerics.statistics import Paired
from recover.protocol.power_model import PowerFigures, told
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
    """How many valid flips were recovered, and the size of the perturbations."""
    relative = "" if recovery.relative_norm_mean is None else f", {percent(recovery.relative_norm_mean, 1)} of the "
    return (
        f"with the clamp held, a perturbation of norm at most {recovery.budget:g} recovers the behavior on "
        f"{recovery.recovered} of {recovery.searched} valid flips ({percent(recovery.rate)}; 95% interval "
        f"{interval(recovery.wilson95)}); the mean norm is {number(recovery.norm_mean)}"
        f"{relative and relative + 'residual norm'}; the clamp itself displaces the residual by "
        f"{number(recovery.clamp_displacement_mean)}"
    )


def replies(read: Replies | None) -> list[str]:
    """The quality of free replies under the perturbations, where the behavior is a whole answer."""
    if read is None:
        return []
    return [
        f"in free replies with the clamps live, {read.non_refusal.hits} of {read.n} are not refusals, "
        f"{read.base_like.hits} are like the model's own answer (these count as recovered), and "
        f"{read.strict_base_like.hits} are like it by the strict criterion; {read.token_for_token.hits} forced answers "
        "are the model's own token for token, as far as the perturbation reaches; along the replies, clamped features "
        f"drifted by at most {tiny(read.relative_drift_max)} of their size"
    ]


def not_found(recovery: Recovery, power: PowerFigures | None, closed: int) -> str:
    """Say that this search found nothing, and what it would have found; `closed` flips have nothing admissible."""
    if power is not None:
        could = f"; {told(power)}"
    elif closed == recovery.searched:
        could = ""
    else:
        could = ", and which routes this search would have found was not measured"
    return (
        f"the search found no admissible perturbation of norm at most {recovery.budget:g} that recovers the behavior "
        f"on any of {recovery.searched} valid flips; a larger budget or another search may find one{could}"
    )


def unmoved(closed: int, still: int, unread: int) -> list[str]:
    """On how many flips nothing is admissible; on how many random perturbations move nothing, or not the score."""
    told = []
    if closed:
        told.append(
            f"on {closed} of them nothing is admissible at all, since the clamped features read every direction; that "
            "holds for any behavior"
        )
    if still:
        told.append(
            f"on {still} of them no admissible random perturbation, up to many times the budget, changes anything that "
            "the model computes from there on"
        )
    if unread:
        told.append(
            f"on {unread} of them admissible random perturbations change what the model computes from there on, but "
            "none, up to many times the budget, changes the score; a route that opens only where several inactive "
            "units are on together would be missed by these"
        )
    return told


def survived(own: Reading, norm: float, beyond: bool) -> str:
    """A shared perturbation, usually larger than the budget, that recovers what none within the budget did."""
    return (
        f"{'beyond' if beyond else 'at'} the budget, one perturbation of norm {number(norm)} shared by all prompts "
        f"recovers the behavior on {own.hits} of {own.n} held-out prompts: what the answers are made of "
        "survived the clamp"
    )


def drift(recovery: Recovery) -> list[str]:
    """How far the clamped features moved, and how much zero drift shows here."""
    moved = recovery.back_but_features_moved
    notes = (
        [f"on {moved} more the behavior came back, but the clamped features moved; these are not counted"]
        if moved
        else []
    )
    if recovery.features_compete:
        return [
            "features compete in this SAE (there is no fixed threshold), so orthogonality does not fix their values: "
            f"they drifted by {number(recovery.drift_mean)} on average and by at most {number(recovery.drift_max)}",
            *notes,
        ]
    told = f"the pre-activations of the clamped features shifted by at most {tiny(recovery.preactivation_shift_max)}"
    if recovery.mostly_inactive:
        told += (
            f"; {percent(recovery.below_threshold_share)} of them are below their threshold (median margin "
            f"{recovery.threshold_margin_median:.2f}), where a drift of zero alone would show little"
        )
    return [told, *notes]


def features(placebo: PlaceboFeatures, counts: Counts) -> str:
    """Warn that random features suppress nearly as much as the chosen ones."""
    return (
        f"clamping as many random features suppresses the behavior on {percent(placebo.suppressed_rate)} of examples, "
        f"and the defense does so on {percent(counts.valid_flips / counts.base)}: the choice of features matters little"
    )


def transfer(read: TransferEvidence) -> str:
    """Say how many examples shared perturbations recover, beside their controls."""

    def told(reading: Reading) -> str:
        return counted(reading.hits, reading.n) if reading.n else "not measured"

    return (
        f"one perturbation shared by all prompts and fitted to some recovers {told(read.own)} of the held-out prompts; "
        f"under C1+, also orthogonal to the directions along which the clamp writes: {told(read.write_orthogonal)}; "
        f"controls: fitted to shuffled targets {told(read.shuffled)}, random directions {told(read.random)}"
    )


def placebo(pairs: Paired | None, within: tuple[Reading, Reading] | None, finding: Finding) -> list[str]:
    """How the behavior's own target compares with an unrelated one."""
    told = []
    if within is not None and within[0].n and within[1].n:
        own, other = within
        told.append(
            f"with one perturbation per example at this budget, the own target is reached on {own.hits} of {own.n} and "
            f"an unrelated target on {other.hits} of {other.n}, so per-example recovery at this budget "
            f"{'favors' if finding.reached_more_often else 'does not favor'} the behavior's own answer"
        )
    if pairs is not None and pairs.n:
        ratio = "" if math.isnan(pairs.median_ratio) else f"; the median ratio of norms is {number(pairs.median_ratio)}"
        told.append(
            f"the own target needs a smaller norm than the unrelated target on {pairs.smaller} of {pairs.n} pairs and "
            f"a larger one on {pairs.larger}{ratio} (p = {p_value(finding.comparisons['placebo'])})"
        )
    return told


def content(rule: Rule, shared: Transfer | RefusedTransfer, pairs: int, rules: Rules) -> str:
    """The reason that goes with the rule that decided.

    Args:
        rule: the rule.
        shared: the readings of transfer, or why there are none.
        pairs: number of pairs of own and placebo target.
        rules: the thresholds.
    """
    said = {True: "content: true", False: "content: false", None: "content: unknown"}[rule.content]
    return f"{said}: {_because(rule, shared, pairs, rules)}"


def _because(rule: Rule, shared: Transfer | RefusedTransfer, pairs: int, rules: Rules) -> str:
    if isinstance(shared, RefusedTransfer):
        return f"transfer was not run: {shared.refused}"
    read = shared.evidence
    own, plus, dealt = read.own, read.write_orthogonal, read.dealt
    asked = "all examples have the same target, which one shared perturbation can carry"
    written = f"one perturbation fitted to another target reaches it on {dealt.hits} of {dealt.n} held-out prompts"
    chance = "one shared perturbation recovers no more than chance"
    return {
        Rule.MECHANISM_SURVIVED: "one shared perturbation cannot carry each prompt's answer, so what the answers are "
        "made of survived the clamp; it can carry a rule that picks them, and other rules were not fitted; nor does it "
        "need the directions along which the clamped features write, since the result holds under C1+ too",
        Rule.WRITES_ANY_TARGET: f"{asked}, and {written}: it writes whatever target it is fitted to",
        Rule.CLAMP_UNDONE: "one shared perturbation no longer recovers the behavior once it must be orthogonal to the "
        "directions along which the clamp writes (C1+): it undoes the clamp",
        Rule.NO_MORE_THAN_CHANCE: f"{chance}, and an unrelated target is reached as easily: a perturbation of this "
        "size can write arbitrary answers",
        Rule.NOT_RUN: "transfer was not run",
        Rule.FEW_HELDOUT: f"there are only {own.n} held-out examples, and {rules.min_heldout} are needed; add prompts",
        Rule.NOTHING_TO_SHUFFLE: "the behavior has no target that could be shuffled, so chance was not measured",
        Rule.ONE_TARGET: f"{asked}, although {written} only",
        Rule.C1_PLUS_EMPTY: "one shared perturbation recovers more than chance, but the directions along which the "
        "clamped features read and write leave no direction for C1+, so it cannot be ruled out that the perturbation "
        "undoes the clamp; clamp fewer features",
        Rule.NO_PLACEBO: f"{chance}, and there is no unrelated target to compare with",
        Rule.FEW_PAIRS: f"{chance}, and there are too few pairs of own and unrelated target to compare ({pairs})",
        Rule.WIDE_INTERVAL: f"{chance} on {own.n} held-out examples, which are too few to exclude that it recovers "
        f"most (95% interval up to {percent(own.wilson95[1])}); add prompts",
        Rule.OWN_TARGET_NEARER: f"{chance}, yet the own target needs a smaller norm than the unrelated one",
        Rule.HIGH_CHANCE: f"the predicate holds by chance {percent(read.chance)} of the time, and above "
        f"{percent(rules.max_chance)} it shows nothing; use a stricter predicate",
        Rule.NOT_CLEARLY_MOST: "one shared perturbation recovers more than chance, but not clearly most of the "
        f"held-out examples (95% intervals begin at {percent(own.wilson95[0])} under C1 and "
        f"{percent(plus.wilson95[0])} under C1+; above {percent(rules.most)} is needed): it holds in part, or for "
        "some prompts",
    }[rule]


def because(verdict: Verdict) -> str | None:
    """Why `content` of what is RECOVERABLE is true, false or unknown; None where that was not asked."""
    rule, control = verdict.statistics.content_by, verdict.controls.placebo
    paired = None if control is None else control.paired
    if rule is None or verdict.transfer is None:
        return None
    return _because(rule, verdict.transfer, paired.n if paired else 0, verdict.statistics.rules)
