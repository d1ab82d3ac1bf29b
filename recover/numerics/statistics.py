"""Intervals and tests for what a check reports (reference: Statistics).

1. *Intervals*: Wilson for rates, bootstrap for medians, which may be infinite.
2. *Paired norms*: an exact sign test of whether one of two norms is the smaller, example by example.
3. *Two rates*: Fisher's exact test.
4. *Several tests at once*: Holm's correction of their p-values.
5. *"No more than"* is never a test that failed to reject: it is an upper bound (`upper_share`), or a test of the share
   that is to be excluded (`at_most`).
6. *Fits vary*: what is read of several fits is tested over fits (`mean_above_zero`), not over examples alone.

A smallest norm is infinite where nothing was found, at any norm that was tried. All p-values are one-sided: small where
the data say what the function's name says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta, binom, fisher_exact
from scipy.stats import t as student

from recover.types import InputError

TIE = 0.01
"""A smallest norm is where a local search in rounded arithmetic stopped: norms that differ by less are equal."""
DRAWN_AT_ONCE = 2**20
"""Figures of resamples that are held in memory together."""


def wilson(successes: float | int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a rate; all of [0, 1] where `n` is 0.

    It solves `|p - successes/n| = q sqrt(p (1 - p) / n)` for `p`, with `q` the two-sided normal quantile. Written out,
    as `scipy.stats.binomtest` differs in the last digit (by 3e-16 at most for `n <= 300`), which verdicts print. Where
    each of `n` clusters counts by its mean, `successes` is the sum of these means; the interval is then a cautious one.

    >>> from recover.numerics import wilson
    >>> wilson(8, 10)
    (0.490..., 0.943...)

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


def median_interval(
    values: ArrayLike, draws: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a median of figures that may be infinite; so may its ends be.

    An end that falls between two resampled medians is the outer of the two, as there is nothing to interpolate between
    a finite one and infinity. The median of an even number of figures is infinite where the upper one of the middle two
    is. The same seed gives the same interval.

    Args:
        values: one figure an example, such as its smallest norm; infinite where there is none.
        draws: how many resamples.
        confidence: share of the resamples that the interval holds.
        seed: of the resampling.

    Raises:
        InputError: no values, NaN, minus infinity, no draws, or not `0 < confidence < 1`.
    """
    _check_confidence(confidence)
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0 or not (sample > -math.inf).all():
        raise InputError("median: values must be a sequence of numbers, at least one; infinity is one, NaN is not")
    if draws < 1:
        raise InputError(f"bootstrap: {draws} draws; give at least one")
    generator, rows = np.random.default_rng(seed), max(1, DRAWN_AT_ONCE // len(sample))
    sizes = [(min(rows, draws - start), len(sample)) for start in range(0, draws, rows)]
    medians = np.concatenate([np.median(sample[generator.integers(len(sample), size=size)], axis=1) for size in sizes])
    low = np.quantile(medians, (1 - confidence) / 2, method="lower")
    high = np.quantile(medians, (1 + confidence) / 2, method="higher")
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """Paired norms: where `ours` is smaller than `theirs`, and how sure that is.

    Attributes:
        n: pairs in all: `smaller + larger + ties`.
        smaller: pairs where `ours` is the smaller.
        larger: pairs where it is the larger.
        ties: pairs that differ by less than the tolerance, those that are both infinite among them.
        both_infinite: ties of two infinite norms, which have no ratio.
        median_ratio: of ours to theirs, over all pairs but those; it may be 0 or infinite. NaN where none is left.
        p: one-sided, of the sign test.
    """

    n: int
    smaller: int
    larger: int
    ties: int
    both_infinite: int
    median_ratio: float
    p: float


def paired_smaller(ours: ArrayLike, theirs: ArrayLike, tolerance: float = TIE) -> Paired:
    """Test whether `ours` tend to be smaller than `theirs`, example by example: the exact sign test.

    Were neither likelier to be the smaller one, `smaller` would be binomial, with probability 1/2, among the pairs that
    are not ties; `p` is the probability of at least as many. Unlike the signed-rank test it does not weigh by how much
    they differ, so infinite norms need no rank and an outlier counts as one example. The price is power: where the
    log-ratios are normal, it needs half as many pairs again. Ties are left out, which keeps the test exact; with many
    of them a small `p` comes from a few pairs, so report `ties` beside it.

    Args:
        ours: the smallest norms for the behavior's own target, one an example; infinite where it is not reached.
        theirs: those for the placebo target, searched up to the same largest norm.
        tolerance: a pair is a tie where the smaller of the two is less than this share below the larger, so that
            numerical noise cannot become significance.

    Raises:
        InputError: lengths that differ, a norm that is negative or NaN, or not `0 <= tolerance < 1`.
    """
    a, b = (np.asarray(norms, dtype=np.float64) for norms in (ours, theirs))
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"paired norms: shapes {a.shape} and {b.shape}; give two sequences of one length")
    if not ((a >= 0) & (b >= 0)).all():
        raise InputError("paired norms: one is negative or NaN; give numbers from 0, infinity where there is none")
    if not 0 <= tolerance < 1:
        raise InputError(f"paired norms: tolerance {tolerance} is no share; give a number from 0 to below 1")
    # Not by their difference: that of two infinities is NaN.
    tied = (a == b) | (np.minimum(a, b) > (1 - tolerance) * np.maximum(a, b))
    smaller, larger = int((~tied & (a < b)).sum()), int((~tied & (a > b)).sum())
    both_infinite = np.isinf(a) & np.isinf(b)
    # A positive norm is infinitely many times one of 0.
    with np.errstate(divide="ignore", over="ignore"):
        ratios = np.divide(a, b, out=np.ones_like(a), where=a != b)[~both_infinite]
    return Paired(
        n=len(a),
        smaller=smaller,
        larger=larger,
        ties=int(tied.sum()),
        both_infinite=int(both_infinite.sum()),
        median_ratio=float(np.median(ratios)) if len(ratios) else math.nan,
        p=float(binom.sf(smaller - 1, smaller + larger, 0.5)),
    )


def sign_test(positive: int, negative: int) -> float:
    """The one-sided p-value of the exact sign test that positive differences are no likelier than negative ones.

    >>> from recover.numerics import sign_test
    >>> sign_test(7, 0), sign_test(0, 0)
    (0.0078125, 1.0)
    """
    return float(binom.sf(positive - 1, positive + negative, 0.5))


def upper_share(successes: float | int, n: int, confidence: float = 0.95) -> float:
    """The one-sided upper bound of a share (Clopper and Pearson 1934); 1 where `n` is 0.

    `successes` may be a sum of the means of clusters, as in `wilson`.

    >>> from recover.numerics import upper_share
    >>> round(upper_share(0, 24), 3)  # 1 - 0.05 ** (1 / 24)
    0.117

    Raises:
        InputError: not `0 <= successes <= n`, or not `0 < confidence < 1`.
    """
    _check_confidence(confidence)
    if not 0 <= successes <= n:
        raise InputError(f"share: {successes} successes of {n}; give 0 <= successes <= n")
    return 1.0 if successes >= n else float(beta.ppf(confidence, successes + 1, n - successes))


def at_most(successes: int, n: int, share: float) -> float:
    """The p-value that so few successes come from a true share of `share` or more: `P(X <= successes)`.

    >>> from recover.numerics import at_most
    >>> round(at_most(0, 24, 0.15), 4)
    0.0202
    """
    return float(binom.cdf(successes, n, share))


def mean_above_zero(values: ArrayLike) -> float:
    """The one-sided p-value of Student's t test that the mean is not above 0; 1 for fewer than two values.

    >>> from recover.numerics import mean_above_zero
    >>> round(mean_above_zero([1.0, 2.0, 3.0]), 4)
    0.0371
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return 1.0
    mean, spread = float(sample.mean()), float(sample.std(ddof=1))
    if spread <= 1e-12 * abs(mean):
        return 0.0 if mean > 0 else 1.0
    return float(student.sf(mean / (spread / math.sqrt(len(sample))), len(sample) - 1))


def more_often(successes: int, n: int, other_successes: int, other_n: int) -> float:
    """The one-sided p-value of Fisher's exact test that the first rate is higher than the other.

    A hypergeometric tail; 1 where either has no trials. The trials of the two are taken to be different ones; of the
    same examples, which tend to succeed together, the test is cautious.

    >>> from recover.numerics import more_often
    >>> round(more_often(3, 3, 0, 3), 3)
    0.05

    Raises:
        InputError: not `0 <= successes <= n`, of either.
    """
    for k, of in ((successes, n), (other_successes, other_n)):
        if not 0 <= k <= of:
            raise InputError(f"rates: {k} successes of {of}; give 0 <= successes <= n")
    table = [[successes, n - successes], [other_successes, other_n - other_successes]]
    return float(fisher_exact(table, alternative="greater").pvalue)


def holm(p_values: ArrayLike) -> list[float]:
    """Holm's adjusted p-values, in the order given (Holm 1979).

    Reject those up to `alpha`: with probability at most `alpha` any true hypothesis is among the rejected, however the
    tests depend on each other. The adjusted value of the `i`-th smallest of `m` is `(m - i + 1) p_(i)`, or what
    the place before has, if that is larger.

    >>> from recover.numerics import holm
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    Raises:
        InputError: a value that is not between 0 and 1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise InputError("holm: p-values must be a sequence of numbers from 0 to 1")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]).clip(max=1)
    return [float(value) for value in adjusted]


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence: {confidence} is no share; give a number between 0 and 1, such as 0.95")
