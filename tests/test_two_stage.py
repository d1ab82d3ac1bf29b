"""The first stage of a two-stage search, against a plain forward pass and against no first stage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recover.baselines.two_stage import Opening, opened
from recover.defenses.clamps import Clamp, Defense, Scale
from recover.defenses.defended import defend
from recover.defenses.speech import say
from recover.models.generation import answered, generate
from recover.models.host import Model
from recover.saes.sae import from_sae_lens
from recover.search.ascent import Schedule
from recover.search.constraints.pinned import Pinned
from recover.search.pinned import find_pinned
from recover.tasks.behaviors import ForcedAnswer
from recover.types import Site, Surface
from tests.by_hand import sae_lens_sae
from tests.models import D_MODEL, left_padded, plain_forward, tiny_lm, token_rows

SITES, COLUMNS, FIRST, BUDGET = (Site(1), Site(2)), 4, 2, 40.0
SAE = from_sae_lens(sae_lens_sae("standard"))
DEFENSE = Defense(tuple(Clamp(SAE, (2, 7), Scale(3.0), True, "all", site) for site in SITES))
MODEL, PROMPTS = Model(tiny_lm(scale=8.0)), left_padded(token_rows())


@pytest.fixture(scope="module")
def answers() -> tuple[Tensor, Tensor]:
    """The model's own, and what it says under the clamps."""
    return generate(MODEL, PROMPTS, COLUMNS), say(MODEL, PROMPTS, COLUMNS, DEFENSE)


def pinned(answer: Tensor) -> Pinned:
    return Pinned.of(defend(MODEL, DEFENSE, answered(PROMPTS, answer), ForcedAnswer(answer), surface=Surface("every")))


def opening(answers: tuple[Tensor, Tensor]) -> Opening:
    own, refusal = answers
    return Opening(pinned(own[:, :FIRST]), pinned(refusal[:, :FIRST]), COLUMNS)


def test_its_score_is_the_difference_of_the_mean_log_probabilities(answers: tuple[Tensor, Tensor]) -> None:
    """Under the clamps, with no delta, one prompt at a time by hooks."""
    expected = []
    for row in range(len(PROMPTS)):
        means = []
        for answer in answers:
            ids = torch.cat([PROMPTS.ids[row][PROMPTS.mask[row]], answer[row, : FIRST - 1]])
            changes = {site: lambda h, site=site: DEFENSE.apply(site, h[None])[0] for site in SITES}
            likely = plain_forward(MODEL.module, ids, changes)[0][-FIRST:].log_softmax(dim=-1)
            means.append(likely.gather(1, answer[row, :FIRST, None]).mean())
        expected.append(means[0] - means[1])
    objective = opening(answers)
    score, slack = objective(torch.zeros(len(PROMPTS), len(SITES) * COLUMNS, D_MODEL))
    assert_close(score, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert_close(score, slack)
    rows = torch.tensor([2, 0])
    assert_close(objective.select(rows)(torch.zeros(2, len(SITES) * COLUMNS, D_MODEL))[0], score[rows])


def test_columns_beyond_the_opening_do_not_matter_to_it(answers: tuple[Tensor, Tensor]) -> None:
    objective = opening(answers)
    noise = torch.randn(len(PROMPTS), len(SITES) * COLUMNS, D_MODEL, generator=torch.Generator().manual_seed(0))
    blank = noise.clone().reshape(len(PROMPTS), len(SITES), COLUMNS, D_MODEL)
    blank[:, :, FIRST:] = 0
    assert_close(objective(noise)[0], objective(blank.flatten(1, 2))[0])
    blank[:, 1, 0] = 0
    assert not torch.allclose(objective(noise)[0], objective(blank.flatten(1, 2))[0])


def test_a_search_goes_on_from_a_better_opening(answers: tuple[Tensor, Tensor]) -> None:
    target, objective = pinned(answers[0]), opening(answers)
    start = opened(objective, target.start, target.free, BUDGET)
    assert bool((start.flatten(1).norm(dim=1) <= BUDGET).all())
    assert_close(target.free.project(start), start, atol=1e-4, rtol=1e-4)
    changed = (answers[0][:, :FIRST] != answers[1][:, :FIRST]).any(dim=1)
    assert bool(changed.any())
    with torch.no_grad():
        assert bool((objective(start)[0] > objective(target.start)[0])[changed].all())
        slack, without = (target(free)[1] for free in (target.within(start, BUDGET), target.start))
    # With no step all that is looked at is where it begins, and no delta.
    begun = find_pinned(target, BUDGET, Schedule(steps=0, restarts=0), start=start)
    assert_close(begun.slack, torch.maximum(slack, without), atol=1e-4, rtol=1e-4)
    found = find_pinned(target, BUDGET, Schedule(steps=20, restarts=0), start=start)
    assert bool((found.slack >= without - 1e-4).all())
    assert bool((found.norm <= BUDGET).all())
