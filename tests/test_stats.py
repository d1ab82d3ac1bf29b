"""Every expected value is worked out by hand in the comment beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from recover.stats import bootstrap, wilson
from recover.types import InputError

Q = 1.959964  # the normal quantile at 0.975


def test_wilson_by_hand() -> None:
    # 37 of 64: rate 0.578125; q^2 = 3.841459; 1 + q^2 / n = 1.0600228
    # center (0.578125 + 3.841459 / 128) / 1.0600228 = 0.6081364 / 1.0600228 = 0.5737013
    # half 1.959964 / 1.0600228 * sqrt(0.578125 * 0.421875 / 64 + 3.841459 / 16384)
    #    = 1.8489829 * sqrt(0.0038108826 + 0.0002344640) = 1.8489829 * 0.0636029 = 0.1176007
    assert wilson(37, 64) == pytest.approx((0.456101, 0.691302), abs=2e-6)


def test_wilson_of_none_and_of_all() -> None:
    # 0 of n: from 0 to q^2 / (n + q^2); 37 of 37: from 37 / (37 + q^2) = 37 / 40.841459 = 0.905942 to 1
    assert wilson(0, 37) == (0.0, pytest.approx(1 - 0.905942, abs=1e-6))
    assert wilson(37, 37) == (pytest.approx(0.905942, abs=1e-6), 1.0)


def test_wilson_ends_are_exact_where_none_or_all_succeed() -> None:
    for n in range(1, 100):
        assert wilson(0, n)[0] == 0
        assert wilson(n, n)[1] == 1


def test_wilson_of_one_half_of_two() -> None:
    # At rate 1/2 the interval is 1/2 -+ q / (2 sqrt(n + q^2)): 1.959964 / (2 sqrt(5.841459)) = 0.405469
    assert wilson(1, 2) == pytest.approx((0.5 - 0.405469, 0.5 + 0.405469), abs=1e-6)


def test_wilson_at_other_confidence() -> None:
    # The normal quantile at 0.95 is 1.644854, its square 2.705543: 1.644854 / (2 sqrt(4.705543)) = 0.379134
    assert wilson(1, 2, confidence=0.9) == pytest.approx((0.5 - 0.379134, 0.5 + 0.379134), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(1, 10), (37, 64), (63, 64), (500, 1000)])
def test_wilson_ends_solve_their_equation(successes: int, n: int) -> None:
    """At either end p, the rate is q standard deviations away: |p - rate| = q sqrt(p (1 - p) / n)."""
    for p in wilson(successes, n):
        assert abs(p - successes / n) == pytest.approx(Q * (p * (1 - p) / n) ** 0.5, rel=1e-6)


def test_wilson_knows_nothing_without_examples() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(InputError, match="0 <= successes <= n"):
        wilson(successes, n)


def test_bootstrap_of_a_rate_by_hand() -> None:
    # The mean of a resample of (0, 0, 0, 0, 1) is Binomial(5, 1/5) / 5. P(0) = 0.328 > 0.025, so the low end is 0.
    # P(<= 2) = 0.942 < 0.975 < P(<= 3) = 0.993, so the high end is 3 / 5.
    assert bootstrap([0, 0, 0, 0, 1]) == pytest.approx((0.0, 0.6))


def test_bootstrap_at_other_confidence_by_hand() -> None:
    # Resamples of (0, 1) average 0, 1/2, 1 with probability 1/4, 1/2, 1/4. Between the quantiles 0.3 and 0.7 all
    # are 1/2; between 0.2 and 0.8 the ends are 0 and 1.
    assert bootstrap([0.0, 1.0], confidence=0.4) == (0.5, 0.5)
    assert bootstrap([0.0, 1.0], confidence=0.6) == (0.0, 1.0)


def test_bootstrap_of_another_statistic_by_hand() -> None:
    # The median of three draws from (1, 2, 9) is 1 where at least two are 1: 3 (1/3)^2 (2/3) + (1/3)^3 = 7/27 = 0.26;
    # 2 with 13/27 and 9 with 7/27. So the quantiles 0.1 and 0.9 are 1 and 9, and 0.3 and 0.7 are both 2.
    assert bootstrap([1.0, 2.0, 9.0], np.median, confidence=0.8) == (1.0, 9.0)
    assert bootstrap([1.0, 2.0, 9.0], np.median, confidence=0.4) == (2.0, 2.0)


def test_bootstrap_of_a_large_sample_is_nearly_normal() -> None:
    # The mean of n figures has standard error s / sqrt(n): for 400 of +-1 that is 0.05, so -+ 0.098.
    low, high = bootstrap(np.tile([-1.0, 1.0], 200))
    assert (low, high) == pytest.approx((-0.098, 0.098), abs=0.006)


def test_bootstrap_of_one_figure_is_that_figure() -> None:
    assert bootstrap([3.5]) == (3.5, 3.5)


def test_bootstrap_is_seeded() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap(values, draws=200) == bootstrap(values, draws=200, seed=0)
    assert bootstrap(values, draws=200) != bootstrap(values, draws=200, seed=1)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0]]])
def test_bootstrap_refuses_unusable_values(values: Any) -> None:
    with pytest.raises(InputError, match="finite numbers"):
        bootstrap(values)


def test_bootstrap_refuses_no_draws() -> None:
    with pytest.raises(InputError, match="0 draws"):
        bootstrap([1.0], draws=0)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, float("nan")])
def test_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        wilson(1, 2, confidence)
    with pytest.raises(InputError, match="between 0 and 1"):
        bootstrap([1.0], confidence=confidence)


def test_bootstrap_gives_the_statistic_whole_resamples() -> None:
    sizes: set[int] = set()

    def size(sample: NDArray[np.float64]) -> float:
        sizes.add(sample.size)
        return 0.0

    bootstrap([1.0, 2.0, 3.0], size, draws=5)
    assert sizes == {3}
