"""Check that the gradient a search follows is the derivative of what it climbs, by values alone, on a few examples.

A gradient can be reversed, vanish, or lack a part (an SAE's error computed under `no_grad`), and a search that follows
it finds less than there is and does not notice. So, example by example:

1. *Points*: zero, where a search begins, and a random admissible point of norm `reach / 2`.
2. *Directions* at each: the admissible gradient of the score there, and DIRECTIONS random admissible ones, all of norm
   1. `D`, the gradient's part along a direction, is what is claimed.
3. *Differences*: with steps `h` of three lengths, STEPS as shares of `reach`, the coarsest first and the finer ones
   only where it does not agree yet: `F = (f(+h) - f) / h` ahead, `B = (f - f(-h)) / h` behind, `C` their mean; of the
   score and of the slack, `f`, from the same passes.
4. *Agreement*. `C` misses the derivative by what the function bends, of order `h^2`, and by rounding. A value is known
   up to `eta = rounding (1 + |f|) + ADDED_UP ||G|| (||point|| + h)`, `rounding` for the sums that make a logit, the
   second part for those that read the residual, `G` being the gradient of all directions, of inadmissible ones too, of
   which a projection leaves a rounding. So `C` is known up to `noise = eta / h`. With
   `scale = max(|D|, |F|, |B|, ||g|| / sqrt(n))`, the last the slope of a random direction (`g` the admissible gradient,
   `n` the dimension of the admissible space), there is agreement at a step if

       |C - D| <= noise + TOLERANCE scale

   In float32 `rounding` is `64 eps = 8e-6` (four times what SmolLM2's logits moved by when a negligible delta was
   added), and at the best step a function that bends over lengths of about `reach` is missed by about
   `rounding^(2/3) = 4e-4` of its slope. TOLERANCE is a hundred times that, so a part of the gradient shorter than a
   tenth of it may be missed. A finer step counts only where `noise <= TOLERANCE scale`: otherwise anything would agree.
   Where even the coarsest is all noise (a complete bottleneck) `D` and `C` are zero as far as can be told, and agree.
5. *Kinks*. Where relu or max bend at the point, or nearer than `h`, the gradient is that of one side or between. So it
   agrees as well where it is `F` of this step and of the coarser one before, or `B` of both, up to the same tolerance
   with `2 noise`; or where it lies between `B` and `F` and their gap is more than rounding and at least half of what it
   was with the coarser step: the gap that a curve makes goes with `h`.
6. *Hidden*. A step function agrees with its zero gradient at almost every point. So random directions are followed as
   far as `sqrt(n) reach` too, where their part along any single direction is about `reach`: if the score changes there
   by more than rounding, and on average a hundred times (HIDDEN) as steeply as the gradient at either point has it, the
   gradient hides what is there.

Passes, for a batch of any size: 2 forward with 4 backward; 20 forward for the coarsest step, and for each finer one 20
for what has not agreed; 8 for 6. All draws are the same for every example, so a result does not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange, reduce

from recover.defenses.defended import Defended
from recover.numerics.metrics import by_example, norm
from recover.search.ascent import Feasible, Objective, scale_to, without_rounding
from recover.search.gradient_free import ADDED_UP, Draws, values_of
from recover.types import Bool, Delta, Float, InputError, PerExample, Rows, Tensor

DIRECTIONS = 4
STEPS = (0.1, 0.03, 0.003)
TOLERANCE, HIDDEN = 0.05, 100.0
LOGIT_ROUNDING = 64 * torch.finfo(torch.float32).eps
"""Rounding of a value in float32, as a share of 1 plus its size."""

PerValue = Float[Tensor, "value batch"]
PerDraw = Float[Tensor, "value batch draws"]


@dataclass(frozen=True, eq=False)
class Agreement:
    """Gradients compared with differences: the worst of all points, directions and values of each example.

    Attributes:
        agrees: whether every directional derivative agrees, and nothing is hidden.
        error: largest disagreement beyond rounding, as a share of the slope, at the step that agrees best; infinite
            where a value or a gradient is not finite.
        step: norm of that step.
        slope: norm of the score's admissible gradient, the larger of the two points.
        noise: what rounding can make of the difference along that gradient at zero, at the coarsest step, as a share of
            the slope; well above TOLERANCE agreement says little, and it is infinite where the gradient is zero.
        hidden: whether the score changes within reach of random directions in a way that no slope shows.
    """

    agrees: Bool[Tensor, "batch"]
    error: PerExample
    step: PerExample
    slope: PerExample
    noise: PerExample
    hidden: Bool[Tensor, "batch"]


def finite_differences(
    objective: Objective,
    feasible: Feasible,
    like: Delta,
    reach: float | PerExample,
    seed: int = 0,
    *,
    rounding: float = LOGIT_ROUNDING,
) -> Agreement:
    """Compare the gradients of score and slack with central differences, in admissible directions.

    Args:
        objective: score and slack of a delta.
        feasible: the constraint that the search keeps.
        like: any delta `[batch pos d_model]`, for its shape, dtype and device.
        reach: the norm over which the objective is of interest, as a rule the budget; in units of the residual.
        seed: of the random directions and the random point.
        rounding: uncertainty of a value, as a share of 1 plus its size; give it for a model that is not in float32.

    Raises:
        InputError: `reach` is not finite and positive.
    """
    return _compare(objective, feasible, like, reach, seed, rounding, lambda directions: directions)


def error_channel(
    defended: Defended,
    feasible: Feasible,
    seed: int = 0,
    *,
    reach: float | None = None,
    rounding: float = LOGIT_ROUNDING,
) -> Agreement:
    """Compare gradients with differences in directions of the SAE's error: does the gradient through it arrive?

    A direction `v` has the part `J v` that the SAE's reconstruction follows, `J = dD(E(h))/dh` at the defended state,
    and the part `e = v - J v` that it leaves to the error (see `decompose`). Each direction is replaced by its `e`,
    made admissible again. A gradient that stops at the error is `J^T` times the right one, which loses just these.

    Arguments and errors are those of `finite_differences`; the objective is `defended`, with the residual and the SAE
    of its first site, and `reach` is by default a tenth of the norm of the defended residual, by example.
    """
    sae = defended.defense.at(defended.suffix.site)[0].sae
    state = defended.suffix.residual.to(sae.dtype)

    def error(directions: Delta) -> Delta:
        followed = torch.func.jvp(lambda h: sae.decode(sae.encode(h)), (state,), (directions.to(sae.dtype),))[1]
        left = feasible.project(directions - followed.to(directions))
        # An SAE that follows all of a direction leaves a rounding of it, which is no direction.
        return left.masked_fill(by_example(norm(left) <= 1e-4 * norm(directions)), 0.0)

    like = defended.zero_delta
    tenth = 0.1 * norm(state).to(like)
    # A clamp can leave a residual that is zero or not finite; then one length is as good as another.
    tenth = torch.where(torch.isfinite(tenth) & (tenth > 0), tenth, 1.0)
    return _compare(defended, feasible, like, tenth if reach is None else reach, seed, rounding, error)


def _compare(
    objective: Objective,
    feasible: Feasible,
    like: Delta,
    reach: float | PerExample,
    seed: int,
    rounding: float,
    channel: Callable[[Delta], Delta],
) -> Agreement:
    """Steps 1 to 6, with every direction passed through `channel`."""
    far = torch.as_tensor(reach, dtype=like.dtype, device=like.device).expand(like.shape[0])
    if not bool((torch.isfinite(far) & (far > 0)).all()):
        raise InputError(f"reach must be finite and positive, got {reach}; give a norm, as a rule the budget")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(DIRECTIONS + 1, *like.shape[1:], generator=generator).to(like)
    # Projected as a whole batch, as each example may have its own constraint.
    *drawn, elsewhere = (feasible.project(one.expand_as(like)) for one in draws)
    freedom = torch.stack([norm(one).square() for one in drawn]).mean(dim=0).sqrt()
    random = [scale_to(channel(one), 1.0) for one in drawn]

    start = _slopes(objective, torch.zeros_like(like), feasible, rounding)
    error, step, steepest = torch.full_like(far, -1.0), torch.full_like(far, math.nan), torch.zeros_like(far)
    for at in (start, _slopes(objective, scale_to(elsewhere, far / 2), feasible, rounding)):
        directions = torch.stack([scale_to(channel(at.gradient[0]), 1.0), *random], dim=1)
        typical = at.length / freedom.clamp(min=1)
        here, length = _disagreement(objective, at, directions, typical, far)
        step = torch.where(here > error, length, step)
        error, steepest = torch.maximum(error, here), torch.maximum(steepest, at.length[0])
    hidden = _hidden(objective, start, torch.stack(random, dim=1), steepest, freedom * far)
    coarsest = STEPS[0] * far
    noise = start.uncertain(coarsest)[0] / (coarsest * start.length[0])
    return Agreement((error <= TOLERANCE) & ~hidden, error, step, steepest, noise, hidden)


@dataclass(frozen=True, eq=False)
class _Slopes:
    """Score and slack (`value`) at a point, and their gradients there: the admissible part, and the norm of it all."""

    point: Delta
    values: PerValue
    gradient: Float[Tensor, "value batch pos d_model"]
    whole: PerValue
    rounding: float

    @property
    def length(self) -> PerValue:
        """Norms of the admissible gradients."""
        return torch.stack([norm(one) for one in self.gradient])

    def uncertain(self, length: PerExample) -> PerValue:
        """What is not to be relied on of a value at a distance `length` from the point."""
        return self.rounding * (1 + self.values.abs()) + ADDED_UP * self.whole * (norm(self.point) + length)

    def select(self, rows: Rows) -> _Slopes:
        parts = {name: getattr(self, name)[:, rows] for name in ("values", "gradient", "whole")}
        return replace(self, point=self.point[rows], **parts)


def _slopes(objective: Objective, point: Delta, feasible: Feasible, rounding: float) -> _Slopes:
    leaf = point.detach().requires_grad_(True)
    values = objective(leaf)
    gradients, whole = [], []
    for value in values:
        gradient = torch.zeros_like(leaf)
        if value.requires_grad:  # a value that is cut off altogether claims no slope
            (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True, materialize_grads=True)
        # As the search has it: what rounding leaves of a gradient is none.
        gradients.append(without_rounding(feasible.project(gradient), gradient))
        whole.append(norm(gradient))
    here = torch.stack([value.detach() for value in values])
    return _Slopes(point, here, torch.stack(gradients), torch.stack(whole), rounding)


@dataclass(frozen=True, eq=False)
class _Differences:
    """One-sided differences, ahead and behind, with one step, and what rounding can make of half their sum."""

    forward: PerDraw
    backward: PerDraw
    noise: PerDraw

    def errors(self, claimed: PerDraw, typical: PerValue, coarser: _Differences | None) -> PerDraw:
        """Steps 4 and 5: what `claimed` misses, as a share of the scale; infinite where this step cannot tell."""
        steep = torch.maximum(self.forward.abs(), self.backward.abs())
        scale = torch.maximum(torch.maximum(claimed.abs(), steep), typical[..., None])
        away = (claimed - (self.forward + self.backward) / 2).abs() - self.noise
        if coarser is not None:
            low, high = torch.minimum(self.forward, self.backward), torch.maximum(self.forward, self.backward)
            gap, before = high - low, (coarser.forward - coarser.backward).abs()
            kink = (gap > 4 * self.noise) & (gap >= before / 2)
            outside = torch.maximum(claimed - high, low - claimed) - 2 * self.noise
            away = torch.where(kink, torch.minimum(away, outside), away)
            for now, then in ((self.forward, coarser.forward), (self.backward, coarser.backward)):
                both = torch.maximum((claimed - now).abs(), (claimed - then).abs())
                away = torch.minimum(away, both - 2 * self.noise)
        error = torch.relu(away) / scale.clamp(min=torch.finfo(scale.dtype).tiny)
        if coarser is not None:
            error = error.where(self.noise <= TOLERANCE * scale, torch.inf)
        return error.nan_to_num(nan=torch.inf, posinf=torch.inf)

    def select(self, rows: Rows) -> _Differences:
        return _Differences(self.forward[:, rows], self.backward[:, rows], self.noise[:, rows])


def _disagreement(
    objective: Objective, at: _Slopes, directions: Draws, typical: PerValue, reach: PerExample
) -> tuple[PerExample, PerExample]:
    """Steps 3 to 5 at one point: the largest disagreement of each example, and the step that it was read at."""
    claimed = einsum(at.gradient, directions, "value batch pos d, batch draws pos d -> value batch draws")
    best, chosen = torch.full_like(claimed, torch.inf), torch.full_like(claimed, math.nan)
    rows, coarser = torch.arange(len(reach), device=reach.device), None
    for share in STEPS:
        here = _differences(objective.select(rows), at.select(rows), directions[rows], share * reach[rows])
        error = here.errors(claimed[:, rows], typical[:, rows], coarser)
        better = error < best[:, rows]
        best[:, rows] = torch.where(better, error, best[:, rows])
        chosen[:, rows] = torch.where(better, rearrange(share * reach[rows], "batch -> batch 1"), chosen[:, rows])
        left = reduce(best[:, rows] > TOLERANCE, "value batch draws -> batch", "any").nonzero().flatten()
        rows, coarser = rows[left], here.select(left)
        if not len(rows):
            break
    flat, steps = (rearrange(one, "value batch draws -> batch (value draws)") for one in (best, chosen))
    worst, where = flat.max(dim=1)
    return worst, steps.gather(1, where[:, None])[:, 0]


def _differences(objective: Objective, at: _Slopes, directions: Draws, step: PerExample) -> _Differences:
    """Step 3, with one step for each example."""
    move = rearrange(step, "batch -> batch 1 1 1") * directions
    point = rearrange(at.point, "batch pos d -> batch 1 pos d")
    ahead, behind = values_of(objective, torch.cat([point + move, point - move], dim=1)).chunk(2, dim=2)
    here, length = at.values[..., None], rearrange(step, "batch -> batch 1")
    noise = at.uncertain(step)[..., None] / length
    return _Differences((ahead - here) / length, (here - behind) / length, noise.expand_as(ahead))


def _hidden(
    objective: Objective, start: _Slopes, random: Draws, steepest: PerExample, far: PerExample
) -> Bool[Tensor, "batch"]:
    """Step 6: whether the score changes along random directions, each and its opposite, as no slope has it."""
    probes = rearrange(far, "batch -> batch 1 1 1") * torch.cat([random, -random], dim=1)
    change = (values_of(objective, probes)[0] - start.values[0][:, None]).abs()
    accounted = torch.maximum(start.uncertain(far)[0], HIDDEN * steepest * far)
    return (change > accounted[:, None]).any(dim=1)
