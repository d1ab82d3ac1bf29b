"""The ascent: find the largest score inside the constraints, and stop where the behavior is back.

There is one loop, `ascend`. For every example of a batch at once it

1. *looks* at the current point: score, slack, the part of the score's gradient that may be followed, and the drift of
   what must stay (`Terrain`);
2. *keeps* the point of largest slack among those that count;
3. *steps* by a rule (`StepRule`);
4. *retires* examples that reached the goal or cannot go on; the others continue in a smaller batch.

What is still unsolved starts again, a stated number of times, from a random admissible point (`from_each_start`).

================  ==================================  =============================================================
rule              defined in                          a step
================  ==================================  =============================================================
`Steepest`        here                                along the gradient, by the length that would reach the goal if
                                                      the score were linear
`ProjectedAdam`   `recover.search.adam`               momentum, and a step length for each coordinate
`RestoredSteps`   `recover.search.restoring`          as `Steepest`; then the clamped features are restored
`ProbedAdam`      `recover.baselines.probes`          Adam outside of random probes, then corrections, as published
================  ==================================  =============================================================

`find_perturbation` is the search under a linear constraint: the admissible deltas are a linear space, `delta = P v`,
and every iterate lies in it by construction, so that no optimizer can leave it and drift is rounding.

The search knows nothing of models: it sees an `Objective`. Its word is not evidence: `certify` measures afresh.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from pydantic import NonNegativeInt, PositiveInt

from recover.numerics.metrics import by_example, norm
from recover.search.constraints.linear import Budget
from recover.types import Bool, Delta, InputError, Int, PerExample, Rows, Tensor

OnStep = Callable[[int, int], None] | None
ROUNDING = 3e-6
"""An admissible part of a gradient up to this share of the whole is rounding (float32, with a margin)."""


@runtime_checkable
class Objective(Protocol):
    """A differentiable score of deltas, and a slack that is positive where the goal is reached; by example."""

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Score and slack, each `[batch]`, of `delta [batch pos d_model]`."""

    def select(self, rows: Tensor) -> Objective:
        """The objective of the examples `rows` alone."""


@runtime_checkable
class Feasible(Protocol):
    """For each example a set of admissible deltas that is a cone: a linear space, or all of it."""

    def project(self, delta: Tensor) -> Tensor:
        """The nearest admissible delta, `[batch pos d_model]`, each in the set of its own example."""

    def select(self, rows: Tensor) -> Feasible:
        """The sets of the examples `rows`; itself where all examples share one set, in batches of any size."""


class Status(enum.Enum):
    """How a search of one example ended."""

    RECOVERED = "recovered"
    EXHAUSTED = "steps exhausted"
    STALLED = "no step inside the budget improves it"
    NO_GRADIENT = "gradient zero in every admissible direction"
    NON_FINITE = "score or gradient not finite"
    # Given by `gradient_free`, which looks again at what the search did not solve.
    NOTHING_ADMISSIBLE = "no direction is admissible"
    UNMOVED = "no admissible perturbation drawn, of any size, changes anything downstream"
    UNREAD = "admissible perturbations change activations downstream, but none drawn, of any size, changes the score"
    OUTDONE = "a random perturbation does better"
    MISLED = "the gradient does not account for how the score changes"


@dataclass(frozen=True)
class Schedule:
    """How hard to search.

    Args:
        steps: gradient steps at most, by example and start.
        stride: longest step, as a share of the Newton step or the budget, whichever is shorter.
        still: a step shorter than this share of the delta is no step: the search has stalled.
        goal: slack at which an example is retired, above 0 so that rounding cannot undo it; in logits.
        restarts: random starts for what is unsolved.
        seed: of the random starts.
    """

    steps: PositiveInt = 100
    stride: float = 1.0
    still: float = 1e-3
    goal: float = 0.02
    restarts: NonNegativeInt = 1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Best:
    """The best delta found for each example, by the solver's own account, and the gradient steps that it took."""

    delta: Delta
    score: PerExample
    slack: PerExample
    steps: Int[Tensor, "batch"]

    @property
    def recovered(self) -> Bool[Tensor, "batch"]:
        """Where the behavior is back."""
        return self.slack > 0


@dataclass(frozen=True, eq=False)
class Solution(Best):
    """What `find_perturbation` found, and how the search of each example ended."""

    status: tuple[Status, ...]

    @property
    def recovered(self) -> Bool[Tensor, "batch"]:
        """Where the solver believes that it reached the goal."""
        return torch.tensor([status is Status.RECOVERED for status in self.status])


@dataclass(frozen=True, eq=False)
class Point:
    """What one look at a delta shows, by example.

    Attributes:
        gradient: the part of the score's gradient that may be followed from there.
        drift: relative, of what must stay; zero where the constraint leaves no room for any.
    """

    delta: Delta
    score: PerExample
    slack: PerExample
    gradient: Delta
    drift: PerExample


@runtime_checkable
class Terrain(Protocol):
    """What an ascent climbs: an objective and what may be done to its examples."""

    def look(self, delta: Tensor) -> Point:
        """What there is to know at `delta`; a forward and at least one backward pass."""

    def select(self, rows: Tensor) -> Any:
        """The terrain of the examples `rows` alone."""


T = TypeVar("T", bound=Terrain)
Ends = Mapping[Status, Tensor]
Mask = Bool[Tensor, "batch"]


class StepRule(Generic[T]):
    """How an ascent goes on from what it saw: one rule object for one start.

    Tensors among its attributes are its memory, with one row for each example that is still active.
    """

    def __init__(self, start: Delta, budget: float, schedule: Schedule) -> None:
        self.budget, self.schedule, self.steps = budget, schedule, schedule.steps

    def counts(self, point: Point) -> Mask:
        """Which points may be results: where score, slack and gradient are finite."""
        return torch.isfinite(point.score) & torch.isfinite(point.slack) & torch.isfinite(norm(point.gradient))

    def step(self, terrain: T, point: Point, counts: Mask, best: PerExample, number: int) -> tuple[Delta, Ends]:
        """The next point of each example, and which examples end here: by reason, the first that applies counting.

        Args:
            terrain: of the examples that are still active.
            point: where they are.
            counts: whether that may be a result.
            best: the largest slack met so far, this point included.
            number: steps taken so far.
        """
        raise NotImplementedError

    def settle(self, terrain: T, delta: Delta) -> tuple[Delta, Mask | None]:
        """The next point put right, at the cost of passes, and whether it has moved; only for examples that go on."""
        return delta, None

    def keep(self, rows: Rows) -> None:
        """Forget all but the active examples `rows`."""
        vars(self).update({name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)})


def ascend(
    terrain: T, start: Delta, rule: StepRule[T], on_step: OnStep = None, *, otherwise: Delta | None = None
) -> tuple[Solution, PerExample]:
    """One start of a search.

    Args:
        terrain: what is climbed.
        start: where to begin, `[batch pos d_model]`.
        rule: fresh from this start.
        on_step: as in `find_perturbation`.
        otherwise: the result where no point counts; `start` by default.

    Returns:
        For each example the point with the largest slack met among those that count, and the drift there.
    """
    goal, batch = rule.schedule.goal, len(start)
    best, best_score = (start if otherwise is None else otherwise).clone(), start.new_full((batch,), -torch.inf)
    best_slack, best_drift = best_score.clone(), torch.zeros_like(best_score)
    steps, status = torch.zeros(batch, dtype=torch.long, device=start.device), [Status.EXHAUSTED] * batch
    active, delta = torch.arange(batch, device=start.device), start
    for step in range(rule.steps + 1):
        point = terrain.look(delta)
        steps[active] = step
        counts = rule.counts(point)
        better = counts & (point.slack > best_slack[active])
        rows = active[better]
        best[rows], best_drift[rows] = delta[better], point.drift[better]
        best_score[rows], best_slack[rows] = point.score[better], point.slack[better]

        delta, ends = rule.step(terrain, point, counts, best_slack[active], step)
        solved = best_slack[active] >= goal
        going = torch.ones_like(solved)
        for reason, where in {Status.RECOVERED: solved, **ends}.items():
            for row in active[where & going].tolist():
                status[row] = reason
            going &= ~where
        if on_step is not None:
            on_step(step, int((~solved).sum()))
        if step == rule.steps or not bool(going.any()):
            break
        active, delta, terrain = _narrowed(going, active, delta, terrain, rule)
        delta, moving = rule.settle(terrain, delta)
        if moving is not None:
            for row in active[~moving].tolist():
                status[row] = Status.STALLED
            if not bool(moving.any()):
                break
            active, delta, terrain = _narrowed(moving, active, delta, terrain, rule)
    return Solution(best, best_score, best_slack, steps, tuple(status)), best_drift


def _narrowed(going: Tensor, active: Tensor, delta: Tensor, terrain: T, rule: StepRule[T]) -> tuple[Tensor, Tensor, T]:
    if bool(going.all()):
        return active, delta, terrain
    rows = going.nonzero().flatten()
    rule.keep(rows)
    return active[rows], delta[rows], terrain.select(rows)


class Steepest(StepRule[T]):
    """Steepest ascent, by the length that would reach the goal if the slack were linear, within the budget.

    From the highest point so far (a score can rise while its slack does not) follow the gradient for that length, but
    no longer than the budget: an easy example ends with a small delta, a hard one goes straight to the budget. Where an
    example got no higher, halve the stride.
    """

    def __init__(self, start: Delta, budget: float, schedule: Schedule) -> None:
        super().__init__(start, budget, schedule)
        self.here, self.slope = start, torch.zeros_like(start)
        self.height, self.stride = (start.new_full((len(start),), value) for value in (-torch.inf, schedule.stride))

    def step(self, terrain: T, point: Point, counts: Mask, best: PerExample, number: int) -> tuple[Delta, Ends]:
        delta = clip(self._uphill(point, counts, best), self.budget)
        return delta, {
            Status.NON_FINITE: best == -torch.inf,
            Status.NO_GRADIENT: norm(self.slope) == 0,
            Status.STALLED: norm(delta - self.here) <= self.schedule.still * norm(self.here),
        }

    def _uphill(self, point: Point, counts: Mask, best: PerExample) -> Delta:
        """The next point, not yet within the budget."""
        higher = counts & (point.score > self.height)
        moved = by_example(higher)
        self.here = torch.where(moved, point.delta, self.here)
        self.slope = torch.where(moved, point.gradient, self.slope)
        self.height = torch.where(higher, point.score, self.height)
        self.stride = torch.where(higher, (self.stride * 1.5).clamp(max=self.schedule.stride), self.stride / 2)
        # The length that reaches the goal if the slack were linear; aimed past it, as slacks are mostly concave.
        newton = (2 * self.schedule.goal - best) / norm(self.slope).clamp(min=torch.finfo(self.slope.dtype).tiny)
        return self.here + scale_to(self.slope, self.stride * newton.clamp(max=self.budget))


@dataclass(frozen=True, eq=False)
class Plain:
    """An objective under a linear constraint: the gradient that may be followed is the projected one."""

    objective: Objective
    feasible: Feasible

    def look(self, delta: Delta) -> Point:
        leaf = delta.detach().requires_grad_(True)
        score, slack = self.objective(leaf)
        (gradient,) = torch.autograd.grad(score.sum(), leaf)
        free = without_rounding(self.feasible.project(gradient), gradient)
        return Point(delta, score.detach(), slack.detach(), free, torch.zeros_like(score))

    def select(self, rows: Rows) -> Plain:
        return Plain(self.objective.select(rows), self.feasible.select(rows))


Rule = type[StepRule[Plain]]


def find_perturbation(
    objective: Objective,
    start: Delta,
    feasible: Feasible,
    budget: float,
    schedule: Schedule | None = None,
    on_step: OnStep = None,
    *,
    rule: Rule | None = None,
) -> Solution:
    """Search for an admissible delta of norm at most `budget` that brings the behavior back.

    Args:
        objective: score and slack of a delta.
        start: where to begin, `[batch pos d_model]`, admissible and within the budget; zeros as a rule.
        feasible: the linear constraint (C1), or any cone, which may be another one for each example.
        budget: largest Frobenius norm of an example's delta (C4), in units of the residual; `inf` for none.
        schedule: how hard to search.
        on_step: called with (steps done, examples still being searched) after every step.
        rule: how to step; steepest ascent by default.

    Returns:
        For each example the delta with the largest slack met, never worse than `start`.

    Raises:
        InputError: the budget is not a positive number.

    The score of this objective is the sum of a delta's entries minus 1; no entry but the first may change:

        >>> import torch
        >>> from recover.search import EncoderOrthogonal, find_perturbation
        >>> class Sum:
        ...     def __call__(self, delta):
        ...         score = delta.sum(dim=(1, 2)) - 1
        ...         return score, score
        ...     def select(self, rows):
        ...         return self
        >>> held = EncoderOrthogonal(torch.eye(3)[:, 1:])
        >>> find_perturbation(Sum(), torch.zeros(1, 1, 3), held, budget=2.0).status
        (<Status.RECOVERED: 'recovered'>,)
    """
    if not budget > 0:
        raise InputError(f"budget must be positive, got {budget}")
    schedule, kind = schedule or Schedule(), rule or Steepest

    def climb(terrain: Plain, at: Delta) -> Solution:
        return ascend(terrain, at, kind(at, budget, schedule), on_step)[0]

    def drawn(terrain: Plain, noise: Delta) -> Delta:
        return clip(scale_to(terrain.feasible.project(noise), budget if math.isfinite(budget) else 1.0), budget)

    return from_each_start(Plain(objective, feasible), [start], schedule, climb, drawn)


def scale_to(delta: Delta, length: float | PerExample) -> Delta:
    """`delta` with each example's norm set to `length`; zero stays zero, and so does what is too small to be scaled.

    >>> import torch
    >>> scale_to(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]]), 10.0)
    tensor([[[6., 8.]],
    <BLANKLINE>
            [[0., 0.]]])
    """
    own = norm(delta)
    # A loss that is solved by far has a gradient below all normal numbers, which no division brings back.
    return delta * by_example(torch.where(own > torch.finfo(own.dtype).tiny, length / own, 0.0))


def clip(delta: Delta, budget: float) -> Delta:
    """`delta` within the budget (C4), aimed a little low, so that no other way of summing finds the norm above it."""
    return Budget(budget * (1 - 1e-6)).project(delta) if math.isfinite(budget) else delta


def without_rounding(admissible: Delta, gradient: Delta) -> Delta:
    """The admissible part of a gradient; zero where it is only what rounding leaves, which is no direction to go."""
    return admissible.masked_fill(by_example(norm(admissible) <= ROUNDING * norm(gradient)), 0.0)


S = TypeVar("S", bound=Best)


def from_each_start(
    terrain: T,
    starts: Sequence[Delta],
    schedule: Schedule,
    climb: Callable[[T, Delta], S],
    drawn: Callable[[T, Delta], Delta],
) -> S:
    """The best that is met from any start: those given, and as many random ones as the schedule says.

    Args:
        terrain: of all examples.
        starts: one at least, each of all examples; all but the first are for what is still unsolved.
        schedule: for its goal, its restarts and its seed.
        climb: one start of the search.
        drawn: a start from noise, `[batch pos d_model]`.
    """
    generator = torch.Generator().manual_seed(schedule.seed)
    best, like = climb(terrain, starts[0]), starts[0]
    for at in range(1, len(starts) + schedule.restarts):
        unsolved = (best.slack < schedule.goal).nonzero().flatten()
        if not len(unsolved):
            break
        part = terrain.select(unsolved)
        if at < len(starts):
            start = starts[at][unsolved]
        else:
            # One draw for all examples: a result must not depend on which others are in the batch.
            start = drawn(part, torch.randn(like.shape[1:], generator=generator).to(like).expand_as(like[unsolved]))
        best = better(best, climb(part, start), unsolved)
    return best


def better(first: S, second: S, rows: Rows, goal: float = math.inf) -> S:
    """`first`, with the examples `rows` that miss the goal taken from `second` where it is better; steps add up."""
    take = (first.slack[rows] < goal) & (second.slack > first.slack[rows])
    kept: dict[str, Any] = {"steps": first.steps.index_add(0, rows, second.steps)}
    for field in fields(first):
        own, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(own, tuple):
            given = dict(zip(rows[take].tolist(), (other[at] for at in take.nonzero().flatten().tolist()), strict=True))
            kept[field.name] = tuple(given.get(row, value) for row, value in enumerate(own))
        elif isinstance(own, Tensor) and field.name != "steps":
            kept[field.name] = own.index_copy(0, rows[take], other[take])
    return replace(first, **kept)
