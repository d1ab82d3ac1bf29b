"""Routes planted into the user's own objective: positive controls, at norms that are known.

A search that finds nothing proves as much as it could have found. So a way back is added to the model's own behavior,
which opens at a known smallest norm `r`, and the same search is asked for it:

1. *Axes*. For each example orthonormal directions, drawn at random among the admissible ones.
2. *Signal*. A function `v` of the perturbation's coordinates `x_i` along them, from rectifiers as a network has them;
   it is 1 at norm `r` and nowhere closer:

   =============  =====================================================  =============================================
   kind           signal `v`                                             open where
   =============  =====================================================  =============================================
   `linear`       `x / r`                                                `x >= r`
   `rectified`    `relu(x - k) / (r - k)`, `k = 0.9 r`                   `x >= r`; below `k` the unit is dead
   `conjunction`  `relu(sum_i clamp(x_i - k, 0, 1.1 a) / a - (m - 1))`,  all `m` units are on; `m t` in all, and the
                  `t = r / sqrt m`, `k = 2 t / 3`, `a = t - k`           nearest point has `x_i = t`, norm `t sqrt m`
   `narrow`       `2 ^ (1 - (distance to c / w)^2)`, `w = 0.08 r`,       within `w` of the point `c`, at `r + w` on its
                  `c` at `r + w` on the axis                             axis; elsewhere flat to rounding (float32)
   =============  =====================================================  =============================================

   In a conjunction `m - 1` units at their caps give `1.1 (m - 1) a`, which is less than the `m a` that are asked for as
   long as `m < 11`: none can be spared. The norm is least where all `x_i` are equal.
3. *Together*. The behavior shows where the model shows it *or* the route is open: the slack is the larger of the two,
   the route's being `h (v - 1)` with `h` the size of the example's own slack without a perturbation. The score is the
   model's plus `h v`, as a logit adds up: gradients of both are there, and that of a dead unit is zero.

What is found of these says what a search finds of *such* routes, whose rectifiers `surrogate` sees through. A model's
own may be of another kind; `narrow` stands for those that no gradient shows, true or surrogate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import einsum, rearrange

from recover.numerics.metrics import by_example, norm
from recover.search.ascent import Feasible, Objective, Schedule, Solution, better
from recover.search.gradient_free import reexamined
from recover.search.solvers import Solver
from recover.types import Delta, Float, PerExample, Rows, Tensor

RouteKind = Literal["linear", "rectified", "conjunction", "narrow"]
ROUTE_KINDS: tuple[RouteKind, ...] = get_args(RouteKind)
UNITS = (4, 8)
"""Units of a conjunction, in turn; fewer where there are fewer admissible directions."""
KNEE, CONJUNCTION_KNEE, CAP, WIDTH = 0.9, 2 / 3, 1.1, 0.08
ROUNDING = 1e-5
"""What a projection leaves of a random direction, up to this share, is rounding."""
Axes = Float[Tensor, "batch unit pos d_model"]


@dataclass(frozen=True, eq=False)
class Route:
    """One route for each example.

    Attributes:
        kind: of all of them.
        axes: orthonormal admissible directions; zeros behind those that an example has.
        norm: the smallest norm at which it opens.
        height: the size of its slack where it is off, in logits.
    """

    kind: RouteKind
    axes: Axes
    norm: PerExample
    height: PerExample

    @property
    def units(self) -> PerExample:
        """How many directions each has."""
        flat = rearrange(self.axes, "batch unit pos d_model -> batch unit (pos d_model)")
        present: PerExample = (flat.norm(dim=2) > 0.5).sum(dim=1).to(self.axes.dtype)
        return present

    @property
    def point(self) -> Delta:
        """The nearest point at which each opens, of norm `norm`."""
        return self.axes.sum(dim=1) * by_example(self.norm / self.units.sqrt())

    def signal(self, delta: Delta) -> PerExample:
        """`v`: 0 or less where the route is off, 1 where it opens; differentiable."""
        x = einsum(self.axes.to(delta), delta, "batch unit pos d_model, batch pos d_model -> batch unit")
        if self.kind == "conjunction":
            units = self.units.to(x)
            each = self.norm / units.sqrt()
            a = (1 - CONJUNCTION_KNEE) * each
            on = torch.clamp(x / a[:, None] - (CONJUNCTION_KNEE * each / a)[:, None], 0.0, CAP)
            return torch.relu(on.sum(dim=1) - (units - 1))
        along = x[:, 0] / self.norm
        if self.kind == "rectified":
            return torch.relu(along - KNEE) / (1 - KNEE)
        if self.kind == "narrow":
            apart = norm(delta / by_example(self.norm) - (1 + WIDTH) * self.axes[:, 0])
            return torch.exp2(1 - (apart / WIDTH).square())
        return along

    def slack(self, delta: Delta) -> PerExample:
        """Positive where the route is open, in logits; differentiable."""
        return self.height * (self.signal(delta) - 1)

    def select(self, rows: Rows) -> Route:
        """The routes of the examples `rows`."""
        return Route(self.kind, self.axes[rows], self.norm[rows], self.height[rows])


@dataclass(frozen=True, eq=False)
class Routed:
    """An objective with a route planted into it: its examples show the behavior by themselves or by the route.

    The smallest norm of an example is the smaller of its own and the route's:

    >>> import torch
    >>> from recover.search.planted_routes import Route, Routed
    >>> class Never:
    ...     def __call__(self, delta):
    ...         value = -1 + 0 * delta.sum(dim=(1, 2))
    ...         return value, value
    ...     def select(self, rows):
    ...         return self
    >>> route = Route("rectified", torch.eye(3)[None, :1, None], torch.tensor([2.0]), torch.tensor([1.0]))
    >>> before, after = torch.tensor([[[1.99, 0.0, 0.0]]]), torch.tensor([[[2.01, 0.0, 0.0]]])
    >>> Routed(Never(), route)(before)[1] > 0, Routed(Never(), route)(after)[1] > 0
    (tensor([False]), tensor([True]))
    """

    objective: Objective
    route: Route

    def __call__(self, delta: Delta) -> tuple[PerExample, PerExample]:
        """Score and slack of `delta`."""
        score, slack = self.objective(delta)
        # The larger of the two, as a rectifier: of equal ones the gradient is the model's own.
        return score + self.route.height * self.route.signal(delta), slack + torch.relu(self.route.slack(delta) - slack)

    def select(self, rows: Rows) -> Routed:
        return Routed(self.objective.select(rows), self.route.select(rows))


def plant(
    kind: RouteKind,
    like: Delta,
    feasible: Feasible,
    *,
    seeds: Sequence[int],
    size: Callable[[Delta], PerExample],
    height: PerExample,
) -> Route:
    """Draw a route for each example.

    Args:
        kind: of all of them.
        like: any deltas of these examples, `[batch pos d_model]`.
        feasible: what is admissible; there is an admissible direction for each example.
        seeds: one for each example, that its route follows from alone.
        size: the norm at which each is to open, given the unit directions `[batch pos d_model]` of its nearest point.
        height: as in `Route`.
    """
    count = max(UNITS) if kind == "conjunction" else 1
    draws = [torch.randn(count, *like.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    axes = _orthonormal(torch.stack(draws).to(like), feasible)
    if kind == "conjunction":
        asked = torch.tensor([UNITS[seed % len(UNITS)] for seed in seeds], device=like.device)
        axes = axes * (torch.arange(count, device=like.device) < asked[:, None])[:, :, None, None]
    one = Route(kind, axes, torch.ones_like(height), height)
    return Route(kind, axes, size(one.point), height)


def _orthonormal(draws: Axes, feasible: Feasible) -> Axes:
    """The draws, projected and made orthonormal one after another (twice, for rounding); zero where none is left."""
    found = list[Tensor]()
    for draw in draws.unbind(dim=1):
        here = feasible.project(draw)
        for _ in range(2):
            for axis in found:
                inner = einsum(here, axis, "batch pos d_model, batch pos d_model -> batch")
                here = here - by_example(inner) * axis
            here = feasible.project(here)
        length = norm(here)
        left = length > ROUNDING * norm(draw)
        found.append(here * by_example(torch.where(left, 1 / length.clamp(min=torch.finfo(here.dtype).tiny), 0.0)))
    # What has an axis behind one that is missing would be counted wrongly: the space is used up by then.
    present = torch.stack([norm(axis) > 0.5 for axis in found], dim=1).long().cumprod(dim=1).bool()
    return torch.stack(found, dim=1) * present[:, :, None, None]


Solvers = Callable[[Rows], Mapping[str, Solver]]
"""The solvers for the examples `rows`, by name, the cheap ones first."""


def routes_found(
    routed: Routed, start: Delta, feasible: Feasible, budget: float, schedule: Schedule, solvers: Solvers
) -> Solution:
    """Search for the routes within the budget by each solver in turn, and without gradients for what none found.

    That is what `worst_case` does to find a delta within the budget, but a solver is only asked for what those before
    it did not solve, and no smallest norm is sought.

    Args:
        routed: the objective with its routes.
        start: as in `worst_case`.
        feasible: as in `worst_case`.
        budget: as in `worst_case`.
        schedule: how hard each solver searches.
        solvers: those of the search whose power is asked for.
    """
    rows = torch.arange(len(start), device=start.device)
    best = drawn = None
    for name in solvers(rows[:0]):
        part = routed.select(rows)
        one = solvers(rows)[name](part, start[rows], feasible.select(rows), budget, schedule)
        best = one.within if best is None else better(best, one.within, rows, schedule.goal)
        if one.share is not None:
            drawn = better(best, one.within, rows)
        rows = (best.slack < schedule.goal).nonzero().flatten()
        if not len(rows):
            return best
    assert best is not None
    return reexamined(routed, best, feasible, budget, schedule, drawn=drawn)
