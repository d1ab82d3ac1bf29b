"""The defended state and its objective against clamps made by hooks on the plain module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recover.defenses.clamps import Clamp, Defense, Floor, Scale, Set
from recover.defenses.defended import defend
from recover.models.host import Model
from recover.saes.activations import ReLU
from recover.saes.sae import SAE
from recover.tasks.behaviors import AnswerLikelihood, Behavior, LogitDifference
from recover.types import InputError, Placement, Site, Surface
from tests.by_hand import Edits, clamped_forward, defense_of, sae_lens_sae
from tests.models import D_MODEL, VOCAB, left_padded, plain_forward, plain_lm, tiny_lm, token_rows

TARGET, OTHER = torch.tensor([3, 9, 27, 40]), torch.tensor([5, 1, 30, 2])
COLUMNS = torch.stack([TARGET, OTHER], dim=1)
CLOSE = {"atol": 2e-4, "rtol": 1e-4}
S = (2, 7, 11, 19)

CASES: dict[str, tuple[str, int, Placement, int, Edits]] = {
    "standard": ("llama", 1, "after_clamp", 0, {Site(1): [(sae_lens_sae("standard"), S, Set(-2.0), True, "all")]}),
    "skip first": ("llama", 1, "after_clamp", 3, {Site(1): [(sae_lens_sae("standard"), S, Set(-2.0), True, "all")]}),
    "skip the suffix too": (
        "gpt2",
        3,
        "before_clamp",
        2,
        {Site(1): [(sae_lens_sae("standard"), S, Set(-2.0), False, "all")]},
    ),
    "topk, before": ("gpt2", 2, "before_clamp", 0, {Site(2): [(sae_lens_sae("topk"), S, Scale(2.0), True, "all")]}),
    "last position, before": (
        "gemma2",
        3,
        "before_clamp",
        0,
        {Site(1): [(sae_lens_sae("jumprelu"), S, Floor(1.0), False, "last")]},
    ),
    "two sites": (
        "gemma3",
        2,
        "after_clamp",
        1,
        {
            Site(1): [(sae_lens_sae("standard"), S, Set(-2.0), True, "all")],
            Site(3): [(sae_lens_sae("standard", seed=1), (0, 5), Floor(1.5), False, "last")],
        },
    ),
    "two clamps at the last site": (
        "mistral",
        1,
        "before_clamp",
        0,
        {
            Site(3, "post"): [
                (sae := sae_lens_sae("standard"), (2, 7), Set(-2.0), True, "all"),
                (sae, (11, 19), Scale(3.0), True, "last"),
            ]
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_hooks_on_the_plain_module(name: str) -> None:
    family, n_pos, placement, skip_first, edits = CASES[name]
    module, rows = tiny_lm(family), token_rows()
    delta = 1.5 * torch.randn(4, n_pos, D_MODEL, generator=torch.Generator().manual_seed(4))
    behavior = LogitDifference(TARGET, OTHER)
    defense = defense_of(edits, skip_first=skip_first)
    defended = defend(
        Model(module), defense, left_padded(rows), behavior, n_pos=n_pos, surface=Surface(placement=placement)
    )

    plain, ours = (delta.clone().requires_grad_(True) for _ in range(2))
    logits = [
        clamped_forward(module, ids, plain[i], edits, placement, skip_first)[0][COLUMNS[i]]
        for i, ids in enumerate(rows)
    ]
    expected = torch.stack(logits)
    score, slack = defended(ours)
    assert_close(score, expected[:, 0] - expected[:, 1], **CLOSE)
    assert_close(slack, score)
    assert_close(defended.logits(ours), expected, **CLOSE)
    gradient, expected_gradient = (
        torch.autograd.grad(value, leaf)[0]
        for value, leaf in ((score.sum(), ours), ((expected[:, 0] - expected[:, 1]).sum(), plain))
    )
    assert_close(gradient, expected_gradient, atol=1e-4 * expected_gradient.abs().max().item(), rtol=1e-3)

    nothing = torch.zeros(n_pos, D_MODEL)
    for i, ids in enumerate(rows):
        base = plain_forward(module, ids)[0][-1]
        under = clamped_forward(module, ids, nothing, edits, placement, skip_first)[0]
        assert_close(defended.base_logits[i], base[COLUMNS[i]], **CLOSE)
        assert_close(defended.defended_logits[i], under[COLUMNS[i]], **CLOSE)
    assert (defended.base_logits - defended.defended_logits).abs().max() > 0.05

    some = torch.tensor([3, 1])
    assert_close(defended.select(some)(delta[some])[0], score.detach()[some], **CLOSE)
    assert defended.zero_delta.shape == delta.shape


def flipped(defended_slack: Tensor, base_slack: Tensor) -> list[int]:
    pairs = zip(base_slack.tolist(), defended_slack.tolist(), strict=True)
    return [i for i, (base, under) in enumerate(pairs) if base > 0 and not under > 0]


@pytest.mark.parametrize("kind", ["difference", "answer"])
def test_valid_flips_show_at_base_and_not_when_defended(kind: str) -> None:
    module, rows = tiny_lm(), token_rows((5,) * 24, seed=3)
    edits: Edits = {Site(1): [(sae_lens_sae("standard"), S, Set(-6.0), False, "all")]}
    base = torch.stack([plain_forward(module, ids)[0][-1] for ids in rows])
    under = torch.stack(
        [clamped_forward(module, ids, torch.zeros(1, D_MODEL), edits, "after_clamp")[0] for ids in rows]
    )
    if kind == "difference":
        behavior: Behavior = LogitDifference(torch.arange(24), torch.arange(24) + 30)
        slacks = [
            x[torch.arange(24), torch.arange(24)] - x[torch.arange(24), torch.arange(24) + 30] for x in (base, under)
        ]
    else:  # the answer is what the model says; of every other example, something else
        answer = (base.argmax(dim=1) + torch.tensor([0, 1] * 12)) % VOCAB
        behavior = AnswerLikelihood(answer)
        slacks = [(x.argmax(dim=1) == answer).float() for x in (base, under)]
    defended = defend(Model(module), defense_of(edits), left_padded(rows), behavior)
    assert defended.valid_flips.tolist() == flipped(slacks[1], slacks[0])
    assert defended.shown_at_base.tolist() == (slacks[0] > 0).tolist()
    assert defended.shown_when_defended.tolist() == (slacks[1] > 0).tolist()
    assert 0 < len(defended.valid_flips) < int(defended.shown_at_base.sum())


def test_the_search_of_a_bfloat16_model_is_in_float32_outside_of_it() -> None:
    module = tiny_lm().bfloat16()
    edits: Edits = {Site(1): [(sae_lens_sae("standard"), S, Set(-2.0), True, "all")]}
    defended = defend(Model(module), defense_of(edits), left_padded(token_rows()), LogitDifference(TARGET, OTHER))
    delta = defended.zero_delta.requires_grad_(True)
    score, slack = defended(delta)
    (gradient,) = torch.autograd.grad(score.sum(), delta)
    assert {x.dtype for x in (score, slack, delta, gradient)} == {torch.float32}
    assert gradient.abs().sum() > 0


def narrow_clamp(width: int, site: Site, positions: str = "all") -> Clamp:
    eye, zero = torch.eye(width), torch.zeros(width)
    return Clamp(SAE(eye, zero, eye, zero, ReLU(), site, "standard", ""), (0,), Set(0.0), positions=positions)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("clamp", "complaint"),
    [
        (narrow_clamp(8, Site(1)), "reads 8 dimensions.* has 16"),
        (narrow_clamp(D_MODEL, Site(7)), "layer must be 0 to 3"),
        (narrow_clamp(D_MODEL, Site(1), "answer"), "positions `answer`"),
    ],
)
def test_a_defense_that_does_not_fit_is_refused(clamp: Clamp, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        defend(Model(tiny_lm()), Defense((clamp,)), left_padded(token_rows()), LogitDifference(TARGET, OTHER))


def test_more_positions_than_the_shortest_prompt_has_are_refused() -> None:
    defense = Defense((narrow_clamp(D_MODEL, Site(1)),))
    with pytest.raises(InputError, match="trailing positions"):
        defend(Model(tiny_lm()), defense, left_padded(token_rows()), LogitDifference(TARGET, OTHER), n_pos=5)


def test_a_module_that_is_not_of_transformers() -> None:
    module, rows = plain_lm(), token_rows((6, 6, 6, 6))
    edits: Edits = {Site(1): [(sae_lens_sae("standard"), S, Set(-2.0), False, "all")]}
    delta = torch.randn(4, 2, D_MODEL)
    defended = defend(Model(module), defense_of(edits), left_padded(rows), LogitDifference(TARGET, OTHER), n_pos=2)
    expected = [clamped_forward(module, ids, delta[i], edits, "after_clamp")[0] for i, ids in enumerate(rows)]
    assert_close(defended.logits(delta), torch.stack([x[COLUMNS[i]] for i, x in enumerate(expected)]), **CLOSE)


@pytest.mark.parametrize("site", [Site(1), Site(3), Site(3, "post")], ids=lambda site: site.hook_name)
def test_downstream_is_every_logit_and_what_blocks_add_to_the_last_residual(site: Site) -> None:
    """By hand: logits of the whole vocabulary under the clamp and a delta, and the last residual less that delta."""
    module, rows = tiny_lm(), token_rows()
    edits: Edits = {site: [(sae_lens_sae("standard"), S, Set(-2.0), True, "all")]}
    defended = defend(Model(module), defense_of(edits), left_padded(rows), LogitDifference(TARGET, OTHER))
    delta = torch.randn(defended.zero_delta.shape, generator=torch.Generator().manual_seed(0))
    seen = defended.downstream(delta)
    last = list[Tensor]()
    hook = module.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0][0, -1]))
    for row, ids in enumerate(rows):
        last.clear()
        logits = clamped_forward(module, ids, delta[row], edits, "after_clamp")[0]
        assert_close(seen[row, :VOCAB], logits, **CLOSE)
        if site != Site(3, "post"):
            assert_close(seen[row, VOCAB:], last[-1] - delta[row, 0], **CLOSE)
    hook.remove()
    assert seen.shape[1] == VOCAB + (0 if site == Site(3, "post") else D_MODEL)
    assert_close(defended.select(torch.tensor([2])).downstream(delta[2:3])[0], seen[2], **CLOSE)
