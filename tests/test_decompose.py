from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from recover.saes.decomposition import Decomposition, decompose, recompose
from recover.saes.sae import from_sae_lens
from tests.saes import D_MODEL, random_sae, residuals, variants

VARIANTS = pytest.mark.parametrize(("architecture", "options"), variants())


@VARIANTS
def test_parts_are_those_of_sae_lens(architecture: str, options: dict[str, Any]) -> None:
    module = random_sae(architecture, dtype=torch.float64, **options)
    x = residuals(3, 4, dtype=torch.float64)
    parts = decompose(from_sae_lens(module, dtype=torch.float64), x)
    torch.testing.assert_close(parts.features, module.encode(x).detach())
    torch.testing.assert_close(parts.reconstruction, module(x).detach())
    torch.testing.assert_close(parts.error, (x - module(x)).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@VARIANTS
def test_recomposing_gives_the_residual_back(architecture: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    sae = from_sae_lens(random_sae(architecture, **options), dtype=dtype)
    x = residuals(3, 4, dtype=dtype)
    parts = decompose(sae, x)
    rounding = 4 * torch.finfo(dtype).eps * (x.abs() + parts.reconstruction.abs())
    assert ((recompose(sae, parts) - x).abs() <= rounding).all()


@VARIANTS
def test_gradients_are_those_of_finite_differences(architecture: str, options: dict[str, Any]) -> None:
    sae = from_sae_lens(random_sae(architecture, **options), dtype=torch.float64)
    x = residuals(2, dtype=torch.float64).requires_grad_()

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = decompose(sae, x)
        return split.features, split.reconstruction, split.error

    assert torch.autograd.gradcheck(parts, (x,), eps=1e-7, atol=1e-6)


@VARIANTS
def test_gradient_through_features_and_error_together_is_the_identity(
    architecture: str, options: dict[str, Any]
) -> None:
    sae = from_sae_lens(random_sae(architecture, **options), dtype=torch.float64)
    x = residuals(dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: recompose(sae, decompose(sae, x)), x)
    torch.testing.assert_close(jacobian, torch.eye(D_MODEL, dtype=torch.float64), rtol=0, atol=1e-12)


def test_error_survives_an_edit_of_the_features() -> None:
    """With no features at all, what is left is the decoder bias and the error."""
    module = random_sae("jumprelu", dtype=torch.float64)
    sae, x = from_sae_lens(module, dtype=torch.float64), residuals(4, dtype=torch.float64)
    parts = decompose(sae, x)
    empty = replace(parts, features=torch.zeros_like(parts.features))
    expected = module.b_dec + x - module(x)
    torch.testing.assert_close(recompose(sae, empty), expected.detach())


def test_narrow_residuals_are_split_in_the_precision_of_the_sae() -> None:
    sae = from_sae_lens(random_sae("standard"))
    x = residuals(4, dtype=torch.bfloat16)
    parts: Decomposition = decompose(sae, x)
    assert parts.error.dtype == torch.float32
    torch.testing.assert_close(recompose(sae, parts), x.float())
