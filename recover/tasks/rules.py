"""Other rules over the same prompts: what a perturbation could have brought back in the behavior's own rule's place.

A shared perturbation cannot carry each prompt's answer, but it can carry a rule that picks one: "the subject" and "the
first name" are as much rules of an IOI prompt as "the indirect object". What returns more easily than all of these is
the behavior's own rule.

1. *The task's*: what it knows of its prompts (`Examples.rules`).
2. *Generic* ones need the targets alone: always the commonest answer, always another one, the next answer in a fixed
   cycle, the model's second choice; for whole answers, the answer to another request.
3. *Left out* are rules that give every example its own answer, and those that another rule before them equals.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import reduce

from recover.tasks.behaviors import Behavior, Targeted, known_targets
from recover.tasks.dialogue import Dialogue
from recover.types import Float, InputError, Int, Rows, Tensor

OTHERS_OF_ONE = ("always another answer", "always yet another answer")
"""The constant rules where all examples have one target."""


@dataclass(frozen=True, eq=False)
class OtherRule:
    """Another rule over the same prompts: what it would answer for each example.

    Attributes:
        name: as a reader is told it ("the subject", "the first name", "always the same answer").
        targets: `[batch]`, the token that the rule answers, for a behavior with a target; None for whole answers.
        dialogue: the answers that the rule gives, for whole answers; else None.

    >>> rule = OtherRule("the subject", torch.tensor([3, 5, 3]))
    >>> rule.select(torch.tensor([1])).targets
    tensor([5])
    """

    name: str
    targets: Int[Tensor, "batch"] | None = None
    dialogue: Dialogue | None = None

    def __post_init__(self) -> None:
        if (self.targets is None) == (self.dialogue is None):
            raise InputError(f"rule {self.name!r}: give it targets or a dialogue, one of the two")

    def __len__(self) -> int:
        return len(self.answers)

    def select(self, rows: Rows) -> OtherRule:
        """Select a subset of examples."""
        targets = None if self.targets is None else self.targets[rows]
        return OtherRule(self.name, targets, None if self.dialogue is None else self.dialogue.select(rows.tolist()))

    def equals(self, answers: Tensor) -> bool:
        """Test whether these are the rule's answers: targets `[batch]`, or tokens `[batch pos]` of whole answers."""
        return self.answers.shape == answers.shape and bool((self.answers == answers).all())

    @property
    def answers(self) -> Tensor:
        """What the rule answers: targets `[batch]`, or the tokens `[batch pos]` of whole answers."""
        if self.dialogue is not None:
            return self.dialogue.answers
        assert self.targets is not None
        return self.targets


@runtime_checkable
class WithRules(Protocol):
    """What is asked of examples here (`recover.tasks.Examples`)."""

    @property
    def behavior(self) -> Behavior:
        """The behavior of each example."""

    @property
    def strict(self) -> Behavior | None:
        """A stricter predicate of the same kind."""

    @property
    def dialogue(self) -> Dialogue | None:
        """The requests and answers, for whole answers."""

    @property
    def rules(self) -> Sequence[OtherRule]:
        """The task's own other rules."""


def all_rules(
    examples: WithRules, base_logits: Float[Tensor, "batch ..."] | None, seed: int, most: int = 5
) -> tuple[OtherRule, ...]:
    """List other rules, the task's first, then generic ones; none equals the behavior's own rule or one before it.

    Args:
        examples: with a dialogue, or with a behavior that has a target; without either, there are no rules.
        base_logits: of the undefended model, as the strict behavior or the behavior itself reads them.
        seed: of what generic rules draw.
        most: how many, at most.
    """
    behavior, dialogue = examples.behavior, examples.dialogue
    if dialogue is not None:
        generic = generic_answers(dialogue, seed)
        return _different((*examples.rules, *generic), dialogue.answers)[:most]
    if not isinstance(behavior, Targeted):
        return ()
    reads = [one for one in (examples.strict, behavior) if isinstance(one, Targeted)]
    fits = [one for one in reads if base_logits is not None and _reads(one, base_logits)]
    generic = generic_rules(behavior, None, seed)
    if fits and base_logits is not None and (second := _second_choice(fits[0], known_targets(behavior), base_logits)):
        generic = (*generic, second)
    return _different((*examples.rules, *generic), behavior.target)[:most]


def generic_rules(
    behavior: Targeted, base_logits: Float[Tensor, "batch ..."] | None, seed: int
) -> tuple[OtherRule, ...]:
    """Make the rules that need nothing from the task.

    Args:
        behavior: its known targets are those of its examples, or all its choices where it knows them.
        base_logits: of the undefended model, in the columns of `behavior.tokens`, or of the whole vocabulary. The
            second choice is left out where a row gives fewer than two other known targets, and not all of them.
        seed: which other answer is always given.

    >>> from recover.tasks import LogitDifference
    >>> behavior = LogitDifference(torch.tensor([7, 5, 7, 9]), torch.tensor([1, 1, 1, 1]))
    >>> for rule in generic_rules(behavior, None, seed=0):
    ...     print(rule.name, rule.targets.tolist())
    always the commonest answer [7, 7, 7, 7]
    always another answer [9, 9, 9, 9]
    the next answer in a fixed cycle [9, 7, 9, 5]
    """
    own, known = behavior.target, sorted(set(known_targets(behavior)))
    counts = Counter(own.tolist())
    commonest = min(counts, key=lambda token: (-counts[token], token))
    others = [token for token in known if token != commonest]
    made = [OtherRule("always the commonest answer", torch.full_like(own, commonest))]
    drawn = random.Random(seed).sample(others, len(others))
    if len(counts) == 1:
        made += [OtherRule(name, torch.full_like(own, one)) for name, one in zip(OTHERS_OF_ONE, drawn, strict=False)]
    elif len(known) >= 3:
        made.append(OtherRule(OTHERS_OF_ONE[0], torch.full_like(own, drawn[0])))
    if len(known) >= 2:
        made.append(OtherRule("the next answer in a fixed cycle", next_of(own, known)))
    second = None if base_logits is None else _second_choice(behavior, known, base_logits)
    return _different([*made, second] if second else made, own)


def generic_answers(dialogue: Dialogue, seed: int) -> tuple[OtherRule, ...]:
    """Make the rule "the answer to another request" for whole answers; none where fewer than two are served.

    The requests that the model serves are put in a seeded order, and each is given the answer of one a fixed number of
    places on: as few places as let the fewest keep an answer equal to their own. Those that it declines are given such
    answers as well.
    """
    served = random.Random(seed).sample(dialogue.served, len(dialogue.served))
    if len(served) < 2:
        return ()
    answers = dialogue.answers[served]
    kept = [int((answers == answers.roll(-by, dims=0)).all(dim=1).sum()) for by in range(1, len(served))]
    by = 1 + min(range(len(kept)), key=kept.__getitem__)
    given = {row: served[(place + by) % len(served)] for place, row in enumerate(served)}
    rows = [given.get(row, served[row % len(served)]) for row in range(len(dialogue))]
    other = OtherRule("the answer to another request", dialogue=dialogue.with_answers_of(dialogue.select(rows)))
    return _different([other], dialogue.answers)


def next_of(own: Int[Tensor, "batch"], known: Iterable[int]) -> Int[Tensor, "batch"]:
    """Map each of `own` to the next larger token of `known`, the largest to the smallest; all of `own` are known."""
    cycle = torch.tensor(sorted(set(known)), dtype=own.dtype, device=own.device)
    return cycle[(torch.searchsorted(cycle, own.contiguous()) + 1) % len(cycle)]


def _reads(behavior: Targeted, logits: Tensor) -> bool:
    """Whether these logits can be those that the behavior reads."""
    tokens = behavior.tokens
    if tokens is None:
        return int(logits.shape[-1]) > max(known_targets(behavior))
    return logits.shape == tokens.shape


def _second_choice(behavior: Targeted, known: Iterable[int], logits: Tensor) -> OtherRule | None:
    """The likeliest known target other than the own one, where the columns of `logits` tell it."""
    if not _reads(behavior, logits):
        raise InputError(
            f"rules: base logits of shape {tuple(logits.shape)} are not those that the behavior reads; "
            "give them in the columns of its tokens, or for the whole vocabulary"
        )
    # A readout such as a probe's gives logits at each position, and is read by their mean.
    logits = reduce(logits, "batch ... choice -> batch choice", "mean") if logits.ndim > 2 else logits
    own, wanted = behavior.target, torch.tensor(sorted(set(known)), device=logits.device)
    tokens = behavior.tokens
    if tokens is None:
        tokens, logits = wanted.expand(len(own), -1), logits[:, wanted]
    usable = torch.isin(tokens, wanted) & (tokens != own[:, None])
    enough = min(2, len(wanted) - 1)
    if enough < 1 or int(usable.sum(dim=1).min()) < enough:
        return None
    best = logits.masked_fill(~usable, -torch.inf).argmax(dim=1, keepdim=True)
    return OtherRule("the model's second choice", tokens.gather(1, best)[:, 0])


def _different(rules: Iterable[OtherRule], own: Tensor) -> tuple[OtherRule, ...]:
    """The rules that are neither the behavior's own nor one before them."""
    kept: list[OtherRule] = []
    for rule in rules:
        if not rule.equals(own) and not any(rule.equals(before.answers) for before in kept):
            kept.append(rule)
    return tuple(kept)
