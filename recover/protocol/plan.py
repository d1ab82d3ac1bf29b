"""The plan of a check: how much of the protocol is run, on which random draws. Every default is here.

A field's type carries its range. Sections of DEFENSE.yaml (`recover.run.config`) take fields, ranges and defaults from
these dataclasses, so that each is written once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from recover.defenses.utility import MAX_INCREASE
from recover.evidence.rules import Rules
from recover.evidence.transfer import FitSchedule
from recover.search.ascent import Schedule
from recover.types import Positive, Surface

__all__ = ["Plan", "TransferPlan"]


@dataclass(frozen=True)
class TransferPlan:
    """How a shared delta is fitted and read.

    Args:
        norms: budgets, as shares of the mean norm of the defended residual. The search's own budget is added. Evidence
            is read at the largest of all, the others show the curve; none is chosen by its result.
        folds: 1 fits on one half and reads on the other; 2 does it the other way round as well.
        splits: how often the prompts are split in halves anew; each split has its own fits.
        rules: other rules that the behavior's own is compared with, at most; 0 for none.
        scales: shares of the fits' norms at which rules are read as well.
        shuffles: fits to shuffled targets, at the largest budget.
        draws: random directions.
        fit: how a delta is fitted.
    """

    norms: Annotated[tuple[Positive, ...], Field(strict=False)] = (0.2, 0.4, 0.6)
    folds: Literal[1, 2] = 2
    splits: PositiveInt = 3
    rules: NonNegativeInt = 4
    scales: Annotated[tuple[Positive, ...], Field(strict=False)] = (0.1, 0.14, 0.2, 0.28, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
    shuffles: PositiveInt = 1
    draws: PositiveInt = 100
    fit: FitSchedule = field(default_factory=FitSchedule)


@dataclass(frozen=True)
class Plan:
    """How much of the protocol a check runs.

    Args:
        seed: seed of the split, the placebo targets and features, the shuffles and the random draws.
        curve: budgets of the curve, as multiples of the search's.
        random_draws: random admissible directions, for each example.
        planted_routes: routes of each kind, planted into the model where nothing was found (`recover.protocol.power`);
            with 0 the power of the search is not measured.
        placebo_features: draws of random features, each clamped in the place of the defense's.
        undo_scales: shares of the clamp's displacement that are taken back.
        sample: examples on which gradients are compared with finite differences.
        max_loss_increase: nats a token on neutral text, above which the clamp counts as breaking the model.
        schedule: how hard to search.
        surface: where a perturbation enters.
        transfer: how shared perturbations are fitted and read.
        rules: thresholds of the rules of evidence.

    >>> Plan(schedule=Schedule(steps=10), surface=Surface("every")).surface.every
    True
    """

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    curve: Annotated[tuple[Positive, ...], Field(strict=False)] = (0.1, 0.25, 0.5, 1.0, 2.0)
    random_draws: PositiveInt = 1000
    planted_routes: NonNegativeInt = 20
    placebo_features: NonNegativeInt = 5
    undo_scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    sample: int = 8
    max_loss_increase: Annotated[float, Field(ge=0, allow_inf_nan=False)] = MAX_INCREASE
    schedule: Schedule = field(default_factory=Schedule)
    surface: Surface = field(default_factory=Surface)
    transfer: TransferPlan = field(default_factory=TransferPlan)
    rules: Rules = field(default_factory=Rules)
