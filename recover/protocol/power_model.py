"""The power of a search as a section of the verdict: which planted routes it finds, and whether these are enough.

All that decides is here: `REQUIRED` kinds must be found in `MIN_FOUND` of the trials each for a search that found
nothing to be believed. A kind found as often counts as covered, any other is named as not covered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, with_config

from recover.evidence.readings import Count
from recover.numerics.formats import counted, percent
from recover.numerics.statistics import wilson
from recover.protocol.records import STRICT
from recover.search.planted_routes import ROUTE_KINDS, RouteKind

MIN_FOUND = 0.95
"""Share of the routes of a kind that must be found for the kind to count as covered."""
REQUIRED: tuple[RouteKind, ...] = ("linear", "rectified", "conjunction")
"""Kinds that must be covered for `NOT_RECOVERED_AT_BUDGET`."""
NAMED: Mapping[RouteKind, str] = {
    "linear": "linear routes",
    "rectified": "routes through one inactive unit",
    "conjunction": "conjunctions of inactive units",
    "narrow": "narrow routes, which open near one point only",
}


@with_config(STRICT)
@dataclass(frozen=True)
class RoutePower:
    """How many planted routes of one kind the search finds within the budget."""

    trials: Annotated[Count, Field(description="number of routes planted")]
    found: Annotated[Count, Field(description="number of them that the search found within the budget")]
    rate: Annotated[float, Field(ge=0, le=1, description="found as a share of trials")]
    wilson95: Annotated[tuple[float, float], Field(description="95% Wilson interval of the rate")]

    @property
    def covered(self) -> bool:
        """Found often enough."""
        return self.rate >= MIN_FOUND


@with_config(STRICT)
@dataclass(frozen=True)
class PowerFigures:
    """The power of the search, on routes planted into the model where it found none of its own."""

    norm_over_budget: Annotated[float, Field(gt=0, description="smallest norm of the routes as a share of the budget")]
    examples: Annotated[Count, Field(description="number of examples that routes were planted into")]
    required: Annotated[tuple[RouteKind, ...], Field(description="kinds that must be found for a verdict")]
    min_found: Annotated[float, Field(description="share of each required kind that must be found")]
    kinds: Annotated[dict[RouteKind, RoutePower], Field(description="figures of each kind of route, by name")]

    @property
    def suffices(self) -> bool:
        """Whether every required kind is covered, so that a search that found nothing says something."""
        return all(kind in self.kinds and self.kinds[kind].covered for kind in self.required)


def power_figures(found: Mapping[str, Mapping[str, Any]], share: float) -> PowerFigures:
    """From what the phase `power` says of each example: `{kind: [whether each route was found]}`; of one at least."""
    trials = {kind: [hit for one in found.values() for hit in one[kind]] for kind in ROUTE_KINDS}
    return PowerFigures(
        norm_over_budget=share,
        examples=len(found),
        required=REQUIRED,
        min_found=MIN_FOUND,
        kinds={
            kind: RoutePower(len(hits), sum(hits), sum(hits) / len(hits), wilson(sum(hits), len(hits)))
            for kind, hits in trials.items()
        },
    )


def told(power: PowerFigures) -> str:
    """Which planted routes the search finds, and which kinds are not covered."""
    covered = [kind for kind, one in power.kinds.items() if one.covered]
    missed = [kind for kind in power.kinds if kind not in covered]

    def counts(kind: RouteKind) -> str:
        return counted(power.kinds[kind].found, power.kinds[kind].trials)

    where = f"planted into the model at {percent(power.norm_over_budget)} of the budget"
    found = "; ".join(f"{NAMED[kind]} {counts(kind)}" for kind in covered)
    lost = "; ".join(f"{NAMED[kind]} ({counts(kind)})" for kind in missed)
    said = (
        f"of routes {where} this search finds: {found}" if covered else f"this search covers no kind of route {where}"
    )
    return said + (f"; not covered: {lost}" if missed else "")
