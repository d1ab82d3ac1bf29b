"""Every expected value is worked out by hand in the comment beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from recover.numerics import statistics
from recover.numerics.statistics import holm, median_interval, more_often, paired_smaller, wilson
from recover.types import InputError

INF = math.inf
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


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, float("nan")])
def test_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        wilson(1, 2, confidence)
    with pytest.raises(InputError, match="between 0 and 1"):
        median_interval([1.0], confidence=confidence)


def test_median_interval_is_that_of_a_loop_over_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, however many resamples are held at once."""
    values = np.random.default_rng(1).normal(size=7)
    generator = np.random.default_rng(3)
    loop = [np.median(generator.choice(values, 7)) for _ in range(100)]
    expected = tuple(np.quantile(loop, q, method=m) for q, m in (((1 - 0.95) / 2, "lower"), ((1 + 0.95) / 2, "higher")))
    for at_once in (1, 7, 50, 700):
        monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", at_once)
        assert median_interval(values, draws=100, seed=3) == expected


def test_median_interval_by_hand() -> None:
    # The median of three draws from (1, 2, inf) is 1 where at least two are 1: 3 (1/3)^2 (2/3) + (1/3)^3 = 7/27 = 0.26;
    # 2 with 13/27 and infinite with 7/27. The quantiles 0.1 and 0.9 are 1 and inf, and 0.3 and 0.7 are both 2.
    assert median_interval([1.0, 2.0, INF], confidence=0.8) == (1.0, INF)
    assert median_interval([1.0, 2.0, INF], confidence=0.4) == (2.0, 2.0)
    # Both of two draws from (1, inf) are 1 with probability 1/4; otherwise the middle is infinite.
    assert median_interval([1.0, INF], confidence=0.6) == (1.0, INF)
    assert median_interval([1.0, INF], confidence=0.4) == (INF, INF)


def test_median_interval_where_all_or_nearly_all_are_infinite() -> None:
    assert median_interval([INF] * 9) == (INF, INF)
    # For a finite median 26 of 50 draws must be the one finite figure: never seen.
    assert median_interval([3.0, *[INF] * 49]) == (INF, INF)
    assert median_interval([*[3.0] * 49, INF]) == (3.0, 3.0)


def test_median_interval_ends_are_medians_that_were_drawn() -> None:
    # All quantiles lie between the two that are drawn here, so the ends are these.
    values = np.random.default_rng(2).normal(size=5)
    generator = np.random.default_rng(7)
    medians = [np.median(generator.choice(values, 5)) for _ in range(2)]
    assert min(medians) < max(medians)
    assert median_interval(values, draws=2, confidence=0.5, seed=7) == (min(medians), max(medians))


def test_median_interval_of_finite_figures_is_that_of_the_bootstrap() -> None:
    # Among 10,000 medians the neighbors of a quantile are hardly apart.
    values = np.random.default_rng(2).normal(size=200)
    theirs = scipy_stats.bootstrap((values,), np.median, n_resamples=10_000, method="percentile", rng=0)
    assert median_interval(values) == pytest.approx(tuple(theirs.confidence_interval), abs=1e-3)


def test_median_interval_is_seeded() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert median_interval(values, draws=50) == median_interval(values, draws=50, seed=0)
    assert median_interval(values, draws=50) != median_interval(values, draws=50, seed=1)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [1.0, -INF], [[1.0]]])
def test_median_interval_refuses_unusable_values(values: Any) -> None:
    with pytest.raises(InputError, match="values must be a sequence"):
        median_interval(values)


def test_median_interval_refuses_no_draws_and_no_share() -> None:
    with pytest.raises(InputError, match="0 draws"):
        median_interval([1.0], draws=0)
    with pytest.raises(InputError, match="between 0 and 1"):
        median_interval([1.0], confidence=95.0)


def test_paired_norms_by_hand() -> None:
    ours = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0, 5.0]
    theirs = [2.0, 3.0, 6.0, 5.0, 8.0, 7.0, 9.0, 3.0, 5.0]
    found = paired_smaller(ours, theirs)
    assert (found.n, found.smaller, found.larger, found.ties, found.both_infinite) == (9, 7, 1, 1, 0)
    # 7 or 8 of 8 fair coins: (8 + 1) / 2^8.
    assert found.p == pytest.approx(9 / 256, rel=1e-12)
    # 0.5 0.667 0.5 0.8 0.625 0.857 0.778 3 1: the fifth of nine is 7/9.
    assert found.median_ratio == pytest.approx(7 / 9, rel=1e-12)


def test_paired_norms_the_other_way_round() -> None:
    ours, theirs = [1.0, 2.0, 3.0, 9.0], [2.0, 3.0, 6.0, 3.0]
    turned = paired_smaller(theirs, ours)
    assert (turned.smaller, turned.larger) == (1, 3)
    # 1 or more of 4 fair coins.
    assert turned.p == pytest.approx(15 / 16, rel=1e-12)


def test_an_infinite_norm_is_the_larger_and_two_are_a_tie_without_a_ratio() -> None:
    # Ratios: 0, 0.5, infinite and, of the tie, 1; the median of four is 0.75.
    found = paired_smaller([1.0, 2.0, INF, 3.0, INF, INF], [INF, 4.0, 5.0, 3.0, INF, INF])
    assert vars(found) == {
        "n": 6,
        "smaller": 2,
        "larger": 1,
        "ties": 3,
        "both_infinite": 2,
        "median_ratio": 0.75,
        "p": pytest.approx(4 / 8, rel=1e-12),
    }
    assert paired_smaller([INF, INF, 1.0], [1.0, 1.0, 1.0]).median_ratio == INF
    assert paired_smaller([1.0, 1.0, INF], [INF, INF, 1.0]).median_ratio == 0


def test_a_norm_of_zero_is_the_smaller_and_two_are_a_tie_of_ratio_1() -> None:
    found = paired_smaller([0.0, 0.0, 1.0], [0.0, 1.0, 0.0])
    assert (found.smaller, found.larger, found.ties, found.median_ratio) == (1, 1, 1, 1.0)


def test_noise_below_the_tolerance_is_no_significance() -> None:
    theirs = np.linspace(1.0, 100.0, 60)
    assert paired_smaller(0.995 * theirs, theirs).ties == 60
    assert paired_smaller(0.995 * theirs, theirs).p == 1.0
    assert paired_smaller(0.995 * theirs, theirs, tolerance=0.0).p == pytest.approx(2.0**-60)
    assert paired_smaller(0.985 * theirs, theirs).smaller == 60
    # A share of the larger of the two, whichever it is: 100 and 99.5 are as equal as 99.5 and 100.
    assert paired_smaller([100.0, 99.5, 100.0, 98.5], [99.5, 100.0, 98.5, 100.0]).ties == 2
    assert paired_smaller([90.0, 100.0], [100.0, 90.0], tolerance=0.2).ties == 2


def test_equal_norms_are_a_tie_without_any_tolerance() -> None:
    assert paired_smaller([1.0, INF, 0.0], [1.0, INF, 0.0], tolerance=0.0).ties == 3


def test_paired_norms_agree_with_the_binomial_test_of_scipy() -> None:
    generator = np.random.default_rng(0)
    for n in (1, 5, 45, 200):
        ours, theirs = generator.lognormal(-0.2, 1, n), generator.lognormal(0, 1, n)
        expected = scipy_stats.binomtest(int((ours < theirs).sum()), n, alternative="greater").pvalue
        assert paired_smaller(ours, theirs, tolerance=0.0).p == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_keeps_its_level() -> None:
    """Where neither is smaller, p falls below 0.05 in 5 % of the draws at most; of 20 pairs 15 are needed: 2.07 %."""
    generator = np.random.default_rng(0)
    draws = generator.standard_cauchy((2000, 2, 20))
    found = [paired_smaller(np.exp2(a / 9), np.exp2(b / 9), 0.0).p for a, b in draws.clip(-900, 900)]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.0207, abs=0.01)


def test_no_pairs_say_nothing() -> None:
    found = paired_smaller([], [])
    assert (found.n, found.p) == (0, 1.0)
    assert math.isnan(found.median_ratio)
    assert math.isnan(paired_smaller([INF], [INF]).median_ratio)


@pytest.mark.parametrize(
    ("ours", "theirs", "tolerance", "message"),
    [
        ([1.0], [1.0, 2.0], 0.01, r"shapes \(1,\) and \(2,\)"),
        ([[1.0]], [[1.0]], 0.01, "two sequences of one length"),
        ([1.0, math.nan], [1.0, 2.0], 0.01, "negative or NaN"),
        ([1.0, 2.0], [math.nan, 2.0], 0.01, "negative or NaN"),
        ([-1.0], [1.0], 0.01, "negative or NaN"),
        ([1.0], [-INF], 0.01, "negative or NaN"),
        ([1.0], [1.0], 1.0, "tolerance 1.0"),
        ([1.0], [1.0], -0.1, "tolerance -0.1"),
        ([1.0], [1.0], math.nan, "tolerance nan"),
    ],
)
def test_paired_norms_refuse_what_is_no_pair_of_norms(ours: Any, theirs: Any, tolerance: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        paired_smaller(ours, theirs, tolerance)


def test_more_often_by_hand() -> None:
    # The lady tasting tea, 3 of 4 cups: (C(4,3) C(4,1) + C(4,4) C(4,0)) / C(8,4) = 17 / 70.
    assert more_often(3, 4, 1, 4) == pytest.approx(17 / 70, rel=1e-9)
    # 5 of 6 against 1 of 4: (C(6,5) C(4,1) + C(6,6) C(4,0)) / C(10,6) = 25 / 210.
    assert more_often(5, 6, 1, 4) == pytest.approx(25 / 210, rel=1e-9)
    # The other way round, 1 or more of 4: all deals but the one that leaves these 4 none, C(4,0) C(6,6) / C(10,6).
    assert more_often(1, 4, 5, 6) == pytest.approx(1 - 1 / 210, rel=1e-9)
    # 54 of 54 against 0 of 54: one deal in C(108, 54).
    assert more_often(54, 54, 0, 54) == pytest.approx(1 / math.comb(108, 54), rel=1e-9)


@pytest.mark.parametrize("counts", [(0, 0, 3, 5), (3, 5, 0, 0), (0, 0, 0, 0), (0, 4, 0, 5), (4, 4, 5, 5), (0, 3, 2, 5)])
def test_more_often_where_nothing_can_be_said(counts: tuple[int, int, int, int]) -> None:
    assert more_often(*counts) == pytest.approx(1.0)


@pytest.mark.parametrize("counts", [(-1, 3, 1, 3), (4, 3, 1, 3), (1, 3, -1, 3), (1, 3, 4, 3)])
def test_more_often_refuses_impossible_counts(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(InputError, match="0 <= successes <= n"):
        more_often(*counts)


def test_holm_by_hand() -> None:
    # In order 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, and 0.04, which is raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.4]) == [1.0, 1.0, 1.0]
    assert holm([0.02, 0.02]) == [0.04, 0.04]


def test_holm_of_one_and_of_none_changes_nothing() -> None:
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@pytest.mark.parametrize("p_values", [[0.1, 1.1], [-0.1], [math.nan, 0.1], [[0.1]]])
def test_holm_refuses_what_is_no_probability(p_values: Any) -> None:
    with pytest.raises(InputError, match="from 0 to 1"):
        holm(p_values)
