"""What a defense costs on text that has nothing to do with the behavior: the utility control.

A clamp that breaks the model suppresses every behavior, and undoing the damage brings every behavior back; recovery
from such a clamp says nothing about a defense.

1. Mean cross-entropy of each token of neutral passages given those before it, the first of each passage left out.
2. The same with every clamp live wherever it acts.
3. The difference, in nats a token: by `exp` of it the perplexity grew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from recover.defenses.clamps import Clamp, Defense
from recover.defenses.defended import check_fits, clamp_edits
from recover.models.host import Model, Prompts
from recover.saes.fit import next_token_loss
from recover.types import InputError

MAX_INCREASE = math.log(2)
"""In nats a token. There the perplexity is doubled: what comes next has half the probability that it had.

Measured on SmolLM2-135M: leaving out one whole block costs 0.15 to 0.47. Its 64 features for indirect objects cost 0.14
at -5, as shipped; 0.52 at -20, where sentences begin to slip; 1.87 at -50, where they fall apart.
"""


@dataclass(frozen=True)
class Utility:
    """Losses on neutral text, in nats a token.

    Attributes:
        loss_off: mean next-token cross-entropy without the defense.
        loss_on: with it.
        increase: `loss_on - loss_off`.
        tokens: how many were predicted.
        broken: whether the increase is above what was allowed, or is not a number.
    """

    loss_off: float
    loss_on: float
    increase: float
    tokens: int
    broken: bool


def measure_utility(
    model: Model, defense: Defense, neutral: Prompts, batch_size: int | None = None, max_increase: float = MAX_INCREASE
) -> Utility:
    """Measure what the defense costs on neutral text.

    A clamp at the `last` position acts on every token here. In generation each one was once the last; in one pass over
    a whole passage the clamp would edit only the end, after which nothing is predicted.

    The text is passages such as `model.tokenize(recover.tasks.prose.NEUTRAL)`; above `max_increase`, in nats a token,
    the model counts as broken.

    Raises:
        InputError: a defense that does not fit the model, or no passage has a second token.
    """
    check_fits(model, defense)
    tokens = int((neutral.positions > 0).sum())
    if tokens == 0:
        raise InputError("neutral text: no passage has a second token, so nothing is predicted; give longer ones")
    batches = [neutral.select(rows) for rows in torch.split(torch.arange(len(neutral)), batch_size or len(neutral))]
    off, on = (next_token_loss(model, batches, edits) for edits in ({}, clamp_edits(_wherever_it_acts(defense))))
    # Not `>`: a loss that is not a number is broken too.
    return Utility(off, on, on - off, tokens, broken=not on - off <= max_increase)


def _wherever_it_acts(defense: Defense) -> Defense:
    """Let the defense's clamps at the `last` position act at all of them."""
    places = [(clamp, "all" if clamp.positions == "last" else clamp.positions) for clamp in defense.clamps]
    clamps = (Clamp(one.sae, one.features, one.mode, one.only_active, where, one.site) for one, where in places)
    return replace(defense, clamps=tuple(clamps))
