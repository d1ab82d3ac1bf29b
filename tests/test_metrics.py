"""Every expected value is worked out by hand in the comment beside it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recover.numerics import metrics

# One example over two positions, a second one that stays as it is.
Z_DEF = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]]])
Z_REC = torch.tensor([[[1.0, 0.0], [2.0, 5.0]], [[1.0, 0.0], [0.0, 0.0]]])
SILENT = torch.zeros(2, 2, 2)


def test_activation_drift() -> None:
    # z_rec - z_def = (-2, 0, 2, 1): sqrt(4 + 0 + 4 + 1) = 3
    assert metrics.activation_drift(Z_REC, Z_DEF).tolist() == [3.0, 0.0]


def test_relative_drift() -> None:
    # ||z_def|| = sqrt(9 + 16) = 5: 3 / 5
    torch.testing.assert_close(metrics.relative_drift(Z_REC, Z_DEF), torch.tensor([0.6, 0.0]))
    # Over nothing: 3^2 + 4^2 from silence is infinitely much, silence from silence none.
    moved = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert metrics.relative_drift(moved, SILENT).tolist() == [math.inf, 0.0]


def test_decode_drift() -> None:
    # Position 0: -2 (1, 0, 0) = (-2, 0, 0); position 1: 2 (1, 0, 0) + 1 (0, 3, 4) = (2, 3, 4)
    # sqrt(4 + 4 + 9 + 16) = sqrt(33)
    decoder = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 4.0]])
    torch.testing.assert_close(metrics.decode_drift(Z_REC, Z_DEF, decoder), torch.tensor([33**0.5, 0.0]))


def test_clamp_floor_violation() -> None:
    # relu(z_def - z_rec) = relu(2, 0, -2, -1) = (2, 0, 0, 0); 2 / 5
    torch.testing.assert_close(metrics.clamp_floor_violation(Z_REC, Z_DEF), torch.tensor([0.4, 0.0]))
    # Rising is no violation, whatever it starts from.
    assert metrics.clamp_floor_violation(Z_DEF, SILENT).tolist() == [0.0, 0.0]


def test_reactivation() -> None:
    # Example 0: two are 0 after the clamp, of which one (0 to 2) is active later: 1 / 2.
    # Example 1: three are 0 and stay so: 0 / 3.
    after = metrics.reactivation(Z_REC, Z_DEF)
    assert (after.count.tolist(), after.inactive.tolist()) == ([1, 0], [2, 3])
    assert after.share.tolist() == [0.5, 0.0]


def test_reactivation_counts_negative_features_as_inactive() -> None:
    # -1 to 2 and -1 to 0: the first counts, the second is still not above 0; 3 was active. 1 / 2
    after = metrics.reactivation(torch.tensor([[2.0, 0.0, 9.0]]), torch.tensor([[-1.0, -1.0, 3.0]]))
    assert after.share.tolist() == [0.5]


def test_reactivation_of_nothing_inactive_is_none() -> None:
    after = metrics.reactivation(torch.ones(1, 3), torch.ones(1, 3))
    assert (after.inactive.tolist(), after.share.tolist()) == ([0], [0.0])


def test_relative_norm() -> None:
    # ||delta||_F = sqrt(1 + 4 + 4) = 3 over ||h||_F = sqrt(36 + 64) = 10
    delta = torch.tensor([[[1.0, 0.0], [2.0, -2.0]]])
    h_def = torch.tensor([[[6.0, 0.0], [0.0, 8.0]]])
    torch.testing.assert_close(metrics.relative_norm(delta, h_def), torch.tensor([0.3]))


def test_norms_without_positions() -> None:
    # sqrt(9 + 16), sqrt(25 + 144)
    assert metrics.norm(torch.tensor([[3.0, 4.0], [5.0, 12.0]])).tolist() == [5.0, 13.0]


def test_norms_are_summed_in_float64() -> None:
    # 2^24 ones after a 2^12: in float32 every further 1 would be lost. sqrt(2^24 + 1024)
    values = torch.ones(1, 1025)
    values[0, 0] = 2**12
    assert metrics.norm(values).dtype == torch.float32
    assert metrics.norm(values.double()).item() == pytest.approx((2**24 + 1024) ** 0.5, rel=1e-15)
    assert metrics.norm(values).item() == pytest.approx((2**24 + 1024) ** 0.5, rel=1e-7)


def test_valid_flips() -> None:
    base = torch.tensor([True, True, True, False, True])
    defended = torch.tensor([False, True, False, False, False])
    valid = metrics.valid_flips(base, defended)
    assert valid.tolist() == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("x_hat", "expected"),
    [
        # x varies around its mean (2, 0) by 4 + 4 + 0 + 0 = 8; each row missed by (1, 0): 1 - 4 / 8
        ([[1.0, 0.0], [5.0, 0.0], [3.0, 0.0], [3.0, 0.0]], 0.5),
        ([[0.0, 0.0], [4.0, 0.0], [2.0, 0.0], [2.0, 0.0]], 1.0),
        # The mean explains nothing.
        ([[2.0, 0.0]] * 4, 0.0),
        # Worse than the mean: all missed by 2 in the other dimension, 1 - (8 + 16) / 8
        ([[2.0, 2.0]] * 4, -2.0),
    ],
)
@pytest.mark.parametrize("shape", [(4, 2), (2, 2, 2)])
def test_explained_variance(x_hat: list[list[float]], expected: float, shape: tuple[int, ...]) -> None:
    x = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    value = metrics.explained_variance(x.reshape(shape), torch.tensor(x_hat).reshape(shape))
    assert value == pytest.approx(expected)


def test_explained_variance_of_what_does_not_vary_is_undefined() -> None:
    assert math.isnan(metrics.explained_variance(torch.ones(3, 2), torch.zeros(3, 2)))


def test_l0() -> None:
    # 2, 0, 1 and 3 active (a negative feature is active too): 6 / 4
    features = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, -1.0, 0.0], [1.0, 1.0, 1.0]])
    assert metrics.l0(features) == 1.5
    assert metrics.l0(features.reshape(2, 2, 3)) == 1.5


@pytest.mark.parametrize(
    ("ce_sae", "expected"),
    # From 3 (clean) to 7 (mean): 3 loses nothing, 4 loses a quarter, 7 everything, 9 half as much again.
    [(3.0, 1.0), (4.0, 0.75), (7.0, 0.0), (9.0, -0.5)],
)
def test_loss_recovered(ce_sae: float, expected: float) -> None:
    assert metrics.loss_recovered(3.0, ce_sae, 7.0) == expected


def test_loss_recovered_is_undefined_where_the_mean_costs_nothing() -> None:
    assert math.isnan(metrics.loss_recovered(3.0, 4.0, 3.0))


def test_drift_has_a_gradient_where_nothing_has_moved() -> None:
    z: Tensor = Z_DEF.clone().requires_grad_()
    metrics.activation_drift(z, Z_DEF).sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
