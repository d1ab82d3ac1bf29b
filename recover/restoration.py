"""Jacobian search: a delta at the first of several clamped sites, under which the features of all of them stay.

Later sites see what the blocks between make of a delta. To first order they stay if it keeps out of the row space of a
Jacobian (`recover.monitor`); what curvature adds is taken back by Gauss-Newton. For every example of a batch at once:

1. *Project* the gradient of the score, with the Jacobian at the delta that is reached and not at zero. Inactive
   features near their threshold count as held if the direction would take them on toward it.
2. *Step* along it as `recover.search` does: by the length that would reach the goal if the slack were linear, no longer
   than the budget.
3. *Restore*: `delta <- delta - J^+ (Phi(delta) - Phi_ref)` within C1 of the first site, a few times, until the relative
   drift is within the tolerance. A step that makes drift worse is halved.
4. *Clip* to the budget, and restore again, as clipping moves the features too.
5. *Judge*: a point counts if its drift is within the tolerance, its norm within the budget and its score higher;
   otherwise the stride is halved. The best slack among those that count is kept, so that no result breaks either bound.
6. *Retire* solved examples and those that stall; what is unsolved starts again from a random point, restored as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange

from recover.defended import Defended, Delta
from recover.metrics import norm
from recover.monitor import Jacobian, Monitor, Watched, row_space
from recover.search import ROUNDING, Schedule, clip, scale_to
from recover.types import Bool, InputError, Int, PerExample, Tensor

__all__ = ["DRIFT", "Restored", "RestoredSolution", "recover_restored", "restore"]

DRIFT = 1e-3
"""Relative drift that is allowed."""
CORRECTIONS = 8
"""Gauss-Newton steps of one restoration at most."""
ROUNDS = 3
"""Of restoring and clipping."""
TURNS = 4
"""Rounds of holding what a direction would wake."""
HALVINGS = 6
"""Of a random start that cannot be restored."""


@dataclass(frozen=True, eq=False)
class Restored:
    """The nearest found with the clamped features back in place.

    Attributes:
        drift: relative, of `delta`.
        converged: where it is within the tolerance.
        steps: Gauss-Newton steps tried.
    """

    delta: Delta
    drift: PerExample
    converged: Bool[Tensor, "batch"]
    steps: int


@dataclass(frozen=True, eq=False)
class RestoredSolution:
    """The best delta found for each example, by the solver's own account.

    Attributes:
        drift: relative drift of the clamped features, over all sites and positions.
        steps: gradient steps.
    """

    delta: Delta
    score: PerExample
    slack: PerExample
    drift: PerExample
    steps: Int[Tensor, "batch"]

    @property
    def recovered(self) -> Bool[Tensor, "batch"]:
        """Where the behavior is back."""
        return self.slack > 0


def restore(
    monitor: Monitor, delta: Delta, tolerance: float = DRIFT, steps: int = CORRECTIONS, *, dense: bool | None = None
) -> Restored:
    """Bring the clamped features back to their reference by changing a delta as little as may be.

    Args:
        monitor: what is watched.
        delta: with C1, orthogonal to what the first site's clamped features read; it stays so.
        tolerance: relative drift that is allowed.
        steps: Gauss-Newton steps at most.
        dense: as in `row_space`.
    """
    here = trial = delta.detach()
    drift, move = torch.full_like(norm(here), torch.inf), torch.zeros_like(here)
    share = torch.ones_like(drift)
    taken = 0
    while True:
        leaf = trial.detach().requires_grad_(True)
        watched = monitor.watch(leaf)
        seen = monitor.drift(watched.detached()).to(drift.dtype)
        nearer = seen < drift
        if taken == 0:
            # Where it starts is all there is, however far off.
            drift = torch.where(seen.isfinite(), seen, torch.inf)
        here, drift = torch.where(_each(nearer), trial, here), torch.where(nearer, seen, drift)
        going = drift > tolerance
        if taken == steps or not bool(going.any()):
            return Restored(here, drift, drift <= tolerance, taken)
        taken += 1
        back = row_space(Jacobian.at(monitor, leaf, watched, monitor.held(watched)), dense=dense).solve(
            monitor.moved(watched.detached())
        )
        move = torch.where(_each(nearer), back.to(here.dtype), move)
        share = torch.where(nearer, 1.0, share / 2)
        trial = torch.where(_each(going), here - _each(share) * move, here)


def recover_restored(
    defended: Defended,
    budget: float,
    schedule: Schedule | None = None,
    on_step: Callable[[int, int], None] | None = None,
    *,
    tolerance: float = DRIFT,
    c1: bool = True,
    dense: bool | None = None,
) -> RestoredSolution:
    """Search for a delta at the first site that brings the behavior back with the features of all sites in place.

    Args:
        defended: a defense put into a model, with deltas after the clamp of its first site; in float32.
        budget: largest Frobenius norm of an example's delta; `inf` for none.
        schedule: how hard to search.
        on_step: called with (steps done, examples still being searched) after every step.
        tolerance: largest relative drift of a result.
        c1: whether the features of the first site are held exactly, all of them; otherwise the active ones are held to
            the tolerance, as at later sites, and inactive ones may move below their threshold.
        dense: as in `row_space`.

    Returns:
        For each example the delta with the largest slack met, among those within the budget and the tolerance; no
        delta is one of them.

    Raises:
        InputError: the budget is not a positive number, or a delta enters elsewhere.
    """
    if not budget > 0:
        raise InputError(f"budget: {budget} is not a positive number")
    monitor, schedule = Monitor.of(defended, c1=c1), schedule or Schedule()
    search = _Search(budget, schedule, tolerance, dense, on_step)
    generator = torch.Generator().manual_seed(schedule.seed)
    best = search.ascend(monitor, defended.zero_delta)
    for _ in range(schedule.restarts):
        unsolved = (best.slack < schedule.goal).nonzero().flatten()
        if len(unsolved) == 0:
            break
        part = monitor.select(unsolved)
        # One draw for all examples: a result must not depend on which others are in the batch.
        noise = torch.randn(defended.zero_delta.shape[1:], generator=generator).to(defended.zero_delta)
        start = search.drawn(part, noise.expand_as(part.defended.zero_delta))
        best = _better(best, search.ascend(part, start), unsolved)
    return best


@dataclass(frozen=True, eq=False)
class _Point:
    """What is known at one delta: the gradient is projected."""

    score: PerExample
    slack: PerExample
    drift: PerExample
    gradient: Delta


@dataclass(frozen=True)
class _Search:
    budget: float
    schedule: Schedule
    tolerance: float
    dense: bool | None
    on_step: Callable[[int, int], None] | None

    def ascend(self, monitor: Monitor, start: Delta) -> RestoredSolution:
        """One start; see the module's docstring."""
        schedule, batch = self.schedule, start.shape[0]
        best = monitor.defended.zero_delta
        best_score = start.new_full((batch,), -torch.inf)
        best_slack, best_drift = best_score.clone(), torch.zeros_like(best_score)
        steps = torch.zeros(batch, dtype=torch.long, device=start.device)
        active = torch.arange(batch, device=start.device)
        # Of the examples still active: the next point, the highest so far, score and gradient there, and the stride.
        delta, here, slope = start, start, torch.zeros_like(start)
        height, stride = best_score.clone(), start.new_full((batch,), schedule.stride)
        for step in range(schedule.steps + 1):
            point = self._look(monitor, delta)
            steps[active] = step
            counts = torch.isfinite(point.score) & torch.isfinite(point.slack) & torch.isfinite(norm(point.gradient))
            counts &= (point.drift <= self.tolerance) & (norm(delta) <= self.budget)
            better = counts & (point.slack > best_slack[active])
            rows = active[better]
            best[rows], best_drift[rows] = delta[better], point.drift[better]
            best_score[rows], best_slack[rows] = point.score[better], point.slack[better]

            higher = counts & (point.score > height)
            here = torch.where(_each(higher), delta, here)
            slope = torch.where(_each(higher), point.gradient, slope)
            height = torch.where(higher, point.score, height)
            stride = torch.where(higher, (stride * 1.5).clamp(max=schedule.stride), stride / 2)
            # The length that reaches the goal if the slack were linear; aimed past it, as slacks are mostly concave.
            newton = (2 * schedule.goal - best_slack[active]) / norm(slope).clamp(min=torch.finfo(slope.dtype).tiny)
            solved = best_slack[active] >= schedule.goal
            going = ~solved & (norm(slope) > 0)
            if self.on_step is not None:
                self.on_step(step, int((~solved).sum()))
            if step == schedule.steps or not bool(going.any()):
                break
            delta = here + scale_to(slope, stride * newton.clamp(max=self.budget))
            active, delta, here, slope, height, stride = (
                values[going] for values in (active, delta, here, slope, height, stride)
            )
            if not bool(going.all()):
                monitor = monitor.select(going.nonzero().flatten())
            delta = self._within(monitor, delta)
            moving = norm(delta - here) > schedule.still * norm(here)
            if not bool(moving.any()):
                break
            if not bool(moving.all()):
                active, delta, here, slope, height, stride = (
                    values[moving] for values in (active, delta, here, slope, height, stride)
                )
                monitor = monitor.select(moving.nonzero().flatten())
        return RestoredSolution(best, best_score, best_slack, best_drift, steps)

    def drawn(self, monitor: Monitor, noise: Delta) -> Delta:
        """A random start at the budget, or as near to it as it can be restored."""
        size = self.budget if math.isfinite(self.budget) else 1.0
        leaf = torch.zeros_like(noise, requires_grad=True)
        start = scale_to(self._uphill(monitor, leaf, monitor.watch(leaf), noise), size)
        good = torch.zeros_like(norm(start), dtype=torch.bool)
        found = torch.zeros_like(start)
        for halving in range(HALVINGS):
            trial = self._within(monitor, start / 2**halving)
            drift = monitor.drift(monitor.watch(trial).detached())
            fits = ~good & (drift <= self.tolerance) & (norm(trial) <= self.budget)
            found, good = torch.where(_each(fits), trial, found), good | fits
            if bool(good.all()):
                break
        return found

    def _look(self, monitor: Monitor, delta: Delta) -> _Point:
        leaf = delta.detach().requires_grad_(True)
        watched = monitor.watch(leaf)
        logits, behavior = watched.logits.float(), monitor.defended.behavior
        score = behavior.score(logits)
        (gradient,) = torch.autograd.grad(score.sum(), leaf, retain_graph=True)
        free = self._uphill(monitor, leaf, watched, gradient)
        # What rounding leaves of a gradient that has no admissible part is no direction to go.
        rounding = norm(free) <= ROUNDING * norm(gradient)
        slack, drift = behavior.slack(logits).detach(), monitor.drift(watched.detached())
        return _Point(score.detach(), slack, drift, free.masked_fill(_each(rounding), 0.0))

    def _uphill(self, monitor: Monitor, leaf: Delta, watched: Watched, gradient: Delta) -> Delta:
        """The part of a direction that moves no active feature, and no inactive one on toward a near threshold."""
        held, near = monitor.active, monitor.near(watched)
        for _ in range(TURNS):
            free = row_space(Jacobian.at(monitor, leaf, watched, held), dense=self.dense).project(gradient)
            blocked = near & monitor.watched & ~held
            if not bool(blocked.any()):
                break
            blocked = Jacobian.at(monitor, leaf, watched, blocked).push(free) > 0
            if not bool(blocked.any()):
                break
            held = held | blocked
        return free

    def _within(self, monitor: Monitor, delta: Delta) -> Delta:
        """Restored and within the budget; where both cannot be had at once, what came nearest."""
        delta = clip(delta, self.budget)
        for round_ in range(ROUNDS):
            delta = restore(monitor, delta, self.tolerance, dense=self.dense).delta
            long = norm(delta) > self.budget
            if round_ == ROUNDS - 1 or not bool(long.any()):
                break
            # Below the budget, as restoring may lengthen it again.
            delta = torch.where(_each(long), clip(delta, self.budget * (1 - 1e-3 * 4**round_)), delta)
        return delta


def _better(first: RestoredSolution, second: RestoredSolution, rows: Int[Tensor, "rows"]) -> RestoredSolution:
    """`first`, with the examples `rows` taken from `second` where their slack is larger; steps add up."""
    kept = {name: getattr(first, name).clone() for name in ("delta", "score", "slack", "drift", "steps")}
    take = second.slack > first.slack[rows]
    for name in ("delta", "score", "slack", "drift"):
        kept[name][rows[take]] = getattr(second, name)[take]
    kept["steps"][rows] += second.steps
    return RestoredSolution(**kept)


def _each(values: Tensor) -> Tensor:
    return rearrange(values, "batch -> batch 1 1")
