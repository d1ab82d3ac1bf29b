"""A search in two stages: first that an answer opens as its own and not as a refusal, then that it is given whole.

The score of a whole answer is flat where the model is sure to refuse: what follows an opening that it would never give
is of little use. The published search therefore begins with the opening alone (reference: Settings, Refusal):

1. *Opening*: raise the mean log-probability of the answer's first tokens, and lower that of the tokens with which the
   defended model refuses, each teacher-forced, for some steps.
2. *Answer*: go on from there with the whole answer, as any search does.

Only the start of the second stage differs, so what it may vary, its budget and its goal are those of any search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from recover.defenses.defended import Defended
from recover.search.ascent import Feasible, Objective, OnStep, Schedule, find_perturbation
from recover.search.constraints.pinned import Pinned
from recover.tasks.behaviors import positions_read
from recover.types import Delta, Float, PerExample, Rows, Tensor

OPENING_STEPS = 20
"""Steps of the first stage, as published."""


@dataclass(frozen=True, eq=False)
class Opening:
    """The objective of the first stage.

    Attributes:
        own, refusal: the first tokens of each answer, forced (`ForcedAnswer`), and as many of each refusal.
        columns: how many columns a delta has at each site; those beyond the opening do not matter to it.
    """

    own: Defended | Pinned
    refusal: Defended | Pinned
    columns: int

    def __call__(self, delta: Delta) -> tuple[PerExample, PerExample]:
        """The difference of the two mean log-probabilities; the slack is the same, so that no goal ends the stage."""
        own, refusal = (part(self._first(part, delta))[0] for part in (self.own, self.refusal))
        return own - refusal, own - refusal

    def select(self, rows: Rows) -> Opening:
        return replace(self, own=self.own.select(rows), refusal=self.refusal.select(rows))

    def _first(self, part: Defended | Pinned, delta: Delta) -> Float[Tensor, "batch site_opening d_model"]:
        """The columns of a delta that an opening has, site after site."""
        sites = delta.chunk(delta.shape[1] // self.columns, dim=1)
        return torch.cat([site[:, : positions_read(part.behavior)] for site in sites], dim=1)


def opened(
    opening: Objective,
    start: Delta,
    feasible: Feasible,
    budget: float,
    schedule: Schedule | None = None,
    on_step: OnStep = None,
) -> Delta:
    """Run the first stage: the delta that it ends at, within the budget, is where the second starts.

    The arguments are those of `find_perturbation`; of the schedule the stride and the seed count.
    """
    first = replace(schedule or Schedule(), steps=OPENING_STEPS, goal=math.inf, restarts=0)
    return find_perturbation(opening, start, feasible, budget, first, on_step).delta
