"""Sentences on what the finds use, written from what was decided."""

from __future__ import annotations

from recover.evidence.readings import Reading
from recover.numerics.formats import counted, number
from recover.protocol.uses_model import MeanFigure, UsesFigures


def uses(found: UsesFigures) -> str:
    """What the perturbations within the budget use, and the figures that show it."""
    because = {
        "undone": "downstream they do what lifting the clamp does: the clamp is undone",
        "direct_writing": "an unrelated answer is reached as easily, so that writing an answer explains them",
        "dormant": "without the defense the model does not use what they move, while it uses what the clamp takes out: "
        "they open a route that the model leaves unused",
        "outside_sae": "their part in the SAE's error alone brings the behavior back, and their part in features does "
        "not: they go where the SAE describes nothing",
        "unknown": "none of the routes that were looked for is shown",
    }[found.route]
    return (
        f"uses {found.route.replace('_', ' ')}, at norms up to {found.norm:g}: {because}. Likeness with lifting the "
        f"clamp {_mean(found.likeness)}; the own answer clearly nearer than an unrelated one on "
        f"{_told(found.nearer)} pairs; by the SAE's error alone {_told(found.error_alone)}, by features alone "
        f"{_told(found.features_alone)}; at base the behavior survives without what the perturbation moves on "
        f"{_told(found.base_without_find)}, and without what the clamp takes out on {_told(found.base_without_clamp)}"
    )


def _told(reading: Reading) -> str:
    return counted(reading.hits, reading.n) if reading.n else "none of 0"


def _mean(mean: MeanFigure | None) -> str:
    if mean is None:
        return "not measured"
    low, high = mean.interval95
    return f"{number(mean.mean)} ({number(low)} to {number(high)})"
