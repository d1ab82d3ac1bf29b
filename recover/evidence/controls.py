"""Controls of a check: what would be found if there were nothing to find?

- *Placebo target*: an unrelated target of the same kind, drawn for each example from the targets of the others, that
  does not show when defended. If it is reached as easily, reaching the own one says nothing about the behavior.
- *Undo*: the clamp writes along decoder directions, and C1 forbids moving only the encoder ones, so part of what it
  wrote could be cancelled without any clamped feature noticing: `-P (h_def - h)`, in several shares.
- *Undefended*: with the clamp off, from where it would have put the state, with nothing held and as far as it went, a
  search must find a way back, since there is one: zero.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange

from recover.defenses.defended import Defended
from recover.models.host import Suffix
from recover.numerics.metrics import norm
from recover.search.ascent import Feasible, scale_to
from recover.tasks.behaviors import Behavior, Targeted, positions_read
from recover.types import Bool, Delta, Float, Int, PerExample, Residual, Rows, Tensor

TRIES = 8
"""Candidates looked at before an example counts as having no placebo."""


@dataclass(frozen=True)
class Anywhere:
    """Every delta is admissible."""

    def project(self, delta: Residual) -> Residual:
        return delta

    def select(self, rows: Rows) -> Anywhere:
        return self


@dataclass(frozen=True, eq=False)
class Undefended:
    """An objective: the model without the clamp, with a delta at the clamped site."""

    suffix: Suffix
    behavior: Behavior

    @classmethod
    def of(cls, defended: Defended) -> Undefended:
        """Turn the clamp off."""
        held, behavior = defended.suffix, defended.behavior
        start, reads = (held.site, defended.base), positions_read(behavior)
        _, suffix = held.model.prefill(held.prompts, start, n_pos=held.n_pos, tokens=behavior.tokens, reads=reads)
        return cls(suffix, behavior)

    def __call__(self, delta: Residual) -> tuple[PerExample, PerExample]:
        state, reads = self.suffix.residual + delta, positions_read(self.behavior)
        logits = self.suffix.logits(state, self.behavior.tokens, reads).float()
        return self.behavior.score(logits), self.behavior.slack(logits)

    def select(self, rows: Rows) -> Undefended:
        return Undefended(self.suffix.select(rows), self.behavior.select(rows))


def displacement(defended: Defended) -> Delta:
    """What the clamps themselves move where a delta enters, `h_def - h`, `[batch (site n_pos) d_model]`.

    At each site it is what the clamp there does, with those below live.
    """
    n_pos, (_, *later) = defended.suffix.n_pos, defended.delta_sites
    moved = [defended.suffix.residual - defended.base[:, -n_pos:]]
    if later:
        after = defended.states()
        with torch.no_grad():
            before = defended.suffix.entering(defended.suffix.residual, later)
        moved += [after[site] - before[site] for site in later]
    return torch.cat(moved, dim=1).float()


def undone(moved: Delta, feasible: Feasible, scale: float) -> Delta:
    """The admissible part of the clamp's displacement, taken back by this share: `-scale P (h_def - h)`."""
    return -scale * feasible.project(moved)


def cosine(delta: Delta, other: Delta) -> PerExample:
    """Cosine of two deltas of each example, all positions together; 0 where one of them is zero."""
    return rearrange(scale_to(delta, 1.0) * scale_to(other, 1.0), "batch pos d -> batch (pos d)").sum(dim=1)


def placebo_targets(
    defended: Defended, ids: Sequence[str], known: Sequence[int], seed: int
) -> tuple[Int[Tensor, "batch"], Bool[Tensor, "batch"]] | None:
    """An unrelated target for each example, and where there is one.

    Each example goes through the other targets in an order of its own, drawn from the seed and its id, so that neither
    its batch nor its place matters. Left out are its own target, a sole rival (in IOI the subject, which is not
    unrelated), and what shows when defended already, as that would be no flip. `known` are the targets of all examples
    of the check. None where the behavior has no target.
    """
    behavior = defended.behavior
    if not isinstance(behavior, Targeted):
        return None
    own, rivals = behavior.target.tolist(), behavior.rivals.tolist()
    orders = []
    for name, target, others in zip(ids, own, rivals, strict=True):
        sole = others if len(others) == 1 else []
        order = [token for token in sorted(set(known)) if token != target and token not in sole]
        random.Random(f"{seed}:{name}").shuffle(order)
        orders.append(order)
    chosen, found = behavior.target.clone(), torch.zeros_like(behavior.target, dtype=torch.bool)
    for turn in range(min(TRIES, max(map(len, orders), default=0))):
        offered = [order[turn] if turn < len(order) else target for order, target in zip(orders, own, strict=True)]
        there = torch.tensor([turn < len(order) for order in orders], device=found.device)
        tried = torch.tensor(offered, device=chosen.device)
        with torch.no_grad():
            slack = defended.asking(behavior.retarget(tried))(defended.zero_delta)[1]
        take = there & ~found & (slack <= 0)
        chosen, found = torch.where(take, tried, chosen), found | take
        if bool(found.all()):
            break
    return chosen, found


def averaged(deltas: Float[Tensor, "batch pos d_model"]) -> Delta:
    """Their mean, for every example."""
    return deltas.mean(dim=0, keepdim=True).expand_as(deltas)


def longest(deltas: Delta) -> float:
    """The largest norm among them; 1 where all are zero, as a search needs a length."""
    return float(norm(deltas).max()) or 1.0
