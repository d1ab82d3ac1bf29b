from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, nn

from recover.saes.activations import ReLU
from recover.saes.sae import SAE, from_sae_lens, load_sae_folder
from recover.types import InputError, Site
from tests.saes import D_MODEL, D_SAE, random_sae, residuals, variants

VARIANTS = pytest.mark.parametrize(("architecture", "options"), variants())
FEATURES = torch.tensor([7, 0, 19])


def refusal(of: nn.Module | Path) -> str:
    """The message with which an SAE is refused: always one line."""
    with pytest.raises(InputError) as caught:
        load_sae_folder(of) if isinstance(of, Path) else from_sae_lens(of)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@VARIANTS
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
def test_encodes_and_decodes_as_sae_lens_does(
    architecture: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    module = random_sae(architecture, dtype=torch.float64, **options)
    sae = from_sae_lens(module, dtype=torch.float64)
    x = residuals(*shape, dtype=torch.float64)

    features = module.encode(x)
    assert 0 < (features != 0).double().mean() < 1
    torch.testing.assert_close(sae.encode(x), features, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.decode(features), module.decode(features), rtol=1e-12, atol=1e-12)


@VARIANTS
def test_encodes_and_decodes_as_sae_lens_does_in_float32(architecture: str, options: dict[str, Any]) -> None:
    module = random_sae(architecture, **options)
    sae = from_sae_lens(module)
    x = residuals(64)
    torch.testing.assert_close(sae.encode(x), module.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)), module(x), rtol=1e-5, atol=1e-5)


@VARIANTS
def test_reads_selected_features_as_sae_lens_does(architecture: str, options: dict[str, Any]) -> None:
    module = random_sae(architecture, **options)
    sae = from_sae_lens(module)
    x = residuals(4, 5)
    torch.testing.assert_close(sae.read(x, FEATURES), module.encode(x)[..., FEATURES], rtol=1e-5, atol=1e-5)
    for feature in range(D_SAE):
        alone = sae.read(x, torch.tensor([feature]))
        torch.testing.assert_close(alone, module.encode(x)[..., [feature]], rtol=1e-5, atol=1e-5)


@VARIANTS
def test_gradients_are_those_of_sae_lens(architecture: str, options: dict[str, Any]) -> None:
    module = random_sae(architecture, dtype=torch.float64, **options)
    sae = from_sae_lens(module, dtype=torch.float64)
    weights = residuals(6, seed=1, dtype=torch.float64)

    def gradient(coder: SAE | sae_lens.SAE[Any]) -> Tensor:
        x = residuals(6, dtype=torch.float64).requires_grad_()
        (coder.decode(coder.encode(x)) * weights).sum().backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(gradient(sae), gradient(module), rtol=1e-10, atol=1e-10)


@VARIANTS
def test_pre_activations_are_affine_in_the_residual(architecture: str, options: dict[str, Any]) -> None:
    """By hand from the weights: (x - b_dec) W_enc + b, times the decoder norms where acts are rescaled."""
    module = random_sae(architecture, dtype=torch.float64, **options)
    sae = from_sae_lens(module, dtype=torch.float64)
    x = residuals(5, dtype=torch.float64)
    bias = module.b_gate if architecture == "gated" else module.b_enc
    centered = x - module.b_dec if options["apply_b_dec_to_input"] else x
    norms = module.W_dec.norm(dim=-1) if options.get("rescale_acts_by_decoder_norm") else 1.0
    expected = (centered @ module.W_enc + bias) * norms
    torch.testing.assert_close(sae.pre_activations(x), expected.detach())
    torch.testing.assert_close(sae.pre_activations(x, FEATURES), expected.detach()[:, FEATURES])


def test_selected_features_need_only_their_own_columns() -> None:
    class Narrow(ReLU):
        def __call__(self, pre: Tensor) -> Tensor:
            assert pre.shape[-1] == len(FEATURES)
            return super().__call__(pre)

    module = random_sae("standard")
    sae, x = replace(from_sae_lens(module), activation=Narrow()), residuals(8)
    torch.testing.assert_close(sae.read(x, FEATURES), module.encode(x)[:, FEATURES], rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        sae.encode(x)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_competing_features_cannot_be_encoded_alone(architecture: str) -> None:
    sae = from_sae_lens(random_sae(architecture, k=4))
    assert not sae.pointwise
    with pytest.raises(ValueError, match="ranks all features"):
        sae.select(FEATURES)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@VARIANTS
def test_half_precision_is_widened_without_loss(
    architecture: str, options: dict[str, Any], narrow: torch.dtype
) -> None:
    module = random_sae(architecture, dtype=narrow, **options)
    sae = from_sae_lens(module)
    assert sae.dtype == sae.encode(residuals(2)).dtype == torch.float32
    wide = module.to(dtype=torch.float32)
    x = residuals(64)
    torch.testing.assert_close(sae.encode(x), wide.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)), wide(x), rtol=1e-5, atol=1e-5)


def test_inputs_are_cast_to_the_dtype_of_the_sae() -> None:
    sae = from_sae_lens(random_sae("standard"))
    x = residuals(3, dtype=torch.bfloat16)
    torch.testing.assert_close(sae.encode(x), sae.encode(x.float()), rtol=0, atol=0)
    assert sae.decode(sae.encode(x).bfloat16()).dtype == torch.float32


def test_what_is_known_of_the_sae() -> None:
    module = random_sae("jumprelu", hook_name="blocks.3.hook_resid_post")
    sae = from_sae_lens(module)
    assert (sae.d_model, sae.d_sae, sae.pointwise) == (D_MODEL, D_SAE, True)
    assert (sae.site, sae.architecture) == (Site(3, "post"), "jumprelu")
    assert not any(t.requires_grad for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))


def test_site_can_be_missing_or_given() -> None:
    assert from_sae_lens(random_sae("standard", hook_name=None)).site is None
    elsewhere = random_sae("standard", hook_name="model.layers.2.output")
    assert from_sae_lens(elsewhere, site=Site(2, "post")).site == Site(2, "post")


def test_later_changes_of_the_module_do_not_reach_the_sae() -> None:
    module = random_sae("standard")
    sae, x = from_sae_lens(module), residuals(4)
    before = sae.decode(sae.encode(x))
    module.fold_W_dec_norm()
    torch.testing.assert_close(sae.decode(sae.encode(x)), before, rtol=0, atol=0)


def test_hash_is_of_the_tensors_in_the_order_of_their_names() -> None:
    module = random_sae("standard")
    digest = hashlib.sha256()
    for tensor in (module.W_dec, module.W_enc, module.b_dec, module.b_enc):
        digest.update(tensor.detach().numpy().tobytes())
    assert from_sae_lens(module).sha256 == digest.hexdigest()

    with torch.no_grad():
        module.b_dec[0] += 1
    assert from_sae_lens(module).sha256 != digest.hexdigest()


def test_hash_does_not_depend_on_the_precision_it_is_held_in() -> None:
    module = random_sae("gated", dtype=torch.bfloat16)
    narrow = from_sae_lens(module).sha256
    assert from_sae_lens(module.to(dtype=torch.float32)).sha256 == narrow


@VARIANTS
def test_moves_with_everything_it_holds(architecture: str, options: dict[str, Any]) -> None:
    module = random_sae(architecture, **options)
    sae = from_sae_lens(module).to(dtype=torch.float64)
    x = residuals(4, dtype=torch.float64)
    expected = module.to(dtype=torch.float64).encode(x)
    assert sae.encode(x).dtype == torch.float64
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-5, atol=1e-5)

    moved = sae.to(device="meta")
    assert moved.device.type == moved.encode(x.to("meta")).device.type == "meta"


@pytest.mark.gpu
@VARIANTS
def test_works_on_a_gpu(architecture: str, options: dict[str, Any]) -> None:
    module = random_sae(architecture, **options)
    sae = from_sae_lens(module).to("cuda")
    x = residuals(16)
    on_gpu = sae.read(x.cuda(), FEATURES.cuda()).cpu()
    torch.testing.assert_close(on_gpu, module.encode(x)[:, FEATURES], rtol=1e-4, atol=1e-4)
    assert from_sae_lens(module.to("cuda")).device.type == "cuda"


# What is refused


def config_of(architecture: str, **options: Any) -> Any:
    return sae_lens.registry.get_sae_class(architecture)[1](d_in=4, d_sae=6, **options)


@pytest.mark.parametrize(
    "architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_transcoders_are_refused(architecture: str) -> None:
    sae_class, _ = sae_lens.registry.get_sae_class(architecture)
    module = sae_class(config_of(architecture, d_out=4, apply_b_dec_to_input=False))
    assert "reads one site and writes another" in refusal(module)


@pytest.mark.parametrize(
    ("architecture", "reason"), [("matching_pursuit", "an iteration"), ("temporal", "other positions")]
)
def test_encoders_that_are_not_linear_are_refused(architecture: str, reason: str) -> None:
    sae_class, _ = sae_lens.registry.get_sae_class(architecture)
    attention = {"n_heads": 1, "bottleneck_factor": 1} if architecture == "temporal" else {}
    assert reason in refusal(sae_class(config_of(architecture, **attention)))


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("layer_norm", "own deviation"),
        ("constant_norm_rescale", "own norm"),
        ("expected_average_only_in", "fold_activation_norm_scaling_factor"),
        ("covariance_whitening", "fold_activation_whitening"),
    ],
)
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk", "abstopk"])
def test_normalized_inputs_are_refused(architecture: str, mode: str, reason: str) -> None:
    options = {"k": 4} if architecture.endswith("topk") else {}
    message = refusal(random_sae(architecture, normalize_activations=mode, **options))
    assert mode in message
    assert reason in message


@VARIANTS
def test_folded_normalization_is_accepted(architecture: str, options: dict[str, Any]) -> None:
    """With the factor folded in, features of x are those that the unfolded SAE has of factor * x."""
    x, factor = residuals(8, dtype=torch.float64), 0.25
    module = random_sae(architecture, dtype=torch.float64, normalize_activations="expected_average_only_in", **options)
    expected = module.encode(factor * x)
    module.fold_activation_norm_scaling_factor(factor)
    if options["apply_b_dec_to_input"] or "k" in options:
        expected = module.encode(x)  # sae_lens folds exactly where only the weights scale
    torch.testing.assert_close(from_sae_lens(module, dtype=torch.float64).encode(x), expected)


def test_other_hooks_are_refused() -> None:
    assert "blocks.1.attn.hook_z" in refusal(random_sae("standard", hook_name="blocks.1.attn.hook_z"))
    assert "hook_mlp_out" in refusal(random_sae("standard", hook_name="blocks.1.hook_mlp_out"))
    reshaped = random_sae("standard", hook_name="blocks.1.attn.hook_z", reshape_activations="hook_z")
    assert "reshape_activations='hook_z'" in refusal(reshaped)


def test_training_saes_are_refused() -> None:
    module = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(d_in=4, d_sae=6, k=2))
    assert "save_inference_model()" in refusal(module)


def test_unknown_classes_are_refused() -> None:
    class Noisy(sae_lens.StandardSAE):
        pass

    assert "class Noisy is not known" in refusal(Noisy(config_of("standard")))
    assert "Linear is not a sae_lens SAE" in refusal(nn.Linear(2, 2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    module = random_sae("standard")
    with torch.no_grad():
        module.W_enc[2, 3] = value
    assert "W_enc holds values that are not finite" in refusal(module)


@pytest.mark.parametrize("k", [0, D_SAE + 1])
def test_impossible_k_is_refused(k: int) -> None:
    assert f"k={k} is not in 1..{D_SAE}" in refusal(random_sae("topk", k=k))


# Folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@VARIANTS
def test_loads_what_sae_lens_saves(
    tmp_path: Path, architecture: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    module = random_sae(architecture, dtype=dtype, **options)
    module.save_model(tmp_path)
    sae, x = load_sae_folder(tmp_path), residuals(16)
    torch.testing.assert_close(sae.encode(x), module.to(dtype=torch.float32).encode(x), rtol=1e-5, atol=1e-5)
    assert sae.sha256 == from_sae_lens(module).sha256
    assert sae.site == Site(1, "pre")


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_loads_batchtopk_and_matryoshka_as_saved(tmp_path: Path, name: str, rescale: bool) -> None:
    """By hand: pre-activations (in units of decoder norm) above the one threshold, and all others zero."""
    widths = {"matryoshka_widths": [8, D_SAE]} if name.startswith("M") else {}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=D_MODEL, d_sae=D_SAE, k=4, rescale_acts_by_decoder_norm=rescale, decoder_init_norm=0.5, **widths
    )
    training = getattr(sae_lens, f"{name}TrainingSAE")(config)
    with torch.no_grad():
        training.b_enc.copy_(torch.linspace(-0.5, 0.5, D_SAE))
        training.topk_threshold.fill_(0.8)
    training.save_inference_model(tmp_path)

    x = residuals(32)
    pre = (x - training.b_dec) @ training.W_enc + training.b_enc
    if rescale:
        pre = pre * 0.5
    sae = load_sae_folder(tmp_path)
    assert sae.architecture == "jumprelu"
    torch.testing.assert_close(sae.encode(x), (pre * (pre > 0.8)).detach(), rtol=1e-5, atol=1e-5)


def test_loads_configurations_older_than_sae_lens_6(tmp_path: Path) -> None:
    module = random_sae("standard")
    module.save_model(tmp_path)
    old = {"d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float32", "hook_point": "blocks.4.hook_resid_pre"}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    sae, x = load_sae_folder(tmp_path), residuals(4)
    assert sae.site == Site(4, "pre")
    torch.testing.assert_close(sae.encode(x), module.encode(x), rtol=1e-5, atol=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_sae("jumprelu").save_model(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"no {name}" in refusal(folder)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no cfg.json" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_bad_json_is_refused(folder: Path, text: str) -> None:
    (folder / "cfg.json").write_bytes(text.encode("latin-1"))
    assert "cfg.json is not JSON" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 1000])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "damaged or cut short" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("architecture", "standard", "threshold"),
        ("architecture", "nonesuch", "nonesuch"),
        ("d_sae", D_SAE + 1, "size mismatch"),
        ("d_in", "many", "TypeError"),
        ("normalize_activations", "softly", "softly"),
    ],
)
def test_config_that_does_not_fit_is_refused(folder: Path, key: str, value: Any, reason: str) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, key: value}))
    message = refusal(folder)
    assert str(folder) in message
    assert reason in message


def test_refused_saes_are_refused_from_folders_too(tmp_path: Path) -> None:
    random_sae("standard", normalize_activations="layer_norm").save_model(tmp_path)
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert "layer_norm" in message


def test_metadata_without_hook_name_is_no_site(tmp_path: Path) -> None:
    module = random_sae("standard")
    module.cfg.metadata = SAEMetadata()
    module.save_model(tmp_path)
    assert load_sae_folder(tmp_path).site is None
