"""Laws of clamps: what they leave alone, what order and splitting change (nothing), and what a delta meets."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from property_tests.guards import guards
from property_tests.rounding import (
    activation_error,
    assert_within,
    eps,
    product_error,
    projection_leak,
    reading_error,
    settled,
    slope,
)
from property_tests.strategies import (
    COMPETING,
    DTYPES,
    SEEDS,
    VALUES,
    ClampCase,
    ResidualCase,
    Scene,
    clamp_cases,
    randn,
    residual_cases,
    scenes,
)
from recover.defenses.clamps import Clamp, Defense, Floor, Scale, Set
from recover.saes.activations import JumpReLU, ReLU
from recover.saes.sae import SAE
from recover.search.constraints.linear import ActivationStable, EncoderOrthogonal
from recover.types import InputError, Site
from tests.by_hand import clamped
from tests.saes import POINTWISE


def writing_error(scene: Scene, x: Tensor) -> Tensor:
    """Bound on the rounding of what the first clamp writes, `[batch pos d_model]`, where all features are settled.

    Features read with an error, edited by a map of slope `1 + |factor|` at most, summed through the decoder, added.
    """
    sae, clamp = scene.sae.sae(), scene.clamp
    chosen = clamp.indices
    z = clamp.read(x)
    steep = 1 + (abs(clamp.mode.factor) if isinstance(clamp.mode, Scale) else 1)
    read = slope(sae.activation, chosen) * reading_error(sae, x, chosen)
    read = read + activation_error(sae, clamp.pre_activations(x), chosen)
    change = (clamp.features_after(z) - z).double().abs() + z.double().abs()
    written = steep * read @ clamp.decoder.double().abs() + product_error(change, clamp.decoder)
    total = x.double().abs() + change @ clamp.decoder.double().abs()
    return written + 3 * eps(sae.dtype) * total


@guards(Clamp.displacement, "change = self.features_after(z) - z\n", "change = self.features_after(z)\n")
@given(scenes(dtypes=("float64",), geometries=("generic",)), st.integers(0, 2))
def test_a_clamp_edits_its_features_and_leaves_the_error_and_the_others(scene: Scene, skip_first: int) -> None:
    """Held against `D(clamp(E(h))) + h - D(E(h))` in sae_lens's own words, which keeps the error and all else."""
    sae, x, mask = scene.sae.sae(), scene.residual(), scene.x.mask()
    everything = torch.arange(sae.d_sae)
    assume(settled(sae, x, everything, moved=reading_error(sae, x.abs() + sae.b_dec.abs(), everything)).all())
    # sae_lens takes decoder norms in the dtype that is stored: where that is not float64, in ours too.
    assume(scene.sae.stored == "float64" or not scene.sae.rescale_acts_by_decoder_norm)
    module, case = scene.sae.module().to(torch.float64), scene.clamps[0]
    counted = mask & (mask.cumsum(dim=1) > skip_first)
    ours = scene.clamp.apply(x, counted)
    bound = 8 * writing_error(scene, x.abs() + sae.b_dec.abs())
    z = sae.encode(x).abs()
    # By hand all features go through the decoder twice, and cancel up to their rounding.
    bound = bound + 4 * product_error(z, sae.W_dec, sae.b_dec) + 4 * z @ sae.W_dec.abs() * eps(sae.dtype) * sae.d_model
    bound = bound + 4 * (reading_error(sae, x.abs() + sae.b_dec.abs(), everything) * 2) @ sae.W_dec.abs()
    bound = bound + 4 * activation_error(sae, sae.pre_activations(x), everything) @ sae.W_dec.abs()
    edit = (module, case.features, case.edit(), case.only_active, case.positions)
    for row, length in enumerate(scene.x.lengths):
        by_hand = clamped(x[row, -length:], [edit], skip_first)
        assert_within(ours[row, -length:], by_hand, bound[row, -length:])


@guards(Clamp.apply, "return (x + self.displacement(", "return (x.detach() + 0 * x + self.displacement(")
@given(scenes(), SEEDS)
def test_an_empty_clamp_is_the_identity_forward_and_backward(scene: Scene, seed: int) -> None:
    """To the bit: a mask that is False everywhere, a factor of 1, and a floor below everything edit nothing."""
    sae = scene.sae.sae()
    low = float(sae.encode(scene.residual()).min()) - 1
    nowhere = torch.zeros(scene.x.shape, dtype=torch.bool)
    empty = [
        (scene.clamp, nowhere),
        (Clamp(sae, scene.clamps[0].features, Scale(1)), None),
        (Clamp(sae, scene.clamps[0].features, Floor(low), only_active=False), None),
    ]
    for clamp, mask in empty:
        leaf = scene.residual().requires_grad_(True)
        out = clamp.apply(leaf, mask)
        upstream = randn(*leaf.shape, seed=seed, dtype=leaf.dtype)
        (gradient,) = torch.autograd.grad(out, leaf, upstream)
        assert torch.equal(out, leaf)
        assert torch.equal(gradient, upstream)


@guards(Clamp.displacement, "        if edited is not None:\n", "        if edited is None:\n")
@given(scenes(clamps=2), st.sampled_from(list(DTYPES)))
def test_padding_and_other_masked_positions_are_untouched(scene: Scene, dtype: str) -> None:
    """To the bit, in any dtype, and the dtype and the shape stay."""
    x, mask = scene.residual().to(DTYPES[dtype]), scene.x.mask()
    out = scene.defense.apply(Site(1), x, mask)
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    assert torch.equal(out[~mask], x[~mask])
    elsewhere = scene.defense.apply(Site(2), x, mask)
    assert torch.equal(elsewhere, x)


@guards(Clamp.edited, '"last": column == -1', '"last": column >= -2')
@given(scenes(positions=("last",)))
def test_a_clamp_on_the_last_position_edits_no_other(scene: Scene) -> None:
    x = scene.residual()
    out = scene.clamp.apply(x)
    assert torch.equal(out[:, :-1], x[:, :-1])
    everywhere = replace_case(scene, positions="all").clamp.apply(x[:, -1:])
    assume(settled(scene.sae.sae(), x, scene.clamp.indices).all())
    assert_within(out[:, -1:], everywhere, 2 * writing_error(scene, x)[:, -1:])


def replace_case(scene: Scene, **changes: object) -> Scene:
    """The scene with its first clamp changed."""
    return replace(scene, clamps=(replace(scene.clamps[0], **changes), *scene.clamps[1:]))  # type: ignore[arg-type]


@guards(Set.__call__, "return torch.zeros_like(z) + _like(self.value, z)", "return z + _like(self.value, z)")
@given(scenes(modes=("set", "floor")), st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6))
def test_setting_and_flooring_twice_is_setting_and_flooring_once(scene: Scene, values: list[float]) -> None:
    """This is about features. Scaling is left out: twice scales by the square."""
    z = torch.tensor([values] * len(scene.clamps[0].features)).T
    once = scene.clamp.features_after(z)
    assert torch.equal(scene.clamp.features_after(once), once)


@guards(
    Clamp.features_after,
    "return torch.where(z != 0, self.mode(z), z) if self.only_active else self.mode(z)",
    "return self.mode(z)",
)
@given(residual_cases(), SEEDS, st.integers(1, 8), VALUES, st.sampled_from([None, 0.5, 2.0]))
def test_setting_active_features_of_an_orthonormal_dictionary_twice_is_setting_them_once(
    x: ResidualCase, seed: int, d_model: int, value: float, threshold: float | None
) -> None:
    """This is about residuals: encoder and decoder are one rotation, so what is written is what is read next.

    In general it is not, as other biases and overlapping features answer to what was written.
    """
    Q = torch.linalg.qr(randn(d_model, d_model, seed=seed, dtype=torch.float64)).Q
    zero = torch.zeros(d_model, dtype=torch.float64)
    activation = ReLU() if threshold is None else JumpReLU(zero + threshold)
    sae = SAE(Q, zero, Q.mT.contiguous(), zero, activation, Site(0), "standard", "")
    residual, chosen = x.tensor(d_model, torch.float64), torch.arange(d_model)
    # A value at the threshold is woken or not by rounding, and a residual there too.
    noise = 40 * d_model * eps(torch.float64) * (residual.abs().max().item() + abs(value))
    assume(value <= 0 or abs(value - (threshold or 0.0)) > noise)
    assume(settled(sae, residual, chosen, moved=noise).all())
    assume(abs(value) > noise or value == 0)
    clamp = Clamp(sae, range(d_model), Set(value), only_active=True)
    once = clamp.apply(residual)
    pre = sae.pre_activations(once)
    # A feature set to 0 or to its threshold may stand a rounding above it: what it then writes is of that size.
    twice = clamp.apply(once)
    assert_within(twice, once, 4 * noise * d_model + 0 * pre.abs().max().item())


@guards(Floor.__call__, "torch.maximum(z, _like", "torch.minimum(z, _like")
@given(scenes(modes=("floor",), positions=("all",)), VALUES, SEEDS)
def test_a_floor_never_lowers_and_keeps_order(scene: Scene, other: float, seed: int) -> None:
    """Larger features stay larger, and a higher floor never gives less."""
    clamp, k = scene.clamp, len(scene.clamps[0].features)
    small = 3 * randn(5, k, seed=seed).relu()
    large = small + randn(5, k, seed=seed + 1).relu()
    low, high = sorted((scene.clamps[0].value, other))
    for active in (True, False):
        at = [
            replace_case(scene, value=value, only_active=active).clamp.features_after(z)
            for value in (low, high)
            for z in (small, large)
        ]
        assert (at[0] >= small).all()
        assert (at[0] <= at[1]).all()
        assert (at[2] <= at[3]).all()
        assert (at[0] <= at[2]).all()
    assert clamp.only_active == scene.clamps[0].only_active


@guards(Defense.apply, "for clamp in here]).sum(dim=0)", "for clamp in here])[0]")
@given(scenes(clamps=3), st.permutations(range(3)))
def test_the_order_of_disjoint_clamps_does_not_matter(scene: Scene, order: list[int]) -> None:
    """All read the unedited residual, so only the order of a sum changes."""
    sae, x, mask = scene.sae.sae(), scene.residual(), scene.x.mask()
    clamps = [case.clamp(sae) for case in scene.clamps]
    first = Defense(tuple(clamps)).apply(Site(1), x, mask)
    second = Defense(tuple(clamps[index] for index in order)).apply(Site(1), x, mask)
    sizes = sum((clamp.displacement(x, mask).double().abs() for clamp in clamps), x.double().abs())
    assert_within(second, first, 4 * eps(sae.dtype) * sizes)


@guards(Clamp.decoder, "return self.sae.W_dec[self.indices]", "return self.sae.W_dec[self.indices.sort().values]")
@given(scenes(), SEEDS)
def test_features_may_be_named_in_any_order_and_split_over_clamps(scene: Scene, seed: int) -> None:
    sae, x, case = scene.sae.sae(), scene.residual(), scene.clamps[0]
    assume(settled(sae, x, scene.clamp.indices).all())
    shuffled = torch.randperm(len(case.features), generator=torch.Generator().manual_seed(seed)).tolist()
    features = tuple(case.features[index] for index in shuffled)
    one_by_one = tuple(replace(case, features=(feature,)).clamp(sae) for feature in features)
    whole = scene.clamp.apply(x)
    bound = 4 * writing_error(scene, x)
    assert_within(replace(case, features=features).clamp(sae).apply(x), whole, bound)
    assert_within(Defense(one_by_one).apply(Site(1), x), whole, bound)


@guards(Clamp.displacement, "z = self.read(x)\n        change", "z = self.read(x - x.mean(dim=(0, 1)))\n        change")
@given(scenes(positions=("all",)))
def test_a_batch_gives_what_its_examples_and_positions_give_one_by_one(scene: Scene) -> None:
    x, mask = scene.residual(), scene.x.mask()
    assume(settled(scene.sae.sae(), x, scene.clamp.indices).all())
    together, bound = scene.clamp.apply(x, mask), 2 * writing_error(scene, x)
    for row in range(x.shape[0]):
        for pos in range(x.shape[1]):
            at = (slice(row, row + 1), slice(pos, pos + 1))
            assert_within(scene.clamp.apply(x[at], mask[at]), together[at], bound[at])


@guards(Clamp.displacement, "change = self.features_after(z) - z\n", "change = self.features_after(z) - z.detach()\n")
@given(scenes(dtypes=("float64",), kinds=("normal", "duplicate"), positions=("all",)), SEEDS)
def test_the_gradient_of_a_clamp_equals_finite_differences(scene: Scene, seed: int) -> None:
    sae, clamp, x = scene.sae.sae(), scene.clamp, scene.residual()
    step, direction = 2.0**-12, randn(*x.shape, seed=seed, dtype=x.dtype)
    upstream, everything = randn(*x.shape, seed=seed + 1, dtype=x.dtype), torch.arange(sae.d_sae)
    moved = step * (direction.abs() @ sae.W_enc.abs())
    assume(settled(sae, x, everything, moved=2 * moved).all())
    if isinstance(clamp.mode, Floor):
        far = (clamp.read(x) - clamp.mode.value).abs() > 2 * moved[..., clamp.indices] * slope(
            sae.activation, clamp.indices
        )
        assume(far.all())
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad((clamp.apply(leaf) * upstream).sum(), leaf)
    ahead, behind = ((clamp.apply(x + sign * step * direction) * upstream).sum() for sign in (1, -1))
    noise = (
        4 * (writing_error(scene, x) * upstream.abs()).sum()
        + x.numel() * eps(x.dtype) * ((clamp.apply(x).abs() + x.abs()) * upstream.abs()).sum()
    )
    gradient_noise = 2 * (sae.d_model + sae.d_sae) * eps(x.dtype) * gradient.abs().max() * direction.abs().sum() + noise
    assert_within((ahead - behind) / (2 * step), (gradient * direction).sum(), float(noise / step + gradient_noise))


@guards("recover.numerics.subspaces.NullSpace.project", "for _ in range(2):", "for _ in range(0):")
@given(scenes(architectures=POINTWISE, positions=("all",)))
def test_under_c1_a_clamp_and_a_perturbation_commute_for_pointwise_features(scene: Scene) -> None:
    """`clamp(h + delta) = clamp(h) + delta`: clamped pre-activations move by rounding and by what `A^T delta` is."""
    sae, clamp, x = scene.sae.sae(), scene.clamp, scene.residual()
    chosen = clamp.indices
    delta = EncoderOrthogonal.of(clamp).project(scene.delta())
    # What a projection leaves of `A^T delta` is the rounding of delta's own entries.
    tightly = projection_leak(sae.d_model, sae.dtype) * delta.double().norm(dim=-1, keepdim=True)
    leak = tightly * clamp.encoder.double().norm(dim=0)
    # Adding delta rounds too, by eps of the sum, which the encoder then reads.
    leak = leak + eps(sae.dtype) * (x.double() + delta.double()).abs() @ clamp.encoder.double().abs()
    everywhere = torch.zeros(*x.shape[:2], sae.d_sae, dtype=torch.float64)
    everywhere[..., chosen] = leak
    assume(settled(sae, x, chosen, moved=everywhere).all())
    assume(settled(sae, x + delta, chosen, moved=everywhere).all())
    steep = 1 + (abs(clamp.mode.factor) if isinstance(clamp.mode, Scale) else 1)
    bound = writing_error(scene, x.abs() + delta.abs()) + writing_error(scene, x) + writing_error(scene, x + delta)
    bound = bound + steep * slope(sae.activation, chosen) * leak @ clamp.decoder.double().abs()
    bound = bound + 2 * eps(sae.dtype) * (delta.double().abs() + clamp.apply(x).double().abs())
    assert_within(clamp.apply(x + delta), clamp.apply(x) + delta, bound)


@guards(
    "recover.saes.activations.TopK.__call__",
    "top = pre.topk(self.k, dim=-1, sorted=False)\n",
    "top = pre.topk(pre.shape[-1], dim=-1, sorted=False)\n",
)
@guards(
    "recover.saes.activations.AbsTopK.__call__",
    "top = pre.abs().topk(self.k, dim=-1, sorted=False)",
    "top = pre.abs().topk(pre.shape[-1], dim=-1, sorted=False)",
)
@pytest.mark.parametrize("architecture", COMPETING)
def test_under_c1_they_do_not_commute_where_features_compete(architecture: str) -> None:
    """The shortest counterexample that hypothesis finds. `test_engine_laws` shows that a certificate catches it."""
    draws = scenes(
        architectures=(architecture,),
        dtypes=("float64",),
        kinds=("normal",),
        geometries=("generic",),
        positions=("all",),
    )

    def apart(scene: Scene) -> bool:
        x, clamp = scene.residual(), scene.clamp
        delta = EncoderOrthogonal.of(clamp).project(scene.delta())
        return bool((clamp.apply(x + delta) - clamp.apply(x) - delta).abs().max() > 0.1)

    scene = find(draws, apart, settings=settings(max_examples=300, database=None, derandomize=True))
    x, clamp = scene.residual(), scene.clamp
    delta = EncoderOrthogonal.of(clamp).project(scene.delta())
    assert EncoderOrthogonal.of(clamp).violation(delta).max() < 1e-12
    assert ActivationStable(clamp, x).violation(delta).max() > 0.01


@guards("recover.defenses.clamps._checked", "    if len(set(checked)) < len(checked):", "    if False:")
@given(st.data())
def test_clamps_that_share_a_feature_are_refused(data: st.DataObject) -> None:
    scene = data.draw(scenes())
    second: ClampCase = data.draw(clamp_cases(scene.sae.d_sae))
    sae = scene.sae.sae()
    clamps = (scene.clamp, second.clamp(sae))
    shared = set(scene.clamps[0].features) & set(second.features)
    with pytest.raises(InputError) if shared else nullcontext():
        Defense(clamps)
