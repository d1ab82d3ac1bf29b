"""Laws of the measures: what rescaling, shuffling and splitting may and may not change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from property_tests.guards import guards
from property_tests.rounding import assert_within, eps
from property_tests.strategies import SEEDS, randn
from recover.numerics import metrics
from recover.tasks.behaviors import AnswerLikelihood, ChoiceMargin, LogitDifference


@dataclass(frozen=True)
class FeaturesCase:
    """Features defended and recovered, `[batch pos k]`; `silent` of ten entries are zero before, and after."""

    batch: int
    pos: int
    k: int
    seed: int
    silent: int
    dtype: str = "float64"

    def tensor(self, salt: int = 0) -> Tensor:
        shape = (self.batch, self.pos, self.k)
        generator = torch.Generator().manual_seed(self.seed + 1 + salt)
        kept = torch.randint(0, 10, shape, generator=generator) >= self.silent
        return (randn(*shape, seed=self.seed + salt, dtype=torch.float64) * kept).to(getattr(torch, self.dtype))

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """After recovery, and defended."""
        return self.tensor(7), self.tensor()


features = st.builds(
    FeaturesCase,
    batch=st.integers(1, 4),
    pos=st.integers(1, 3),
    k=st.integers(1, 6),
    seed=SEEDS,
    silent=st.integers(0, 10),
    dtype=st.sampled_from(["float32", "float64"]),
)
factors = st.integers(-20, 20).map(lambda power: 2.0**power)
RELATIVE = (metrics.relative_drift, metrics.clamp_floor_violation, metrics.relative_norm)


@guards(
    "recover.numerics.metrics._ratio",
    "return torch.where(part == 0, 0.0, part / whole)",
    "return torch.where(part == 0, 0.0, part / (whole + 1e-3))",
)
@given(features, factors)
def test_relative_measures_do_not_depend_on_the_unit(case: FeaturesCase, factor: float) -> None:
    """To the bit, for powers of 2: they are ratios of norms."""
    a, b = case.pair
    for measure in RELATIVE:
        assert torch.equal(measure(factor * a, factor * b), measure(a, b))
    one, other = metrics.reactivation(a, b), metrics.reactivation(factor * a, factor * b)
    assert torch.equal(one.count, other.count)
    assert torch.equal(one.share, other.share)
    assert metrics.l0(factor * a) == metrics.l0(a)


@guards(
    metrics.norm,
    "length: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)",
    "length: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64) + 1e-3",
)
@given(features, factors, factors, SEEDS)
def test_absolute_measures_scale_with_their_unit(case: FeaturesCase, factor: float, other: float, seed: int) -> None:
    """And decode drift with that of the decoder too."""
    a, b = case.pair
    assert torch.equal(metrics.activation_drift(factor * a, factor * b), factor * metrics.activation_drift(a, b))
    decoder = randn(case.k, 5, seed=seed, dtype=a.dtype)
    drift = metrics.decode_drift(a, b, decoder)
    assert torch.equal(metrics.decode_drift(factor * a, factor * b, other * decoder), factor * other * drift)
    assert torch.equal(metrics.norm(factor * a), factor * metrics.norm(a))


@guards(
    metrics.norm,
    "torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)",
    "torch.linalg.vector_norm(flat, ord=1, dim=1, dtype=torch.float64)",
)
@given(features, st.just(0.0) | st.floats(2**-10, 100) | st.floats(-100, -(2**-10)))
def test_norm_satisfies_the_axioms_of_a_norm(case: FeaturesCase, factor: float) -> None:
    """Zero for zero alone, homogeneous, and no longer than by a detour; positions add as squares."""
    a, b = case.pair
    length = metrics.norm(a)
    rounding = (case.pos * case.k + 4) * eps(a.dtype)
    assert torch.equal(length == 0, (a == 0).flatten(1).all(dim=1))
    assert_within(metrics.norm(factor * a), abs(factor) * length.double(), rounding * abs(factor) * length.double())
    detour = length.double() + metrics.norm(b).double()
    assert (metrics.norm(a + b).double() <= detour * (1 + rounding)).all()
    parts = torch.stack([metrics.norm(a[:, pos]).double() for pos in range(case.pos)])
    assert_within(length, parts.square().sum(dim=0).sqrt(), 2 * rounding * length.double())


@guards(metrics.reactivation, "inactive & (z_rec > 0)", "inactive & (z_rec >= 0)")
@given(features)
def test_nothing_moved_is_no_drift_and_no_reactivation(case: FeaturesCase) -> None:
    _, z = case.pair
    for measure in (metrics.activation_drift, metrics.relative_drift, metrics.clamp_floor_violation):
        assert measure(z, z).count_nonzero() == 0
    assert metrics.reactivation(z, z).count.count_nonzero() == 0


@guards(metrics.clamp_floor_violation, "torch.relu(z_def - z_rec)", "torch.relu(z_rec - 2 * z_def)")
@given(features)
def test_drift_is_symmetric_and_sinking_is_a_part_of_it(case: FeaturesCase) -> None:
    """What has sunk and what has risen make the drift, as squares; so the floor is violated by no more than it."""
    a, b = case.pair
    assert torch.equal(metrics.activation_drift(a, b), metrics.activation_drift(b, a))
    drift, sunk = metrics.relative_drift(a, b), metrics.clamp_floor_violation(a, b)
    assert (sunk <= drift * (1 + 4 * eps(a.dtype))).all()
    size = metrics.norm(b)
    some = size > 0
    risen = metrics.norm(torch.relu(a - b))[some].double() / size[some].double()
    expected = (sunk[some].double().square() + risen.square()).sqrt()
    assert_within(drift[some], expected, 8 * eps(a.dtype) * drift[some].double())


@guards(metrics.activation_drift, "return norm(z_rec - z_def)\n", "return norm(z_rec - z_def.flip(0))\n")
@given(features, SEEDS)
def test_every_measure_of_a_recovery_depends_on_its_example_alone(case: FeaturesCase, seed: int) -> None:
    """In any order of the batch, and of positions and features within an example, up to the order of a sum."""
    a, b = case.pair
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator) for size in (case.batch, case.k))
    for measure in (metrics.activation_drift, *RELATIVE):
        whole = measure(a, b)
        shuffled = measure(a[rows][..., columns], b[rows][..., columns])
        finite = whole[rows].isfinite()
        assert torch.equal(finite, shuffled.isfinite())
        assert_within(shuffled[finite], whole[rows][finite], 8 * eps(a.dtype) * whole[rows][finite].double())
        for row in range(case.batch):
            assert torch.equal(measure(a[row : row + 1], b[row : row + 1])[0], whole[row])


@guards(metrics.reactivation, "reduce((inactive & (z_rec > 0)).long()", "reduce((z_rec > 0).long()")
@given(features)
def test_reactivated_features_were_dormant(case: FeaturesCase) -> None:
    a, b = case.pair
    after = metrics.reactivation(a, b)
    assert ((after.count >= 0) & (after.count <= after.inactive)).all()
    assert (after.inactive <= case.pos * case.k).all()
    assert ((after.share >= 0) & (after.share <= 1)).all()


@guards(
    metrics.explained_variance,
    '(tokens - reduce(tokens, "token d_model -> d_model", "mean")).square()',
    "tokens.square()",
)
@given(features, SEEDS, factors, st.floats(-10, 10))
def test_explained_variance_does_not_depend_on_unit_origin_or_order(
    case: FeaturesCase, seed: int, factor: float, shift: float
) -> None:
    """At most 1, which only a perfect reconstruction reaches; 0 for the mean."""
    x_hat, x = case.tensor(7).double(), case.tensor().double()
    tokens = x.flatten(0, 1)
    spread = (tokens - tokens.mean(dim=0)).square().sum()
    assume(spread > 1e-3)
    explained = metrics.explained_variance(x, x_hat)
    assert explained <= 1
    assert (explained == 1) == bool((x == x_hat).all())
    assert metrics.explained_variance(x, x) == 1
    n = case.batch * case.pos * case.k
    rounding = 8 * n * eps(torch.float64) * float((tokens.square().sum() + x_hat.square().sum()) / spread + 1)
    mean = tokens.mean(dim=0).expand_as(x)
    assert abs(metrics.explained_variance(x, mean)) <= rounding
    assert abs(metrics.explained_variance(factor * x, factor * x_hat) - explained) <= rounding
    # A shift costs the digits that it has over the values.
    assert abs(metrics.explained_variance(x + shift, x_hat + shift) - explained) <= rounding * (1 + shift**2) * 8
    order = torch.randperm(case.batch * case.pos, generator=torch.Generator().manual_seed(seed))
    shuffled = metrics.explained_variance(tokens[order], x_hat.flatten(0, 1)[order])
    assert abs(shuffled - explained) <= rounding


@guards(
    metrics.loss_recovered, "return (ce_mean - ce_sae) / (ce_mean - ce_clean)", "return (ce_mean - ce_sae) / ce_mean"
)
@given(st.floats(0, 10), st.floats(0.1, 10), st.floats(-1, 12), st.floats(0.1, 5), st.floats(-5, 5))
def test_loss_recovered_does_not_depend_on_unit_or_origin(
    clean: float, gap: float, sae: float, a: float, b: float
) -> None:
    """1 where the SAE costs nothing, 0 where it is as bad as the mean, and linear between."""
    mean = clean + gap
    share = metrics.loss_recovered(clean, sae, mean)
    rounding = 16 * eps(torch.float64) * (abs(clean) + abs(sae) + mean + abs(b) / a) / gap * (1 + abs(share))
    assert metrics.loss_recovered(clean, clean, mean) == 1
    assert metrics.loss_recovered(clean, mean, mean) == 0
    assert abs(metrics.loss_recovered(a * clean + b, a * sae + b, a * mean + b) - share) <= rounding
    assert math.isnan(metrics.loss_recovered(mean, sae, clean))


@guards(ChoiceMargin.slack, "logits[:, 0] - logits[:, 1:].amax(dim=1)", "logits[:, 0] - logits[:, 1:].mean(dim=1)")
@given(st.integers(1, 5), st.integers(3, 9), SEEDS, st.floats(-50, 50))
def test_a_behavior_shows_where_its_token_is_likeliest_whatever_is_added_to_all_logits(
    batch: int, vocab: int, seed: int, shift: float
) -> None:
    """For each behavior over its own tokens, and example by example."""
    logits = randn(batch, vocab, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randperm(vocab, generator=generator)[:3] for _ in range(batch)])
    behaviors = {
        "two": LogitDifference(tokens[:, 0], tokens[:, 1]),
        "three": ChoiceMargin(tokens[:, 0], tokens[:, 1:]),
        "all": AnswerLikelihood(tokens[:, 0]),
    }
    rounding = 8 * vocab * eps(torch.float64) * (logits.abs().max() + abs(shift) + 1)
    for behavior in behaviors.values():
        seen = logits if behavior.tokens is None else logits.gather(1, behavior.tokens)
        target = tokens[:, 0] if behavior.tokens is None else torch.zeros(batch, dtype=torch.long)
        slack = behavior.slack(seen)
        assert torch.equal(slack > 0, seen.argmax(dim=1) == target)
        assert_within(behavior.slack(seen + shift), slack, rounding)
        assert_within(behavior.score(seen + shift), behavior.score(seen), rounding)
        row = torch.tensor([batch - 1])
        assert_within(behavior.select(row).slack(seen[row]), slack[row], rounding)
        assert_within(behavior.select(row).score(seen[row]), behavior.score(seen)[row], rounding)
