from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from recover.defenses.clamps import Clamp, Set
from recover.saes.activations import JumpReLU, ReLU
from recover.saes.sae import SAE, from_sae_lens
from recover.search.constraints.linear import (
    ActivationStable,
    Budget,
    Constraint,
    Constraints,
    DecodeStable,
    EncoderOrthogonal,
)
from recover.types import InputError, Site
from tests.saes import POINTWISE, random_sae, residuals, variants

VARIANTS = pytest.mark.parametrize(("architecture", "options"), variants())
FEATURES = (7, 0, 19, 4, 11)


def row(*entries: float) -> Tensor:
    return torch.tensor([[entries]])


def relu_sae(W_enc: Tensor, b_enc: Tensor | None = None) -> SAE:
    d_model, d_sae = W_enc.shape
    bias = torch.zeros(d_sae) if b_enc is None else b_enc
    return SAE(W_enc, bias, 2 * W_enc.mT, torch.zeros(d_model), ReLU(), Site(0), "standard", "")


def coordinates() -> Clamp:
    """Features 0 and 1 are the first two of three coordinates, where these are above 0; they write them doubled."""
    return Clamp(relu_sae(torch.eye(3, 2)), (0, 1), Set(0.0))


def random_case(architecture: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Clamp, Tensor]:
    """A clamp, and the state that it leaves: some clamped features are active there, some are not."""
    clamp = Clamp(from_sae_lens(random_sae(architecture, **options), dtype=dtype), FEATURES, Set(1.0))
    h_def = clamp.apply(residuals(6, 4, dtype=dtype))
    assert 0 < (clamp.reference(h_def) != 0).double().mean() < 1
    return clamp, h_def


def feasible(constraint: Constraint, delta: Tensor) -> bool:
    return bool((constraint.violation(delta) <= 1e-4 * torch.linalg.vector_norm(delta, dim=(1, 2))).all())


# C1


def test_encoder_orthogonal_by_hand() -> None:
    """Only the third coordinate is free; of (3, 4, 2) the features see (3, 4), of length 5."""
    constraint = EncoderOrthogonal.of(coordinates())
    delta = row(3.0, 4.0, 2.0)
    assert constraint.violation(delta).tolist() == [5.0]
    torch.testing.assert_close(constraint.project(delta), row(0.0, 0.0, 2.0))
    assert constraint.violation(constraint.project(delta)).tolist() == [0.0]


def test_encoder_orthogonal_to_several_clamps() -> None:
    sae = relu_sae(torch.eye(3))
    clamps = Clamp(sae, (0,), Set(0.0)), Clamp(sae, (2,), Set(0.0))
    projected = EncoderOrthogonal.of(*clamps).project(row(3.0, 4.0, 2.0))
    torch.testing.assert_close(projected, row(0.0, 4.0, 0.0))


def test_violation_is_over_all_positions_of_each_example() -> None:
    delta = torch.tensor([[[3.0, 0.0, 7.0], [0.0, 4.0, 7.0]], [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    assert EncoderOrthogonal.of(coordinates()).violation(delta).tolist() == [5.0, 0.0]


@pytest.mark.parametrize("architecture", POINTWISE)
def test_c1_implies_c2_and_c3_for_pointwise_saes(architecture: str) -> None:
    clamp, h_def = random_case(architecture)
    delta = EncoderOrthogonal.of(clamp).project(residuals(6, 4, seed=1, dtype=torch.float64))
    assert (ActivationStable(clamp, h_def).violation(delta) < 1e-10).all()
    assert (DecodeStable(clamp, h_def).violation(delta) < 1e-10).all()


def test_c1_does_not_imply_c2_where_features_compete() -> None:
    """By hand: of features 5 and 3 only the larger is kept; a delta that only the other one reads pushes it out."""
    sae = from_sae_lens(random_sae("topk", k=1))
    eye = torch.eye(2)
    sae = replace(sae, W_enc=eye, b_enc=torch.zeros(2), W_dec=eye, b_dec=torch.zeros(2))
    clamp = Clamp(sae, (0,), Set(5.0))
    constraint, delta = ActivationStable(clamp, row(5.0, 3.0)), row(1.0, 4.0)
    torch.testing.assert_close(constraint.project(delta), row(0.0, 4.0))
    assert constraint.violation(constraint.project(delta)).tolist() == [5.0]


# C2


@pytest.mark.parametrize(
    ("delta", "projected"),
    [
        # The active feature 0 is held; feature 1 may move, from -1 up to 0.
        ((5.0, 0.5, 2.0), (0.0, 0.5, 2.0)),
        ((5.0, -9.0, 2.0), (0.0, -9.0, 2.0)),
        # Here it would wake, so it is held too.
        ((5.0, 3.0, 2.0), (0.0, 0.0, 2.0)),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ],
)
def test_activation_stable_by_hand(delta: tuple[float, ...], projected: tuple[float, ...]) -> None:
    constraint = ActivationStable(coordinates(), row(1.0, -1.0, 0.0))
    torch.testing.assert_close(constraint.project(row(*delta)), row(*projected))
    assert constraint.violation(row(*projected)).tolist() == [0.0]


def test_violations_by_hand() -> None:
    """The features go from (1, 0) to (4, 4): by (3, 4), of length 5; what they write is twice that."""
    h_def, delta = row(1.0, -1.0, 0.0), row(3.0, 5.0, 9.0)
    assert ActivationStable(coordinates(), h_def).violation(delta).tolist() == [5.0]
    assert DecodeStable(coordinates(), h_def).violation(delta).tolist() == [10.0]


def test_each_position_holds_its_own_features() -> None:
    """Example 0: feature 0 active, then none; example 1: feature 1 active, then both, where delta wakes nothing."""
    h_def = torch.tensor([[[1.0, -1.0, 0.0], [-9.0, -9.0, 0.0]], [[-9.0, 1.0, 0.0], [1.0, 1.0, 0.0]]])
    projected = ActivationStable(coordinates(), h_def).project(torch.full((2, 2, 3), 5.0))
    expected = [[[0.0, 0.0, 5.0], [5.0, 5.0, 5.0]], [[5.0, 0.0, 5.0], [0.0, 0.0, 5.0]]]
    torch.testing.assert_close(projected, torch.tensor(expected))


def test_a_feature_that_holding_another_wakes_is_held_too() -> None:
    """Feature 1 reads y - x. Delta (2, 1, 4) moves it by -1, but without its x part by +1, from -0.5 to 0.5."""
    clamp = Clamp(
        relu_sae(torch.tensor([[1.0, -1.0], [0.0, 1.0], [0.0, 0.0]]), torch.tensor([1.0, -0.5])), (0, 1), Set(0.0)
    )
    constraint = ActivationStable(clamp, row(0.0, 0.0, 0.0))
    assert constraint.violation(row(0.0, 1.0, 4.0)).tolist() == [0.5]
    torch.testing.assert_close(constraint.project(row(2.0, 1.0, 4.0)), row(0.0, 0.0, 4.0))


def test_rounding_at_a_threshold_ends_with_the_reference() -> None:
    """Feature 0 sits at its threshold, 1, and any rounding upward makes it jump there from 0."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(64, 8, generator=generator)
    sae = replace(relu_sae(A), activation=JumpReLU(torch.ones(8)), b_enc=torch.ones(8))
    h_def = torch.zeros(1, 500, 64)
    delta = 1e4 * torch.randn(1, 500, 64, generator=generator)
    constraint = ActivationStable(Clamp(sae, tuple(range(8)), Set(0.0)), h_def)
    naive = EncoderOrthogonal(A).project(delta)
    assert constraint.violation(naive).item() > 1  # so rounding does wake some
    projected = constraint.project(delta)
    assert constraint.violation(projected).item() == 0
    assert 0 < (projected != 0).any(dim=-1).sum() < 500


@pytest.mark.parametrize("constraint", [ActivationStable, DecodeStable])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("architecture", POINTWISE)
def test_projection_is_feasible_and_no_longer(
    architecture: str, scale: float, dtype: torch.dtype, constraint: type[ActivationStable | DecodeStable]
) -> None:
    clamp, h_def = random_case(architecture, dtype)
    delta = scale * residuals(6, 4, seed=1, dtype=dtype)
    stable = constraint(clamp, h_def)
    projected = stable.project(delta)
    assert not feasible(stable, delta)
    assert feasible(stable, projected)
    assert (projected.norm(dim=-1) <= delta.norm(dim=-1) * (1 + 1e-6)).all()
    torch.testing.assert_close(stable.project(projected), projected)


@pytest.mark.parametrize("architecture", POINTWISE)
def test_stability_leaves_at_least_the_room_of_orthogonality(architecture: str) -> None:
    clamp, h_def = random_case(architecture)
    delta = residuals(6, 4, seed=1, dtype=torch.float64)
    stable = ActivationStable(clamp, h_def).project(delta)
    orthogonal = EncoderOrthogonal.of(clamp).project(delta)
    assert (stable.norm(dim=-1) >= orthogonal.norm(dim=-1) - 1e-9).all()
    assert (stable.norm(dim=-1) > orthogonal.norm(dim=-1) + 1e-3).any()


# C4


def test_budget_by_hand() -> None:
    """Over all positions: (3, 0) and (0, 4) have length 5, so at 2.5 they are halved; (1, 0) is within it."""
    delta = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]]])
    budget = Budget(2.5)
    assert budget.violation(delta).tolist() == [2.5, 0.0]
    projected = budget.project(delta)
    torch.testing.assert_close(projected[0], delta[0] / 2)
    assert torch.equal(projected[1], delta[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-3, 1.0, 7.7, 20, 1e3])
def test_norm_never_exceeds_the_budget(eps: float, dtype: torch.dtype) -> None:
    delta = torch.randn(200, 3, 40).to(dtype) * torch.logspace(-3, 3, 200)[:, None, None].to(dtype)
    projected = Budget(eps).project(delta)
    lengths = torch.linalg.vector_norm(projected.double(), dim=(1, 2))
    assert (lengths <= eps).all()
    assert (Budget(eps).violation(projected) == 0).all()
    assert torch.equal(Budget(eps).project(projected), projected)


def test_budget_is_differentiable_at_zero() -> None:
    delta = torch.zeros(2, 3, 4, requires_grad=True)
    Budget(1.0).project(delta).sum().backward()
    assert delta.grad is not None
    assert torch.equal(delta.grad, torch.ones(2, 3, 4))


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf")])
def test_budget_must_be_a_norm(eps: float) -> None:
    with pytest.raises(InputError, match="finite and positive"):
        Budget(eps)


# Together


@pytest.mark.parametrize("architecture", POINTWISE)
def test_constraints_hold_together_in_any_order(architecture: str) -> None:
    clamp, h_def = random_case(architecture)
    parts: tuple[Constraint, ...] = (
        EncoderOrthogonal.of(clamp),
        ActivationStable(clamp, h_def),
        Budget(0.5),
    )
    delta = residuals(6, 4, seed=1, dtype=torch.float64)
    for order in itertools.permutations(parts):
        projected = Constraints(order).project(delta)
        assert all(feasible(part, projected) for part in parts)
        torch.testing.assert_close(projected, Constraints(parts).project(delta))


def test_worst_violation_by_hand() -> None:
    """What the features see has length 5, the budget is passed by 8 - 6 = 2; and within both, 0."""
    delta = torch.tensor([[[3.0, 4.0, 39.0**0.5]], [[0.0, 0.0, 1.0]]])
    constraints = Constraints((Budget(6.0), EncoderOrthogonal.of(coordinates())))
    torch.testing.assert_close(constraints.violation(delta), torch.tensor([5.0, 0.0]))
    torch.testing.assert_close(Constraints((Budget(6.0),)).violation(delta), torch.tensor([2.0, 0.0]))
