"""The certificate against hooks on the plain module and sae_lens's own encoder, and against cases computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from recover.defenses.clamps import Clamp, Defense, Floor, Scale, Set
from recover.evidence.certificate import Certificate, certify, constraint_residual
from recover.models.host import Model, Prompts
from recover.numerics.subspaces import NullSpace
from recover.planted.network import Linear, Network
from recover.saes.activations import ReLU, TopK
from recover.saes.sae import SAE, from_sae_lens
from recover.search.constraints.linear import EncoderOrthogonal
from recover.tasks.behaviors import LogitDifference
from recover.types import InputError, Placement, Site, Surface
from tests.by_hand import Edits, clamped_forward, defense_of, sae_lens_sae
from tests.models import D_MODEL, left_padded, plain_forward, plain_lm, tiny_lm, token_rows

TARGET, OTHER = torch.tensor([3, 9, 27, 40]), torch.tensor([5, 1, 30, 2])
BEHAVIOR = LogitDifference(TARGET, OTHER)
CLOSE = {"atol": 3e-4, "rtol": 1e-4}


def random_delta(n_pos: int, batch: int = 4, size: float = 1.5) -> Tensor:
    return size * torch.randn(batch, n_pos, D_MODEL, generator=torch.Generator().manual_seed(4))


def share(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole if part > 0 else part


def by_hand(
    module: nn.Module,
    ids: Tensor,
    delta: Tensor,
    edits: Edits,
    placement: str,
    target: int,
    other: int,
    skip_first: int = 0,
) -> dict[str, Tensor]:
    """Every figure of the certificate for one prompt."""
    first = min(edits, key=lambda site: site.index)

    def forward(push: Tensor) -> tuple[float, dict[Site, Tensor]]:
        logits, after = clamped_forward(module, ids, push, edits, placement, skip_first)
        return float(logits[target] - logits[other]), after

    n_pos = len(delta)
    slack, recovered = forward(delta)
    defended_slack, defended = forward(torch.zeros_like(delta))
    h = plain_forward(module, ids, read=first)[1][-n_pos:]
    h_def = defended[first][-n_pos:]
    z_def, z_rec, shifts, margins, decoded, limits, still = [], [], [], [], [], [], []
    for site, here in edits.items():
        sae = here[0][0]
        chosen = [f for edit in here for f in edit[1]]
        x_def, x_rec = defended[site][-n_pos:], recovered[site][-n_pos:]
        a, b = sae.encode(x_def)[:, chosen], sae.encode(x_rec)[:, chosen]
        bias = sae.b_enc - (sae.b_dec @ sae.W_enc if sae.cfg.apply_b_dec_to_input else 0)
        pre_def, pre_rec = ((x @ sae.W_enc + bias)[:, chosen] for x in (x_def, x_rec))
        threshold = sae.threshold[chosen].clamp(min=0) if hasattr(sae, "threshold") else torch.zeros(len(chosen))
        if sae.cfg.architecture() == "topk":
            threshold = threshold * torch.nan
        gaps = pre_def - threshold
        z_def.append(a)
        z_rec.append(b)
        shifts += [(pre_rec - pre_def)[:, i].abs().max() for i in range(len(chosen))]
        margins += [gaps[gaps[:, i].abs().argmin(), i] for i in range(len(chosen))]
        decoded.append((b - a) @ sae.W_dec[chosen])
        arrived = delta if site == first else x_rec - x_def
        limits.append(1e-5 * max(sae.W_enc[:, f].norm() for f in chosen) * (x_def.norm() + arrived.norm()))
        still.append(max(shifts[-len(chosen) :]) <= limits[-1] and (b - a).norm() <= limits[-1])
    moved = []
    for site in edits:
        # What enters a site: every edit below it, and none there.
        below = {other: here for other, here in edits.items() if other.index < site.index}
        if below:
            below[site] = [untouched(edits[site][0])]
            _, states = clamped_forward(module, ids, 0 * delta, below, placement, skip_first)
            moved.append((defended[site] - states[site]).flatten())
        else:
            moved.append((defended[site] - plain_forward(module, ids, read=site)[1]).flatten())
    everywhere = torch.cat(moved)
    a, b = torch.cat(z_def, dim=1), torch.cat(z_rec, dim=1)
    A = torch.cat([edit[0].W_enc[:, list(edit[1])] for edit in edits[first]], dim=1)
    residual = (delta @ A).norm() / (A.norm() * delta.norm())
    return {
        "shows": torch.tensor(slack > 0),
        "score": torch.tensor(slack),
        "slack": torch.tensor(slack),
        "defended_slack": torch.tensor(defended_slack),
        "norm": delta.norm(),
        "relative_norm": delta.norm() / h_def.norm(),
        "displacement": (h_def - h).norm(),
        "displacement_everywhere": everywhere.norm(),
        "constraint_residual": residual,
        "preactivation_shift": torch.stack(shifts),
        "threshold_margin": torch.stack(margins),
        "drift": (b - a).norm(),
        "relative_drift": share((b - a).norm(), a.norm()),
        "decode_drift": torch.stack([part.norm() for part in decoded]).norm(),
        "clamp_floor_violation": share((a - b).clamp(min=0).norm(), a.norm()),
        "rounding": max(limits),
        "held": torch.tensor(bool(residual <= 1e-5) and all(still)),
        "dormant": (a <= 0).sum().float(),
        "reactivated": ((a <= 0) & (b > 0)).sum().float(),
    }


def untouched(edit: Any) -> Any:
    """The same edit of no feature at all."""
    sae, _, *how = edit
    return (sae, (), *how)


def cases() -> dict[str, tuple[str, int, Placement, Edits]]:
    standard, jump, top, second = (
        sae_lens_sae("standard"),
        sae_lens_sae("jumprelu"),
        sae_lens_sae("topk"),
        sae_lens_sae("standard", seed=1),
    )
    S = (2, 7, 11, 19)
    return {
        "standard": ("llama", 1, "after_clamp", {Site(1): [(standard, S, Set(-2.0), True, "all")]}),
        "jumprelu, 3 positions": ("gpt2", 3, "after_clamp", {Site(2): [(jump, S, Set(-2.0), True, "all")]}),
        "topk, before": ("llama", 2, "before_clamp", {Site(1): [(top, S, Scale(0.0), True, "all")]}),
        "standard, before": ("gemma2", 2, "before_clamp", {Site(2): [(standard, S, Set(1.0), False, "all")]}),
        "last position": ("gpt_neox", 1, "after_clamp", {Site(1): [(standard, S, Set(-2.0), False, "last")]}),
        "last of 3 positions": ("llama", 3, "after_clamp", {Site(3, "post"): [(jump, S, Floor(2), False, "last")]}),
        "two clamps at a site": (
            "llama",
            2,
            "after_clamp",
            {Site(1): [(standard, (2, 7), Set(-2.0), True, "all"), (standard, (11, 19), Scale(3.0), True, "last")]},
        ),
        "two sites": (
            "gemma3",
            2,
            "after_clamp",
            {Site(1): [(standard, S, Set(-2.0), True, "all")], Site(3): [(second, (0, 5), Floor(1.5), False, "all")]},
        ),
        "site 0": ("gpt2", 1, "before_clamp", {Site(0): [(standard, S, Set(-2.0), True, "all")]}),
    }


CASES = cases()


@pytest.mark.parametrize("skip_first", [0, 3])
@pytest.mark.parametrize("name", CASES)
def test_every_figure_agrees_with_hooks_on_the_plain_module(name: str, skip_first: int) -> None:
    family, n_pos, placement, edits = CASES[name]
    module, rows, delta = tiny_lm(family), token_rows(), random_delta(n_pos)
    defense = defense_of(edits, skip_first=skip_first)
    certificate = certify(Model(module), defense, left_padded(rows), BEHAVIOR, delta, Surface(placement=placement))
    expected = [
        by_hand(module, ids, delta[i], edits, placement, int(TARGET[i]), int(OTHER[i]), skip_first)
        for i, ids in enumerate(rows)
    ]
    for figure in vars(certificate):
        values = torch.stack([one[figure] for one in expected])
        assert_close(getattr(certificate, figure), values, **CLOSE, equal_nan=True, msg=lambda m, f=figure: f"{f}: {m}")
    assert (certificate.drift > 0.01).any()
    assert (certificate.displacement > 0.01).any()


def test_two_clamps_in_the_place_of_one_give_the_same_certificate() -> None:
    sae = from_sae_lens(sae_lens_sae("standard"))
    one = Defense((Clamp(sae, (2, 7, 11, 19), Set(-2.0), site=Site(1)),))
    two = Defense((Clamp(sae, (2, 7), Set(-2.0), site=Site(1)), Clamp(sae, (11, 19), Set(-2.0), site=Site(1))))
    model, prompts, delta = Model(tiny_lm()), left_padded(token_rows()), random_delta(2)
    first, second = (certify(model, defense, prompts, BEHAVIOR, delta) for defense in (one, two))
    for figure in vars(first):
        assert_close(getattr(first, figure), getattr(second, figure), **CLOSE, msg=lambda m, f=figure: f"{f}: {m}")


def axis_sae(activation: Any, b_enc: float = 0.0) -> SAE:
    """Feature `i` reads and writes dimension `i`."""
    eye, zero = torch.eye(D_MODEL), torch.zeros(D_MODEL)
    return SAE(eye, zero + b_enc, eye, zero, activation, Site(1), "standard", "")


def last_residual(module: nn.Module, rows: list[Tensor]) -> Tensor:
    return torch.stack([plain_forward(module, ids, read=Site(1))[1][-1] for ids in rows])


def test_a_planted_case_computed_by_hand() -> None:
    """Dimensions 0 and 1 are clamped to 7 and the delta moves 0 by +2, 1 by -8 and 5 by 6."""
    module, rows = tiny_lm(), token_rows()
    defense = Defense((Clamp(axis_sae(ReLU()), (0, 1), Set(7.0), only_active=False),))
    delta = torch.zeros(4, 1, D_MODEL)
    delta[:, 0, 0], delta[:, 0, 1], delta[:, 0, 5] = 2.0, -8.0, 6.0
    facts = certify(Model(module), defense, left_padded(rows), BEHAVIOR, delta)
    h = last_residual(module, rows)
    # The clamp adds 7 - relu(h): where h is negative, the error stays and 7 + h is left.
    h_def = h.clone()
    h_def[:, :2] += 7 - h[:, :2].clamp(min=0)
    z_def, z_rec = h_def[:, :2].clamp(min=0), (h_def[:, :2] + torch.tensor([2.0, -8.0])).clamp(min=0)
    assert_close(facts.norm, torch.full((4,), 104.0**0.5))
    assert_close(facts.constraint_residual, torch.full((4,), (68.0 / (2 * 104.0)) ** 0.5))
    assert_close(facts.preactivation_shift, torch.tensor([[2.0, 8.0]] * 4), **CLOSE)
    assert_close(facts.threshold_margin, h_def[:, :2], **CLOSE)
    assert_close(facts.drift, (z_rec - z_def).norm(dim=1), **CLOSE)
    assert_close(facts.decode_drift, facts.drift, **CLOSE)
    assert_close(facts.relative_drift, (z_rec - z_def).norm(dim=1) / z_def.norm(dim=1), **CLOSE)
    assert_close(facts.clamp_floor_violation, (z_def - z_rec).clamp(min=0).norm(dim=1) / z_def.norm(dim=1), **CLOSE)
    assert_close(facts.displacement, (h_def - h).norm(dim=1), **CLOSE)
    assert_close(facts.relative_norm, 104.0**0.5 / h_def.norm(dim=1), **CLOSE)


def test_reactivation_counts_dormant_features_that_wake() -> None:
    """Set to 0 and never negative before: both are dormant, and the delta wakes one of them at one of two positions."""
    module, rows = tiny_lm(), token_rows()
    defense = Defense((Clamp(axis_sae(ReLU()), (0, 1), Set(0.0), only_active=False),))
    delta = torch.zeros(4, 2, D_MODEL)
    delta[:, 1, 0] = 1000.0
    facts = certify(Model(module), defense, left_padded(rows), BEHAVIOR, delta)
    assert facts.dormant.tolist() == [4.0] * 4
    assert facts.reactivated.tolist() == [1.0] * 4


def test_features_that_compete_drift_under_an_orthogonal_delta() -> None:
    """TopK, k = 2: lifting the third largest above the second pushes the clamped second out."""
    module, rows = tiny_lm(), token_rows()
    h = last_residual(module, rows)
    for example, ids in enumerate(rows):
        order = h[example].argsort(descending=True)
        clamped, rival = int(order[1]), int(order[2])
        assert h[example, clamped] > 0
        delta = torch.zeros(1, 1, D_MODEL)
        delta[0, 0, rival] = h[example, clamped] - h[example, rival] + 0.5
        behavior = BEHAVIOR.select(torch.tensor([example]))
        untouched = Clamp(axis_sae(TopK(2)), (clamped,), Scale(1.0))
        facts = certify(Model(module), Defense((untouched,)), left_padded([ids]), behavior, delta)
        assert facts.constraint_residual.item() == 0
        assert facts.preactivation_shift.abs().max() < 1e-4
        assert_close(facts.drift, h[example, clamped][None], **CLOSE)
        assert facts.threshold_margin.isnan().all()
        assert not facts.held
        pointwise = replace(untouched.sae, activation=ReLU())
        facts = certify(
            Model(module),
            Defense((Clamp(pointwise, (clamped,), Scale(1.0)),)),
            left_padded([ids]),
            behavior,
            delta,
        )
        assert facts.drift.item() < 1e-4
        assert facts.held


def test_a_forbidden_delta_that_is_too_short_to_move_anything_is_not_held() -> None:
    """Of norm 2e-5, straight along what is read: shift and drift pass for rounding, the direction does not."""
    delta = torch.zeros(4, 1, D_MODEL)
    delta[:, 0, 3] = 2e-5
    defense = Defense((Clamp(axis_sae(ReLU()), (3,), Set(5.0), only_active=False),))
    facts = certify(Model(tiny_lm()), defense, left_padded(token_rows()), BEHAVIOR, delta)
    assert (facts.preactivation_shift[:, 0] <= facts.rounding).all()
    assert not facts.held.any()


def test_zero_drift_far_below_threshold_does_not_hide_a_forbidden_delta() -> None:
    """Features at -1000: a delta straight along what they read moves no activation, but the certificate tells."""
    sae = axis_sae(ReLU(), b_enc=-1000.0)
    delta = torch.zeros(4, 1, D_MODEL)
    delta[:, 0, 3] = 20.0
    defense = Defense((Clamp(sae, (3,), Set(0.0), only_active=False),))
    facts = certify(Model(tiny_lm()), defense, left_padded(token_rows()), BEHAVIOR, delta)
    assert facts.drift.tolist() == [0.0] * 4
    assert facts.reactivated.tolist() == [0.0] * 4
    assert_close(facts.preactivation_shift, torch.full((4, 1), 20.0), **CLOSE)
    assert_close(facts.constraint_residual, torch.ones(4))
    assert (facts.threshold_margin < -900).all()
    assert not facts.held.any()


def orthogonal_delta(defense: Defense, n_pos: int, size: float = 6.0) -> Tensor:
    return EncoderOrthogonal.of(*defense.at(defense.sites[0])).project(random_delta(n_pos, size=size))


def run_both(architecture: str, delta_is_orthogonal: bool) -> tuple[Certificate, Certificate]:
    edits = {Site(1): [(sae_lens_sae(architecture), (2, 7, 11, 19), Set(-2.0), True, "all")]}
    defense, model, prompts = defense_of(edits), Model(tiny_lm()), left_padded(token_rows())
    delta = orthogonal_delta(defense, 2) if delta_is_orthogonal else random_delta(2, size=6.0)
    before, after = (
        certify(model, defense, prompts, BEHAVIOR, delta, Surface(placement=placement))
        for placement in ("before_clamp", "after_clamp")  # type: ignore[arg-type]
    )
    return before, after


@pytest.mark.parametrize(
    ("gain", "move", "beside", "held"),
    [
        (1e-3, 1e-3, 0.0, False),
        (1e-3, 1e-8, 0.0, True),
        (1e3, 0.1, 0.0, True),
        (1e-3, 0.1, 1e6, False),
        (1e-3, 1e-3, 1e6, True),
    ],
)
def test_what_is_rounding_at_a_site_is_measured_by_the_states_of_that_site(
    gain: float, move: float, beside: float, held: bool
) -> None:
    """States of norm 200, and a delta with a part `beside` what is read, arrive `gain` times as large at site 2.

    There feature 3 moves by `move`. A move of 1e-3 would be half of what is rounding at the first site without the part
    beside, one of 0.1 fifty times that; with it 10 are rounding at the first site, and 0.01 at the second.
    """
    J = gain * torch.eye(D_MODEL)
    blocks = [Linear(torch.eye(D_MODEL)), Linear(J), Linear(torch.eye(D_MODEL))]
    network = Network(torch.full((61, D_MODEL), 50.0), blocks, torch.zeros(61, D_MODEL), torch.zeros(61)).eval()
    defense = Defense(tuple(Clamp(axis_sae(ReLU()), (f,), Scale(1.0), site=Site(s)) for s, f in ((1, 0), (2, 3))))
    delta = torch.zeros(4, 1, D_MODEL)
    delta[:, 0, 3], delta[:, 0, 5] = move / gain, beside
    facts = certify(Model(network), defense, left_padded(token_rows((6,) * 4)), BEHAVIOR, delta)
    assert_close(facts.preactivation_shift[:, 1], torch.full((4,), move), atol=0.2 * move + 1e-7, rtol=0)
    assert facts.held.tolist() == [held] * 4
    norms = [scale * (50.0 * D_MODEL**0.5 + ((move / gain) ** 2 + beside**2) ** 0.5) for scale in (1.0, gain)]
    assert_close(facts.rounding, torch.full((4,), 1e-5 * max(norms)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_before_and_after_the_clamp_are_one_state_under_c1_and_a_pointwise_sae(architecture: str) -> None:
    before, after = run_both(architecture, delta_is_orthogonal=True)
    assert_close(before.slack, after.slack, **CLOSE)
    for facts in (before, after):
        assert facts.drift.max() < 1e-4
        assert facts.preactivation_shift.max() < 1e-4
        assert facts.constraint_residual.max() < 1e-6
        assert facts.held.all()
    assert (after.slack - after.defended_slack).abs().max() > 0.1


@pytest.mark.parametrize(("architecture", "orthogonal"), [("standard", False), ("topk", True)])
def test_before_and_after_the_clamp_differ_otherwise(architecture: str, orthogonal: bool) -> None:
    before, after = run_both(architecture, delta_is_orthogonal=orthogonal)
    assert (before.slack - after.slack).abs().max() > 0.01
    assert_close(before.defended_slack, after.defended_slack)


def test_no_delta_recovers_nothing_and_breaks_nothing() -> None:
    name = "standard"
    family, n_pos, _, edits = CASES[name]
    facts = certify(
        Model(tiny_lm(family)), defense_of(edits), left_padded(token_rows()), BEHAVIOR, torch.zeros(4, n_pos, D_MODEL)
    )
    for zero in (facts.norm, facts.constraint_residual, facts.drift, facts.relative_drift, facts.decode_drift):
        assert zero.tolist() == [0.0] * 4
    assert torch.equal(facts.slack, facts.defended_slack)
    some = facts.select(torch.tensor([2, 1]))
    assert torch.equal(some.slack, facts.slack[[2, 1]])
    assert torch.equal(some.preactivation_shift, facts.preactivation_shift[[2, 1]])


def test_the_constraint_is_measured_over_all_clamps_of_the_first_site_only() -> None:
    sae = axis_sae(ReLU())
    clamps = (
        Clamp(sae, (3,), Scale(1.0), site=Site(2)),
        Clamp(sae, (0,), Scale(1.0), site=Site(1)),
        Clamp(sae, (1,), Scale(1.0), site=Site(1)),
    )
    delta = torch.zeros(4, 1, D_MODEL)
    delta[:, 0, 1], delta[:, 0, 3] = 3.0, 4.0
    facts = certify(Model(tiny_lm()), Defense(clamps), left_padded(token_rows()), BEHAVIOR, delta)
    assert_close(facts.constraint_residual, torch.full((4,), 3.0 / (2**0.5 * 5.0)))


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    model, prompts = Model(tiny_lm()), left_padded(token_rows())
    defense = Defense((Clamp(axis_sae(ReLU()), (0,), Set(0.0)),))
    for shape in ((3, 1, D_MODEL), (4, 1, D_MODEL - 1), (4, 12, D_MODEL), (4, 5, D_MODEL), (4, 0, D_MODEL)):
        with pytest.raises(InputError, match="does not belong"):
            certify(model, defense, prompts, BEHAVIOR, torch.zeros(shape))


def test_a_defense_that_does_not_fit_is_refused() -> None:
    prompts, delta = left_padded(token_rows()), torch.zeros(4, 1, D_MODEL)
    narrow = SAE(torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8), ReLU(), Site(1), "standard", "")
    with pytest.raises(InputError, match="reads 8 dimensions"):
        certify(Model(tiny_lm()), Defense((Clamp(narrow, (0,), Set(0.0)),)), prompts, BEHAVIOR, delta)
    high = Defense((Clamp(axis_sae(ReLU()), (0,), Set(0.0), site=Site(9)),))
    with pytest.raises(InputError, match="layer must be"):
        certify(Model(tiny_lm()), high, prompts, BEHAVIOR, delta)
    nowhere = Defense((Clamp(axis_sae(ReLU()), (0,), Set(0.0), positions="answer"),))
    with pytest.raises(InputError, match="answer"):
        certify(Model(tiny_lm()), nowhere, prompts, BEHAVIOR, delta)


def test_a_module_that_is_not_of_transformers() -> None:
    module, rows, delta = plain_lm(), token_rows((6, 6, 6, 6)), random_delta(2)
    edits: Edits = {Site(1): [(sae_lens_sae("standard"), (2, 7), Set(-2.0), False, "all")]}
    facts = certify(Model(module), defense_of(edits), left_padded(rows), BEHAVIOR, delta)
    for i, ids in enumerate(rows):
        expected = by_hand(module, ids, delta[i], edits, "after_clamp", int(TARGET[i]), int(OTHER[i]))
        assert_close(facts.slack[i], expected["slack"], **CLOSE)
        assert_close(facts.drift[i], expected["drift"], **CLOSE)


def test_padding_is_not_clamped() -> None:
    """An unconditional clamp at all positions, on a prompt alone and beside a longer one."""
    module, rows = tiny_lm(), token_rows()
    edits: Edits = {Site(1): [(sae_lens_sae("standard"), (2, 7), Set(9.0), False, "all")]}
    delta, row = random_delta(1), torch.tensor([3])
    together = certify(Model(module), defense_of(edits), left_padded(rows), BEHAVIOR, delta)
    alone = certify(Model(module), defense_of(edits), left_padded(rows).select(row), BEHAVIOR.select(row), delta[3:])
    assert isinstance(left_padded(rows).select(row), Prompts)
    assert_close(together.slack[3:], alone.slack, **CLOSE)


def test_a_wrong_encoder_in_the_search_does_not_pass_the_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features far below their threshold show no drift, so only the constraint's own measure can tell."""
    honest = Clamp.encoder.func  # type: ignore[attr-defined]

    def off_by_one(clamp: Clamp) -> torch.Tensor:
        return clamp.sae.W_enc[:, [feature - 1 for feature in clamp.features]]

    sae = from_sae_lens(sae_lens_sae("standard"), site=Site(1))
    clamp = Clamp(sae, (2, 7, 11), Set(-50.0))
    wrong = NullSpace.of(off_by_one(clamp)).project(torch.randn(1, 1, sae.d_model))
    right = NullSpace.of(honest(clamp)).project(torch.randn(1, 1, sae.d_model))
    monkeypatch.setattr(Clamp, "encoder", property(off_by_one))
    assert constraint_residual((clamp,), wrong).item() > 1e-3
    assert constraint_residual((clamp,), right).item() < 1e-6
