"""Random probes: the published baseline for several sites (reference: What the published code does).

From a delta of zero at the first site, for every example of a batch at once:

1. *Probe*. The row space of the monitored features is taken to be the span of a few random combinations of them, pulled
   back to the delta, and of the drift direction, the gradient of `||Phi(delta) - Phi_ref||^2`.
2. *Project* the gradient of the score onto the complement of that span.
3. *Step* with Adam, whose scaling of each coordinate leaves the complement again; clip to the budget.
4. *Correct*: a few steps along the drift direction, each of the length that is best to first order; clip.

Facts carry over from the publication, code does not; what it leaves open is settled in the baseline's favor. `Phi` has
the rows that `monitor` keeps, those of the first site included. The delta of largest slack is kept whatever its
drift, and a solved example is retired, which leaves it with less drift than all the steps would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat

from recover.defenses.defended import Defended
from recover.numerics.metrics import by_example, norm
from recover.search.ascent import Ends, Mask, OnStep, Point, Schedule, Status, StepRule, ascend, clip
from recover.search.constraints.monitor import Jacobian, Monitor, Watched
from recover.search.restoring import RestoredSolution
from recover.types import Delta, Float, InputError, PerExample, Rows, Tensor

PROBES, CORRECTIONS, RATE = 8, 5, 0.1
MOMENTUM, MEMORY, FLOOR = 0.9, 0.999, 1e-8


def find_probed(
    defended: Defended,
    budget: float,
    schedule: Schedule | None = None,
    on_step: OnStep = None,
    *,
    probes: int = PROBES,
    corrections: int = CORRECTIONS,
    rate: float = RATE,
) -> RestoredSolution:
    """Search as the publication does, from a delta of zero at the first site.

    Args:
        defended: a defense put into a model, with deltas after the clamp of its first site.
        budget: largest Frobenius norm of an example's delta; `inf` for none.
        schedule: its steps, goal and seed; there are no restarts, and the stride is Adam's.
        on_step: called with (steps done, examples still being searched) after every step.
        probes: random combinations of features.
        corrections: steps along the drift direction after each step.
        rate: Adam's learning rate.

    Returns:
        For each example the delta with the largest slack met, whatever it does to the clamped features.

    Raises:
        InputError: the budget is not a positive number, or a delta enters elsewhere.
    """
    if not budget > 0:
        raise InputError(f"budget must be positive, got {budget}")
    schedule, start = schedule or Schedule(), defended.zero_delta
    generator = torch.Generator().manual_seed(schedule.seed)
    terrain = _Probed(Monitor.of(defended, c1=False), probes, generator)
    found, drift = ascend(terrain, start, _ProbedAdam(start, budget, schedule, corrections, rate), on_step)
    return RestoredSolution(found.delta, found.score, found.slack, found.steps, drift)


@dataclass(frozen=True, eq=False)
class _Probed:
    """A monitored batch; what may be followed of a gradient is its part outside of random probes (1 and 2 above)."""

    monitor: Monitor
    probes: int
    generator: torch.Generator

    def look(self, delta: Delta) -> Point:
        leaf = delta.detach().requires_grad_(True)
        watched = self.monitor.watch(leaf)
        score, slack, gradient = watched.graded(self.monitor.defended.behavior, leaf)
        # One draw for all examples: a result must not depend on which others are in the batch.
        weights = torch.randn(self.probes, watched.pre.shape[1], generator=self.generator).to(delta.device)
        free = _outside(_span(self.monitor, leaf, watched, weights), gradient)
        return Point(delta, score, slack, free, self.monitor.drift(watched.detached()))

    def select(self, rows: Rows) -> _Probed:
        return _Probed(self.monitor.select(rows), self.probes, self.generator)


class _ProbedAdam(StepRule[_Probed]):
    """Adam as published, and corrections after each step (3 and 4 above)."""

    def __init__(self, start: Delta, budget: float, schedule: Schedule, corrections: int, rate: float) -> None:
        super().__init__(start, budget, schedule)
        self.corrections, self.rate = corrections, rate
        self.mean, self.square = torch.zeros_like(start), torch.zeros_like(start)

    def counts(self, point: Point) -> Mask:
        return torch.isfinite(point.slack)

    def step(self, terrain: _Probed, point: Point, counts: Mask, best: PerExample, number: int) -> tuple[Delta, Ends]:
        gradient = point.gradient
        self.mean = MOMENTUM * self.mean + (1 - MOMENTUM) * gradient
        self.square = MEMORY * self.square + (1 - MEMORY) * gradient.square()
        width = (self.square / (1 - MEMORY ** (number + 1))).sqrt() + FLOOR
        delta = clip(point.delta + self.rate * self.mean / (1 - MOMENTUM ** (number + 1)) / width, self.budget)
        return delta, {Status.NON_FINITE: ~torch.isfinite(norm(gradient))}

    def settle(self, terrain: _Probed, delta: Delta) -> tuple[Delta, None]:
        for _ in range(self.corrections):
            delta = clip(_corrected(terrain.monitor, delta), self.budget)
        return delta, None


def _span(
    monitor: Monitor, leaf: Delta, watched: Watched, weights: Float[Tensor, "probe row"]
) -> Float[Tensor, "batch n direction"]:
    """An orthonormal basis of the probes and the drift direction; zero columns where there is nothing."""
    jacobian = Jacobian.at(monitor, leaf, watched, monitor.kept(watched))
    combinations = [repeat(one, "row -> batch row", batch=len(leaf)) for one in weights]
    pulled = [jacobian.pull(one) for one in (*combinations, monitor.moved(watched.detached()))]
    columns = rearrange(torch.stack(pulled), "probe batch pos d_model -> batch (pos d_model) probe")
    size = columns.norm(dim=1, keepdim=True)
    left, singular, _ = torch.linalg.svd(torch.where(size > 0, columns / size, 0.0), full_matrices=False)
    basis: Tensor = left * rearrange(singular > torch.finfo(torch.float32).eps, "batch probe -> batch 1 probe")
    return basis


def _outside(basis: Float[Tensor, "batch n direction"], gradient: Delta) -> Delta:
    flat = rearrange(gradient.double(), "batch pos d_model -> batch (pos d_model)")
    seen = einsum(flat, basis, "batch n, batch n direction -> batch direction")
    outside = flat - einsum(seen, basis, "batch direction, batch n direction -> batch n")
    return rearrange(outside, "batch (pos d_model) -> batch pos d_model", pos=gradient.shape[1]).to(gradient)


def _corrected(monitor: Monitor, delta: Delta) -> Delta:
    """One step along the drift direction."""
    leaf = delta.detach().requires_grad_(True)
    watched = monitor.watch(leaf)
    jacobian = Jacobian.at(monitor, leaf, watched, monitor.kept(watched))
    toward = jacobian.pull(monitor.moved(watched.detached()))
    passed = norm(jacobian.push(toward))
    length = torch.where(passed > 0, norm(toward).square() / passed.square(), 0.0)
    return delta - (by_example(length) * toward).to(delta.dtype)
