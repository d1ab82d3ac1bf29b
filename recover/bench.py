"""What the phases of a check share: the model, the defense, the examples in batches, and their defended states.

Batches are fixed by the order of the examples, so that every phase, and a later start, meets the same ones. A defended
state is made when it is first asked for and kept: valid flips only, as no phase needs others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from recover.admissible import admissible
from recover.behavior import Behavior
from recover.clamp import Defense
from recover.defended import Defended, Placement, defend
from recover.model import Model, Prompts
from recover.plan import Plan
from recover.search import Feasible, Schedule
from recover.transfer import Pool
from recover.types import Float, InputError, Int, Tensor


@dataclass(frozen=True, eq=False)
class Examples:
    """What is asked of the model: ids, prompts and one behavior entry each.

    Attributes:
        texts: only to be kept.
        strict: a stricter predicate of the same kind, with which transfer is read: one whose rate of chance is low.
            By default the behavior itself.
    """

    ids: Sequence[str]
    prompts: Prompts
    behavior: Behavior
    texts: Sequence[str] | None = None
    strict: Behavior | None = None

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.prompts) or not len(self.ids):
            raise InputError(
                f"examples: {len(self.ids)} ids for {len(self.prompts)} prompts; give one each, at least one"
            )
        if len(set(self.ids)) < len(self.ids):
            raise InputError("examples: two have the same id; each needs its own")

    def select(self, rows: Int[Tensor, "rows"]) -> Examples:
        """The same for the examples `rows`."""
        pick = rows.tolist()
        return Examples(
            [self.ids[row] for row in pick],
            self.prompts.select(rows),
            self.behavior.select(rows),
            None if self.texts is None else [self.texts[row] for row in pick],
            None if self.strict is None else self.strict.select(rows),
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples under the defense, and which of them flip.

    Attributes:
        base, under: the slack `[batch]` without the defense and with it; `strict_...` by the stricter predicate.
        flips: the rows of valid flips.
        strict_flips: the same by the stricter predicate.
        target: the defended state of the flips.
        strict_target: of the strict flips, with the stricter predicate.
    """

    examples: Examples
    base: Float[Tensor, "batch"]
    under: Float[Tensor, "batch"]
    strict_base: Float[Tensor, "batch"]
    strict_under: Float[Tensor, "batch"]
    flips: Int[Tensor, "flips"]
    strict_flips: Int[Tensor, "strict_flips"]
    target: Defended
    strict_target: Defended

    @property
    def flip_ids(self) -> list[str]:
        """Ids of the valid flips."""
        return [self.examples.ids[row] for row in self.flips.tolist()]

    @property
    def strict_ids(self) -> list[str]:
        """Ids of the flips by the stricter predicate."""
        return [self.examples.ids[row] for row in self.strict_flips.tolist()]


@dataclass(frozen=True, eq=False)
class Bench:
    """A check's material. `exact` is the model in float32, for certificates."""

    model: Model
    exact: Model
    defense: Defense
    examples: Examples
    budget: float
    placement: Placement
    schedule: Schedule
    plan: Plan
    batch_size: int
    _made: dict[int, Batch] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[Int[Tensor, "rows"], ...]:
        """The examples of each batch."""
        return torch.split(torch.arange(len(self.examples.ids)), self.batch_size)

    def batch(self, number: int) -> Batch:
        """The batch of this number, defended."""
        if number not in self._made:
            self._made[number] = self._make(self.examples.select(self.rows[number]))
        return self._made[number]

    @property
    def batches(self) -> list[Batch]:
        """All of them, in order."""
        return [self.batch(number) for number in range(len(self.rows))]

    @property
    def pool(self) -> Pool:
        """All examples that flip by the stricter predicate, as one."""
        return Pool(tuple(batch.strict_target for batch in self.batches if len(batch.strict_flips)))

    def feasible(self, defended: Defended, *, write_orthogonal: bool = False) -> Feasible:
        """The admissible deltas of these examples: C1, or C1+."""
        return admissible(defended, write_orthogonal=write_orthogonal)

    def _make(self, part: Examples) -> Batch:
        defended = defend(self.model, self.defense, part.prompts, part.behavior, placement=self.placement)
        slack = part.behavior.slack
        base, under = slack(defended.base_logits.float()), slack(defended.defended_logits.float())
        flips, target = defended.valid_flips, defended.select(defended.valid_flips)
        if part.strict is None:
            return Batch(part, base, under, base, under, flips, flips, target, target)
        strict, suffix = part.strict, defended.suffix
        with torch.no_grad():
            at_base = self.model.run(part.prompts, tokens=strict.tokens).logits
            when_defended = suffix.logits(suffix.residual, strict.tokens)
        again = replace(defended, behavior=strict, base_logits=at_base, defended_logits=when_defended)
        strict_base, strict_under = strict.slack(at_base.float()), strict.slack(again.defended_logits.float())
        chosen = again.valid_flips
        return Batch(part, base, under, strict_base, strict_under, flips, chosen, target, again.select(chosen))
