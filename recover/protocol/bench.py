"""The bench that the phases of a check share: model, defense, examples in batches, and their defended states.

Batches are fixed by the order of the examples, so that every phase, and a later start, meets the same ones. A defended
state is made when it is first asked for and kept: valid flips only, as no phase needs others.

*What is searched.* Where deltas enter at the first clamped site, deltas themselves, within what is admissible
(`admissible`). Where they enter at every site, the free parts of pinned deltas (`pinning`); `whole` makes of these what
is saved, corrections included.

*What flips.* An example whose behavior shows without the defense and not with it. Where the behavior is a whole answer
that is read from what the model says: its own reply opens with neither a refusal nor a safety cue, the defended one
with a refusal (`recover.tasks.replies`).

*What shared perturbations are fitted and read on.* The examples that are right at base by the stricter predicate and by
the check's own: those that flip by both, and those that the defense leaves right. What only one of the two
predicates loses is neither. Where the behavior is a whole answer, flips alone, as each reading is a reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from recover.defenses.clamps import Defense
from recover.defenses.defended import Defended, defend, displaced
from recover.defenses.speech import say
from recover.evidence.transfer import Pool
from recover.models.generation import texts
from recover.models.host import Model
from recover.numerics.subspaces import leading
from recover.protocol.plan import Plan
from recover.search.ascent import Feasible, Schedule
from recover.search.constraints.first_order import admissible
from recover.search.constraints.pinned import Pinned
from recover.tasks import replies as refusal
from recover.tasks.behaviors import Targeted, positions_read
from recover.tasks.dialogue import Dialogue
from recover.tasks.examples import Examples
from recover.tasks.rules import OtherRule, all_rules
from recover.types import Bool, Delta, Float, Int, Rows, Site, Surface, Tensor, TokenIds

GOAL = 0.02
"""Share of the median distance from showing that a search's goal is at most."""
EXPLAINED = 0.999
"""Share of the square of what a clamp writes that C1+ forbids: the rest is rounding and stray features."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples under the defense, and which of them flip.

    Attributes:
        examples: all of the batch.
        base, under: the slack `[batch]` without the defense and with it; `strict_...` by the stricter predicate.
        flips: the rows of valid flips.
        right: the rows that shared perturbations are fitted and read on.
        turned: which of `right` flip.
        target: the defended state of the flips.
        right_target: the defended state of `right`, with the stricter predicate.
        replies: what the model says under the defense, where the behavior is a whole answer.
    """

    examples: Examples
    base: Float[Tensor, "batch"]
    under: Float[Tensor, "batch"]
    strict_base: Float[Tensor, "batch"]
    strict_under: Float[Tensor, "batch"]
    flips: Int[Tensor, "flips"]
    right: Int[Tensor, "right"]
    turned: Bool[Tensor, "right"]
    target: Defended
    right_target: Defended
    replies: Sequence[str] | None = None

    @property
    def flipped(self) -> Examples:
        """The valid flips."""
        return self.examples.select(self.flips)

    @property
    def flip_ids(self) -> list[str]:
        """Ids of the valid flips."""
        return [self.examples.ids[row] for row in self.flips.tolist()]

    @property
    def right_ids(self) -> list[str]:
        """Ids of what shared perturbations are fitted and read on."""
        return [self.examples.ids[row] for row in self.right.tolist()]


@dataclass(frozen=True, eq=False)
class Bench:
    """The model, the defense and the examples of a check, in batches.

    `dataclasses.replace` gives a bench with another defense, plan or budget, which makes its own defended batches.

    Attributes:
        model: what behaviors are read with: the host, or what the examples' readout makes of it.
        exact: `model` in float32 or float64, for certificates.
        defense: its clamps.
        examples: prompts and behavior.
        budget: largest Frobenius norm of a perturbation.
        plan: what is run; its surface says where perturbations enter.
        batch_size: examples at once.
        host: the host itself, where it is another model than `model`.
    """

    model: Model
    exact: Model
    defense: Defense
    examples: Examples
    budget: float
    plan: Plan
    batch_size: int
    host: Model | None = None
    # Not an argument: `replace` would hand it on, and batches under one defense would pass for those under another.
    _made: dict[int, Batch] = field(init=False, repr=False, default_factory=dict)

    @cached_property
    def schedule(self) -> Schedule:
        """How hard to search, with a goal on the scale of the slack.

        A goal of some logits is out of reach where all logits are small: it is a share of how far the flips are from
        showing, at most.
        """
        given, flips = self.plan.schedule, [batch.under[batch.flips] for batch in self.batches]
        away = torch.cat(flips).abs()
        away = away[away.isfinite() & (away > 0)]
        if not len(away):
            return given
        return replace(given, goal=min(given.goal, GOAL * float(away.double().median())))

    @property
    def surface(self) -> Surface:
        """Where perturbations enter."""
        return self.plan.surface

    def entered_at(self, surface: Surface) -> Bench:
        """Make a bench whose perturbations enter elsewhere."""
        return replace(self, plan=replace(self.plan, surface=surface))

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
        """All batches, in order."""
        return [self.batch(number) for number in range(len(self.rows))]

    @cached_property
    def pool(self) -> Pool:
        """All that shared perturbations are fitted and read on, as one pool."""
        return Pool(tuple(self.objective(batch.right_target) for batch in self.batches if len(batch.right)))

    @cached_property
    def pool_rows(self) -> Rows:
        """Where the examples of the pool stand among all examples."""
        return torch.cat([rows[batch.right.cpu()] for rows, batch in zip(self.rows, self.batches, strict=True)])

    @cached_property
    def pool_turned(self) -> Bool[Tensor, "right"]:
        """Which examples of the pool flip."""
        return torch.cat([batch.turned.cpu() for batch in self.batches])

    @cached_property
    def pool_ids(self) -> list[str]:
        """Ids of the examples of the pool."""
        return [name for batch in self.batches for name in batch.right_ids]

    @cached_property
    def pool_own(self) -> Int[Tensor, "right"]:
        """The right answer of each example of the pool: its target, or its number where answers are whole; else 0."""
        if self.examples.dialogue is not None:
            return torch.arange(len(self.pool))
        targets = self.pool.targets
        return torch.zeros(len(self.pool), dtype=torch.long) if targets is None else targets.cpu()

    @cached_property
    def other_rules(self) -> tuple[OtherRule, ...]:
        """Other rules over the same prompts, as many as the plan compares."""
        examples, base = self.examples, None
        read = examples.strict or examples.behavior
        if isinstance(read, Targeted) and examples.dialogue is None:
            parts = [(examples.prompts.select(rows), read.select(rows).tokens) for rows in self.rows]
            with torch.no_grad():
                runs = [self.model.run(p, tokens=tokens, reads=positions_read(read)).logits for p, tokens in parts]
            base = torch.cat(runs).float()
        return all_rules(examples, base, self.plan.seed, self.plan.transfer.rules)

    @cached_property
    def pool_clusters(self) -> list[str]:
        """For each example of the pool a name that it shares with those that ask the same thing."""
        names = self.examples.clusters
        return [names[row] for row in self.pool_rows.tolist()]

    def defended(self, part: Examples, model: Model | None = None) -> Defended:
        """Put these examples under the defense."""
        return defend(model or self.model, self.defense, part.prompts, part.behavior, surface=self.surface)

    def objective(self, defended: Defended) -> Defended | Pinned:
        """Give the function that a search over these examples raises."""
        return Pinned.of(defended) if self.surface.every else defended

    def feasible(self, objective: Defended | Pinned, *, write_orthogonal: bool = False) -> Feasible:
        """Give the space that a search may vary: under C1, or C1+."""
        if not write_orthogonal:
            return objective.free if isinstance(objective, Pinned) else admissible(objective)
        if isinstance(objective, Pinned):
            return objective.orthogonal_to(self.written)
        return admissible(objective, write_orthogonal=True, written=self.written[self.defense.sites[0]])

    @cached_property
    def written(self) -> dict[Site, Float[Tensor, "d_model written"]]:
        """Directions along which the clamps of each site write on these prompts, at any position: a basis of it.

        All of what is written but a thousandth of its square, and no direction of a feature that never fires.
        """
        reads = positions_read(self.examples.behavior)
        parts = [displaced(self.model, self.defense, self.examples.prompts.select(rows), reads) for rows in self.rows]
        return {site: leading(torch.cat([part[site] for part in parts]), EXPLAINED) for site in self.defense.sites}

    def whole(self, part: Examples, objective: Defended | Pinned, *found: Delta) -> list[Delta]:
        """Complete what a search of the examples `part` found for saving.

        Pinned deltas, found as free parts, get their corrections, as exact as certificates are.
        """
        if not isinstance(objective, Pinned):
            return list(found)
        if self.exact is not self.model:
            objective = Pinned.of(self.defended(part, self.exact))
        return [objective.delta(free.to(self.exact.dtype)).float() for free in found]

    def _make(self, part: Examples) -> Batch:
        defended = self.defended(part)
        slack = part.behavior.slack
        base, under = slack(defended.base_logits.float()), slack(defended.defended_logits.float())
        flips, replies = defended.valid_flips, None
        if part.dialogue is not None:
            replies = texts(self.model.tokenizer, self.said(part.dialogue))
            said = [refusal.valid_flip(*pair) for pair in zip(part.dialogue.texts, replies, strict=True)]
            flips = flips[torch.tensor(said, device=flips.device)[flips]]
        target, here = defended.select(flips), torch.arange(len(part.ids), device=flips.device)
        turned = torch.isin(here, flips)
        if part.strict is None:
            right = flips if part.dialogue is not None else (base > 0).nonzero().flatten()
            read = defended.select(right)
            return Batch(part, base, under, base, under, flips, right, turned[right], target, read, replies)
        strict, suffix = part.strict, defended.suffix
        with torch.no_grad():
            at_base = self.model.run(part.prompts, tokens=strict.tokens).logits
            when_defended = suffix.logits(suffix.residual, strict.tokens)
        again = replace(defended, behavior=strict, base_logits=at_base, defended_logits=when_defended)
        strict_base, strict_under = strict.slack(at_base.float()), strict.slack(again.defended_logits.float())
        lost = strict_under <= 0
        right = ((base > 0) & (strict_base > 0) & (turned == lost)).nonzero().flatten()
        read = again.select(right)
        return Batch(part, base, under, strict_base, strict_under, flips, right, turned[right], target, read, replies)

    def said(self, dialogue: Dialogue, delta: Delta | None = None) -> TokenIds:
        """Generate replies `[batch pos]` to these requests under the defense, with a delta or without."""
        length = dialogue.answers.shape[1]
        return say(self.model, dialogue.prompts, length, self.defense, delta, surface=self.surface, stop=dialogue.stop)
