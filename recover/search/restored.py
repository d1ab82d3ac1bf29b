"""Restored search: a delta at the first of several clamped sites, under which the features of all of them stay.

Later sites see what the blocks between make of a delta. To first order they stay if it keeps out of the row space of a
Jacobian (`recover.search.constraints.monitor`); what curvature adds is taken back by Gauss-Newton. The climb is that of
`recover.search.restoring`; of it this module says, for every example of a batch at once,

1. *Which way*: the gradient of the score, projected with the Jacobian at the delta that is reached and not at zero.
   Inactive features near their threshold are kept as well if the direction would take them on toward it.
2. *Restore*: `delta <- delta - J^+ (Phi(delta) - Phi_ref)` within C1 of the first site, a few times, until the relative
   drift is within the tolerance. A step that makes drift worse is halved.
3. *Clip* to the budget, and restore again, as clipping moves the features too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from recover.defenses.defended import Defended
from recover.numerics.metrics import by_example, norm
from recover.search.ascent import OnStep, Point, Schedule, better, clip, find_perturbation, without_rounding
from recover.search.constraints.first_order import admissible
from recover.search.constraints.monitor import Jacobian, Monitor, Watched, jacobian_row_space
from recover.search.restoring import RestoredSolution, search_restoring
from recover.types import Bool, Delta, PerExample, Rows, Tensor

DRIFT = 1e-3
"""Relative drift that is allowed."""
CORRECTIONS, ROUNDS, TURNS = 8, 3, 4
"""Gauss-Newton steps of one restoration at most; rounds of restoring and clipping, and of keeping what would wake."""
LOOSE_DRIFT, LINEAR_ROUNDS, CLEAR = 1e-2, 3, 1.0
"""In a search with one Jacobian: relative drift that is allowed, rounds, and the slack that is left for restoring."""


@dataclass(frozen=True, eq=False)
class Restored:
    """The nearest delta found with the clamped features back in place.

    Attributes:
        drift: relative, of `delta`.
        converged: where it is within the tolerance.
        steps: Gauss-Newton steps tried.
    """

    delta: Delta
    drift: PerExample
    converged: Bool[Tensor, "batch"]
    steps: int


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
    share, taken = torch.ones_like(drift), 0
    while True:
        leaf = trial.detach().requires_grad_(True)
        watched = monitor.watch(leaf)
        seen = monitor.drift(watched.detached()).to(drift.dtype)
        nearer = seen < drift
        if taken == 0:
            # Where it starts is all there is, however far off.
            drift = torch.where(seen.isfinite(), seen, torch.inf)
        here, drift = torch.where(by_example(nearer), trial, here), torch.where(nearer, seen, drift)
        going = drift > tolerance
        if taken == steps or not bool(going.any()):
            return Restored(here, drift, drift <= tolerance, taken)
        taken += 1
        space = jacobian_row_space(Jacobian.at(monitor, leaf, watched, monitor.kept(watched)), dense=dense)
        back = space.solve(monitor.moved(watched.detached()))
        move = torch.where(by_example(nearer), back.to(here.dtype), move)
        share = torch.where(nearer, 1.0, share / 2)
        trial = torch.where(by_example(going), here - by_example(share) * move, here)


def find_restored(
    defended: Defended,
    budget: float,
    schedule: Schedule | None = None,
    on_step: OnStep = None,
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
        c1: whether the features of the first site are kept exactly; otherwise as those of later sites are.
        dense: as in `row_space`.

    Returns:
        For each example the delta with the largest slack among those met within the budget and the tolerance, zero
        included.

    Raises:
        InputError: the budget is not a positive number, or a delta enters elsewhere.
    """
    watching = _Watching(Monitor.of(defended, c1=c1), budget, tolerance, dense)
    return search_restoring(watching, [defended.zero_delta], budget, tolerance, schedule or Schedule(), on_step)


def find_linearized(
    defended: Defended,
    budget: float,
    schedule: Schedule | None = None,
    *,
    tolerance: float = LOOSE_DRIFT,
    rounds: int = LINEAR_ROUNDS,
    dense: bool | None = None,
) -> RestoredSolution:
    """Search as `find_restored` does with one Jacobian for a whole search: a fraction of the passes, for long answers.

    1. Search within the space that is admissible to first order at no delta (`admissible`), for a margin of a logit.
    2. Restore what was found, to the tolerance and within the budget.
    3. What restoring undid is searched again from there; a few rounds.

    Where the model curves much on the way it finds less than `find_restored`, which looks at every step.

    `rounds` bounds steps 1 to 3; other arguments, what is returned and errors are as in `find_restored`.
    """
    schedule = schedule or Schedule()
    clear = replace(schedule, goal=max(schedule.goal, CLEAR))
    watching = _Watching(Monitor.of(defended, c1=True), budget, tolerance, dense)
    space, start = admissible(defended), defended.zero_delta
    with torch.no_grad():
        score, slack = defended(start)
    best = RestoredSolution(start, score, slack, torch.zeros_like(score, dtype=torch.long), torch.zeros_like(score))
    for _ in range(rounds):
        rows = (best.slack < schedule.goal).nonzero().flatten()
        if not len(rows):
            break
        part, asked = watching.select(rows), defended.select(rows)
        found = find_perturbation(asked, start[rows], space.select(rows), budget, clear)
        delta = part.within(found.delta)
        with torch.no_grad():
            score, slack = asked(delta)
            drift = part.monitor.drift(part.monitor.watch(delta).detached()).to(score.dtype)
        counts = (drift <= tolerance) & (norm(delta) <= budget)
        told = RestoredSolution(delta, score, slack.where(counts, -torch.inf), found.steps, drift)
        best = better(best, told, rows)
        start = start.index_copy(0, rows, delta)
    return best


@dataclass(frozen=True, eq=False)
class _Watching:
    """The `Restoration` of all clamped features, as a monitor watches them."""

    monitor: Monitor
    budget: float
    tolerance: float
    dense: bool | None

    def select(self, rows: Rows) -> _Watching:
        return replace(self, monitor=self.monitor.select(rows))

    def look(self, delta: Delta) -> Point:
        monitor = self.monitor
        leaf = delta.detach().requires_grad_(True)
        watched = monitor.watch(leaf)
        score, slack, gradient = watched.graded(monitor.defended.behavior, leaf)
        free = self._uphill(leaf, watched, gradient)
        return Point(delta, score, slack, without_rounding(free, gradient), monitor.drift(watched.detached()))

    def free(self, delta: Delta, along: Delta) -> Delta:
        leaf = delta.detach().requires_grad_(True)
        return self._uphill(leaf, self.monitor.watch(leaf), along)

    def _uphill(self, leaf: Delta, watched: Watched, gradient: Delta) -> Delta:
        """The part of a direction that moves no active feature, and no inactive one on toward a near threshold."""
        monitor, kept, near = self.monitor, self.monitor.active, self.monitor.near(watched)
        for _ in range(TURNS):
            free = jacobian_row_space(Jacobian.at(monitor, leaf, watched, kept), dense=self.dense).project(gradient)
            blocked = near & monitor.watched & ~kept
            if blocked.any():
                blocked = Jacobian.at(monitor, leaf, watched, blocked).push(free) > 0
            if not blocked.any():
                break
            kept = kept | blocked
        return free

    def within(self, delta: Delta) -> Delta:
        delta = clip(delta, self.budget)
        for round_ in range(ROUNDS):
            delta = restore(self.monitor, delta, self.tolerance, dense=self.dense).delta
            long = norm(delta) > self.budget
            if round_ == ROUNDS - 1 or not bool(long.any()):
                break
            # Below the budget, as restoring may lengthen it again.
            delta = torch.where(by_example(long), clip(delta, self.budget * (1 - 1e-3 * 4**round_)), delta)
        return delta
