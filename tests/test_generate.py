"""Generation against transformers' own and a loop without any cache; teacher forcing against generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from recover.defenses.clamps import Clamp, Defense, Scale, Set
from recover.defenses.defended import clamp_edits
from recover.models.generation import NO_TOKEN, answered, generate, n_answer
from recover.models.host import Edit, Model, Prompts
from recover.saes.sae import from_sae_lens
from recover.types import Positions, Site
from tests.by_hand import sae_lens_sae
from tests.models import D_MODEL, FAMILIES, left_padded, plain_forward, plain_lm, tiny_lm, token_rows

SITES = (Site(1), Site(3))
STEPS = 6
VOCABULARY_END = 10**6
"""No token ends the answers of a test that compares all steps."""


def defense(positions: Positions = "all", skip_first: int = 0) -> Defense:
    """Live clamps at two sites, one of which scales what it meets."""
    sae = from_sae_lens(sae_lens_sae("standard"))
    first = Clamp(sae, (2, 7), Set(-6.0), False, positions, SITES[0])
    return Defense((first, Clamp(sae, (1, 5), Scale(-3.0), True, positions, SITES[1])), skip_first)


def live(clamps: Defense, push: Tensor | None = None) -> Callable[[int, int], Mapping[Site, Edit]]:
    """The clamps, and a delta `[batch column d_model]` at the answer's columns of the last site."""

    def edits(first: int, last: int) -> Mapping[Site, Edit]:
        made = clamp_edits(clamps, n_answer(first, last))
        if push is None:
            return made
        clamp = made[SITES[1]]

        def edit(h: Tensor, positions: Tensor) -> Tensor:
            h = clamp(h, positions).clone()
            h[:, first - last - 1 :] += push[:, first : last + 1]
            return h

        return {**made, SITES[1]: edit}

    return edits


def by_hand(module: nn.Module, ids: list[int], clamps: Defense, push: Tensor | None) -> list[int]:
    """One prompt, the whole text again at every step, hooks on the module, the clamp's place counted by hand."""
    text, found = list(ids), []
    for step in range(STEPS):

        def change(site: Site, step: int = step) -> Callable[[Tensor], Tensor]:
            def edit(h: Tensor) -> Tensor:
                at = torch.arange(len(h))
                place = {"all": at >= 0, "prompt": at < len(ids), "last": at == len(ids) - 1, "answer": at >= len(ids)}
                mask = (at >= clamps.skip_first) & place[clamps.clamps[0].positions]
                clamp = next(clamp for clamp in clamps.clamps if clamp.site == site)
                z = clamp.sae.encode(h)[..., list(clamp.features)]
                new = torch.full_like(z, -6.0) if site == SITES[0] else torch.where(z != 0, -3 * z, z)
                h = h + torch.where(mask[:, None], (new - z) @ clamp.sae.W_dec[list(clamp.features)], 0.0)
                if push is not None and site == SITES[1]:
                    h[len(ids) - 1 :] += push[: step + 1]
                return h

            return edit

        logits, _ = plain_forward(module, torch.tensor(text), {site: change(site) for site in SITES})
        found.append(int(logits[-1].argmax()))
        text.append(found[-1])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_without_edits_it_is_the_models_own_greedy_generation(family: str) -> None:
    module, prompts = tiny_lm(family), left_padded(token_rows())
    ours = generate(Model(module), prompts, STEPS)
    theirs = module.generate(
        prompts.ids,
        attention_mask=prompts.mask.long(),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=VOCABULARY_END,
    )
    assert torch.equal(ours, theirs[:, prompts.ids.shape[1] :])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("positions", ["all", "prompt", "last", "answer"])
def test_clamps_and_deltas_are_live_at_every_step(positions: Positions, use_cache: bool) -> None:
    module, rows, clamps = tiny_lm(), token_rows(), defense(positions, skip_first=1)
    push = 3 * torch.randn(len(rows), STEPS, D_MODEL, generator=torch.Generator().manual_seed(1))
    ours = generate(Model(module), left_padded(rows), STEPS, live(clamps, push), use_cache=use_cache)
    expected = [by_hand(module, ids.tolist(), clamps, push[row]) for row, ids in enumerate(rows)]
    assert ours.tolist() == expected
    # And the edits matter: without them it is another text.
    assert ours.tolist() != generate(Model(module), left_padded(rows), STEPS).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_with_and_without_keys_and_values_the_text_is_the_same(family: str) -> None:
    model, prompts = Model(tiny_lm(family)), left_padded(token_rows())
    texts = [generate(model, prompts, STEPS, live(defense()), use_cache=kept) for kept in (True, False)]
    assert torch.equal(*texts)
    single = [
        generate(model, prompts.select(torch.tensor([row])), STEPS, live(defense()))[0].tolist()
        for row in range(len(prompts))
    ]
    assert texts[0].tolist() == single


def test_a_module_without_a_cache_generates_too() -> None:
    module, rows = plain_lm(), [ids[:4] for ids in token_rows()]
    ours = generate(Model(module), left_padded(rows), STEPS)
    for ids, answer in zip(rows, ours.tolist(), strict=True):
        text = ids.tolist()
        for token in answer:
            assert int(module(torch.tensor([text]))[0, -1].argmax()) == token
            text.append(token)


def test_an_answer_ends_with_its_stop_token() -> None:
    model, prompts = Model(tiny_lm()), left_padded(token_rows())
    whole = generate(model, prompts, STEPS)
    stop = int(whole[0, 2])
    ended = generate(model, prompts, STEPS, stop=[stop])
    for before, after in zip(whole.tolist(), ended.tolist(), strict=True):
        length = before.index(stop) + 1 if stop in before else len(after)
        assert after[:length] == before[:length]
        assert set(after[length:]) <= {NO_TOKEN}


def test_all_ended_is_the_end() -> None:
    model, prompts = Model(tiny_lm()), left_padded(token_rows()[:1])
    first = int(generate(model, prompts, 1)[0, 0])
    assert generate(model, prompts, STEPS, stop=[first]).tolist() == [[first]]


def test_teacher_forcing_gives_the_logits_of_every_step() -> None:
    """Answers of unequal length, the shorter ones padded on the right."""
    module, rows = tiny_lm(), token_rows()
    prompts, model = left_padded(rows), Model(module)
    answer = generate(model, prompts, STEPS)
    answer[1, 3:] = NO_TOKEN
    forced = answered(prompts, answer)
    assert forced.mask.sum(dim=1).tolist() == [
        len(ids) + (3 if row == 1 else STEPS - 1) for row, ids in enumerate(rows)
    ]
    logits = model.run(forced, reads=STEPS).logits
    assert logits.shape[:2] == (len(rows), STEPS)
    there = answer != NO_TOKEN
    assert torch.equal(logits.argmax(dim=-1)[there], answer[there])
    text = torch.cat([rows[1], answer[1, :2]])
    torch.testing.assert_close(logits[1, 2], plain_forward(module, text)[0][-1], atol=1e-4, rtol=1e-4)


def test_columns_behind_the_prompt() -> None:
    assert [n_answer(0, 0), n_answer(0, 4), n_answer(3, 3), n_answer(1, 4)] == [0, 4, 1, 4]


def test_prompts_keep_their_padding() -> None:
    forced = answered(Prompts(torch.tensor([[0, 5]]), torch.tensor([[False, True]])), torch.tensor([[7, 8, 9]]))
    assert forced.ids.tolist() == [[0, 5, 7, 8]]
    assert forced.mask.tolist() == [[False, True, True, True]]
