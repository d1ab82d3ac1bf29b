"""Where the finds of a check travel: attribution of each delta to parts, example by example and over all.

Of the delta within the budget, without the linear part of the error, which takes text of its own to fit. Effects of
parts are shares of the whole delta's effect, all examples together, so that they add up to one over the error, the
features that are not clamped (`free`, of which `top_k` are a part) and those that are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from recover.evidence.attribution.parts import TOP_K, Attribution
from recover.protocol.records import ExampleRecord, PartRecord, without_nan
from recover.protocol.verdict_model import AttributionFigures, Part, PartFigures, Rate, SaidReading
from recover.tasks.replies import ReplyReading

PARTS: tuple[Part, ...] = ("full", "error", "free", "top_k", "clamped")
SAID = ("error", "free", "clamped")
"""Parts under which a reply is generated, where the behavior is a whole answer."""
POINTS = 4
"""Points of the integral along a delta."""


def part_values(
    found: Attribution, said: Mapping[str, Sequence[ReplyReading]] | None = None
) -> list[dict[str, dict[str, Any]]]:
    """A `PartRecord` for each part of each example of a batch; with how what is said under some parts reads."""
    columns = {
        str(name): {key: value.tolist() for key, value in vars(found.views[name]).items()}
        for name in found.views
        if name in PARTS
    }
    values = []
    for row in range(len(found.defended)):
        unsaid = {"non_refusal": None, "base_like": None}
        parts = {name: {key: value[row] for key, value in view.items()} | unsaid for name, view in columns.items()}
        for name, reads in (said or {}).items():
            parts[name] |= {"non_refusal": reads[row].non_refusal, "base_like": reads[row].base_like}
        values.append(without_nan(parts))
    return values


def summary(records: Sequence[ExampleRecord]) -> AttributionFigures | None:
    """The section `attribution` of a verdict; None where no example has one.

    A `gap` is negative where the gradient promises too much. A share is None where there is no effect.
    """
    each = [record.attribution for record in records if record.attribution is not None]
    if not each:
        return None
    full = [parts["full"] for parts in each]
    effect = sum(one.replay_score - one.knockout_score for one in full)
    first, along = sum(one.first_order for one in full), sum(one.integrated for one in full)
    return AttributionFigures(
        n=len(each),
        top_k=TOP_K,
        effect_mean=effect / len(each),
        gap=_share(effect - first, effect),
        integrated_gap=_share(effect - along, effect),
        parts={name: _part([parts[name] for parts in each], full, first, along) for name in PARTS},
    )


def _part(parts: Sequence[PartRecord], full: Sequence[PartRecord], first: float, along: float) -> PartFigures:
    """One part over all examples."""
    n, said = len(parts), [part for part in parts if part.base_like is not None]
    start, end = (sum(getattr(one, key) for one in full) for key in ("knockout_score", "replay_score"))
    return PartFigures(
        norm_mean=fmean(part.norm for part in parts),
        first_order_share=_share(sum(part.first_order for part in parts), first),
        integrated_share=_share(sum(part.integrated for part in parts), along),
        replay_share=_share(sum(part.replay_score for part in parts) - start, end - start),
        knockout_share=_share(sum(part.knockout_score for part in parts) - start, end - start),
        replay=Rate.of(part.replay_slack > 0 for part in parts),
        knockout=Rate.of(part.knockout_slack > 0 for part in parts),
        said=SaidReading(
            non_refusal=Rate.of(bool(part.non_refusal) for part in said),
            base_like=Rate.of(bool(part.base_like) for part in said),
        )
        if len(said) == n
        else None,
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
