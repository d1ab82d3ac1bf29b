"""Behaviors: does it show, and how much?

A behavior reads next-token logits and gives two numbers for each example. The *score* is differentiable and is what
a search raises. The *slack* is the predicate with its margin: the behavior shows exactly where it is positive.
Behaviors that look at few tokens name them in `tokens`, so that the engine computes only those logits.

A behavior with a *target* can be asked of another one (`retarget`): the same question with another answer in the right
one's place. Controls are made of that: a placebo target, targets shuffled across prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from recover.types import Bool, Float, InputError, Int, PerExample, Rows, Tensor

Logits = Float[Tensor, "batch choice"]


@runtime_checkable
class Behavior(Protocol):
    """A predicate (does the behavior show?) and its differentiable score; `tokens` is None for the whole vocabulary."""

    @property
    def tokens(self) -> Tensor | None:
        """Token ids `[batch choice]` whose logits are read, in the order of the columns of `logits`."""

    def score(self, logits: Tensor) -> Tensor:
        """The differentiable score `[batch]`; larger means more of the behavior."""

    def slack(self, logits: Tensor) -> Tensor:
        """The slack `[batch]`, in logits: the behavior shows exactly where it is positive."""

    def select(self, rows: Tensor) -> Behavior:
        """Select a subset of examples."""


@runtime_checkable
class Targeted(Behavior, Protocol):
    """A behavior with one target token per example, which can be exchanged for another target."""

    @property
    def target(self) -> Tensor:
        """The target token `[batch]` of each example."""

    @property
    def rivals(self) -> Tensor:
        """Tokens `[batch rival]` that compete with the target; empty where the whole vocabulary does."""

    def retarget(self, target: Tensor) -> Targeted:
        """Exchange the target for `target [batch]`; the old target becomes a rival."""


@runtime_checkable
class Answering(Behavior, Protocol):
    """A behavior that reads the logits `[batch pos choice]` of a whole answer instead of the next token's."""

    @property
    def reads(self) -> int:
        """Number of last positions read: the number of tokens of the longest answer."""


@runtime_checkable
class Choosing(Targeted, Protocol):
    """A targeted behavior that knows all possible targets, beside those of its examples."""

    @property
    def choices(self) -> Tensor:
        """All possible targets, `[choice]`."""


def known_targets(behavior: Targeted) -> list[int]:
    """Tokens from which another target can be drawn: all choices where they are known, else the examples' targets."""
    known: list[int] = (behavior.choices if isinstance(behavior, Choosing) else behavior.target).tolist()
    return known


def by_chance(behavior: Behavior) -> float | None:
    """How often a behavior shows where a model knows nothing: 1 in as many answers as compete; None if not known."""
    tokens = behavior.tokens
    if not isinstance(behavior, Targeted) or tokens is None or not len(tokens):
        return None
    return 1 / len(set(tokens[0].tolist()))


def positions_read(behavior: Behavior) -> int:
    """Number of last positions at which a behavior reads logits: 1, or the number of its answer's tokens."""
    return behavior.reads if isinstance(behavior, Answering) else 1


def shows(behavior: Behavior, logits: Logits) -> Bool[Tensor, "batch"]:
    """Test for each example whether the behavior shows, `[batch]`."""
    return behavior.slack(logits) > 0


@dataclass(frozen=True, eq=False)
class LogitDifference:
    """`logit(target) - logit(other)`; shows where the target is above. IOI: the indirect object above the subject."""

    target: Int[Tensor, "batch"]
    other: Int[Tensor, "batch"]

    def __post_init__(self) -> None:
        clash = (self.target == self.other).nonzero().flatten().tolist()
        if clash:
            raise InputError(f"behavior: target and other are the same token in examples {clash}; name two")

    @property
    def tokens(self) -> Int[Tensor, "batch choice"]:
        return torch.stack([self.target, self.other], dim=1)

    def score(self, logits: Logits) -> PerExample:
        return logits[:, 0] - logits[:, 1]

    def slack(self, logits: Logits) -> PerExample:
        return self.score(logits)

    def select(self, rows: Rows) -> LogitDifference:
        return LogitDifference(self.target[rows], self.other[rows])

    @property
    def rivals(self) -> Int[Tensor, "batch 1"]:
        return self.other[:, None]

    def retarget(self, target: Int[Tensor, "batch"]) -> LogitDifference:
        """`logit(new target) - logit(other)`; where the new target is the other one, the two change places."""
        return LogitDifference(target, torch.where(target == self.other, self.target, self.other))


@dataclass(frozen=True, eq=False)
class ChoiceMargin:
    """The target's logit minus the mean of the others' (paper: WMDP); shows where the target beats every other."""

    target: Int[Tensor, "batch"]
    others: Int[Tensor, "batch choice"]

    @property
    def tokens(self) -> Int[Tensor, "batch choice"] | None:
        return torch.cat([self.target[:, None], self.others], dim=1)

    def score(self, logits: Logits) -> PerExample:
        return logits[:, 0] - logits[:, 1:].mean(dim=1)

    def slack(self, logits: Logits) -> PerExample:
        return logits[:, 0] - logits[:, 1:].amax(dim=1)

    def select(self, rows: Rows) -> ChoiceMargin:
        return type(self)(self.target[rows], self.others[rows])

    @property
    def rivals(self) -> Int[Tensor, "batch choice"]:
        return self.others

    def retarget(self, target: Int[Tensor, "batch"]) -> ChoiceMargin:
        """Exchange the target; the old one takes the new one's place among the rivals, or the last place."""
        place = self.others == target[:, None]
        place[:, -1] |= ~place.any(dim=1) & (target != self.target)
        return type(self)(target, torch.where(place, self.target[:, None], self.others))


class ChoiceCrossEntropy(ChoiceMargin):
    """The target's log-probability among the choices alone (minus the cross-entropy); shows as `ChoiceMargin` does."""

    def score(self, logits: Logits) -> PerExample:
        return logits.log_softmax(dim=-1)[:, 0]


class ChoiceOdds(ChoiceMargin):
    """The target's log-odds among the choices; shows where it is likelier than all the others together."""

    def score(self, logits: Logits) -> PerExample:
        return logits[:, 0] - logits[:, 1:].logsumexp(dim=1)

    def slack(self, logits: Logits) -> PerExample:
        return self.score(logits)


class VocabularyMargin(ChoiceMargin):
    """The target's logit minus the largest of the whole vocabulary's others; shows as `ChoiceMargin` does.

    What the score raises is more than what the predicate asks: to be the next token, and not only the best choice.
    """

    @property
    def tokens(self) -> None:
        return None

    def score(self, logits: Logits) -> PerExample:
        others = logits.scatter(1, self.target[:, None], -torch.inf)
        return logits.gather(1, self.target[:, None])[:, 0] - others.amax(dim=1)

    def slack(self, logits: Logits) -> PerExample:
        return super().slack(logits.gather(1, torch.cat([self.target[:, None], self.others], dim=1)))


@dataclass(frozen=True, eq=False)
class AnswerLikelihood:
    """Log-probability of one next token among the whole vocabulary; shows where it is the likeliest."""

    answer: Int[Tensor, "batch"]

    @property
    def tokens(self) -> None:
        return None

    def score(self, logits: Logits) -> PerExample:
        return self._answer(logits.log_softmax(dim=-1))

    def slack(self, logits: Logits) -> PerExample:
        others = logits.scatter(1, self.answer[:, None], -torch.inf)
        return self._answer(logits) - others.amax(dim=1)

    def select(self, rows: Rows) -> AnswerLikelihood:
        return AnswerLikelihood(self.answer[rows])

    @property
    def target(self) -> Int[Tensor, "batch"]:
        return self.answer

    @property
    def rivals(self) -> Int[Tensor, "batch 0"]:
        return self.answer[:, None][:, :0]

    def retarget(self, target: Int[Tensor, "batch"]) -> AnswerLikelihood:
        """Exchange the answer whose log-probability is the score."""
        return AnswerLikelihood(target)

    def _answer(self, values: Logits) -> PerExample:
        return values.gather(1, self.answer[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class ForcedAnswer:
    """A whole answer, teacher-forced; shows where greedy generation would give it token for token.

    The score is the mean log-probability of the answer's tokens, the first `heavy` of them counting `weight` times.

    Attributes:
        answer: `[batch pos]`, negative where an answer has ended.
    """

    answer: Int[Tensor, "batch pos"]
    heavy: int = 16
    weight: float | int = 2.0

    @property
    def tokens(self) -> None:
        return None

    @property
    def reads(self) -> int:
        return int(self.answer.shape[1])

    def score(self, logits: Float[Tensor, "batch pos vocab"]) -> PerExample:
        counts = self._there.to(logits.dtype)
        counts[:, : self.heavy] *= self.weight
        likely = torch.where(self._there, _at(logits.log_softmax(dim=-1), self._token), 0.0)
        return (counts * likely).sum(dim=1) / counts.sum(dim=1)

    def margins(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos"]:
        """The logit of each token minus the largest of all others; infinite where an answer has ended."""
        others = logits.scatter(-1, self._token[..., None], -torch.inf)
        return torch.where(self._there, _at(logits, self._token) - others.amax(dim=-1), torch.inf)

    def slack(self, logits: Float[Tensor, "batch pos vocab"]) -> PerExample:
        return self.margins(logits).amin(dim=1)

    def select(self, rows: Rows) -> ForcedAnswer:
        return ForcedAnswer(self.answer[rows], self.heavy, self.weight)

    @property
    def _there(self) -> Bool[Tensor, "batch pos"]:
        return self.answer >= 0

    @property
    def _token(self) -> Int[Tensor, "batch pos"]:
        return self.answer.clamp(min=0)


def _at(values: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    return values.gather(-1, tokens[..., None])[..., 0]
