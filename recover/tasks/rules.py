"""Other rules over the same prompts: what a shared perturbation may impose in the place of the behavior's own rule.

A task names rules of its own (the subject instead of the indirect object; the letter of another option). Generic ones
need nothing from the task: an answer for all prompts, a fixed map from answers to answers, the model's second choice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from recover.tasks.behaviors import Targeted, known_targets
from recover.tasks.dialogue import Dialogue
from recover.types import Float, Int, Rows, Tensor

if TYPE_CHECKING:
    from recover.tasks.examples import Examples


@dataclass(frozen=True, eq=False)
class OtherRule:
    """Another rule over the same prompts, and what it answers to each.

    Attributes:
        name: as a reader is told it, such as "the subject".
        targets: the token that it answers, `[batch]`, for a behavior with a target; else None.
        dialogue: the answers that it gives, where the behavior is a whole answer; else None.
    """

    name: str
    targets: Int[Tensor, "batch"] | None = None
    dialogue: Dialogue | None = None

    def __len__(self) -> int:
        return 0 if self.answers is None else len(self.answers)

    @property
    def answers(self) -> Tensor | Dialogue | None:
        """What it answers."""
        return self.dialogue if self.targets is None else self.targets

    def select(self, rows: Rows) -> OtherRule:
        """Select a subset of examples."""
        targets = None if self.targets is None else self.targets[rows.to(self.targets.device)]
        return OtherRule(self.name, targets, None if self.dialogue is None else self.dialogue.select(rows.tolist()))


def all_rules(
    examples: Examples, likely: Float[Tensor, "batch known"] | None, seed: int, most: int = 4
) -> tuple[OtherRule, ...]:
    """The other rules of these examples, the task's own first, at most `most`.

    `likely` are the logits of the known targets (sorted) without a defense, where there are any.
    """
    behavior = examples.behavior
    if examples.dialogue is not None:
        generic = of_answers(examples.dialogue, seed)
        own: Sequence[Sequence[int]] = [list(range(len(examples.ids)))]
    elif isinstance(behavior, Targeted):
        generic, own = generic_rules(behavior, likely, seed), [behavior.target.tolist()]
    else:
        return ()
    kept: list[OtherRule] = []
    seen = [tuple(one) for one in own]
    for rule in (*examples.rules, *generic):
        if rule.targets is not None:
            answers = tuple(rule.targets.tolist())
            if answers in seen:
                continue
            seen.append(answers)
        kept.append(rule)
    return tuple(kept[:most])


def generic_rules(behavior: Targeted, likely: Float[Tensor, "batch known"] | None, seed: int) -> tuple[OtherRule, ...]:
    """Rules that need nothing from the task; arguments as in `all_rules`."""
    own, known = behavior.target.tolist(), sorted(set(known_targets(behavior)))

    def rule(name: str, targets: Sequence[int]) -> OtherRule:
        return OtherRule(name, torch.tensor(list(targets), device=behavior.target.device))

    commonest = max(sorted(set(own)), key=own.count)
    others = [token for token in known if token != commonest]
    random.Random(f"rules:{seed}").shuffle(others)
    if len(set(own)) == 1:
        return tuple(rule(f"always another answer ({n})", [token] * len(own)) for n, token in enumerate(others[:2], 1))
    found = [rule("always the commonest answer", [commonest] * len(own))]
    if len(others) > 1:
        found.append(rule("always another answer", [others[0]] * len(own)))
    if len(known) > 1:
        found.append(rule("the next answer in a cycle", [known[(known.index(one) + 1) % len(known)] for one in own]))
    if likely is not None and len(known) > 2:
        masked = likely.clone()
        masked[torch.arange(len(own)), torch.tensor([known.index(one) for one in own])] = -torch.inf
        found.append(rule("the model's second choice", [known[at] for at in masked.argmax(dim=1).tolist()]))
    return tuple(found)


def of_answers(dialogue: Dialogue, seed: int) -> tuple[OtherRule, ...]:
    """For whole answers: to each request the answer to another one, drawn from those that the model serves."""
    served = dialogue.served
    if len(served) < 2:
        return ()
    order = random.Random(f"rules:{seed}").sample(served, len(served))
    after = {row: order[(place + 1) % len(order)] for place, row in enumerate(order)}
    given = dialogue.select([after.get(row, order[0]) for row in range(len(dialogue))])
    return (OtherRule("the answer to another request", None, given),)
