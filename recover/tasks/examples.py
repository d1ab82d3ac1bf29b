"""The examples of a check: prompts, each with its behavior, and optional material for selection and transfer.

A *dialogue* stands beside examples whose behavior is a whole answer: the requests alone, the model's own answers and
their words. Its prompts hold the answer, teacher-forced; whether an example flips, and what a perturbation brings back,
is then read from what the model *says* as well (`recover.tasks.replies`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from recover.models.host import Model, Prompts
from recover.tasks.behaviors import Behavior, positions_read
from recover.tasks.dialogue import Dialogue
from recover.tasks.duplicates import grouped
from recover.tasks.rules import OtherRule
from recover.types import InputError, Rows


@runtime_checkable
class Readout(Protocol):
    """A function from the host model to the model that a behavior is read with, such as one that ends in a probe."""

    @property
    def sha256(self) -> str:
        """Hash of everything that determines the readout."""

    def __call__(self, model: Model) -> Model:
        """Build a model with the host's blocks up to some site, and another head."""


@dataclass(frozen=True, eq=False)
class Contrast:
    """Prompts of two kinds that features are selected from.

    `shown` end before the behavior of interest and `hidden` do not (`contrast`); or `shown` are about what is to be
    forgotten and `hidden` about what is to be kept (`firing`, which reads all their tokens); or `shown` are of a kind
    and `hidden` of others, and `behavior` is what tells them apart (`effect`).

    Attributes:
        behavior: the behavior of each of `shown`, for features selected by their effect on it.
    """

    shown: Prompts
    hidden: Prompts
    behavior: Behavior | None = None


@dataclass(frozen=True, eq=False)
class Examples:
    """Prompts with an id and a behavior each.

    Attributes:
        texts: the prompts as text, for reports that keep it.
        strict: a stricter predicate of the same kind, with which transfer is read: one whose rate of chance is low.
            By default the behavior itself.
        dialogue: of the same examples, where the behavior is a whole answer.
        contrast: what features are selected from that announce a behavior; `None` where the task has no such prompts.
        groups: a name for each example, the same for those that ask the same thing in other words or another order:
            transfer never reads one that a shared delta was fitted to another of. By default each is its own.
        readout: makes the model that the behavior is read with; by default that is the host.
        rules: other rules over the same prompts, which the behavior's own is compared with.
    """

    ids: Sequence[str]
    prompts: Prompts
    behavior: Behavior
    texts: Sequence[str] | None = None
    strict: Behavior | None = None
    dialogue: Dialogue | None = None
    contrast: Contrast | None = None
    groups: Sequence[str] | None = None
    readout: Readout | None = None
    rules: Sequence[OtherRule] = ()

    def __post_init__(self) -> None:
        n = len(self.ids)
        if n != len(self.prompts) or not n:
            raise InputError(f"examples: {n} ids for {len(self.prompts)} prompts; give one each, at least one")
        if len(set(self.ids)) < n:
            raise InputError("examples: two have the same id; each needs its own")
        if self.groups is not None and len(self.groups) != n:
            raise InputError(f"examples: {len(self.groups)} groups for {n} examples; give one each, or none")
        for rule in self.rules:
            if len(rule) != n:
                raise InputError(
                    f"examples: the rule {rule.name!r} has {len(rule)} answers for {n} examples; give one each"
                )

    @classmethod
    def of(
        cls,
        dialogue: Dialogue,
        columns: int,
        contrast: Contrast | None = None,
        rules: Sequence[OtherRule] = (),
    ) -> Examples:
        """Make examples of requests whose behavior is to give the first `columns` tokens of the model's own answer."""
        prompts, behavior = dialogue.forced(columns)
        return cls(dialogue.ids, prompts, behavior, dialogue.asked, dialogue=dialogue, contrast=contrast, rules=rules)

    @property
    def sha256(self) -> str:
        """Hash of the ids, the tokens (those of a forced answer included), the readout and the other rules."""
        digest = hashlib.sha256("\n".join(self.ids).encode())
        digest.update(repr(self.prompts.ids.where(self.prompts.mask, -1).tolist()).encode())
        if self.readout is not None:
            digest.update(self.readout.sha256.encode())
        for rule in self.rules:
            digest.update(repr((rule.name, rule.answers.tolist())).encode())
        return digest.hexdigest()

    @cached_property
    def clusters(self) -> Sequence[str]:
        """The groups, joined where near-duplicates link them (`recover.tasks.duplicates`): what no split may part."""
        return grouped(self)

    def select(self, rows: Rows) -> Examples:
        """Select a subset of examples."""
        pick = rows.tolist()
        return Examples(
            [self.ids[row] for row in pick],
            self.prompts.select(rows),
            self.behavior.select(rows),
            None if self.texts is None else [self.texts[row] for row in pick],
            None if self.strict is None else self.strict.select(rows),
            None if self.dialogue is None else self.dialogue.select(pick),
            self.contrast,
            None if self.groups is None else [self.groups[row] for row in pick],
            self.readout,
            [rule.select(rows) for rule in self.rules],
        )

    def read_with(self, model: Model, exact: Model | None = None) -> tuple[Model, Model]:
        """Return the model that the behavior is read with, and its counterpart for certificates.

        `exact` is the host model for certificates; `model` itself by default.
        """
        exact = exact or model
        if self.readout is None:
            return model, exact
        read = self.readout(model)
        return read, read if exact is model else self.readout(exact)

    def answered_as(self, other: Dialogue) -> Examples:
        """Pair each request with the answer to the request in the same place of `other`.

        Raises:
            InputError: the examples have no dialogue.
        """
        if self.dialogue is None:
            raise InputError("examples: without a dialogue they have no answers that could be exchanged")
        return Examples.of(
            self.dialogue.with_answers_of(other), positions_read(self.behavior), self.contrast, self.rules
        )
