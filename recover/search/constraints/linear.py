"""What a perturbation may not do (reference: Definitions, C1 to C4), each as a projection and a measure.

===  =====================  ==================================================================
C1   `EncoderOrthogonal`    at no position does `delta` have a part that the features read
C2   `ActivationStable`     the clamped features keep their reference activations
C3   `DecodeStable`         what they write keeps its reference value
C4   `Budget`               `||delta||_F <= eps` for each example
===  =====================  ==================================================================

For a pointwise SAE C1 implies C2, and C2 implies C3. Where features compete (TopK, AbsTopK) C1 implies neither, as a
delta can push a clamped feature out by raising others: `violation` tells, `project` does not mend it.

C2 leaves more room than C1, as a feature may move below its threshold. At each position on its own, its projection
holds no more features than it must:

1. hold the features that are active in the reference, and project `delta` onto their null space;
2. hold those too that this wakes, and project again, until none wakes (each round holds more, so this ends);
3. where rounding alone moves a held feature across its threshold, keep the reference: `delta = 0`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import ClassVar

import torch
from einops import einsum, rearrange

from recover.defenses.clamps import Clamp, Number
from recover.numerics.metrics import activation_drift, by_example, decode_drift, norm
from recover.numerics.subspaces import NullSpace
from recover.types import Bool, Float, InputError, PerExample, Residual, Rows, Tensor


class Constraint(ABC):
    """What every constraint does. A projection of a later `stage` keeps what an earlier one made true."""

    stage: ClassVar[int] = 0

    @abstractmethod
    def project(self, delta: Residual) -> Residual:
        """A delta that satisfies the constraint and is no longer than `delta`."""

    @abstractmethod
    def violation(self, delta: Residual) -> PerExample:
        """By how much each example fails the constraint; 0 where it is satisfied."""

    def select(self, rows: Rows) -> Constraint:
        """The constraint of the examples `rows`; itself where all examples share one."""
        return self


@dataclass(frozen=True, eq=False)
class EncoderOrthogonal(Constraint):
    """C1: `A^T delta = 0` at every position, for directions `A` that must not be touched.

    >>> import torch
    >>> from recover.search import EncoderOrthogonal
    >>> EncoderOrthogonal(torch.tensor([[1.0], [0.0]])).project(torch.tensor([[[3.0, 4.0]]]))
    tensor([[[0., 4.]]])
    """

    directions: Float[Tensor, "d_model k"]

    @classmethod
    def of(cls, *clamps: Clamp) -> EncoderOrthogonal:
        """Orthogonal to what the features of these clamps (at one site) read."""
        return cls(torch.cat([clamp.encoder for clamp in clamps], dim=1))

    @cached_property
    def null_space(self) -> NullSpace:
        return NullSpace.of(self.directions)

    def project(self, delta: Residual) -> Residual:
        """The nearest delta in the null space; give float32 at least (see `NullSpace.project`)."""
        return self.null_space.project(delta)

    def violation(self, delta: Residual) -> PerExample:
        """`||A^T delta||_F`, in pre-activation units, computed in float64."""
        seen = einsum(delta.double(), self.directions.double(), "batch pos d_model, d_model k -> batch pos k")
        return norm(seen).to(delta.dtype)


@dataclass(frozen=True, eq=False)
class ActivationStable(Constraint):
    """C2: the clamped features at `h_def + delta` are those at `h_def`."""

    clamp: Clamp
    h_def: Residual
    stage: ClassVar[int] = 1

    @cached_property
    def reference(self) -> Float[Tensor, "batch pos k"]:
        """The clamped features in the defended state."""
        return self.clamp.reference(self.h_def)

    def project(self, delta: Residual) -> Residual:
        """A feasible delta no longer than `delta`, by the steps above; not always the nearest one.

        Where features compete this is the projection of C1, which does not suffice: see `violation`.
        """
        if not self.clamp.sae.pointwise:
            return EncoderOrthogonal.of(self.clamp).project(delta)
        active = self.reference != 0
        held = active
        projected = _hold(self.clamp.encoder, held, delta)
        while True:
            crossed = (self.clamp.read(self.h_def + projected) != 0) != active
            woken = crossed & ~held
            if not woken.any():
                return torch.where(crossed.any(dim=-1, keepdim=True), 0.0, projected)
            held = held | woken
            projected = _hold(self.clamp.encoder, held, delta)

    def violation(self, delta: Residual) -> PerExample:
        """The activation drift, `||z_S(h_def + delta) - z_S(h_def)||`."""
        return activation_drift(self.clamp.read(self.h_def + delta), self.reference)

    def select(self, rows: Rows) -> ActivationStable:
        return replace(self, h_def=self.h_def[rows])


@dataclass(frozen=True, eq=False)
class DecodeStable(ActivationStable):
    """C3: what the clamped features write at `h_def + delta` is what they write at `h_def`.

    The projection is that of C2, which is sufficient, and necessary where the decoder rows are independent.
    """

    def violation(self, delta: Residual) -> PerExample:
        """The decode drift, `||(z_S(h_def + delta) - z_S(h_def)) W_dec[S]||`, in residual units."""
        return decode_drift(self.clamp.read(self.h_def + delta), self.reference, self.clamp.decoder)


@dataclass(frozen=True)
class Budget(Constraint):
    """C4: `||delta||_F <= eps` for each example, over all its positions.

    >>> import torch
    >>> from recover.search import Budget
    >>> Budget(1.0).violation(torch.tensor([[[3.0, 4.0]]]))
    tensor([4.])

    Raises:
        InputError: `eps` is not a finite number above 0.
    """

    eps: Number
    stage: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise InputError(f"budget must be finite and positive, got {self.eps}")

    def project(self, delta: Residual) -> Residual:
        """`delta`, scaled down to the budget where it is longer."""
        length = norm(delta)
        # Aimed two roundings low, so that rounding each entry does not lift the norm over the budget again.
        aim = self.eps * (1 - 2 * torch.finfo(delta.dtype).eps)
        return delta * by_example(torch.where(length > self.eps, aim / length.clamp(min=self.eps), 1.0))

    def violation(self, delta: Residual) -> PerExample:
        """By how much the norm exceeds the budget."""
        return torch.relu(norm(delta) - self.eps)


@dataclass(frozen=True)
class Constraints(Constraint):
    """Several constraints at one site as one: projected onto in the order of their stages.

    The linear C1 comes first; C2 and C3 remove only directions that C1 removes too; the budget scales, which the others
    allow, as their sets hold the segment from any of their points to 0.
    """

    parts: tuple[Constraint, ...]

    def project(self, delta: Residual) -> Residual:
        for part in sorted(self.parts, key=lambda part: part.stage):
            delta = part.project(delta)
        return delta

    def violation(self, delta: Residual) -> PerExample:
        """The largest violation of any part (their units differ)."""
        none = delta.new_zeros(delta.shape[0])
        return reduce(torch.maximum, (part.violation(delta).to(delta.dtype) for part in self.parts), none)

    def select(self, rows: Rows) -> Constraints:
        parts = tuple(part.select(rows) for part in self.parts)
        same = all(new is old for new, old in zip(parts, self.parts, strict=True))
        return self if same else Constraints(parts)


def _hold(A: Float[Tensor, "d_model k"], held: Bool[Tensor, "batch pos k"], delta: Residual) -> Residual:
    """At each position, `delta` projected onto the null space of the columns of `A` held there."""
    patterns, which = torch.unique(rearrange(held, "batch pos k -> (batch pos) k"), dim=0, return_inverse=True)
    which, projected = which.reshape(held.shape[:2]), delta
    for index, pattern in enumerate(patterns):
        if pattern.any():
            here = rearrange(which == index, "batch pos -> batch pos 1")
            projected = torch.where(here, NullSpace.of(A[:, pattern]).project(delta), projected)
    return projected
