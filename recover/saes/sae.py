"""The one form of an SAE in this package, and the adapter that brings every supported sae_lens SAE into it.

All supported architectures are folded, once, into one form:

    pre      = x @ W_enc + b_enc
    features = activation(pre)
    x_hat    = features @ W_dec + b_dec

- `apply_b_dec_to_input` goes into the encoder bias: `b_enc - b_dec @ W_enc`.
- `rescale_acts_by_decoder_norm` goes into the weights: with `n` the norms of the decoder rows, `W_enc * n`,
  `b_enc * n`, `W_dec / n`.
- A model whose writing weights were centered for training (`center_writing_weights`, as for GPT-2) has residuals of
  mean zero over `d_model`. Transformers' own do not, and compute the same: the mean goes out in the encoder,
  `W_enc - mean(W_enc)`, and is part of the error.
- Half precision is widened to float32 before anything is computed.

So `A = W_enc[:, S]` is the whole story of how a residual reaches the features `S`. An SAE that has no such
`A` (inputs normalized by their own norm, matching pursuit, attention over positions) or that misses a factor
it was trained with is refused, with the reason.

This is the only module, beside the loading of published SAEs by name, that imports sae_lens. It does so where
it needs it: the import takes seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from einops import einsum, reduce
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F

from recover.saes.activations import AbsTopK, Activation, Gated, JumpReLU, ReLU, TopK
from recover.types import Float, InputError, Int, Site, Tensor, widened

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"

TWO_SITES = "it reads one site and writes another, so there is no error to pass on; use an SAE of one site"
UNSUPPORTED_ARCHITECTURES = {
    "transcoder": TWO_SITES,
    "skip_transcoder": TWO_SITES,
    "jumprelu_transcoder": TWO_SITES,
    "jumprelu_skip_transcoder": TWO_SITES,
    "matching_pursuit": "its encoder is an iteration and not linear; use an SAE with a linear encoder",
    "temporal": "its encoder attends to other positions; use an SAE with a linear encoder",
}
UNSUPPORTED_NORMALIZATIONS = {
    "layer_norm": "its encoder divides by the input's own deviation; use an SAE with a linear encoder",
    "constant_norm_rescale": "its encoder divides by the input's own norm; use an SAE with a linear encoder",
    "expected_average_only_in": "the factor it was trained with is not in the SAE; "
    "fold it in with fold_activation_norm_scaling_factor(factor)",
    "covariance_whitening": "the whitening it was trained with is not in the SAE; "
    "fold it in with fold_activation_whitening(mean, matrix, inverse)",
}
SUPPORTED_CLASSES = ("StandardSAE", "JumpReLUSAE", "GatedSAE", "TopKSAE", "AbsTopKSAE")
COLUMNS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder with a linear encoder, which computes in its own dtype and casts inputs to it.

    Attributes:
        site: the site that it was trained on, if known.
        architecture: its name in sae_lens.
        sha256: hash of its tensors as sae_lens holds them, in the order of their names. Half precision is hashed as
            float32, so that one SAE has one hash.
    """

    W_enc: Float[Tensor, "d_model d_sae"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_dec: Float[Tensor, "d_model"]
    activation: Activation
    site: Site | None
    architecture: str
    sha256: str

    @property
    def d_model(self) -> int:
        return int(self.W_enc.shape[0])

    @property
    def d_sae(self) -> int:
        return int(self.W_enc.shape[1])

    @property
    def pointwise(self) -> bool:
        """Whether each feature depends only on its own pre-activation."""
        return self.activation.pointwise

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        weights = {
            name: getattr(self, name).to(device=device, dtype=dtype) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        }
        return replace(self, **weights, activation=self.activation.to(device, dtype))

    def select(self, features: Int[Tensor, "k"]) -> SAE:
        """Restrict the SAE to `features`.

        Raises:
            ValueError: the SAE is not pointwise.
        """
        return replace(
            self,
            W_enc=self.W_enc[:, features],
            b_enc=self.b_enc[features],
            W_dec=self.W_dec[features],
            activation=self.activation.select(features),
        )

    def pre_activations(
        self, x: Float[Tensor, "*batch d_model"], features: Int[Tensor, "k"] | None = None
    ) -> Float[Tensor, "*batch k"]:
        """Pre-activations of `features`, or of all features by default (`k = d_sae`)."""
        W_enc, b_enc = self.W_enc, self.b_enc
        if features is not None:
            W_enc, b_enc = W_enc[:, features], b_enc[features]
        return einsum(x.to(self.dtype), W_enc, "... d_model, d_model k -> ... k") + b_enc

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        return self.activation(self.pre_activations(x))

    def decode(self, features: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        return einsum(features.to(self.dtype), self.W_dec, "... d_sae, d_sae d_model -> ... d_model") + self.b_dec

    def read(self, x: Float[Tensor, "*batch d_model"], features: Int[Tensor, "k"]) -> Float[Tensor, "*batch k"]:
        """Activations of `features`, computed from their encoder columns alone where the SAE is pointwise."""
        if self.pointwise:
            return self.select(features).encode(x)
        return self.encode(x)[..., features]


def from_sae_lens(module: nn.Module, *, site: Site | None = None, dtype: torch.dtype = torch.float32) -> SAE:
    """Convert a loaded sae_lens SAE.

    The weights are copied, without gradients and on their device: later changes of `module` do not reach the
    result.

    Args:
        module: a `sae_lens.SAE` of a supported architecture, in any dtype.
        site: where it reads the residual stream; by default what its metadata says. Needed for a hook without a
            TransformerLens name.
        dtype: dtype of the result.

    Raises:
        InputError: the SAE cannot be expressed in the form, reads elsewhere than in the residual stream, or
            holds values that are not finite.
    """
    _check_supported(module)
    config = cast(Any, module).cfg
    if site is None and config.metadata.hook_name is not None:
        site = Site.from_hook_name(config.metadata.hook_name)
    weights = {name: widened(tensor.detach()) for name, tensor in module.state_dict().items()}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise InputError(f"{_label(module)}: {name} holds values that are not finite; get a sound copy")

    W_enc, W_dec, b_dec = weights["W_enc"], weights["W_dec"], weights["b_dec"].double()
    b_enc = weights["b_gate" if "b_gate" in weights else "b_enc"].double()
    if config.apply_b_dec_to_input:
        # In blocks: a float64 copy of a whole encoder can be larger than the memory left.
        blocks = torch.split(W_enc, COLUMNS_AT_ONCE, dim=1)
        b_enc = b_enc - torch.cat([b_dec @ block.double() for block in blocks])
    if (config.metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights"):
        W_enc = W_enc - reduce(W_enc, "d_model d_sae -> 1 d_sae", "mean")
    if getattr(config, "rescale_acts_by_decoder_norm", False):
        norms = torch.linalg.vector_norm(W_dec, dim=-1, dtype=torch.float64)
        W_enc, b_enc, W_dec = W_enc * norms.to(W_enc.dtype), b_enc * norms, F.normalize(W_dec, dim=-1)

    return SAE(
        W_enc=W_enc.to(dtype, copy=True),
        b_enc=b_enc.to(dtype),
        W_dec=W_dec.to(dtype, copy=True),
        b_dec=b_dec.to(dtype),
        activation=_activation(config, weights).to(dtype=dtype),
        site=site,
        architecture=config.architecture(),
        sha256=_sha256(weights),
    )


def load_sae_folder(path: str | Path, *, site: Site | None = None, dtype: torch.dtype = torch.float32) -> SAE:
    """Load an SAE that sae_lens saved (`cfg.json` and `sae_weights.safetensors`), onto the CPU.

    Raises:
        InputError: a file is missing or damaged, or `from_sae_lens` refuses the SAE.
    """
    import sae_lens

    folder = Path(path)
    _check_files(folder)
    try:
        wide = "float64" if dtype == torch.float64 else "float32"
        module = sae_lens.SAE.load_from_disk(folder, device="cpu", dtype=wide)
    except Exception as error:  # anything: sae_lens leaves it to its configuration classes and to torch
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(
            f"SAE folder {folder}: sae_lens cannot load it ({reason}); "
            f"{CONFIG_FILE} and {WEIGHTS_FILE} must be of one SAE"
        ) from error
    try:
        return from_sae_lens(module, site=site, dtype=dtype)
    except InputError as error:
        raise InputError(f"SAE folder {folder}: {error}") from error


def _check_files(folder: Path) -> None:
    """Refuse missing or damaged files with one clear line."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(f"SAE folder {folder}: no {name} in it; give a folder that sae_lens saved")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise InputError(f"SAE folder {folder}: {CONFIG_FILE} is not JSON ({error}); save it again") from error
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt"):
            pass
    except SafetensorError as error:
        raise InputError(
            f"SAE folder {folder}: {WEIGHTS_FILE} is damaged or cut short ({error}); fetch or save it again"
        ) from error


def _check_supported(module: nn.Module) -> None:
    import sae_lens

    kind = type(module).__name__
    if isinstance(module, sae_lens.TrainingSAE):
        raise InputError(f"{kind} is still in training; save_inference_model() and load the folder it writes")
    if not isinstance(module, sae_lens.SAE):
        raise InputError(f"{kind} is not a sae_lens SAE; give a loaded sae_lens.SAE")
    config, label = cast(Any, module).cfg, _label(module)
    if reason := UNSUPPORTED_ARCHITECTURES.get(config.architecture()):
        raise InputError(f"{label}: {reason}")
    # By exact class: a subclass may encode as it likes.
    if type(module) not in {getattr(sae_lens, name) for name in SUPPORTED_CLASSES}:
        raise InputError(f"{label}: class {kind} is not known; give one of {', '.join(SUPPORTED_CLASSES)}")
    if (mode := config.normalize_activations) != "none":
        reason = UNSUPPORTED_NORMALIZATIONS.get(mode, "which is not known; use an SAE with a linear encoder")
        raise InputError(f"{label}: normalize_activations={mode!r}: {reason}")
    if (shape := config.reshape_activations) != "none":
        raise InputError(f"{label}: reshape_activations={shape!r}: give an SAE of the residual stream")


def _label(module: nn.Module) -> str:
    config = cast(Any, module).cfg
    return f"{config.architecture()} SAE at {config.metadata.hook_name or 'a site it does not name'}"


def _activation(config: Any, weights: Mapping[str, Tensor]) -> Activation:
    match config.architecture():
        case "jumprelu":
            return JumpReLU(weights["threshold"])
        case "gated":
            scale = weights["r_mag"].double().exp()
            return Gated(scale, weights["b_mag"].double() - scale * weights["b_gate"].double())
        case "topk" | "abstopk" as architecture:
            if not 1 <= config.k <= config.d_sae:
                raise InputError(f"{architecture} SAE: k={config.k} is not in 1..{config.d_sae}; mend its config")
            return TopK(int(config.k)) if architecture == "topk" else AbsTopK(int(config.k))
        case _:
            return ReLU()


def _sha256(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(weights.items()):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()
