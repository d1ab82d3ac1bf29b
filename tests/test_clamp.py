from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from recover.defenses.clamps import Clamp, Defense, Floor, Mode, Scale, Set
from recover.saes.activations import ReLU
from recover.saes.sae import SAE, from_sae_lens
from recover.types import InputError, Positions, Site
from tests.saes import D_SAE, POINTWISE, random_sae, residuals, variants

VARIANTS = pytest.mark.parametrize(("architecture", "options"), variants())
MODES: tuple[Mode, ...] = (Set(-5.0), Scale(3.0), Floor(0.7))
FEATURES = (7, 0, 19, 4)


def sae_of(architecture: str = "jumprelu", dtype: torch.dtype = torch.float64, **options: Any) -> SAE:
    return from_sae_lens(random_sae(architecture, **options), dtype=dtype)


def transparent() -> SAE:
    """Three features that read and write the first three of four dimensions: the coordinates above 0."""
    eye = torch.eye(4, 3)
    return SAE(eye, torch.zeros(3), eye.mT, torch.zeros(4), ReLU(), Site(0), "standard", "")


@pytest.mark.parametrize(
    ("mode", "only_active", "after"),
    [
        (Set(-5.0), True, [0.0, -5.0, -5.0]),
        (Set(-5.0), False, [-5.0, -5.0, -5.0]),
        (Scale(3.0), True, [0.0, 6.0, -3.0]),
        (Scale(3.0), False, [0.0, 6.0, -3.0]),
        (Floor(1.5), True, [0.0, 2.0, 1.5]),
        (Floor(1.5), False, [1.5, 2.0, 1.5]),
    ],
)
def test_modes_by_hand(mode: Mode, only_active: bool, after: list[float]) -> None:
    """Of an inactive feature, an active one, and one active at a negative value (AbsTopK)."""
    clamp = Clamp(transparent(), (0, 1, 2), mode, only_active)
    assert clamp.features_after(torch.tensor([0.0, 2.0, -1.0])).tolist() == after


@pytest.mark.parametrize(
    ("clamp", "defended"),
    [
        # Feature 0 is inactive (coordinate -1), feature 1 active (2); coordinates 2 and 3 are not clamped.
        (Clamp(transparent(), (0, 1), Set(-5.0)), [-1.0, -5.0, 3.0, 4.0]),
        # Feature 0 rises from 0 to -5: five down from -1.
        (Clamp(transparent(), (0, 1), Set(-5.0), only_active=False), [-6.0, -5.0, 3.0, 4.0]),
        (Clamp(transparent(), (1,), Scale(0.0)), [-1.0, 0.0, 3.0, 4.0]),
        (Clamp(transparent(), (0, 2), Floor(7.0), only_active=False), [6.0, 2.0, 7.0, 4.0]),
    ],
)
def test_defended_state_by_hand(clamp: Clamp, defended: list[float]) -> None:
    x = torch.tensor([[[-1.0, 2.0, 3.0, 4.0]]])
    assert clamp.apply(x).tolist() == [[defended]]


@VARIANTS
@pytest.mark.parametrize("only_active", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_defended_state_is_the_edited_decomposition(
    architecture: str, options: dict[str, Any], mode: Mode, only_active: bool
) -> None:
    """h_def = D(clamp_S(E(h))) + h - D(E(h)), all of it by sae_lens."""
    module = random_sae(architecture, dtype=torch.float64, **options)
    x = residuals(3, 4, dtype=torch.float64)
    edited = module.encode(x).detach().clone()
    chosen = edited[..., FEATURES]
    written = mode(chosen)
    edited[..., FEATURES] = torch.where(chosen != 0, written, chosen) if only_active else written
    expected = module.decode(edited) + x - module(x)

    clamp = Clamp(from_sae_lens(module, dtype=torch.float64), FEATURES, mode, only_active)
    torch.testing.assert_close(clamp.apply(x), expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(clamp.displacement(x), (expected - x).detach(), rtol=1e-10, atol=1e-10)


@VARIANTS
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_finite_differences(architecture: str, options: dict[str, Any], mode: Mode) -> None:
    clamp = Clamp(sae_of(architecture, **options), FEATURES, mode)
    x = residuals(1, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(clamp.apply, (x,), eps=1e-7, atol=1e-6)


@VARIANTS
def test_reference_is_encoded_after_the_clamp(architecture: str, options: dict[str, Any]) -> None:
    module = random_sae(architecture, dtype=torch.float64, **options)
    clamp = Clamp(from_sae_lens(module, dtype=torch.float64), FEATURES, Set(2.0))
    x_def = clamp.apply(residuals(2, 3, dtype=torch.float64))
    expected = module.encode(x_def)[..., FEATURES].detach()
    torch.testing.assert_close(clamp.reference(x_def), expected)
    assert not torch.allclose(expected, torch.full_like(expected, 2.0))


@pytest.mark.parametrize("architecture", POINTWISE)
def test_pointwise_clamps_use_only_their_own_columns(architecture: str) -> None:
    sae = sae_of(architecture)
    others = torch.ones(D_SAE, dtype=torch.bool)
    others[list(FEATURES)] = False
    blank = replace(
        sae,
        W_enc=sae.W_enc.masked_fill(others, torch.nan),
        W_dec=sae.W_dec.masked_fill(others[:, None], torch.nan),
    )
    x = residuals(2, 3, dtype=torch.float64)
    expected = Clamp(sae, FEATURES, Set(-5.0)).apply(x)
    torch.testing.assert_close(Clamp(blank, FEATURES, Set(-5.0)).apply(x), expected)


def test_what_is_not_edited_keeps_every_bit() -> None:
    clamp = Clamp(transparent(), (0, 1), Set(-5.0))
    x = 1e3 * torch.randn(4, 5, 4)
    x[..., :2] = -x[..., :2].abs()  # both clamped features inactive everywhere
    assert torch.equal(clamp.apply(x), x)

    mask = torch.rand(4, 5) < 0.5
    everywhere = Clamp(transparent(), (0, 1), Set(-5.0), only_active=False)
    defended = everywhere.apply(x, mask)
    assert torch.equal(defended[~mask], x[~mask])
    assert torch.equal(defended[mask], everywhere.apply(x)[mask])


def test_masked_out_positions_may_hold_anything() -> None:
    x = torch.ones(1, 2, 4)
    x[0, 0] = torch.inf
    defended = Clamp(transparent(), (0,), Set(-5.0)).apply(x, torch.tensor([[False, True]]))
    assert torch.equal(defended[0, 0], x[0, 0])
    assert defended[0, 1].tolist() == [-5.0, 1.0, 1.0, 1.0]


ALL, NONE, LAST, REAL = [[1, 1, 1]] * 2, [[0, 0, 0]] * 2, [[0, 0, 1]] * 2, [[0, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("positions", "mask", "n_answer", "edited"),
    [
        ("all", None, 0, ALL),
        ("all", REAL, 2, REAL),
        ("last", None, 0, LAST),
        ("last", REAL, 0, [[0, 0, 1], [0, 0, 0]]),
        ("last", None, 2, [[1, 0, 0]] * 2),
        ("last", REAL, 1, [[0, 1, 0]] * 2),
        ("last", None, 3, NONE),
        ("prompt", None, 0, ALL),
        ("prompt", REAL, 0, REAL),
        ("prompt", REAL, 1, [[0, 1, 0], [1, 1, 0]]),
        ("prompt", None, 3, NONE),
        ("answer", None, 0, NONE),
        ("answer", REAL, 2, [[0, 1, 1], [0, 1, 0]]),
        ("answer", None, 3, ALL),
    ],
)
def test_positions(positions: Positions, mask: list[list[int]] | None, n_answer: int, edited: list[list[int]]) -> None:
    clamp = Clamp(transparent(), (1,), Set(-5.0), positions=positions)
    x = torch.ones(2, 3, 4)
    defended = clamp.apply(x, None if mask is None else torch.tensor(mask, dtype=torch.bool), n_answer)
    assert (defended != x).any(dim=-1).int().tolist() == edited


def test_defended_state_has_the_dtype_of_the_residual() -> None:
    clamp = Clamp(sae_of(dtype=torch.float32), FEATURES, Set(-5.0))
    x = residuals(2, 3, dtype=torch.bfloat16)
    assert clamp.apply(x).dtype == torch.bfloat16
    torch.testing.assert_close(clamp.apply(x), clamp.apply(x.float()).bfloat16(), rtol=0, atol=0)


def test_what_a_clamp_knows() -> None:
    module = random_sae("jumprelu")
    clamp = Clamp(from_sae_lens(module), FEATURES, Set(0.0))
    assert clamp.indices.tolist() == list(FEATURES)
    assert clamp.site == Site(1, "pre")
    torch.testing.assert_close(clamp.encoder, module.W_enc.detach()[:, FEATURES])
    torch.testing.assert_close(clamp.decoder, module.W_dec.detach()[list(FEATURES)])
    torch.testing.assert_close(clamp.threshold, module.threshold.detach()[list(FEATURES)].clamp(min=0))
    x = residuals(2)
    pre = (x - module.b_dec) @ module.W_enc + module.b_enc
    torch.testing.assert_close(clamp.pre_activations(x), pre.detach()[:, FEATURES])


def test_features_may_come_as_any_integers() -> None:
    assert Clamp(transparent(), torch.tensor([2, 1]), Set(0.0)).features == (2, 1)


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        ((), "no features"),
        ((0, 3), "feature 3 is out of range; this SAE has features 0..2"),
        ((-1,), "feature -1 is out of range"),
        ((1, 2, 1), "feature 1 is named twice"),
        ((torch.tensor(1.5),), "must be integers"),
    ],
)
def test_unusable_features_are_refused(features: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Clamp(transparent(), features, Set(0.0))


@pytest.mark.parametrize("mode", [Set, Scale, Floor])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_must_be_finite(mode: Any, value: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        mode(value)


def test_site_is_the_one_given_or_that_of_the_sae() -> None:
    nowhere = replace(transparent(), site=None)
    assert Clamp(nowhere, (0,), Set(0.0), site=Site(3)).site == Site(3)
    assert Clamp(transparent(), (0,), Set(0.0), site=Site(3)).site == Site(3)
    with pytest.raises(InputError, match="give the clamp a site"):
        Clamp(nowhere, (0,), Set(0.0))


# Several clamps


def clamp_at(site: Site, sae: SAE, features: tuple[int, ...], mode: Mode = MODES[0]) -> Clamp:
    return Clamp(sae, features, mode, site=site)


def test_sites_are_in_the_order_of_the_forward_pass() -> None:
    sae = transparent()
    late, early, same = (clamp_at(site, sae, (f,)) for f, site in enumerate([Site(4), Site(1), Site(3, "post")]))
    defense = Defense((late, early, same))
    assert defense.sites == (Site(1), Site(4))
    assert defense.at(Site(4)) == defense.at(Site(3, "post")) == (late, same)
    assert defense.at(Site(1, "pre")) == (early,)
    assert defense.at(Site(1, "post")) == ()


@VARIANTS
def test_clamps_at_one_site_edit_one_decomposition(architecture: str, options: dict[str, Any]) -> None:
    """In either order: the clamp of all their features, where the modes agree."""
    sae, x = sae_of(architecture, **options), residuals(2, 3, dtype=torch.float64)
    expected = clamp_at(Site(1), sae, FEATURES).apply(x)
    halves = (clamp_at(Site(1), sae, FEATURES[:2]), clamp_at(Site(0, "post"), sae, FEATURES[2:]))
    for order in itertools.permutations(halves):
        torch.testing.assert_close(Defense(order).apply(Site(1), x), expected)


def test_different_modes_at_one_site_by_hand() -> None:
    sae = transparent()
    defense = Defense((Clamp(sae, (1,), Set(-5.0)), Clamp(sae, (2,), Scale(2.0), positions="last")))
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]])
    assert defense.apply(Site(0), x).tolist() == [[[1.0, -5.0, 3.0, 4.0], [1.0, -5.0, 6.0, 4.0]]]
    padded = torch.tensor([[False, True]])
    assert defense.apply(Site(0), x, padded).tolist() == [[[1.0, 2.0, 3.0, 4.0], [1.0, -5.0, 6.0, 4.0]]]
    assert defense.apply(Site(7), x) is x


def test_defenses_that_mean_nothing_are_refused() -> None:
    sae = transparent()
    with pytest.raises(InputError, match="no clamp"):
        Defense(())
    with pytest.raises(InputError, match="different SAEs"):
        Defense((clamp_at(Site(1), sae, (0,)), clamp_at(Site(0, "post"), transparent(), (1,))))
    with pytest.raises(InputError, match="feature 1 is named twice"):
        Defense((clamp_at(Site(1), sae, (0, 1)), clamp_at(Site(1), sae, (1,))))
    Defense((clamp_at(Site(1), sae, (0, 1)), clamp_at(Site(2), transparent(), (1,))))


def test_gradient_reaches_the_residual_through_a_defense() -> None:
    defense = Defense((Clamp(sae_of(), FEATURES, Set(-5.0)),))

    def defend(x: Tensor) -> Tensor:
        return defense.apply(Site(1), x)

    x = residuals(1, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(defend, (x,), eps=1e-7, atol=1e-6)
