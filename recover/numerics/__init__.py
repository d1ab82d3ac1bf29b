"""Mathematics without models: measures, statistics, subspaces and least squares. Read `metrics` first.

================  =====================================================================================
`metrics`         the measures of a recovery (norms, drift, reactivation) and of an SAE's fit
`statistics`      intervals of rates and medians, the sign test, Fisher's exact test, Holm's correction
`subspaces`       the null space of clamped encoder columns, and the projector onto it
`least_squares`   least squares for matrices that are known by their products alone
================  =====================================================================================
"""

from recover.numerics.least_squares import LeastSquares, cgls
from recover.numerics.metrics import (
    Reactivation,
    activation_drift,
    clamp_floor_violation,
    decode_drift,
    explained_variance,
    l0,
    loss_recovered,
    norm,
    reactivation,
    recovery_rate,
    relative_drift,
    relative_norm,
    valid_flips,
    zero_reactivation_recovery,
)
from recover.numerics.statistics import (
    Paired,
    at_most,
    holm,
    mean_above_zero,
    median_interval,
    more_often,
    paired_smaller,
    sign_test,
    upper_share,
    wilson,
)
from recover.numerics.subspaces import NullSpace, NullSpaces, row_space

__all__ = [
    "LeastSquares",
    "NullSpace",
    "NullSpaces",
    "Paired",
    "Reactivation",
    "activation_drift",
    "at_most",
    "cgls",
    "clamp_floor_violation",
    "decode_drift",
    "explained_variance",
    "holm",
    "l0",
    "loss_recovered",
    "mean_above_zero",
    "median_interval",
    "more_often",
    "norm",
    "paired_smaller",
    "reactivation",
    "recovery_rate",
    "relative_drift",
    "relative_norm",
    "row_space",
    "sign_test",
    "upper_share",
    "valid_flips",
    "wilson",
    "zero_reactivation_recovery",
]
