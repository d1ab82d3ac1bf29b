"""Least squares by conjugate gradients (CGLS), for many examples at once, of matrices seen only through their products.

`min_x ||A x - b||` for each example, from `x = 0`, with `r = b - A x` and `s = A^T r`:

1. *Step* along `p` by the length that makes `||r||` least, `r . A p / ||A p||^2`. (The textbook's `||s||^2 / ||A p||^2`
   is the same up to rounding, and does not keep `||r||` from growing once rounding is all that is left.)
2. *Turn*: the next `p` is the new `s`, plus what keeps it conjugate to the steps before.
3. *Stop* an example where `||A^T r|| <= tolerance ||A|| ||r||`, so that what is left is orthogonal to the columns of
   `A` up to the tolerance; where `||A p|| <= tolerance ||A|| ||p||`, as what `p` passes on is then rounding; or where
   `||r|| <= tolerance ||b||`, so that nothing is left. `||A||` is the largest gain met.

Every `x` lies in the row space of `A`, so that the shortest of several solutions is found. Directions of a gain below
the tolerance, as a share of the largest, are left as they are. Scalars and recurrences are in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange

from recover.numerics.metrics import norm
from recover.types import Bool, Float, Tensor

Product = Callable[[Float[Tensor, "batch n"]], Float[Tensor, "batch m"]]


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """What was found for each example.

    Attributes:
        x: the solution, in float64.
        residual: `b - A x`, which is orthogonal to the columns of `A`.
        steps: pairs of products that it took.
        converged: where it stopped of itself.
    """

    x: Float[Tensor, "batch n"]
    residual: Float[Tensor, "batch m"]
    steps: int
    converged: Bool[Tensor, "batch"]


def cgls(
    forward: Product, adjoint: Product, b: Float[Tensor, "batch m"], *, tolerance: float, steps: int
) -> LeastSquares:
    """Solve `A x = b` in the least-squares sense.

    >>> import torch
    >>> from recover.numerics import cgls
    >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    >>> b = torch.tensor([[2.0, 4.0]], dtype=torch.float64)
    >>> cgls(lambda p: p @ A.mT, lambda r: r @ A, b, tolerance=1e-9, steps=9).x.round(decimals=6)
    tensor([[1., 1.]], dtype=torch.float64)

    Args:
        forward: `A p` for each example.
        adjoint: `A^T r` for each example.
        b: the right-hand sides.
        tolerance: where to stop (3 above); nothing below the rounding of the products can be reached.
        steps: pairs of products at most.
    """
    r = b.double()
    s = adjoint(r).double()
    x, p, gamma = torch.zeros_like(s), s, s.square().sum(dim=1)
    goal, gain = tolerance * norm(r), _ratio(gamma.sqrt(), norm(r))
    # Written so that what is not finite is done: nothing can be made of it.
    going, taken = (gamma > 0) & (norm(r) > goal) & gamma.isfinite(), 0
    while taken < steps and bool(going.any()):
        taken += 1
        q = forward(p).double()
        gain = torch.maximum(gain, _ratio(norm(q), norm(p)))
        length = _ratio((r * q).sum(dim=1), q.square().sum(dim=1))
        going = going & length.isfinite() & (norm(q) > tolerance * gain * norm(p))
        step = rearrange(torch.where(going, length, 0.0), "batch -> batch 1")
        moving = step != 0
        x, r = torch.where(moving, x + step * p, x), torch.where(moving, r - step * q, r)
        s = adjoint(r).double()
        before, gamma = gamma, s.square().sum(dim=1)
        going = going & (norm(r) > goal) & (gamma.sqrt() > tolerance * gain * norm(r))
        p = s + rearrange(torch.where(going, _ratio(gamma, before), 0.0), "batch -> batch 1") * p
    return LeastSquares(x, r, taken, ~going)


def _ratio(part: Float[Tensor, "batch"], whole: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    return torch.where(whole > 0, part / whole, 0.0)
