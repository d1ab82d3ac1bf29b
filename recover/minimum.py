"""The smallest admissible perturbation that brings the behavior back, example by example.

A rate at one budget hides everything; a smallest norm is a figure that two defenses can be compared by. From any delta
that reaches the goal:

1. *Edge*: on the ray from zero to it, bisect to the shortest point that still reaches the goal.
2. *Turn*: on the edge of a smooth goal the nearest point to zero is where the delta is parallel to the edge's normal,
   the admissible part of the slack's gradient. Turn toward it, all the way or in part; whatever reaches the goal while
   being shorter is kept, and step 1 follows.
3. Repeat until no turn helps. Where the slack is linear, or increasing in something linear, one turn is exact.

The result is never longer than where it began, and always reaches the goal. It is an upper bound of the true smallest
norm: the nearest point of *this* piece of the edge, which is all that a local method can say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange

from recover.metrics import norm
from recover.search import Delta, Feasible, Objective, Schedule, recover, scale_to
from recover.types import Float, PerExample, Tensor

TURNS = (1.0, 0.5, 0.2, 0.05)
MARGIN = 1e-4


@dataclass(frozen=True, eq=False)
class Minimum:
    """The smallest perturbation met.

    Attributes:
        delta: zero where none was found.
        norm: infinite where none was found, 0 where the behavior shows without any.
    """

    delta: Delta
    norm: PerExample


def smallest_norm(
    objective: Objective,
    start: Delta,
    feasible: Feasible,
    schedule: Schedule | None = None,
    *,
    rounds: int = 20,
) -> Minimum:
    """For each example the smallest norm of an admissible delta with positive slack.

    Args:
        objective: score and slack of a delta.
        start: a delta to begin the search from, or one that reaches the goal already, `[batch pos d_model]`;
            admissible.
        feasible: the linear constraint, or any cone.
        schedule: of the search that finds a first such delta, without a budget.
        rounds: turns at most.
    """
    with torch.no_grad():
        _, slack = objective(torch.zeros_like(start))
    goal = MARGIN * slack.abs()
    here, reached = torch.zeros_like(start), torch.zeros_like(slack, dtype=torch.bool)
    # A behavior's score and its slack lead to different places, and without a budget one of them may lead nowhere.
    for rising in (objective, OnSlack(objective)):
        found = recover(rising, start, feasible, float("inf"), schedule)
        there, here_too = edge(objective, found.delta, goal), found.slack >= goal
        better = here_too & (~reached | (norm(there) < norm(here)))
        here, reached = torch.where(rearrange(better, "batch -> batch 1 1"), there, here), reached | here_too
    going = reached
    for _ in range(rounds):
        leaf = here.detach().requires_grad_(True)
        _, value = objective(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        before = norm(here)
        turned = edge(objective, closer(objective, here, feasible.project(gradient), goal), goal)
        here = torch.where(rearrange(going, "batch -> batch 1 1"), turned, here)
        going = going & (norm(here) <= before * (1 - MARGIN))
        if not bool(going.any()):
            break
    here = torch.where(rearrange(reached & (slack <= 0), "batch -> batch 1 1"), here, 0.0)
    return Minimum(here, torch.where(reached, norm(here), torch.inf))


@dataclass(frozen=True, eq=False)
class OnSlack:
    """An objective whose score is its slack: what is raised is the predicate itself."""

    of: Objective

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        _, slack = self.of(delta)
        return slack, slack

    def select(self, rows: Tensor) -> OnSlack:
        return OnSlack(self.of.select(rows))


def edge(objective: Objective, outer: Delta, goal: float | PerExample, halvings: int = 16) -> Delta:
    """The shortest point met on the ray from zero to `outer` that reaches the goal, if `outer` does."""

    def reaches(share: Float[Tensor, "batch"]) -> Tensor:
        return _reaches(objective, outer * rearrange(share, "batch -> batch 1 1"), goal)

    return outer * rearrange(_bisected(reaches, norm(outer), halvings), "batch -> batch 1 1")


def closer(objective: Objective, here: Delta, normal: Delta, goal: float | PerExample) -> Delta:
    """`here`, turned toward `normal` and a little shorter, as far as the goal is still reached; else as it is."""
    turned = here
    able = norm(normal) > 0
    for toward in reversed(TURNS):
        ray = (1 - toward) * scale_to(here, 1.0) + toward * scale_to(normal, 1.0)
        candidate = scale_to(ray, norm(here) * (1 - MARGIN / 2))
        keeps = able & _reaches(objective, candidate, goal)
        nearer = edge(objective, candidate, goal) if bool(keeps.any()) else candidate
        turned = torch.where(rearrange(keeps & (norm(nearer) < norm(turned)), "batch -> batch 1 1"), nearer, turned)
    return turned


def _reaches(objective: Objective, delta: Delta, goal: float | PerExample) -> Tensor:
    with torch.no_grad():
        _, slack = objective(delta)
    return slack >= goal


def _bisected(reaches: Callable[[Tensor], Tensor], like: PerExample, halvings: int) -> PerExample:
    """The least share in (0, 1] found to reach, taking it that 1 does and 0 does not."""
    low, high = torch.zeros_like(like), torch.ones_like(like)
    for _ in range(halvings):
        middle = (low + high) / 2
        reached = reaches(middle)
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high
