"""`recover()`: the largest score inside the constraints, stopping where the behavior is back.

For every example of a batch at once:

1. *Parametrize.* The admissible deltas are a linear space, `delta = P v`; every iterate lies in it by construction,
   so no optimizer can leave it and drift is rounding (design, "Single site").
2. *Step.* From the highest point so far, follow the projected gradient for the length that would reach the goal if the
   score were linear (a Newton step on the slack), but no longer than the budget: an easy example ends with a small
   delta, a hard one goes straight to the budget.
3. *Clip* to the budget; scaling keeps the linear constraints.
4. *Shorten* the stride of an example that got no higher.
5. *Retire* examples that reached the goal or that stall; the others go on in a smaller batch. What is still unsolved
   starts again from a random admissible point, a stated number of times.

The search knows nothing of models: it sees an `Objective`. Its word is not evidence: `certify` measures afresh.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from einops import rearrange
from pydantic import NonNegativeInt, PositiveInt

from recover.numerics.metrics import norm
from recover.search.constraints.linear import Budget
from recover.types import Bool, Float, InputError, Int, PerExample, Tensor

Delta = Float[Tensor, "batch pos d_model"]
Rows = Int[Tensor, "rows"]
ROUNDING = 3e-6
"""An admissible part of a gradient up to this share of the whole is rounding (float32, with a margin)."""


@runtime_checkable
class Objective(Protocol):
    """A differentiable score and a slack (positive where the goal is reached) of deltas, by example."""

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Score and slack, each `[batch]`, of `delta [batch pos d_model]`."""

    def select(self, rows: Tensor) -> Objective:
        """The same for the examples `rows`."""


@runtime_checkable
class Feasible(Protocol):
    """For each example a set of admissible deltas that is a cone: a linear space, or all of it."""

    def project(self, delta: Tensor) -> Tensor:
        """The nearest admissible delta, `[batch pos d_model]`, each in the set of its own example."""

    def select(self, rows: Tensor) -> Feasible:
        """The same for the examples `rows`; itself where the set is the same for all, in batches of any size."""


class Status(enum.Enum):
    """How a search of one example ended."""

    RECOVERED = "recovered"
    EXHAUSTED = "steps exhausted"
    STALLED = "no step inside the budget improves it"
    NO_GRADIENT = "gradient zero in every admissible direction"
    NON_FINITE = "score or gradient not finite"
    # Given by `gradient_free`, which looks again at what the search did not solve.
    NOTHING_ADMISSIBLE = "no direction is admissible"
    UNMOVED = "no admissible perturbation drawn, of any size, changes the score"
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
class Solution:
    """The best delta found for each example, and the solver's own account of it."""

    delta: Delta
    score: PerExample
    slack: PerExample
    steps: Int[Tensor, "batch"]
    status: tuple[Status, ...]

    @property
    def recovered(self) -> Bool[Tensor, "batch"]:
        """Where the solver believes that it reached the goal."""
        return torch.tensor([status is Status.RECOVERED for status in self.status])


Climb = Callable[
    [Objective, Delta, Feasible, float, Schedule, Callable[[int, int], None] | None],
    Solution,
]
"""From a start to the best delta met on the way: the arguments of `recover`, in their order."""


def find_perturbation(
    objective: Objective,
    start: Delta,
    feasible: Feasible,
    budget: float,
    schedule: Schedule | None = None,
    on_step: Callable[[int, int], None] | None = None,
    *,
    climb: Climb | None = None,
) -> Solution:
    """Search for an admissible delta of norm at most `budget` that brings the behavior back.

    Args:
        objective: score and slack of a delta.
        start: where to begin, `[batch pos d_model]`, admissible and within the budget; zeros as a rule.
        feasible: the linear constraint (C1), or any cone, which may be another one for each example.
        budget: largest Frobenius norm of an example's delta (C4), in units of the residual; `inf` for none.
        schedule: how hard to search.
        on_step: called with (steps done, examples still being searched) after every step.
        climb: one start of the search; steepest ascent with Newton lengths by default.

    Returns:
        For each example the delta with the largest slack met, never worse than `start`.

    Raises:
        InputError: the budget is not a positive number.
    """
    if not budget > 0:
        raise InputError(f"budget: {budget} is not a positive number")
    schedule, climb = schedule or Schedule(), climb or _ascend
    generator = torch.Generator().manual_seed(schedule.seed)
    best = climb(objective, start, feasible, budget, schedule, on_step)
    for _ in range(schedule.restarts):
        unsolved = (best.slack < schedule.goal).nonzero().flatten()
        if len(unsolved) == 0:
            break
        # One draw for all examples: a result must not depend on which others are in the batch.
        noise = torch.randn(start.shape[1:], generator=generator).to(start).expand_as(start[unsolved])
        allowed = feasible.select(unsolved)
        again = clip(scale_to(allowed.project(noise), budget if math.isfinite(budget) else 1.0), budget)
        found = climb(objective.select(unsolved), again, allowed, budget, schedule, on_step)
        best = better(best, found, unsolved)
    return best


def scale_to(delta: Delta, length: float | PerExample) -> Delta:
    """`delta` with each example's norm set to `length`; zero stays zero."""
    own = norm(delta)
    factor = torch.where(own > 0, length / own, 0.0)
    return delta * rearrange(factor, "batch -> batch 1 1")


def clip(delta: Delta, budget: float) -> Delta:
    """C4, aimed a little low, so that no other way of summing the squares finds the norm above the budget."""
    return Budget(budget * (1 - 1e-6)).project(delta) if math.isfinite(budget) else delta


def evaluate(objective: Objective, delta: Delta, feasible: Feasible) -> tuple[Tensor, Tensor, Delta]:
    """Score, slack and the score's gradient within the admissible space."""
    leaf = delta.detach().requires_grad_(True)
    score, slack = objective(leaf)
    (gradient,) = torch.autograd.grad(score.sum(), leaf)
    admissible = feasible.project(gradient)
    # What rounding leaves of a gradient that has no admissible part is no direction to go.
    rounding = norm(admissible) <= ROUNDING * norm(gradient)
    return score.detach(), slack.detach(), admissible.masked_fill(rearrange(rounding, "batch -> batch 1 1"), 0.0)


def _ascend(
    objective: Objective,
    start: Delta,
    feasible: Feasible,
    budget: float,
    schedule: Schedule,
    on_step: Callable[[int, int], None] | None,
) -> Solution:
    """One start of the search; see the module's docstring."""
    batch = start.shape[0]
    best, best_score = start.clone(), start.new_full((batch,), -torch.inf)
    best_slack, steps = best_score.clone(), torch.zeros(batch, dtype=torch.long, device=start.device)
    status = [Status.EXHAUSTED] * batch
    active = torch.arange(batch, device=start.device)
    # Of the examples still active: the next point, the one it was reached from (the highest so far: a behavior's score
    # can rise while its slack does not), the score and gradient there, and the stride.
    delta, here, slope = start, start, torch.zeros_like(start)
    height, stride = best_score.clone(), start.new_full((batch,), schedule.stride)
    for step in range(schedule.steps + 1):
        score, slack, gradient = evaluate(objective, delta, feasible)
        steps[active] = step
        finite = torch.isfinite(score) & torch.isfinite(slack) & torch.isfinite(norm(gradient))
        better = finite & (slack > best_slack[active])
        rows = active[better]
        best[rows], best_score[rows], best_slack[rows] = delta[better], score[better], slack[better]

        higher = finite & (score > height)
        moved = rearrange(higher, "batch -> batch 1 1")
        here, slope = torch.where(moved, delta, here), torch.where(moved, gradient, slope)
        height = torch.where(higher, score, height)
        stride = torch.where(higher, (stride * 1.5).clamp(max=schedule.stride), stride / 2)
        # The length that reaches the goal if the slack were linear; aimed past it, as slacks are mostly concave.
        newton = (2 * schedule.goal - best_slack[active]) / norm(slope).clamp(min=torch.finfo(slope.dtype).tiny)
        delta = clip(here + scale_to(slope, stride * newton.clamp(max=budget)), budget)

        solved = best_slack[active] >= schedule.goal
        ends = {
            Status.RECOVERED: solved,
            Status.NON_FINITE: best_slack[active] == -torch.inf,
            Status.NO_GRADIENT: ~solved & (norm(slope) == 0),
            Status.STALLED: ~solved & (norm(delta - here) <= schedule.still * norm(here)),
        }
        going = torch.ones_like(solved)
        for reason, where in ends.items():
            for row in active[where & going].tolist():
                status[row] = reason
            going &= ~where
        if on_step is not None:
            on_step(step, int((~solved).sum()))
        if step == schedule.steps or not going.any():
            break
        active, delta, here, slope, height, stride = (
            values[going] for values in (active, delta, here, slope, height, stride)
        )
        if not going.all():
            rows = going.nonzero().flatten()
            objective, feasible = objective.select(rows), feasible.select(rows)
    return Solution(best, best_score, best_slack, steps, tuple(status))


@runtime_checkable
class _Solved(Protocol):
    """What the solutions of all searches have: a dataclass of values by example."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def slack(self) -> Tensor: ...

    @property
    def steps(self) -> Tensor: ...


Solved = TypeVar("Solved", bound=_Solved)


def better(first: Solved, second: Solved, rows: Rows) -> Solved:
    """`first`, with the examples `rows` taken from `second` where their slack is larger; steps add up."""
    take = second.slack > first.slack[rows]
    kept: dict[str, Any] = {"steps": first.steps.index_add(0, rows, second.steps)}
    for field in fields(first):
        own, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(own, tuple):
            given = dict(zip(rows[take].tolist(), (other[at] for at in take.nonzero().flatten().tolist()), strict=True))
            kept[field.name] = tuple(given.get(row, value) for row, value in enumerate(own))
        elif isinstance(own, Tensor) and field.name != "steps":
            kept[field.name] = own.index_copy(0, rows[take], other[take])
    return replace(first, **kept)
