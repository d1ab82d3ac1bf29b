"""The sentences of a verdict's reasons, written from figures and decisions; no sentence decides anything."""

from __future__ import annotations

import math

from recover.evidence.readings import Reading
from recover.numerics.formats import interval, number, p_value, percent, tiny
from recover.numerics.statistics import Paired
from recover.protocol import reasons_knowledge
from recover.protocol.power_model import PowerFigures, told
from recover.protocol.verdict_model import (
    Counts,
    PlaceboFeatures,
    Recovery,
    RefusedTransfer,
    Replies,
    Verdict,
)


def found(recovery: Recovery) -> str:
    """How many valid flips were recovered, and the size of the perturbations."""
    everywhere = (
        ""
        if recovery.displacement_everywhere_mean is None
        else f", and by {number(recovery.displacement_everywhere_mean)} over all positions"
    )
    relative = "" if recovery.relative_norm_mean is None else f", {percent(recovery.relative_norm_mean, 1)} of the "
    return (
        f"with the clamp held, a perturbation of norm at most {recovery.budget:g} recovers the behavior on "
        f"{recovery.recovered} of {recovery.searched} valid flips ({percent(recovery.rate)}; 95% interval "
        f"{interval(recovery.wilson95)}); the mean norm is {number(recovery.norm_mean)}"
        f"{relative and relative + 'residual norm'}; the clamp itself displaces the residual by "
        f"{number(recovery.clamp_displacement_mean)} there{everywhere}"
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
    over = f" ({interval(placebo.interval95)} over {placebo.draws} draws)" if placebo.interval95 else ""
    return (
        f"clamping as many random features suppresses the behavior on {percent(placebo.suppressed_rate)}{over} of "
        f"examples, and the defense does so on {percent(counts.valid_flips / counts.base)}: the choice of features "
        "matters little"
    )


def placebo(pairs: Paired | None, within: tuple[Reading, Reading] | None) -> list[str]:
    """How the behavior's own target compares with an unrelated one, one perturbation per example."""
    told = []
    if within is not None and within[0].n and within[1].n:
        own, other = within
        told.append(
            f"with one perturbation per example at this budget, the own target is reached on {own.hits} of {own.n} and "
            f"an unrelated target on {other.hits} of {other.n}"
        )
    if pairs is not None and pairs.n:
        ratio = "" if math.isnan(pairs.median_ratio) else f"; the median ratio of norms is {number(pairs.median_ratio)}"
        told.append(
            f"the own target needs a smaller norm than the unrelated target on {pairs.smaller} of {pairs.n} pairs and "
            f"a larger one on {pairs.larger}{ratio} (p = {p_value(pairs.p)})"
        )
    return told


def refused(shared: RefusedTransfer) -> str:
    """Why no shared perturbation was fitted."""
    return f"content unknown, rule unknown: no shared perturbation was fitted: {shared.refused}"


def because(verdict: Verdict) -> tuple[str, ...]:
    """Why `content` and `rule` of what is RECOVERABLE are true, false or unknown; empty where that was not asked."""
    if verdict.verdict != "RECOVERABLE":
        return ()
    if isinstance(verdict.transfer, RefusedTransfer):
        return (refused(verdict.transfer),)
    known, rules = verdict.knowledge, verdict.statistics.rules
    return () if known is None else (reasons_knowledge.content(known, rules), reasons_knowledge.rule(known, rules))
