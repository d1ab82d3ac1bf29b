"""Requests, answers and refusal features on a tiny model whose tokenizer speaks in letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from recover.defenses.selection import contrast
from recover.models.host import Model
from recover.saes.sae import from_sae_lens
from recover.tasks.dialogue import Dialogue, Request, ask, opened
from recover.tasks.rules import generic_answers
from recover.types import InputError, Site
from tests.by_hand import sae_lens_sae
from tests.models import VOCAB, plain_forward, tiny_lm

REQUESTS = [Request(f"r{row}", text, "given") for row, text in enumerate(("tea", "a long walk", "snow"))]
STEPS = 4


class Letters:
    """A token is a letter; token 0 ends an answer."""

    chat_template = "{{ messages[0]['content'] }}"
    eos_token_id = 0

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: Any) -> str:
        return f"<{messages[0]['content']}>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens  # the template has them already
        return {"input_ids": [1 + ord(letter) % (VOCAB - 1) for letter in text]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(f"t{token}" for token in tokens if token != 0 or not skip_special_tokens)


def asked(**options: Any) -> Dialogue:
    return ask(Model(tiny_lm(), Letters()), REQUESTS, STEPS, **options)


def test_answers_are_greedy_and_do_not_depend_on_the_batch() -> None:
    module, dialogue, shown = tiny_lm(), asked(), []
    for row, request in enumerate(REQUESTS):
        text = Letters()(f"<{request.text}>", add_special_tokens=False)["input_ids"]
        for token in [token for token in dialogue.answers[row].tolist() if token >= 0]:
            assert int(plain_forward(module, torch.tensor(text))[0][-1].argmax()) == token
            text.append(token)
    alone = asked(batch_size=1, on_batch=lambda done, total: shown.append((done, total)))
    assert torch.equal(alone.answers, dialogue.answers)
    assert shown == [(1, 3), (2, 3), (3, 3)]
    assert dialogue.texts[0] == " ".join(f"t{t}" for t in dialogue.answers[0].tolist() if t > 0)
    assert list(dialogue.select([2, 0]).ids) == ["r2", "r0"]


def said(*texts: str) -> Dialogue:
    return replace(asked(), texts=list(texts))


def test_what_was_served_and_what_was_refused() -> None:
    dialogue = said(
        "Tea is a drink.", "I'm sorry, but I can't help with that.", "It is important to note that snow melts."
    )
    assert (dialogue.refused, dialogue.served) == ([1], [0])


def test_features_are_contrasted_by_their_mean_at_the_last_position() -> None:
    """Of each prompt, one prompt at a time."""
    module, sae, dialogue = tiny_lm(), from_sae_lens(sae_lens_sae("standard")), asked()

    def means(rows: Sequence[int]) -> torch.Tensor:
        ends = []
        for row in rows:
            ids = Letters()(f"<{REQUESTS[row].text}>", add_special_tokens=False)["input_ids"]
            state = plain_forward(module, torch.tensor(ids), read=Site(2))[1]
            assert state is not None
            ends.append(sae.encode(state[-1:])[0])
        return torch.stack(ends).mean(dim=0)

    more, shown = means([0, 1]) - means([0, 1, 2]), means([0, 1])
    difference, mean = contrast(dialogue.model, sae, Site(2), dialogue.select([0, 1]).prompts, dialogue.prompts, 1)
    torch.testing.assert_close(difference, more, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mean, shown, atol=1e-4, rtol=1e-4)


def test_a_placebo_asks_for_the_answer_to_another_request() -> None:
    dialogue = asked()
    other = dialogue.with_answers_of(dialogue.select([1, 2, 0]))
    assert torch.equal(other.answers, dialogue.answers[[1, 2, 0]])
    assert other.texts == [dialogue.texts[row] for row in (1, 2, 0)]
    prompts, behavior = other.forced(2)
    assert torch.equal(behavior.answer, dialogue.answers[[1, 2, 0], :2])
    assert torch.equal(prompts.ids[:, :-1], dialogue.prompts.ids)
    assert torch.equal(prompts.ids[:, -1], dialogue.answers[[1, 2, 0], 0])


def test_what_is_missing_is_said() -> None:
    with pytest.raises(InputError, match="there are none"):
        ask(Model(tiny_lm(), Letters()), [], STEPS)


def test_an_opened_answer_goes_on_greedily_from_its_opening() -> None:
    dialogue, module = said("A walk.", "I'm sorry, but I can't do that.", "Snow falls."), tiny_lm()
    styled = opened(dialogue, "ab", STEPS)
    # The second is declined, and keeps its answer.
    assert dialogue.served == [0, 2]
    assert torch.equal(styled.answers[1], dialogue.answers[1])
    begun = Letters()("ab", add_special_tokens=False)["input_ids"]
    for row in (0, 2):
        text = [*Letters()(f"<{REQUESTS[row].text}>", add_special_tokens=False)["input_ids"], *begun]
        answer = [token for token in styled.answers[row].tolist() if token >= 0]
        assert answer[:2] == begun
        assert len(answer) > 2
        for token in answer[2:]:
            assert int(plain_forward(module, torch.tensor(text))[0][-1].argmax()) == token
            text.append(token)
    assert styled.answers.shape == dialogue.answers.shape
    assert styled.forced(STEPS)[1].answer.shape == dialogue.forced(STEPS)[1].answer.shape
    # No room for a token after the opening: nothing is asked.
    assert torch.equal(opened(dialogue, "abcd", STEPS).answers, dialogue.answers)


def test_the_answer_to_another_request_is_a_served_one() -> None:
    dialogue = said("A walk.", "I'm sorry, but I can't do that.", "Snow falls.")
    answers = torch.arange(3 * STEPS).reshape(3, STEPS)
    (rule,) = generic_answers(replace(dialogue, answers=answers), seed=0)
    assert rule.dialogue is not None
    # Of two served requests each has the other's answer.
    assert torch.equal(rule.dialogue.answers[[0, 2]], answers[[2, 0]])
    assert next(iter(rule.dialogue.texts)) == "Snow falls."
    assert int(rule.dialogue.answers[1, 0]) in (0, 2 * STEPS)
    assert list(rule.dialogue.ids) == list(dialogue.ids)
    assert generic_answers(said("A walk.", "I can't do that.", "I can't do that."), seed=0) == ()


def test_as_few_as_possible_keep_an_answer_equal_to_their_own() -> None:
    dialogue = said("A", "B", "C").select([0, 1, 2, 0])
    answers = torch.tensor([[1], [1], [2], [2]])
    for seed in range(12):
        (rule,) = generic_answers(replace(dialogue, answers=answers), seed)
        assert rule.dialogue is not None
        assert rule.dialogue.answers.flatten().sort().values.tolist() == [1, 1, 2, 2]
        # Where the two equal ones stand side by side, two places on none keeps its own; else one place on.
        assert not bool((rule.dialogue.answers == answers).any())
