"""Laws of intervals, tests and matched draws.

Of intervals what they must contain, and how they answer to more data, more confidence and other units; of p-values how
they answer to exchange and to evidence, and closed forms; of matched features that nothing nearer was passed over.
"""

from __future__ import annotations

import math
from itertools import combinations
from statistics import NormalDist

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from property_tests.guards import guards
from recover.defenses.selection import NEAREST, matched
from recover.numerics.statistics import holm, median_interval, more_often, paired_smaller, wilson

EPS = np.finfo(np.float64).eps
ROUNDING = 32 * EPS
"""A Wilson end is some ten operations on numbers of order 1 at most."""


@st.composite
def counts(draw: st.DrawFn, most: int = 10_000) -> tuple[int, int]:
    n = draw(st.integers(1, 20) | st.integers(1, most))
    return draw(st.integers(0, n)), n


confidences = st.floats(0.5, 0.999)


def width(successes: int, n: int, confidence: float = 0.95) -> float:
    low, high = wilson(successes, n, confidence)
    return high - low


@guards(wilson, "return (center - half if successes > 0 else 0.0)", "return (rate - half if successes > 0 else 0.0)")
@given(counts(), confidences)
def test_wilson_contains_the_rate_and_stays_between_0_and_1(drawn: tuple[int, int], confidence: float) -> None:
    k, n = drawn
    low, high = wilson(k, n, confidence)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high


@guards(
    wilson, "center = (rate + q**2 / (2 * n)) / (1 + q**2 / n)", "center = (rate + q**2 / (3 * n)) / (1 + q**2 / n)"
)
@given(counts(), confidences)
def test_wilson_of_failures_mirrors_that_of_successes(drawn: tuple[int, int], confidence: float) -> None:
    k, n = drawn
    low, high = wilson(k, n, confidence)
    mirrored = wilson(n - k, n, confidence)
    assert abs(mirrored[0] - (1 - high)) <= ROUNDING
    assert abs(mirrored[1] - (1 - low)) <= ROUNDING


@guards(wilson, "half = q / (1 + q**2 / n) * math.sqrt(", "half = q / (1 + q**2 / n) * math.sqrt(n) * math.sqrt(")
@given(counts(), st.integers(2, 50), confidences)
def test_wilson_shrinks_with_more_trials_at_the_same_rate(
    drawn: tuple[int, int], times: int, confidence: float
) -> None:
    """The interval of the smaller sample contains that of the larger."""
    k, n = drawn
    few, many = wilson(k, n, confidence), wilson(times * k, times * n, confidence)
    assert few[0] - ROUNDING <= many[0] <= many[1] <= few[1] + ROUNDING
    assert width(times * k, times * n, confidence) < width(k, n, confidence)


@guards(wilson, "q = NormalDist().inv_cdf((1 + confidence) / 2)", "q = NormalDist().inv_cdf(1 - confidence / 3)")
@given(counts(), confidences, st.floats(1e-4, 0.4))
def test_wilson_widens_with_confidence(drawn: tuple[int, int], confidence: float, more: float) -> None:
    k, n = drawn
    narrow, wide = wilson(k, n, confidence), wilson(k, n, min(confidence + more, 0.9999))
    assert wide[0] <= narrow[0] + ROUNDING
    assert narrow[1] <= wide[1] + ROUNDING
    assert wide[1] - wide[0] > narrow[1] - narrow[0] - ROUNDING


@guards(wilson, "rate = successes / n", "rate = 1 - successes / n")
@given(counts(), confidences)
def test_wilson_rises_with_successes(drawn: tuple[int, int], confidence: float) -> None:
    k, n = drawn
    assume(k < n)
    one, other = wilson(k, n, confidence), wilson(k + 1, n, confidence)
    assert one[0] <= other[0] + ROUNDING
    assert one[1] <= other[1] + ROUNDING
    assert sum(other) > sum(one)


@guards(wilson, "q**2 / (4 * n**2)", "q**2 / (5 * n**2)")
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


@guards(median_interval, "generator, rows = np.random.default_rng(seed)", "generator, rows = np.random.default_rng()")
@given(samples, st.integers(0, 99))
def test_a_median_interval_is_a_function_of_its_seed(values: list[float], seed: int) -> None:
    first = median_interval(values, draws=30, seed=seed)
    np.random.random(3)
    assert median_interval(values, draws=30, seed=seed) == first


@guards(median_interval, "(1 + confidence) / 2", "(2 - confidence) / 2")
@given(samples, st.integers(0, 99), confidences)
def test_a_median_interval_stays_within_the_sample_and_widens_with_confidence(
    values: list[float], seed: int, confidence: float
) -> None:
    slack = 2 * EPS * max(map(abs, values))
    low, high = median_interval(values, draws=50, confidence=confidence, seed=seed)
    assert min(values) - slack <= low <= high <= max(values) + slack
    wider = median_interval(values, draws=50, confidence=(1 + confidence) / 2, seed=seed)
    assert wider[0] <= low + slack
    assert high <= wider[1] + slack


@guards(
    median_interval,
    "sample = np.asarray(values, dtype=np.float64)",
    "sample = 1.0 + np.asarray(values, dtype=np.float64)",
)
@given(samples, st.integers(0, 99), st.integers(-9, 9))
def test_a_median_interval_scales_with_the_unit(values: list[float], seed: int, power: int) -> None:
    """To the bit for powers of 2, where nothing underflows."""
    assume(all(value == 0 or abs(value) > 1e-100 for value in values))
    factor = 2.0**power
    low, high = median_interval(values, draws=30, seed=seed)
    assert median_interval([factor * v for v in values], draws=30, seed=seed) == (factor * low, factor * high)


norms = st.floats(0, 1e6) | st.just(math.inf)
pairs = st.lists(st.tuples(norms, norms), max_size=12)


@guards(median_interval, 'method="lower"', 'method="higher"')
@guards(
    median_interval,
    "sample = np.asarray(values, dtype=np.float64)",
    "sample = np.nan_to_num(np.asarray(values, dtype=np.float64), posinf=1e6)",
)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.inf), min_size=1, max_size=12), st.integers(0, 99), confidences)
def test_a_median_interval_with_infinite_values_is_that_of_large_ones(
    values: list[float], seed: int, confidence: float
) -> None:
    """With large values in place of infinite ones; an end that is large is infinite."""
    large = [min(value, 1e9) for value in values]
    outer = median_interval(large, draws=50, confidence=confidence, seed=seed)
    found = median_interval(values, draws=50, confidence=confidence, seed=seed)
    assert found == tuple(math.inf if end > 1e6 else end for end in outer)


@guards(paired_smaller, "(1 - tolerance) * np.maximum(a, b)", "(1 - tolerance) * b")
@guards(paired_smaller, "binom.sf(smaller - 1,", "binom.sf(smaller,")
@given(pairs, st.floats(0, 0.5))
def test_swapping_the_two_of_every_pair_reverses_the_comparison(
    drawn: list[tuple[float, float]], tolerance: float
) -> None:
    """And the two p-values add up to 1 and the probability of just so many, which both of them count."""
    ours, theirs = [a for a, _ in drawn], [b for _, b in drawn]
    one, other = paired_smaller(ours, theirs, tolerance), paired_smaller(theirs, ours, tolerance)
    assert (one.smaller, one.larger, one.ties) == (other.larger, other.smaller, other.ties)
    assert one.smaller + one.larger + one.ties == one.n == len(drawn)
    decided = one.smaller + one.larger
    assert math.isclose(one.p + other.p, 1 + math.comb(decided, one.smaller) / 2**decided, rel_tol=1e-9)


@guards(paired_smaller, "binom.sf(smaller - 1,", "binom.cdf(smaller,")
@given(pairs, st.integers(0, 11), st.floats(0, 1))
def test_a_smaller_norm_of_ours_is_never_evidence_against_it(
    drawn: list[tuple[float, float]], at: int, share: float
) -> None:
    assume(at < len(drawn))
    ours, theirs = [a for a, _ in drawn], [b for _, b in drawn]
    before = paired_smaller(ours, theirs)
    ours[at] = share * ours[at] if math.isfinite(ours[at]) else 1e9 * share
    after = paired_smaller(ours, theirs)
    assert after.larger <= before.larger
    assert after.smaller >= before.smaller
    assert after.p <= before.p


@guards(paired_smaller, "tied = (a == b) |", "tied = (np.maximum(a, b) < 1e5) | (a == b) |")
@given(pairs, st.integers(-9, 9))
def test_a_comparison_of_norms_does_not_depend_on_the_unit(drawn: list[tuple[float, float]], power: int) -> None:
    """To the bit for powers of 2, where nothing underflows."""
    assume(all(norm == 0 or norm > 1e-100 for pair in drawn for norm in pair))
    ours, theirs = [a for a, _ in drawn], [b for _, b in drawn]
    one = paired_smaller(ours, theirs)
    other = paired_smaller([2.0**power * a for a in ours], [2.0**power * b for b in theirs])
    assert repr(one) == repr(other)


@guards(more_often, 'alternative="greater"', 'alternative="two-sided"')
@given(counts(most=30), counts(most=30))
def test_more_often_counts_the_deals_with_at_least_so_many(first: tuple[int, int], second: tuple[int, int]) -> None:
    (a, n), (b, m) = first, second
    dealt = sum(math.comb(n, k) * math.comb(m, a + b - k) for k in range(a, min(n, a + b) + 1))
    assert math.isclose(more_often(a, n, b, m), dealt / math.comb(n + m, a + b), rel_tol=1e-9)


@guards(holm, "np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order])", "(np.arange(len(p), 0, -1) * p[order])")
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_rejects_what_bonferroni_rejects_in_every_set_of_hypotheses_that_holds_it(p: list[float]) -> None:
    """The closed testing procedure (Marcus, Peritz and Gabriel 1976), of which Holm's is a shortcut."""
    expected = [
        max(
            min(1.0, size * min(p[i] for i in chosen))
            for size in range(1, len(p) + 1)
            for chosen in combinations(range(len(p)), size)
            if at in chosen
        )
        for at in range(len(p))
    ]
    assert np.allclose(holm(p), expected, rtol=1e-12, atol=0)


@st.composite
def rated(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[int]]:
    """Firing rates as of 1,000 tokens, many of them 0 or equal; features to match, and others that are excluded."""
    d_sae = draw(st.integers(2, 60))
    fired = draw(st.lists(st.just(0) | st.integers(0, 5) | st.integers(0, 1000), min_size=d_sae, max_size=d_sae))
    order = draw(st.permutations(range(d_sae)))
    k = draw(st.integers(1, d_sae // 2))
    spared = draw(st.integers(0, d_sae - 2 * k))
    return torch.tensor(fired) / 1000, list(order[:k]), list(order[k : k + spared])


@guards(matched, "unused[found[place]] = False", "unused[place] = False")
@guards(matched, "unused[[*features, *excluded]] = False", "unused[[*features]] = False")
@given(rated(), st.integers(0, 99))
def test_matched_features_are_as_many_others_or_none(
    drawn: tuple[torch.Tensor, list[int], list[int]], seed: int
) -> None:
    rates, features, spared = drawn
    found = matched(rates, features, seed, spared)
    assert found is not None
    assert len(set(found)) == len(features)
    assert not set(found) & {*features, *spared}
    assert set(found) <= set(range(len(rates)))
    assert matched(rates, features, seed, spared) == found
    others = [feature for feature in range(len(rates)) if feature not in features]
    assert matched(rates, features, seed, others[len(features) - 1 :]) is None


@guards(matched, "nearest = pool[distance <= farthest]", "nearest = pool")
@guards(matched, "levels = rates.clamp(min=torch.finfo(rates.dtype).tiny).log()", "levels = rates.clamp(min=0.5).log()")
@given(rated(), st.integers(0, 99))
def test_no_match_passes_over_more_than_nine_that_are_nearer_and_unused(
    drawn: tuple[torch.Tensor, list[int], list[int]], seed: int
) -> None:
    """Of those that fire, for one that does; those that the other features got may be nearer still."""
    rates, features, spared = drawn
    found = matched(rates, features, seed, spared)
    assert found is not None
    candidates = set(range(len(rates))) - {*features, *spared}
    for feature, match in zip(features, found, strict=True):
        alike = [other for other in candidates if bool(rates[other] > 0) == bool(rates[feature] > 0)]
        if match not in alike:
            # None of its kind was left.
            assert set(alike) <= set(found)
        elif rates[feature] > 0:
            apart = {other: abs(math.log(rates[other] / rates[feature])) for other in alike}
            nearer = [other for other in alike if apart[other] < apart[match] - 1e-6]
            assert len(set(nearer) - set(found)) < NEAREST
