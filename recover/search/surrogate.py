"""A search past flat pieces: gradients as if every rectifier leaked.

Where a rectified unit is off, its gradient is zero, whatever lies behind it. A conjunction of such units, or one dead
unit beside a gentle slope that leads elsewhere, hides a near solution from every search that follows gradients, and
random draws do not meet it. Here values stay what they are, and only the backward pass differs:

1. Every `relu`, `clamp`, `hardtanh`, `leaky_relu`, `sign`, and every maximum or minimum with a number, passes a share
   `LEAK` of the gradient where it is flat. A `torch` function mode does it, so that any model that uses these is
   covered; operations that are written otherwise keep their own gradients.
2. Adam follows these gradients within the budget; what it does not solve, plain `Momentum` does once more, which keeps
   the direction of the gradient where Adam evens out its coordinates, and again with the larger share `WIDE`, which a
   slope that leads elsewhere does not drown. None of them asks that a step raise the score, as there is none to be had
   on a plateau; the best point by its true slack is kept.

What is found counts by its true values alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from recover.numerics.metrics import norm
from recover.search.ascent import Ends, Mask, Objective, Plain, Point, Schedule, Status, StepRule, clip, scale_to
from recover.types import Delta, PerExample, Rows, Tensor

LEAK = 0.1
"""Share of the gradient that passes where a piece is flat."""
WIDE = 0.5
"""A larger share: where rectifiers follow each other it is a product, and a slope that leads elsewhere drowns it."""
STEPS, RATE, KEPT, LENGTHS = 40, 0.12, 0.7, 4.0
"""Of `Momentum`: steps, the first one's length as a share of the unit of length, what is kept of the mean, and the unit
as a multiple of the length that would reach the goal if the score were linear."""


class _Leaking(torch.autograd.Function):
    """The value given, with a gradient that is `1` where the input is not on a flat piece and `leak` where it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, flat: Tensor, leak: float) -> Tensor:
        ctx.save_for_backward(flat)
        ctx.leak = leak
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (flat,) = ctx.saved_tensors
        return gradients[0] * torch.where(flat, ctx.leak, 1.0).to(gradients[0].dtype), None, None, None


Flat = tuple[Tensor, Tensor]
"""A value, and where the function is flat."""


def _relu(x: Tensor, inplace: bool = False) -> Flat:
    return x.detach().clamp(min=0), x <= 0


def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Flat:
    value, flat = x.detach(), torch.zeros_like(x, dtype=torch.bool)
    if min is not None:
        value, flat = torch.maximum(value, torch.as_tensor(min).to(value)), flat | (x < min)
    if max is not None:
        value, flat = torch.minimum(value, torch.as_tensor(max).to(value)), flat | (x > max)
    return value, flat


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Flat:
    return _clamp(x, min_val, max_val)


def _sign(x: Tensor) -> Flat:
    return x.detach().sign(), torch.ones_like(x, dtype=torch.bool)


_LEAKY: Mapping[Any, Callable[..., Flat]] = {
    torch.relu: _relu,
    F.relu: _relu,
    torch.Tensor.relu: _relu,
    torch.clamp: _clamp,
    torch.clip: _clamp,
    torch.Tensor.clamp: _clamp,
    torch.Tensor.clip: _clamp,
    F.hardtanh: _hardtanh,
    torch.sign: _sign,
    torch.Tensor.sign: _sign,
}
"""Functions that are flat somewhere, and what stands in their place."""


class Leaking(TorchFunctionMode):
    """A context in which flat pieces let a share `leak` of the gradient through, and values stay as they are.

    >>> import torch
    >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
    >>> with Leaking():
    ...     y = torch.relu(x)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 2.0], [0.10000000149011612, 1.0])
    """

    def __init__(self, leak: float = LEAK) -> None:
        super().__init__()
        self.leak = leak

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stand_in = _LEAKY.get(func)
        if stand_in is None or not isinstance(args[0] if args else None, Tensor) or not args[0].is_floating_point():
            return func(*args, **(kwargs or {}))
        if not (torch.is_grad_enabled() and args[0].requires_grad) or "out" in (kwargs or {}):
            return func(*args, **(kwargs or {}))
        leaking: Tensor = _Leaking.apply(args[0], *stand_in(*args, **(kwargs or {})), self.leak)  # type: ignore[no-untyped-call]
        return leaking


class Momentum(StepRule[Plain]):
    """Steps of a falling length along the mean of the last directions, within the budget."""

    def __init__(self, start: Delta, budget: float, schedule: Schedule) -> None:
        super().__init__(start, budget, schedule)
        self.steps = min(schedule.steps, STEPS)
        self.mean = 0 * start
        self.unit = torch.zeros_like(norm(start))

    def step(self, terrain: Plain, point: Point, counts: Mask, best: PerExample, number: int) -> tuple[Delta, Ends]:
        if number == 0:
            steep = norm(point.gradient).clamp(min=torch.finfo(point.delta.dtype).tiny)
            self.unit = (LENGTHS * (2 * self.schedule.goal - point.slack) / steep).clamp(max=self.budget)
        self.mean = KEPT * self.mean + (1 - KEPT) * scale_to(point.gradient, 1.0)
        length = RATE * (1 - number / max(self.steps, 1)) * self.unit
        ends = {
            Status.NO_GRADIENT: norm(self.mean) == 0,
            Status.NON_FINITE: best == -torch.inf,
            Status.EXHAUSTED: ~counts,
        }
        return clip(terrain.feasible.project(point.delta + scale_to(self.mean, length)), self.budget), ends


@dataclass(frozen=True, eq=False)
class Surrogate:
    """An objective with the same values, whose gradients pass flat pieces."""

    objective: Objective
    leak: float = LEAK

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        with Leaking(self.leak):
            return self.objective(delta)

    def select(self, rows: Rows) -> Surrogate:
        return Surrogate(self.objective.select(rows), self.leak)
