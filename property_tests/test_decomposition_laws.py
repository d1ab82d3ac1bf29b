"""Laws of the folded SAE and of the split of a residual into features, reconstruction and error."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from property_tests.guards import guards
from property_tests.rounding import (
    activation_error,
    assert_within,
    eps,
    product_error,
    reading_error,
    settled,
    slope,
)
from property_tests.strategies import (
    COMPETING,
    DTYPES,
    SEEDS,
    ResidualCase,
    SAECase,
    Scene,
    randn,
    residual_cases,
    sae_cases,
    scenes,
)
from recover.saes.activations import TopK
from recover.saes.decomposition import decompose, recompose
from recover.saes.sae import from_sae_lens

STEP = 2.0**-12
"""Of finite differences. All these functions are linear between kinks, so any step that crosses none is exact."""


def everything(case: SAECase) -> Tensor:
    return torch.arange(case.d_sae)


@guards(decompose, "x - reconstruction)", "x - 1.001 * reconstruction)")
@given(sae_cases(), residual_cases(), st.sampled_from(list(DTYPES)))
def test_reassembling_gives_back_the_input(case: SAECase, x: ResidualCase, dtype: str) -> None:
    """Two roundings: of `x - reconstruction`, and of adding the reconstruction again."""
    residual = x.tensor(case.d_model, DTYPES[dtype])
    parts = decompose(case.sae(), residual)
    sizes = residual.double().abs() + parts.reconstruction.double().abs()
    assert_within(recompose(case.sae(), parts), residual, 2 * eps(parts.error.dtype) * sizes)


@guards(from_sae_lens, "b_enc = b_enc - torch.cat", "b_enc = b_enc + torch.cat")
@guards(from_sae_lens, "b_enc * norms, F.normalize", "b_enc, F.normalize")
@given(sae_cases(geometries=("generic",)), residual_cases())
def test_the_folded_sae_is_the_one_of_sae_lens(case: SAECase, x: ResidualCase) -> None:
    """Features and reconstruction of both, in float64; folding reorders sums, and tells no more than that."""
    sae, module = case.sae(torch.float64), case.module().to(torch.float64)
    residual, chosen = x.tensor(case.d_model, torch.float64), everything(case)
    # sae_lens subtracts b_dec first, so its sums hold these sizes too; and half weights are widened to float32 first.
    wide = product_error(residual.abs() + module.b_dec.abs(), sae.W_enc, sae.b_enc) + 1e-300
    if case.rescale_acts_by_decoder_norm:
        # Norms are taken in the dtype in which the weights are stored, float32 at least.
        wide = wide + 8 * eps(torch.float32 if case.stored != "float64" else torch.float64) * (
            residual.abs() @ sae.W_enc.abs() + sae.b_enc.abs()
        )
    clear = settled(sae, residual, chosen, moved=2 * wide)
    assume(clear.all())
    ours, theirs = sae.encode(residual), module.encode(residual)
    bound = 4 * slope(sae.activation, chosen) * wide + 4 * activation_error(sae, sae.pre_activations(residual), chosen)
    assert_within(ours, theirs, bound)
    assert_within(
        sae.decode(ours),
        module.decode(theirs),
        bound @ sae.W_dec.abs() * 2 + 8 * product_error(ours, sae.W_dec, sae.b_dec, torch.float32),
    )


@guards("recover.types.widened", "return tensor.to(torch.promote_types(tensor.dtype, torch.float32))", "return tensor")
@given(sae_cases(), residual_cases())
def test_half_storage_is_widened_before_anything_is_computed(case: SAECase, x: ResidualCase) -> None:
    """The SAE, and the SAE widened by hand before it is folded, are one to the bit, and of one hash."""
    wide = torch.promote_types(DTYPES[case.stored], torch.float32)
    copy = SAECase(**{**vars(case), "stored": str(wide).removeprefix("torch.")}).module()
    copy.load_state_dict({name: tensor.to(wide) for name, tensor in case.module().state_dict().items()})
    ours, theirs = case.sae(), from_sae_lens(copy, dtype=DTYPES[case.dtype])
    assert ours.sha256 == theirs.sha256
    residual = x.tensor(case.d_model)
    assert torch.equal(ours.encode(residual), theirs.encode(residual))


@guards(
    "recover.saes.activations.Activation.select",
    "self._map(lambda parameter: parameter[features])",
    "self._map(lambda parameter: parameter[: len(features)])",
)
@given(scenes())
def test_reading_some_features_is_encoding_all_and_selecting(scene: Scene) -> None:
    sae, clamp, x = scene.sae.sae(), scene.clamp, scene.residual()
    chosen, pre = clamp.indices, clamp.pre_activations(x)
    bound = 2 * slope(sae.activation, chosen) * reading_error(sae, x, chosen) + activation_error(sae, pre, chosen)
    clear = settled(sae, x, chosen)
    assert_within(sae.read(x, chosen)[clear], sae.encode(x)[..., chosen][clear], bound[clear])
    assert_within(clamp.read(x)[clear], sae.encode(x)[..., chosen][clear], bound[clear])


@guards(TopK.__call__, "scatter(-1, top.indices, torch.relu(top.values))", "scatter(-1, top.indices, top.values)")
@given(sae_cases(), residual_cases())
def test_features_are_as_many_and_of_the_sign_that_their_activation_allows(case: SAECase, x: ResidualCase) -> None:
    sae = case.sae()
    features = sae.encode(x.tensor(case.d_model, DTYPES[case.dtype]))
    if case.architecture in COMPETING:
        assert ((features != 0).sum(dim=-1) <= case.k).all()
    if sae.pointwise or isinstance(sae.activation, TopK):
        assert (features >= 0).all()


@guards(
    "recover.saes.activations.Gated.threshold",
    "return (-self.offset[features] / self.scale[features]).clamp(min=0)",
    "return -self.offset[features] / self.scale[features]",
)
@given(sae_cases(), residual_cases())
def test_at_and_below_its_threshold_a_pointwise_feature_is_zero_and_above_it_is_not(
    case: SAECase, x: ResidualCase
) -> None:
    """Competing features have no threshold, and say so by NaN."""
    sae, chosen, residual = case.sae(), everything(case), x.tensor(case.d_model, DTYPES[case.dtype])
    threshold = sae.activation.threshold(chosen)
    assert threshold.isnan().all() == (not sae.pointwise)
    if sae.pointwise:
        clear = settled(sae, residual, chosen)
        above = sae.pre_activations(residual) > threshold
        assert torch.equal((sae.encode(residual) != 0)[clear], above[clear])


@guards(decompose, "x - reconstruction)", "(x - reconstruction).detach())")
@given(sae_cases(), residual_cases(), SEEDS)
def test_the_gradient_of_a_reassembled_residual_is_the_identity(case: SAECase, x: ResidualCase, seed: int) -> None:
    """`J` through the reconstruction and `I - J` through the error add up: an error that stops its gradient shows."""
    sae = case.sae()
    leaf = x.tensor(case.d_model, DTYPES[case.dtype]).requires_grad_(True)
    upstream = randn(*leaf.shape, seed=seed, dtype=leaf.dtype)
    (gradient,) = torch.autograd.grad(recompose(sae, decompose(sae, leaf)), leaf, upstream)
    # The parts that cancel: through the decoder (a sum of d_model terms) and the encoder (of d_sae).
    through = product_error(upstream, sae.W_dec.mT) * slope(sae.activation, everything(case))
    sizes = (upstream.abs() @ sae.W_dec.mT.abs()).double() * slope(sae.activation, everything(case))
    bound = through @ sae.W_enc.mT.double().abs() + product_error(sizes, sae.W_enc.mT)
    assert_within(gradient, upstream, 2 * bound + 2 * eps(leaf.dtype) * upstream.abs())


@guards(decompose, "x - reconstruction)", "x - reconstruction.detach())")
@given(
    sae_cases(dtypes=("float64",)),
    residual_cases(kinds=("normal", "duplicate")),
    SEEDS,
    st.sampled_from(["features", "reconstruction", "error"]),
)
def test_gradients_equal_finite_differences(case: SAECase, x: ResidualCase, seed: int, part: str) -> None:
    """Through the features and through the error; away from kinks every part is linear, so differences are exact."""
    sae, point = case.sae(), x.tensor(case.d_model, torch.float64)
    direction, upstream = randn(*point.shape, seed=seed, dtype=point.dtype), seed + 1
    moved = STEP * (direction.abs() @ sae.W_enc.abs())
    assume(settled(sae, point, everything(case), moved=2 * moved).all())

    def value(h: Tensor) -> Tensor:
        found: Tensor = getattr(decompose(sae, h), part)
        return (found * randn(*found.shape, seed=upstream, dtype=found.dtype)).sum()

    leaf = point.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    ahead, behind = value(point + STEP * direction), value(point - STEP * direction)
    # Each value sums `numel` products of parts, each of which sums d_model times d_sae terms of this size.
    steep = float(slope(sae.activation, everything(case)).max())
    reach = point.abs().max() + STEP * direction.abs().max() + sae.b_enc.abs().max() + 1
    offset = float(getattr(sae.activation, "offset", torch.zeros(1)).abs().max())
    size = (steep * case.d_model * sae.W_enc.abs().max() * reach + offset) * case.d_sae * sae.W_dec.abs().max().clamp(
        min=1
    ) + sae.b_dec.abs().max()
    terms = case.d_model * case.d_sae + point.numel() * case.d_sae
    noise = terms * eps(torch.float64) * (size + reach) * 6 * point.numel() * max(case.d_sae, 1)
    assert_within((ahead - behind) / (2 * STEP), (gradient * direction).sum(), 2 * float(noise) / STEP)
