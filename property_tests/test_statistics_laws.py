"""Laws of intervals: what they must contain, and how they answer to more data, more confidence and other units."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from recover.stats import bootstrap, wilson

EPS = np.finfo(np.float64).eps
ROUNDING = 32 * EPS
"""A Wilson end is some ten operations on numbers of order 1 at most."""


@st.composite
def counts(draw: st.DrawFn, most: int = 10_000) -> tuple[int, int]:
    n = draw(st.integers(1, most))
    return draw(st.integers(0, n)), n


confidences = st.floats(0.5, 0.999)


def width(successes: int, n: int, confidence: float = 0.95) -> float:
    low, high = wilson(successes, n, confidence)
    return high - low


@given(counts(), confidences)
def test_wilson_contains_the_rate_and_stays_between_0_and_1(drawn: tuple[int, int], confidence: float) -> None:
    k, n = drawn
    low, high = wilson(k, n, confidence)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high


@given(counts(), confidences)
def test_wilson_of_failures_mirrors_that_of_successes(drawn: tuple[int, int], confidence: float) -> None:
    k, n = drawn
    low, high = wilson(k, n, confidence)
    mirrored = wilson(n - k, n, confidence)
    assert abs(mirrored[0] - (1 - high)) <= ROUNDING
    assert abs(mirrored[1] - (1 - low)) <= ROUNDING


@given(counts(), st.integers(2, 50), confidences)
def test_wilson_shrinks_with_more_of_the_same(drawn: tuple[int, int], times: int, confidence: float) -> None:
    """And lies inside what it was."""
    k, n = drawn
    few, many = wilson(k, n, confidence), wilson(times * k, times * n, confidence)
    assert few[0] - ROUNDING <= many[0] <= many[1] <= few[1] + ROUNDING
    assert width(times * k, times * n, confidence) < width(k, n, confidence)


@given(counts(), confidences, st.floats(1e-4, 0.4))
def test_wilson_widens_with_confidence(drawn: tuple[int, int], confidence: float, more: float) -> None:
    k, n = drawn
    narrow, wide = wilson(k, n, confidence), wilson(k, n, min(confidence + more, 0.9999))
    assert wide[0] <= narrow[0] + ROUNDING
    assert narrow[1] <= wide[1] + ROUNDING
    assert wide[1] - wide[0] > narrow[1] - narrow[0] - ROUNDING


@given(counts(), confidences)
def test_wilson_rises_with_successes(drawn: tuple[int, int], confidence: float) -> None:
    k, n = drawn
    assume(k < n)
    one, other = wilson(k, n, confidence), wilson(k + 1, n, confidence)
    assert one[0] <= other[0] + ROUNDING
    assert one[1] <= other[1] + ROUNDING
    assert sum(other) > sum(one)


@given(counts(), confidences)
def test_the_ends_of_wilson_are_the_rates_that_a_score_test_just_accepts(
    drawn: tuple[int, int], confidence: float
) -> None:
    """`(k/n - p)^2 = q^2 p (1 - p) / n` at both."""
    k, n = drawn
    q = NormalDist().inv_cdf((1 + confidence) / 2)
    for p in wilson(k, n, confidence):
        left, right = (k / n - p) ** 2, q**2 * p * (1 - p) / n
        assert math.isclose(left, right, rel_tol=1e-9, abs_tol=4 * ROUNDING * (1 + q**2))


samples = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12)


@given(st.floats(-1e6, 1e6), st.integers(1, 12), st.integers(0, 99), st.sampled_from([np.mean, np.median, np.max]))
def test_bootstrap_of_a_constant_sample_is_that_constant(value: float, n: int, seed: int, statistic: object) -> None:
    low, high = bootstrap([value] * n, statistic, draws=20, seed=seed)  # type: ignore[arg-type]
    assert abs(low - value) <= n * EPS * abs(value)
    assert abs(high - value) <= n * EPS * abs(value)


@given(samples, st.integers(0, 99))
def test_bootstrap_is_a_function_of_its_seed(values: list[float], seed: int) -> None:
    first = bootstrap(values, draws=30, seed=seed)
    np.random.random(3)
    assert bootstrap(values, draws=30, seed=seed) == first


@given(samples, st.integers(0, 99), confidences)
def test_bootstrap_stays_within_the_sample_and_widens_with_confidence(
    values: list[float], seed: int, confidence: float
) -> None:
    size = max(map(abs, values))
    slack = 2 * len(values) * EPS * size
    low, high = bootstrap(values, draws=50, confidence=confidence, seed=seed)
    assert min(values) - slack <= low <= high <= max(values) + slack
    wider = bootstrap(values, draws=50, confidence=(1 + confidence) / 2, seed=seed)
    assert wider[0] <= low + slack
    assert high <= wider[1] + slack
    everything = bootstrap(values, draws=2000, confidence=1 - 1e-9, seed=seed)
    # Among 2,000 resamples of a few values some lie on either side of the mean, unless all are one value.
    assert everything[0] - slack <= np.mean(values) <= everything[1] + slack


@given(samples, st.integers(0, 99), st.integers(-9, 9))
def test_bootstrap_answers_to_the_unit(values: list[float], seed: int, power: int) -> None:
    """To the bit for powers of 2; and turning the sign turns the interval."""
    factor = 2.0**power
    low, high = bootstrap(values, draws=30, seed=seed)
    assert bootstrap([factor * value for value in values], draws=30, seed=seed) == (factor * low, factor * high)
    size = max(map(abs, values))
    turned = bootstrap([-value for value in values], draws=30, seed=seed)
    assert abs(turned[0] + high) <= 4 * EPS * size
    assert abs(turned[1] + low) <= 4 * EPS * size
