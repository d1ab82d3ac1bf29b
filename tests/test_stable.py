"""C2 and C3 as constraints of a search: closed forms, another implementation, replays that know of no search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.testing import assert_close

from recover.defenses.clamps import Clamp, Defense, Scale
from recover.defenses.defended import Defended, defend
from recover.evidence.certificate import certify
from recover.models.host import Model, Prompts
from recover.numerics.metrics import norm
from recover.planted.network import Linear, Network
from recover.saes.activations import AbsTopK, Activation, JumpReLU, ReLU, TopK
from recover.saes.sae import SAE, from_sae_lens
from recover.search.ascent import Schedule, find_perturbation
from recover.search.constraints.linear import ActivationStable, DecodeStable, EncoderOrthogonal
from recover.search.constraints.pinned import Pinned
from recover.search.pinned import find_pinned
from recover.search.restored import find_restored
from recover.search.restoring import RestoredSolution
from recover.search.stable import find_stable
from recover.tasks.behaviors import AnswerLikelihood, LogitDifference
from recover.types import InputError, Site, Surface
from tests.by_hand import sae_lens_sae
from tests.models import left_padded, tiny_lm, token_rows

FAR = Schedule(goal=1e6, steps=30, restarts=0)
"""A goal that nothing reaches: the search goes on to the best that there is."""
FEW = replace(FAR, steps=8)
"""Where nothing but what holds of every search is asked."""
BOTH = pytest.mark.parametrize("kind", [ActivationStable, DecodeStable])
SHEAR = torch.eye(4)
SHEAR[1, 2] = 2.0
"""`h_1 + 2 h_2` arrives in the place of `h_1`."""


def world(h: Tensor, along: Tensor, *clamps: Clamp, maps: tuple[Tensor, ...] = (), every: bool = False) -> Defended:
    """The residual `h [batch d_model]` at the first site, linear blocks, and the score `along . residual`."""
    n, d_model = h.shape
    blocks = [Linear(torch.eye(d_model)), *(Linear(J) for J in maps), Linear(torch.eye(d_model))]
    head = torch.zeros(n + 1, d_model)
    head[:n] = along
    network = Network(torch.cat([h, h[:1]]), blocks, head, torch.zeros(n + 1)).eval().requires_grad_(False)
    ids = torch.arange(n)[:, None]
    prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool))
    behavior = LogitDifference(torch.arange(n), torch.full((n,), n))
    return defend(Model(network), Defense(clamps), prompts, behavior, surface=Surface("every" if every else "first"))


def one(*values: float) -> Tensor:
    return torch.tensor([values])


def reads_axes(*features: int, activation: Activation | None = None, site: int = 1, alike: bool = False) -> Clamp:
    """Feature `i` reads axis `i` twofold and writes it; `alike` lets feature 1 write what feature 0 does."""
    eye, zero = torch.eye(4), torch.zeros(4)
    W_dec = eye[[0, 0, 2, 3]] if alike else eye
    sae = SAE(2 * eye, zero, W_dec, zero, activation or ReLU(), Site(site), "standard", "")
    return Clamp(sae, features, Scale(1.0))


def gains(defended: Defended, kind: Any, budget: float, schedule: Schedule = FAR) -> tuple[Tensor, RestoredSolution]:
    """How much slack is gained, with what a result promises looked at afresh."""
    found = find_stable(defended, kind, budget, schedule)
    prompts, every = defended.suffix.prompts, len(defended.delta_sites) > 1
    facts = certify(
        defended.suffix.model,
        defended.defense,
        prompts,
        defended.behavior,
        found.delta,
        surface=Surface("every" if every else "first"),
    )
    drift = facts.relative_drift if kind is ActivationStable else _relative(facts.decode_drift, defended)
    assert bool((drift <= 1.1e-4).all())
    assert bool((facts.norm <= budget).all())
    assert bool((found.drift <= 1e-4).all())
    assert_close(found.slack, facts.slack, rtol=1e-3, atol=1e-3)
    return found.slack - defended.behavior.slack(defended.defended_logits), found


def _relative(drift: Tensor, defended: Defended) -> Tensor:
    """As a share of what is written in the defended state."""
    states, size = defended.states(), torch.zeros(len(drift))
    for site in defended.defense.sites:
        written = torch.stack([c.read(states[site]) @ c.decoder for c in defended.defense.at(site)]).sum(dim=0)
        size += written.flatten(1).norm(dim=1) ** 2
    return torch.where(drift == 0, 0.0, drift / size.sqrt())


def assert_nearly(gained: Tensor, best: float) -> None:
    """All of the closed form but what is kept clear of thresholds, and not more than it."""
    assert float(gained.max()) <= best * (1 + 1e-6)
    assert float(gained.min()) >= best * (1 - 1.5e-3)


# Closed forms


@BOTH
@pytest.mark.parametrize(
    ("activation", "room"), [(ReLU(), 1.0), (JumpReLU(torch.full((4,), 3.0)), 2.5)], ids=["relu", "jumprelu"]
)
def test_an_inactive_feature_moves_up_to_its_threshold_where_c1_admits_nothing(
    kind: Any, activation: Activation, room: float
) -> None:
    """A pre-activation of -2, read twofold: axis 0 may rise by 1, or by 2.5 to a threshold of 3."""
    clamp = reads_axes(0, activation=activation)
    defended = world(one(-1.0, 0.0, 0.0, 0.0), one(3.0, 0.0, 0.0, 0.0), clamp)
    assert (
        find_perturbation(defended, defended.zero_delta, EncoderOrthogonal.of(clamp), 10.0).delta.count_nonzero() == 0
    )
    gained, found = gains(defended, kind, 10.0)
    assert_nearly(gained, 3 * room)
    assert found.drift.count_nonzero() == 0
    # A shorter budget is all there is.
    assert_nearly(gains(defended, kind, 0.25)[0], 0.75)


def test_active_features_stay_and_inactive_ones_stop_at_their_thresholds() -> None:
    """Along (1, 2, 1, 1) axis 0 is held, axis 1 rises by 0.5, and what is left of the budget goes to 2 and 3.

    C1 has these two alone, and gains sqrt(2) of each unit of budget.
    """
    clamp = reads_axes(0, 1)
    defended = world(one(4.0, -0.5, 0.0, 0.0), one(1.0, 2.0, 1.0, 1.0), clamp)
    gained, found = gains(defended, ActivationStable, 2.5)
    rest = ((2.5**2 - 0.5**2) / 2) ** 0.5
    assert_nearly(gained, 1 + 2 * rest)
    assert_close(found.delta[0, 0], torch.tensor([0.0, 0.5, rest, rest]), rtol=2e-3, atol=1e-3)
    under_c1 = find_perturbation(defended, defended.zero_delta, EncoderOrthogonal.of(clamp), 2.5, FAR)
    start = defended.behavior.slack(defended.defended_logits)
    assert_close(under_c1.slack - start, torch.tensor([2.5 * 2**0.5]))


def test_a_feature_may_fall_as_far_as_it_likes_below_its_threshold() -> None:
    defended = world(one(-1.0, 0.0, 0.0, 0.0), one(-1.0, 0.0, 0.0, 0.0), reads_axes(0))
    assert_nearly(gains(defended, ActivationStable, 7.0)[0], 7.0)


def test_c3_lets_features_trade_what_they_write_together() -> None:
    """Features 0 and 1 write alike: pre-activations 2 and 6 may go to 8 and 0 and write the same; C2 admits nothing.

    In a budget of 3 and along (1, 1/2, 3/10, 0): (1, -1) / sqrt(2) gains 1 / sqrt(8) by unit, axis 2 the rest.
    """
    h, clamp = one(1.0, 3.0, 0.0, 0.0), reads_axes(0, 1, alike=True)
    defended = world(h, one(1.0, 0.0, 0.0, 0.0), clamp)
    assert gains(defended, ActivationStable, 20.0)[0].count_nonzero() == 0
    gained, found = gains(defended, DecodeStable, 20.0)
    assert_nearly(gained, 3.0)
    assert_close(found.delta[0, 0], torch.tensor([3.0, -3.0, 0.0, 0.0]), rtol=2e-3, atol=1e-3)
    defended = world(h, one(1.0, 0.5, 0.3, 0.0), clamp)
    assert_nearly(gains(defended, DecodeStable, 3.0)[0], 3 * (1 / 8 + 0.09) ** 0.5)
    assert_nearly(gains(defended, ActivationStable, 3.0)[0], 3 * 0.3)


@BOTH
@pytest.mark.parametrize("make", [TopK, AbsTopK])
def test_competing_features_are_not_pushed_out_where_c1_pushes_them(kind: Any, make: Any) -> None:
    """Of (3, 2, 1, 0) the two largest are active: axis 2 may rise by 1, then it takes the place of feature 1."""
    h, along = one(3.0, 2.0, 1.0, 0.0), one(0.0, 0.0, 1.0, 0.0)
    clamp = reads_axes(1, activation=make(2))
    defended = world(h, along, clamp)
    under_c1 = find_perturbation(defended, defended.zero_delta, EncoderOrthogonal.of(clamp), 1.3, FAR)
    assert_close(kind(clamp, h[:, None]).violation(under_c1.delta), torch.tensor([4.0]))
    assert_nearly(gains(defended, kind, 1.3)[0], 1.0)
    # An inactive one stays out. It may come up to feature 1, and that one make room: d2 = 1 + d1 of length 1.3.
    room = 0.5 + ((1.3**2 - 0.5) / 2) ** 0.5
    assert_nearly(gains(world(h, along, reads_axes(2, activation=make(2))), kind, 1.3)[0], room)


@BOTH
@pytest.mark.parametrize("every", [False, True])
def test_several_sites_between_linear_blocks(kind: Any, every: bool) -> None:
    """Along (1, 1, 1/2, 1/4) of what comes out, `d0 <= 1` at site 1, and `d1 + 2 d2 (+ e1) <= 2` at site 2.

    With both met: of what is read at site 2 the shortest is (2, 4) / 5 (or (1, 2, 1) / 3), of which half of `d2`
    counts, and what is left of the budget goes along the rest of the score, orthogonal to both.
    """
    clamps = reads_axes(0), reads_axes(1, site=2)
    defended = world(one(-1.0, -2.0, 0.0, 0.0), one(1.0, 1.0, 0.5, 0.25), *clamps, maps=(SHEAR,), every=every)
    if every:
        length, rest = 4**2 - 1 - 4 / 6, 1 + (1 - 4 / 6) / 4 + 0.25 + 2 * 0.25**2
        best = 1 + 2 + (4 / 6) / 2 + (length * rest) ** 0.5
    else:
        length, rest = 4**2 - 1 - 4 / 5, (1 / 5) / 4 + 0.25**2
        best = 1 + 2 + (4 / 5) / 2 + (length * rest) ** 0.5
    assert_nearly(gains(defended, kind, 4.0)[0], best)


# Another implementation


def best_gain(c: Tensor, A: Tensor, awake: Tensor, gap: Tensor, budget: float) -> float:
    """The largest `c . d` under C2 and C4, by scipy's sequential quadratic programming, in units of the budget."""
    A, c, gap = A.double(), c.double(), gap.double() / budget
    held = A[:, awake] / A[:, awake].norm(dim=0)
    left, singular, _ = torch.linalg.svd(held, full_matrices=True)
    free = left[:, int((singular > 1e-6).sum()) :]
    steep, reads, room = (free.T @ c).numpy(), (A[:, ~awake].T @ free).numpy(), gap[~awake].numpy()
    inside = [
        {"type": "ineq", "fun": lambda d: 1 - d @ d, "jac": lambda d: -2 * d},
        {"type": "ineq", "fun": lambda d: room - reads @ d, "jac": lambda d: -reads},
    ]
    if not free.shape[1]:
        return 0.0
    found = minimize(
        lambda d: -steep @ d,
        0 * steep,
        jac=lambda d: -steep,
        constraints=inside if len(room) else inside[:1],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-10},
    )
    return -budget * float(found.fun)


@pytest.mark.parametrize("seed", range(6))
def test_a_linear_score_is_raised_as_far_as_quadratic_programming_finds(seed: int) -> None:
    """Random features, about half of them asleep; above what C1 gains, `budget ||P c||`."""
    generator = torch.Generator().manual_seed(seed)
    A, h, c = (torch.randn(*size, generator=generator) for size in ((10, 6), (3, 10), (3, 10)))
    sae = SAE(A, torch.zeros(6), A.T.contiguous(), torch.zeros(10), ReLU(), Site(1), "standard", "")
    clamp = Clamp(sae, range(6), Scale(1.0))
    gained, _ = gains(world(h, c, clamp), ActivationStable, 2.0)
    pre = h @ A
    best = torch.tensor([best_gain(c[i], A, pre[i] > 0, -pre[i], 2.0) for i in range(3)])
    assert bool((gained <= best * (1 + 1e-4)).all())
    assert bool((gained >= 0.995 * best).all())
    assert bool((gained > 1.05 * 2.0 * norm(EncoderOrthogonal.of(clamp).project(c[:, None]))).all())


# In a model


def tiny(architecture: str, sites: tuple[int, ...] = (1,), *, every: bool = False) -> Defended:
    """Clamps that double, live, and the token that comes twelfth at base as what should be brought back."""
    sae = from_sae_lens(sae_lens_sae(architecture))
    model, prompts = Model(tiny_lm(scale=8.0)), left_padded(token_rows())
    with torch.no_grad():
        target = model.run(prompts).logits.topk(13).indices[:, 12]
    clamps = tuple(Clamp(sae, (2, 7, 11, 19, 4, 5, 1), Scale(2.0), True, "all", Site(site)) for site in sites)
    return defend(
        model,
        Defense(clamps),
        prompts,
        AnswerLikelihood(target),
        n_pos=2,
        surface=Surface("every" if every else "first"),
    )


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(name, ActivationStable) for name in ("standard", "jumprelu", "gated", "topk")]
    + [(name, DecodeStable) for name in ("standard", "topk")],
)
def test_in_a_model_it_gains_what_c1_does_or_more(architecture: str, kind: Any) -> None:
    """How much more hangs on where an ascent in a curved model leads: the closed forms above decide that."""
    defended, budget = tiny(architecture), 2.0 if architecture == "topk" else 0.6
    gained, found = gains(defended, kind, budget, FEW)
    under_c1 = find_restored(defended, budget, FEW, tolerance=1e-4)
    assert bool((found.slack >= under_c1.slack - 1e-3).all())
    assert bool((gained >= -1e-3).all())


@pytest.mark.parametrize(
    ("sites", "every", "kind"),
    [
        ((1, 2), False, DecodeStable),
        ((1, 3), True, ActivationStable),
    ],
)
def test_at_several_sites_it_gains_what_holding_all_of_them_does_or_more(
    sites: tuple[int, ...], every: bool, kind: Any
) -> None:
    defended, budget = tiny("standard", sites, every=every), 0.6
    _, found = gains(defended, kind, budget, FEW)
    if every:
        stricter = find_pinned(Pinned.of(defended), budget, FEW).slack
    else:
        stricter = find_restored(defended, budget, FEW, tolerance=1e-4).slack
    assert bool((found.slack >= stricter - 1e-3).all())


def test_examples_do_not_see_each_other() -> None:
    h = torch.tensor([[4.0, -0.5, 0.0, 0.0], [1.0, 3.0, -2.0, 0.0], [-1.0, -1.0, 0.0, 2.0]])
    along = torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, -1.0, 3.0, 0.5], [2.0, 1.0, 0.5, 0.0]])
    clamp = reads_axes(0, 1, 2)
    together = find_stable(world(h, along, clamp), ActivationStable, 5.0, FAR)
    for row in range(3):
        alone = find_stable(world(h[[row]], along[[row]], clamp), ActivationStable, 5.0, FAR)
        assert_close(alone.delta, together.delta[[row]], rtol=1e-5, atol=1e-5)
    defended = tiny("standard", (1, 2))
    together = find_stable(defended, ActivationStable, 0.6, Schedule(steps=3, restarts=0))
    for row in (3, 1):
        alone = find_stable(defended.select(torch.tensor([row])), ActivationStable, 0.6, Schedule(steps=3, restarts=0))
        assert_close(alone.slack, together.slack[[row]], rtol=1e-3, atol=1e-3)


def test_what_c1_recovers_is_left_at_that() -> None:
    defended = world(one(4.0, -0.5, 0.0, 0.0), one(1.0, 2.0, 1.0, 1.0), reads_axes(0, 1))
    gap = -defended.behavior.slack(defended.defended_logits)
    schedule = Schedule(goal=0.5 - float(gap))
    found = find_stable(defended, ActivationStable, 2.5, schedule)
    under_c1 = find_restored(defended, 2.5, schedule, tolerance=1e-4)
    assert_close(found.delta, under_c1.delta)


@BOTH
def test_an_impossible_search_gives_no_delta_or_none_to_speak_of(kind: Any) -> None:
    defended = tiny("standard", (1, 2))
    gained, found = gains(defended, kind, 1e-6, Schedule(steps=3))
    assert bool((gained >= -1e-4).all())
    assert not bool(found.recovered.any())


def test_what_cannot_be_asked_is_refused() -> None:
    defended = tiny("standard")
    for budget, tolerance in ((0.0, 1e-4), (1.0, 0.0)):
        with pytest.raises(InputError, match="must be positive"):
            find_stable(defended, ActivationStable, budget, tolerance=tolerance)
    before = defended.entered_at(Surface(placement="before_clamp"))
    with pytest.raises(InputError, match="after the clamp"):
        find_stable(before, ActivationStable, 1.0)
