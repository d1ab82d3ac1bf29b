"""The published baseline for several sites (reference: What the published code does), to be measured against.

From a delta of zero at the first site, for every example of a batch at once:

1. *Probe*. The row space of the monitored features is taken to be the span of a few random combinations of them, pulled
   back to the delta, and of the drift direction, the gradient of `||Phi(delta) - Phi_ref||^2`.
2. *Project* the gradient of the score onto the complement of that span.
3. *Step* with Adam, whose scaling of each coordinate leaves the complement again; clip to the budget.
4. *Correct*: a few steps along the drift direction, each of the length that is best to first order; clip.

Facts carry over from the publication, code does not; what it leaves open is settled in the baseline's favor. `Phi` has
the rows that `monitor` holds, those of the first site included. The delta of largest slack is kept whatever its
drift, and a solved example is retired, which leaves it with less drift than all the steps would.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import einsum, rearrange, repeat

from recover.defenses.defended import Defended, Delta
from recover.numerics.metrics import norm
from recover.search.ascent import Schedule, clip
from recover.search.constraints.monitor import Jacobian, Monitor, Watched
from recover.search.held import RestoredSolution
from recover.types import Float, InputError, Tensor

__all__ = ["find_probed"]

PROBES, CORRECTIONS, RATE = 8, 5, 0.1
MOMENTUM, MEMORY, FLOOR = 0.9, 0.999, 1e-8


def find_probed(
    defended: Defended,
    budget: float,
    schedule: Schedule | None = None,
    on_step: Callable[[int, int], None] | None = None,
    *,
    probes: int = PROBES,
    corrections: int = CORRECTIONS,
    rate: float = RATE,
) -> RestoredSolution:
    """Search as the publication does.

    Args:
        defended: a defense put into a model, with deltas after the clamp of its first site.
        budget: largest Frobenius norm of an example's delta; `inf` for none.
        schedule: its steps, goal and seed; there are no restarts, and the stride is Adam's.
        on_step: called with (steps done, examples still being searched) after every step.
        probes: random combinations of features.
        corrections: steps along the drift direction after each step.
        rate: Adam's.

    Returns:
        For each example the delta with the largest slack met, whatever it does to the clamped features.

    Raises:
        InputError: the budget is not a positive number, or a delta enters elsewhere.
    """
    if not budget > 0:
        raise InputError(f"budget: {budget} is not a positive number")
    monitor, schedule = Monitor.of(defended, c1=False), schedule or Schedule()
    generator = torch.Generator().manual_seed(schedule.seed)
    delta = best = defended.zero_delta
    best_score = torch.full_like(norm(delta), -torch.inf)
    best_slack, best_drift = best_score.clone(), torch.zeros_like(best_score)
    steps = torch.zeros(len(delta), dtype=torch.long, device=delta.device)
    best, active = best.clone(), torch.arange(len(delta), device=delta.device)
    mean, square = torch.zeros_like(delta), torch.zeros_like(delta)
    for step in range(schedule.steps + 1):
        leaf, watched = _watched(monitor, delta)
        logits, behavior = watched.logits.float(), monitor.defended.behavior
        score, slack, drift = behavior.score(logits), behavior.slack(logits).detach(), monitor.drift(watched.detached())
        (gradient,) = torch.autograd.grad(score.sum(), leaf, retain_graph=True)
        steps[active] = step
        better = torch.isfinite(slack) & (slack > best_slack[active])
        rows = active[better]
        best[rows], best_drift[rows] = delta[better], drift[better]
        best_score[rows], best_slack[rows] = score.detach()[better], slack[better]
        going = (best_slack[active] < schedule.goal) & torch.isfinite(norm(gradient))
        if on_step is not None:
            on_step(step, int((best_slack[active] < schedule.goal).sum()))
        if step == schedule.steps or not bool(going.any()):
            break
        # One draw for all examples: a result must not depend on which others are in the batch.
        weights = torch.randn(probes, watched.pre.shape[1], generator=generator).to(delta.device)
        gradient = _outside(_span(monitor, leaf, watched, weights), gradient)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * gradient
        square = MEMORY * square + (1 - MEMORY) * gradient.square()
        width = (square / (1 - MEMORY ** (step + 1))).sqrt() + FLOOR
        delta = clip(delta + rate * mean / (1 - MOMENTUM ** (step + 1)) / width, budget)
        active, delta, mean, square = (values[going] for values in (active, delta, mean, square))
        if not bool(going.all()):
            monitor = monitor.select(going.nonzero().flatten())
        for _ in range(corrections):
            delta = clip(_corrected(monitor, delta), budget)
    return RestoredSolution(best, best_score, best_slack, best_drift, steps)


def _watched(monitor: Monitor, delta: Delta) -> tuple[Delta, Watched]:
    leaf = delta.detach().requires_grad_(True)
    return leaf, monitor.watch(leaf)


def _span(
    monitor: Monitor, leaf: Delta, watched: Watched, weights: Float[Tensor, "probe row"]
) -> Float[Tensor, "batch n direction"]:
    """An orthonormal basis of the probes and the drift direction; zero columns where there is nothing."""
    jacobian = Jacobian.at(monitor, leaf, watched, monitor.held(watched))
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
    leaf, watched = _watched(monitor, delta)
    jacobian = Jacobian.at(monitor, leaf, watched, monitor.held(watched))
    toward = jacobian.pull(monitor.moved(watched.detached()))
    passed = norm(jacobian.push(toward))
    length = torch.where(passed > 0, norm(toward).square() / passed.square(), 0.0)
    return delta - (rearrange(length, "batch -> batch 1 1") * toward).to(delta.dtype)
