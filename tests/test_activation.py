from __future__ import annotations

import math

import pytest
import torch

from recover.saes.activations import AbsTopK, Activation, Gated, JumpReLU, ReLU, TopK
from recover.saes.sae import from_sae_lens
from tests.saes import D_SAE, POINTWISE, random_sae

INF = math.inf


@pytest.mark.parametrize(
    ("activation", "pre", "features"),
    [
        (ReLU(), [-1.0, 0.0, 2.0], [0.0, 0.0, 2.0]),
        # At the threshold it is still zero; a negative threshold lets nothing negative through.
        (JumpReLU(torch.tensor([1.0, 2.0, -3.0])), [1.5, 2.0, -1.0], [1.5, 0.0, 0.0]),
        # Magnitudes 2 * 1 + 1 = 3; 2 * 1 - 4 < 0; 2 * -1 + 5 = 3, but the gate is shut.
        (Gated(torch.full((3,), 2.0), torch.tensor([1.0, -4.0, 5.0])), [1.0, 1.0, -1.0], [3.0, 0.0, 0.0]),
        (TopK(2), [3.0, 1.0, -5.0], [3.0, 1.0, 0.0]),
        # The second largest is negative, so it stays zero.
        (TopK(2), [3.0, -2.0, -5.0], [3.0, 0.0, 0.0]),
        (AbsTopK(2), [3.0, 1.0, -5.0], [3.0, 0.0, -5.0]),
    ],
)
def test_features_by_hand(activation: Activation, pre: list[float], features: list[float]) -> None:
    assert activation(torch.tensor([[pre]])).tolist() == [[features]]


def test_thresholds_by_hand() -> None:
    which = torch.tensor([2, 0])
    assert ReLU().threshold(which).tolist() == [0.0, 0.0]
    assert JumpReLU(torch.tensor([1.0, 9.0, -3.0])).threshold(which).tolist() == [0.0, 1.0]
    # 2 pre - 6 > 0 above 3; 2 pre + 8 > 0 above -4, where the gate is still shut: 0.
    gated = Gated(torch.full((3,), 2.0), torch.tensor([8.0, 0.0, -6.0]))
    assert gated.threshold(which).tolist() == [3.0, 0.0]
    assert TopK(2).threshold(which).isnan().all()
    assert AbsTopK(2).threshold(which).isnan().all()


@pytest.mark.parametrize("architecture", POINTWISE)
def test_thresholds_are_where_sae_lens_features_begin(architecture: str) -> None:
    """Each feature is driven, along a direction of its own, to just below and above its threshold."""
    module = random_sae(architecture, d_model=D_SAE, dtype=torch.float64)
    with torch.no_grad():
        module.W_enc.copy_(torch.eye(D_SAE))
    sae = from_sae_lens(module, dtype=torch.float64)
    threshold = sae.activation.threshold(torch.arange(D_SAE))
    at_threshold = threshold - sae.b_enc
    assert (module.encode(at_threshold - 1e-9) == 0).all()
    assert (module.encode(at_threshold + 1e-9) > 0).all()


def test_selection_keeps_each_feature_its_own_parameters() -> None:
    pre = torch.tensor([[2.0, 2.0, 2.0]])
    which = torch.tensor([2, 0])
    assert JumpReLU(torch.tensor([1.0, 0.0, 3.0])).select(which)(pre[:, which]).tolist() == [[0.0, 2.0]]
    gated = Gated(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, -0.5])).select(which)
    assert gated(pre[:, which]).tolist() == [[5.5, 2.5]]
    assert isinstance(ReLU().select(which), ReLU)


def test_moves_its_parameters() -> None:
    moved = JumpReLU(torch.zeros(2)).to("meta", torch.float64)
    assert (moved.thresholds.device.type, moved.thresholds.dtype) == ("meta", torch.float64)
