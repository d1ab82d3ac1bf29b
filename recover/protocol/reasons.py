"""The sentences of a verdict's reasons, each written from figures that were decided elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recover.evidence.rules import Rules
from recover.numerics.statistics import more_often
from recover.search.ascent import Status


def found(recovery: Mapping[str, Any]) -> str:
    """What was brought back, and at which size."""
    low, high = recovery["wilson95"]
    return (
        f"with the clamp held, a perturbation of norm at most {recovery['budget']:g} brings the behavior back on "
        f"{recovery['recovered']} of {recovery['searched']} valid flips ({recovery['rate']:.0%}; 95% interval "
        f"{low:.0%} to {high:.0%}); its mean norm is {_figure(recovery['norm_mean'], '.1f')}, "
        f"{_figure(recovery['relative_norm_mean'], '.1%')} of the residual's, "
        f"and the clamp itself moves the residual by {_figure(recovery['clamp_displacement_mean'], '.1f')}"
    )


def replies(read: Mapping[str, Any] | None) -> list[str]:
    """How what the model says under the perturbations reads, where the behavior is a whole answer."""
    if read is None:
        return []
    n = read["n"]
    return [
        f"said freely, the clamps live: {read['non_refusal']['hits']} of {n} replies are no refusal, "
        f"{read['base_like']['hits']} are like the model's own answer (these count as brought back), "
        f"{read['strict_base_like']['hits']} strictly so; {read['token_for_token']['hits']} are the model's own "
        "token for token as far as the perturbation reaches; clamped features drifted by at most "
        f"{_figure(read['relative_drift_max'], '.1e')} of their size along what was said"
    ]


def not_found(recovery: Mapping[str, Any]) -> str:
    """That this search found nothing, and no more than that."""
    return (
        f"no admissible perturbation of norm at most {recovery['budget']:g} that these searches met brings the "
        f"behavior back on any of {recovery['searched']} valid flips; a larger budget or another search may"
    )


def unmoved(statuses: Sequence[str]) -> list[str]:
    """Where the search failed for want of anything to search."""
    closed, still = (statuses.count(status.name) for status in (Status.NOTHING_ADMISSIBLE, Status.UNMOVED))
    told = []
    if closed:
        told.append(
            f"on {closed} of them nothing is admissible at all: the clamped features read every direction, which would "
            "be so for any behavior"
        )
    if still:
        told.append(
            f"on {still} of them no admissible perturbation that was drawn, up to many times the budget, changes the "
            "score: what the behavior depends on here is read by the clamped features"
        )
    return told


def in_spite(transfer: Mapping[str, Any] | None, budget: float, rules: Rules) -> list[str]:
    """A shared perturbation, as a rule larger than the budget, that brings back what none within it did."""
    if transfer is None:
        return []
    own, shuffled = transfer["readings"]["own"], transfer["readings"]["shuffled"]
    if not shuffled["n"] or more_often(own["hits"], own["n"], shuffled["hits"], shuffled["n"]) > rules.alpha:
        return []
    where = "beyond" if transfer["budget"] > budget else "at"
    return [
        f"{where} the budget, one perturbation of norm {transfer['budget']:.3g} shared by all prompts brings the "
        f"behavior back on {own['hits']} of {own['n']} that it was not fitted to: the mechanism survived the clamp"
    ]


def drift(recovery: Mapping[str, Any]) -> list[str]:
    """What zero drift is worth here."""
    moved = recovery["back_but_features_moved"]
    notes = (
        [f"on {moved} more the behavior is back, but clamped features moved; these are not counted"] if moved else []
    )
    if recovery["below_threshold_share"] is None:
        return [
            "features compete in this SAE (no fixed threshold), so orthogonality does not pin them: they drifted by "
            f"{recovery['drift_mean']:.2g} on average and {recovery['drift_max']:.2g} at most",
            *notes,
        ]
    shift, share = recovery["preactivation_shift_max"], recovery["below_threshold_share"]
    told = f"the clamped features' pre-activations moved by at most {shift:.1e}"
    if share > 0.5:
        told += (
            f"; {share:.0%} of them sit below their threshold (median margin "
            f"{recovery['threshold_margin_median']:.2f}), where zero feature drift alone would show little"
        )
    return [told, *notes]


def features(placebo: Mapping[str, Any] | None, counts: Mapping[str, int]) -> list[str]:
    """Random features that suppress as much as the chosen ones: a caution."""
    if placebo is None or not counts["base"]:
        return []
    own = counts["valid_flips"] / counts["base"]
    if placebo["suppressed_rate"] < own / 2:
        return []
    return [
        f"clamping as many random features suppresses the behavior on {placebo['suppressed_rate']:.0%} of the "
        f"examples, against {own:.0%} with those of the defense: it is hardly these features that matter"
    ]


def _figure(value: float | None, form: str) -> str:
    """A number in words; a share of a residual that the clamp made zero is none."""
    return "an infinite part" if value is None else format(value, form)
