"""Intervals for what a check reports (reference: Statistics): Wilson for rates, bootstrap for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recover.types import InputError

__all__ = ["bootstrap", "wilson"]


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a rate; all of [0, 1] where `n` is 0.

    It solves `|p - successes/n| = q sqrt(p (1 - p) / n)` for `p`, with `q` the two-sided normal quantile.

    Raises:
        InputError: not `0 <= successes <= n`, or not `0 < confidence < 1`.
    """
    _check_confidence(confidence)
    if not 0 <= successes <= n:
        raise InputError(f"wilson: {successes} successes of {n}; give 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    q = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / n
    center = (rate + q**2 / (2 * n)) / (1 + q**2 / n)
    half = q / (1 + q**2 / n) * math.sqrt(rate * (1 - rate) / n + q**2 / (4 * n**2))
    # The ends are exact where all or none succeed, which rounding would miss.
    return (center - half if successes > 0 else 0.0), (center + half if successes < n else 1.0)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], float] = np.mean,
    draws: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of `statistic`; the same seed gives the same interval.

    Args:
        values: one figure an example, drawn from with replacement.
        statistic: of an array of as many figures, such as `np.mean` or `np.median`.
        draws: how many resamples.
        confidence: share of the resamples that the interval holds.
        seed: of the resampling.

    Raises:
        InputError: no values, values that are not finite, no draws, or not `0 < confidence < 1`.
    """
    _check_confidence(confidence)
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0 or not np.isfinite(sample).all():
        raise InputError("bootstrap: values must be a sequence of finite numbers, at least one")
    if draws < 1:
        raise InputError(f"bootstrap: {draws} draws; give at least one")
    generator = np.random.default_rng(seed)
    resampled = [float(statistic(generator.choice(sample, sample.size))) for _ in range(draws)]
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence: {confidence} is no share; give a number between 0 and 1, such as 0.95")
