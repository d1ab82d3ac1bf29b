"""How much of the protocol is run, and on which random draws: every default in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

from recover.defenses.utility import MAX_INCREASE
from recover.evidence.rules import Rules
from recover.evidence.transfer import FitSchedule

__all__ = ["Plan", "TransferPlan"]


@dataclass(frozen=True)
class TransferPlan:
    """How a shared delta is fitted and read.

    Args:
        norms: budgets, as shares of the mean norm of the defended residual. The search's own budget is added. Evidence
            is read at the largest of all, the others show the curve; none is chosen by its result.
        folds: 1 fits on one half and reads on the other; 2 does it the other way round as well.
        shuffles: fits to shuffled targets at the largest budget; one at each other.
        draws: random directions.
        fit: how a delta is fitted.
    """

    norms: tuple[float, ...] = (0.2, 0.4, 0.6)
    folds: int = 2
    shuffles: int = 3
    draws: int = 100
    fit: FitSchedule = field(default_factory=FitSchedule)


@dataclass(frozen=True)
class Plan:
    """What a check runs beside the search at the budget.

    Args:
        seed: of the split, the placebo targets and features, the shuffles and the random draws.
        curve: budgets of the curve, as multiples of the search's.
        random_draws: random admissible directions, for each example.
        placebo_features: draws of random features, each clamped in the place of the defense's.
        undo_scales: shares of the clamp's displacement that are taken back.
        sample: examples on which gradients are held against finite differences.
        max_loss_increase: nats a token on neutral text, above which the clamp counts as breaking the model.
        transfer: of shared deltas.
        rules: of evidence.
    """

    seed: int = 0
    curve: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 2.0)
    random_draws: int = 1000
    placebo_features: int = 3
    undo_scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    sample: int = 8
    max_loss_increase: float = MAX_INCREASE
    transfer: TransferPlan = field(default_factory=TransferPlan)
    rules: Rules = field(default_factory=Rules)
