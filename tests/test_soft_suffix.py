"""Soft suffixes against hooks on the plain module, and what is said with them; deltas in free generation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from recover.baselines.soft_suffix import SoftSuffix, spoken_with, with_room
from recover.defenses.clamps import Clamp, Defense, Scale, Set
from recover.defenses.speech import say
from recover.evidence.certificate import free_drift
from recover.models.generation import NO_TOKEN, answered, generate, texts
from recover.models.host import Model
from recover.saes.sae import from_sae_lens
from recover.tasks.behaviors import ForcedAnswer
from recover.types import InputError, Site, Surface
from tests.by_hand import sae_lens_sae
from tests.models import D_MODEL, left_padded, plain_forward, tiny_lm, token_rows

N, STEPS = 3, 4
SITES = (Site(1), Site(3))


def defense_at(sites: tuple[Site, ...] = SITES) -> Defense:
    sae = from_sae_lens(sae_lens_sae("standard"))
    modes = (Set(-6.0), Scale(-3.0))
    clamps = zip(((2, 7), (1, 5)), modes, sites, strict=True)
    return Defense(tuple(Clamp(sae, features, mode, False, "all", site) for features, mode, site in clamps))


def vectors_of(batch: int) -> Tensor:
    return 2 * torch.randn(batch, N, D_MODEL, generator=torch.Generator().manual_seed(3))


def by_hand(module: nn.Module, defense: Defense, ids: Tensor, vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits of `ids`, with the vectors behind the prompt where there are any; clamped features over the answer."""
    states: dict[Site, Tensor] = {}

    def at(clamp: Clamp) -> Callable[[Tensor], Tensor]:
        def edit(h: Tensor) -> Tensor:
            z = clamp.sae.encode(h)[..., list(clamp.features)]
            new = torch.full_like(z, -6.0) if clamp.site == SITES[0] else -3 * z
            states[clamp.site] = h + (new - z) @ clamp.sae.W_dec[list(clamp.features)]
            return states[clamp.site]

        return edit

    changes = {clamp.site: at(clamp) for clamp in defense.clamps}
    if vectors is not None:
        start = len(ids) - (STEPS - 1) - N
        changes[Site(0)] = lambda h: torch.cat([h[:start], vectors, h[start + N :]])
    logits, _ = plain_forward(module, ids, changes)
    z = [clamp.sae.encode(states[clamp.site][-STEPS:])[..., list(clamp.features)] for clamp in defense.clamps]
    return logits, torch.cat(z, dim=-1)


def test_score_slack_and_drift_are_those_of_the_whole_model_by_hand() -> None:
    module, rows, defense = tiny_lm(), token_rows(), defense_at()
    model, prompts, vectors = Model(module), left_padded(rows), vectors_of(len(rows))
    answer = generate(model, prompts, STEPS)
    behavior = ForcedAnswer(answer)
    soft = SoftSuffix.of(model, defense, answered(prompts, answer), behavior, n=N)
    score, slack = soft(vectors)
    for row, ids in enumerate(rows):
        room = torch.cat([ids, torch.zeros(N, dtype=torch.long), answer[row, :-1]])
        logits, z = by_hand(module, defense, room, vectors[row])
        one = behavior.select(torch.tensor([row]))
        assert_close(slack[row], one.slack(logits[None, -STEPS:])[0], atol=1e-3, rtol=1e-3)
        assert_close(score[row], one.score(logits[None, -STEPS:])[0], atol=1e-3, rtol=1e-3)
        # The reference: the same answer under the clamps, with no vectors and no room for them.
        _, plain = by_hand(module, defense, torch.cat([ids, answer[row, :-1]]))
        assert_close(soft.drift(vectors)[row], (z - plain).norm() / plain.norm(), atol=1e-3, rtol=1e-3)


def test_the_monitor_takes_its_share_of_the_score() -> None:
    model, prompts = Model(tiny_lm()), left_padded(token_rows())
    answer, vectors = generate(model, prompts, STEPS), vectors_of(len(prompts))
    given = (model, defense_at(), answered(prompts, answer), ForcedAnswer(answer))
    plain, watched = SoftSuffix.of(*given, n=N), SoftSuffix.of(*given, n=N, monitor=2.0)
    assert_close(watched(vectors)[0], plain(vectors)[0] - 2 * plain.drift(vectors))
    rows = torch.tensor([2, 0])
    assert_close(plain.select(rows)(vectors[rows])[1], plain(vectors)[1][rows], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_said_with_vectors_is_what_teacher_forcing_predicts(use_cache: bool) -> None:
    model, prompts, defense = Model(tiny_lm()), left_padded(token_rows()), defense_at()
    vectors = vectors_of(len(prompts))
    said = generate(model, with_room(prompts, N), STEPS, spoken_with(defense, vectors), use_cache=use_cache)
    soft = SoftSuffix.of(model, defense, answered(prompts, said), ForcedAnswer(said), n=N)
    assert bool((soft(vectors)[1] > 0).all())
    assert not torch.equal(said, say(model, prompts, STEPS, defense))


def test_vectors_need_room() -> None:
    model, prompts = Model(tiny_lm()), left_padded(token_rows())
    answer = generate(model, prompts, STEPS)
    forced, behavior = answered(prompts, answer), ForcedAnswer(answer)
    with pytest.raises(InputError, match="0 vectors"):
        SoftSuffix.of(model, defense_at(), forced, behavior, n=0)
    with pytest.raises(InputError, match="where the vectors enter"):
        SoftSuffix.of(model, defense_at((Site(0), Site(2))), forced, behavior)


@pytest.mark.parametrize("every_site", [True, False])
def test_drift_in_free_generation_is_that_of_the_text_that_was_said(every_site: bool) -> None:
    """A delta shorter than the answer; the certificate's replay says the same tokens."""
    model, prompts, defense = Model(tiny_lm()), left_padded(token_rows()), defense_at()
    delta = torch.randn(len(prompts), 2 * (1 + every_site), D_MODEL, generator=torch.Generator().manual_seed(5))
    surface = Surface("every" if every_site else "first")
    said = say(model, prompts, STEPS, defense, 3 * delta, surface=surface)
    facts = free_drift(model, prompts, said, defense, 3 * delta, surface=surface)
    assert bool(facts.shows.all())
    assert float(facts.drift.min()) > 1e-3
    nothing = say(model, prompts, STEPS, defense, 0 * delta, surface=surface)
    assert torch.equal(nothing, say(model, prompts, STEPS, defense))
    assert float(free_drift(model, prompts, nothing, defense, 0 * delta, surface=surface).drift.max()) == 0.0


def test_texts_leave_out_what_is_no_token() -> None:
    class Tokenizer:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return " ".join(map(str, tokens))

    assert texts(Tokenizer(), torch.tensor([[3, 4, NO_TOKEN], [NO_TOKEN] * 3])) == ["3 4", ""]
