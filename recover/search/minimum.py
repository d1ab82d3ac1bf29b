"""The smallest admissible perturbation that brings the behavior back, example by example.

From any delta that reaches the goal:

1. *Edge*: on the ray from zero to it, close in on the shortest point that still reaches the goal.
2. *Step*: to the nearest point that would reach the goal if the slack were linear (a Newton step on the margin, as in
   DeepFool: Moosavi-Dezfooli et al. 2016), a little beyond it, or part of the way: the first of these that does reach
   the goal and is shorter. No edge is sought between steps, as slack that is left over shortens the next one.
3. *Turn*, where no such step helps: the nearest point of a smooth edge is parallel to its normal, so turn toward that,
   as far as the goal is still reached, and go to the edge on the ray.
4. Repeat 2 and 3 until neither helps. Where the slack is linear, or increasing in something linear, one step is exact.
5. *Corner*. Where a slack is the least of several margins the nearest point may lie where pieces meet, and each alone
   points past it. So a few cuts are collected, each the linear part of the slack where the last ones led, and the point
   nearest to zero that satisfies all of them is kept if it reaches the goal and is shorter. End with step 1.

The result is never longer than where it began, and always reaches the goal. It is an upper bound of the smallest norm:
the nearest point of *this* piece of the edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, rearrange

from recover.numerics.metrics import by_example, norm
from recover.search.ascent import Feasible, Objective, Schedule, find_perturbation, scale_to
from recover.types import Delta, Float, PerExample, Rows, Tensor

TURNS = (1.0, 0.5, 0.2, 0.05)
MARGIN = 1e-4
STEPS = ((1 + MARGIN, 1.0), (1.02, 1.0), (1.1, 1.0), (1.0, 0.7), (1.0, 0.4), (1.0, 0.15))
"""How far beyond the nearest point, and which share of the way there, in the order in which they are tried."""
CUTS = 6
STILL = 5e-4
"""A step that shortens a delta by less than this share of its norm is the last."""
PUSH = 0.2


@dataclass(frozen=True, eq=False)
class Minimum:
    """The smallest perturbation met.

    Attributes:
        delta: zero where none was found.
        norm: infinite where none was found, 0 where the behavior shows without any.
    """

    delta: Delta
    norm: PerExample


def smallest_perturbation(
    objective: Objective, start: Delta, feasible: Feasible, schedule: Schedule | None = None, *, rounds: int = 20
) -> Minimum:
    """Find for each example the smallest norm of an admissible delta with positive slack.

    Args:
        objective: score and slack of a delta.
        start: an admissible delta to begin from, or one that reaches the goal already, `[batch pos d_model]`.
        feasible: as in `find_perturbation`.
        schedule: of the search that finds a first such delta, without a budget.
        rounds: turns at most.
    """
    with torch.no_grad():
        _, slack = objective(torch.zeros_like(start))
    goal = MARGIN * slack.abs()
    here, reached = torch.zeros_like(start), slack > 0
    # A behavior's score and its slack lead to different places, and without a budget one of them may lead nowhere.
    for rising in (objective, OnSlack(objective)):
        found = find_perturbation(rising, start, feasible, float("inf"), schedule)
        there, here_too = edge(objective, found.delta, goal), found.slack >= goal
        better = here_too & (~reached | (norm(there) < norm(here)))
        here, reached = torch.where(by_example(better), there, here), reached | here_too
    # At a slack of exactly 0 the edge is zero itself, and there is nothing to turn.
    going = last = (reached & (slack < 0)).nonzero().flatten()
    for _ in range(rounds):
        if not len(going):
            break
        before = here[going]
        stepped = _step(objective.select(going), before, feasible.select(going), goal[going])
        here = here.index_copy(0, going, stepped)
        going = going[norm(stepped) <= norm(before) * (1 - STILL)]
    if len(last):
        part = objective.select(last)
        shortest = edge(part, _corner(part, here[last], feasible.select(last), goal[last]), goal[last])
        here = here.index_copy(0, last, shortest)
    return Minimum(here, torch.where(reached, norm(here), torch.inf))


def _step(objective: Objective, here: Delta, feasible: Feasible, goal: PerExample) -> Delta:
    """One Newton step on the margin, as far as the goal is still reached; else `here`."""
    value, gradient = _slope(objective, here, feasible)
    steep = norm(gradient)
    # How long a delta along the gradient is, where the slack's linear part meets the goal.
    length = torch.where(steep > 0, (dot(gradient, here) - (value - goal)) / steep.where(steep > 0, 1.0), torch.inf)
    nearest = scale_to(gradient, length.clamp(min=0).nan_to_num(0.0, 0.0, 0.0))
    stepped, left = here.clone(), (torch.isfinite(length) & (length < norm(here))).nonzero().flatten()
    for beyond, share in STEPS:
        if not len(left):
            break
        tried = (1 - share) * here[left] + share * beyond * nearest[left]
        shorter = norm(tried) < norm(here[left]) * (1 - MARGIN / 2)
        good = shorter & (_excess(objective.select(left), tried, goal[left]) >= 0)
        stepped[left[good]], left = tried[good], left[~good]
    still = (norm(stepped) > norm(here) * (1 - STILL)).nonzero().flatten()
    if len(still):
        stepped[still] = closer(objective.select(still), here[still], gradient[still], goal[still])
    return stepped


def _corner(objective: Objective, here: Delta, feasible: Feasible, goal: PerExample) -> Delta:
    """A shorter delta that reaches the goal by several linear pieces of the slack at once; else `here`."""
    best, point = here, here
    normals, offsets = list[Tensor](), list[Tensor]()
    for _ in range(CUTS):
        value, gradient = _slope(objective, point, feasible)
        better = (value >= goal) & (norm(point) < norm(best))
        best = torch.where(by_example(better), point, best)
        steep = norm(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)
        unit = scale_to(gradient, 1.0).nan_to_num(0.0, 0.0, 0.0)
        normals.append(rearrange(unit, "batch pos d -> batch (pos d)"))
        offsets.append((dot(unit, point) - (value - goal) / steep).nan_to_num(0.0, 0.0, 0.0))
        nearest = _nearest_to_all(torch.stack(normals, dim=1).double(), torch.stack(offsets, dim=1).double())
        point = (1 + MARGIN) * nearest.to(here.dtype).reshape(here.shape)
    return best


def _slope(objective: Objective, at: Delta, feasible: Feasible) -> tuple[PerExample, Delta]:
    """The slack and its admissible gradient."""
    leaf = at.detach().requires_grad_(True)
    _, slack = objective(leaf)
    (gradient,) = torch.autograd.grad(slack.sum(), leaf)
    return slack.detach(), feasible.project(gradient)


def dot(one: Delta, other: Delta) -> PerExample:
    """The inner product of each example's two deltas."""
    return rearrange(one * other, "batch pos d -> batch (pos d)").sum(dim=1)


def _nearest_to_all(
    normals: Float[Tensor, "batch cut n"], offsets: Float[Tensor, "batch cut"], sweeps: int = 60
) -> Float[Tensor, "batch n"]:
    """The shortest `x` with `normals x >= offsets`: Hildreth's method, one multiplier after the other."""
    gram = einsum(normals, normals, "batch cut n, batch other n -> batch cut other")
    weights = torch.zeros_like(offsets)
    for _ in range(sweeps):
        for cut in range(offsets.shape[1]):
            own = gram[:, cut, cut]
            lacking = offsets[:, cut] - (gram[:, cut] * weights).sum(dim=1)
            change = torch.where(own > 0, lacking / own.where(own > 0, 1.0), 0.0)
            weights[:, cut] = (weights[:, cut] + change).clamp(min=0)
    return einsum(weights, normals, "batch cut, batch cut n -> batch n")


@dataclass(frozen=True, eq=False)
class OnSlack:
    """An objective whose score is its slack: what is raised is the predicate itself."""

    of: Objective

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        slack = self.of(delta)[1]
        return slack, slack

    def select(self, rows: Tensor) -> OnSlack:
        return OnSlack(self.of.select(rows))


def edge(objective: Objective, outer: Delta, goal: float | PerExample, halvings: int = 16) -> Delta:
    """The shortest point met on the ray from zero to `outer` that reaches the goal, if `outer` does.

    An interval that holds the edge shrinks to `2^-halvings` of the ray by the ITP method (Oliveira and Takahashi 2020):
    try where a straight line through the slacks at its ends meets the goal, pushed a little toward its middle, and so
    near to that that no edge takes more than one point more than bisection. A smooth one takes about half as many.
    """
    fine, trial = 2.0**-halvings, 0
    below, above = _excess(objective, torch.zeros_like(outer), goal), _excess(objective, outer, goal)
    low, high = torch.zeros_like(below), torch.ones_like(below)
    rows = (above >= 0).nonzero().flatten()
    while len(rows):
        left, right = low[rows], high[rows]
        middle, width = (left + right) / 2, right - left
        line = left - width * below[rows] / (above[rows] - below[rows])
        away = line.where(torch.isfinite(line), middle) - middle
        away = away.sign() * (away.abs() - PUSH * width.square()).clamp(min=0)
        most = (fine * 2.0 ** (halvings - trial) - width / 2).clamp(min=0)
        share = torch.clamp(middle + torch.clamp(away, -most, most), left, right)
        value = _excess(objective.select(rows), outer[rows] * by_example(share), _of(goal, rows))
        reached = value >= 0
        low[rows], high[rows] = torch.where(reached, left, share), torch.where(reached, share, right)
        below[rows], above[rows] = torch.where(reached, below[rows], value), torch.where(reached, value, above[rows])
        rows, trial = rows[high[rows] - low[rows] > fine], trial + 1
    return outer * by_example(high)


def closer(objective: Objective, here: Delta, normal: Delta, goal: float | PerExample) -> Delta:
    """`here`, turned toward `normal` and a little shorter, as far as the goal is still reached; else as it is.

    Where it turned, it is at the edge of the goal on its ray.
    """
    turned, left = here.clone(), (norm(normal) > 0).nonzero().flatten()
    for toward in TURNS:
        if not len(left):
            break
        ray = (1 - toward) * scale_to(here[left], 1.0) + toward * scale_to(normal[left], 1.0)
        candidate = scale_to(ray, norm(here[left]) * (1 - MARGIN / 2))
        good = _excess(objective.select(left), candidate, _of(goal, left)) >= 0
        turned[left[good]], left = candidate[good], left[~good]
    rows = (norm(turned) < norm(here)).nonzero().flatten()
    if len(rows):
        turned[rows] = edge(objective.select(rows), turned[rows], _of(goal, rows), halvings=8)
    return turned


def _excess(objective: Objective, delta: Delta, goal: float | PerExample) -> PerExample:
    """By how much the slack is above the goal."""
    with torch.no_grad():
        return objective(delta)[1] - goal


def _of(goal: float | Tensor, rows: Rows) -> float | Tensor:
    return goal[rows] if isinstance(goal, Tensor) else goal
