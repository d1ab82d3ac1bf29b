"""Tiny random sae_lens SAEs of every architecture, with biases and thresholds that matter."""

from __future__ import annotations

import itertools
from typing import Any

import sae_lens
import torch
from sae_lens.registry import get_sae_class

D_MODEL, D_SAE = 12, 20

# architecture -> the values that each of its own options takes
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": (4, 15), "rescale_acts_by_decoder_norm": (False, True)},
    "abstopk": {"k": (4,), "rescale_acts_by_decoder_norm": (False, True)},
}
POINTWISE = ("standard", "jumprelu", "gated")


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Each supported architecture with each combination of its options."""
    return [
        (architecture, {"apply_b_dec_to_input": apply, **dict(zip(own, values, strict=True))})
        for architecture, own in OPTIONS.items()
        for values in itertools.product(*own.values())
        for apply in (True, False)
    ]


def random_sae(
    architecture: str,
    *,
    seed: int = 0,
    d_model: int = D_MODEL,
    d_sae: int = D_SAE,
    dtype: torch.dtype = torch.float32,
    hook_name: str | None = "blocks.1.hook_resid_pre",
    **options: Any,
) -> sae_lens.SAE[Any]:
    """A sae_lens SAE with random weights, drawn in float32 and rounded to `dtype`.

    Thresholds are of both signs, decoder rows of very different norms.
    """
    sae_class, config_class = get_sae_class(architecture)
    metadata = sae_lens.saes.sae.SAEMetadata(**({} if hook_name is None else {"hook_name": hook_name}))
    sae = sae_class(config_class(d_in=d_model, d_sae=d_sae, metadata=metadata, **options))
    generator = torch.Generator().manual_seed(seed)
    scales = {"W_enc": d_model**-0.5, "W_dec": d_model**-0.5}
    with torch.no_grad():
        for name, parameter in sorted(sae.named_parameters()):
            parameter.copy_(scales.get(name, 0.5) * torch.randn(parameter.shape, generator=generator))
        sae.W_dec.mul_(torch.linspace(0.3, 3.0, d_sae)[:, None])
    return sae.to(dtype=dtype)


def residuals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random residuals `[*shape, D_MODEL]`, twice the size of the encoder's unit."""
    return 2 * torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed)).to(dtype)
