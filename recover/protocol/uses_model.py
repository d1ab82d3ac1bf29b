"""The section `uses` of a verdict: what the finds use, beside what the model still knows and never joined with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from recover.evidence.readings import Reading
from recover.evidence.uses import Found, Mean, Route, Share, judge_uses, nearer
from recover.protocol.records import ExampleRecord
from recover.protocol.section import Figure, Interval, Section


class MeanFigure(Section):
    """A mean over examples."""

    mean: Figure = Field(description="mean over examples")
    interval95: Interval = Field(description="95% interval of the mean")
    n: int = Field(ge=0, description="number of examples")


class UsesFigures(Section):
    """What the perturbations within the budget use, each made for one prompt."""

    norm: Figure = Field(description="largest norm of these perturbations: the budget")
    route: Route = Field(description="the first use that holds; unknown where none is shown")
    undone: bool | None = Field(description="whether they do downstream what lifting the clamp does")
    direct_writing: bool | None = Field(description="whether unrelated answers are reached as easily")
    dormant: bool | None = Field(description="whether the model itself does not use at base what they move")
    outside_sae: bool | None = Field(description="whether their part in the SAE's error alone suffices")
    likeness: MeanFigure | None = Field(description="cosine of their move of the logits with that of lifting the clamp")
    layers: tuple[Figure, ...] = Field(description="mean cosine of the moves of the residual, at some later layers")
    restored: MeanFigure | None = Field(description="share of the distance to the undefended logits taken back")
    nearer: Reading = Field(description="pairs on which the own answer needs a clearly smaller norm")
    unrelated_within: Reading = Field(description="unrelated answers reached within the budget")
    error_alone: Reading = Field(description="brought back by the part in the SAE's error alone")
    features_alone: Reading = Field(description="brought back by the part in features that are not clamped alone")
    base_without_find: Reading = Field(description="shows at base without what the perturbation moves")
    base_without_clamp: Reading = Field(description="shows at base without what the clamp takes out")


def uses(records: Sequence[ExampleRecord], budget: float) -> UsesFigures | None:
    """Decide what the finds use, of the flips that were recovered; None where there is none, or this was not run."""
    finds = [r for r in records if r.back and r.undoing is not None]
    if not finds:
        return None
    seen = [r.undoing for r in finds if r.undoing is not None]
    pairs = [(r.search.by_gradient, r.placebo.smallest) for r in finds if r.search and r.placebo]
    parts = [r.attribution for r in finds if r.attribution is not None]
    found = Found(
        likeness=[one.likeness for one in seen],
        own=[own for own, _ in pairs],
        unrelated=[other for _, other in pairs],
        unrelated_within=Share(sum(r.placebo.within for r in finds if r.placebo), len(pairs)),
        error=Share(sum(one["error"].replay_slack > 0 for one in parts), len(parts)),
        features=Share(sum(one["free"].replay_slack > 0 for one in parts), len(parts)),
        without_find=Share(sum(one.without_find for one in seen), len(seen)),
        without_clamp=Share(sum(one.without_clamp for one in seen), len(seen)),
    )
    decided = judge_uses(found)
    layers = list(zip(*(one.layers for one in seen), strict=True))
    return UsesFigures(
        norm=budget,
        route=decided.route,
        undone=decided.undone,
        direct_writing=decided.direct_writing,
        dormant=decided.dormant,
        outside_sae=decided.outside_sae,
        likeness=_mean(found.likeness),
        layers=tuple(sum(values) / len(values) for values in layers),
        restored=_mean([one.restored for one in seen]),
        nearer=_reading(nearer(found)),
        unrelated_within=_reading(found.unrelated_within),
        error_alone=_reading(found.error),
        features_alone=_reading(found.features),
        base_without_find=_reading(found.without_find),
        base_without_clamp=_reading(found.without_clamp),
    )


def _reading(share: Share) -> Reading:
    return Reading(share.hits, share.n)


def _mean(values: Sequence[float]) -> MeanFigure | None:
    mean = Mean.of(values)
    if mean is None or not math.isfinite(mean.value):
        return None
    return MeanFigure(mean=mean.value, interval95=(mean.low, mean.high), n=mean.n)
