"""Objectives of a few lines, whose answers a reader can see; each example has its own numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

D = 12


@dataclass(frozen=True, eq=False)
class Landscape:
    """`slack(x [batch d], numbers [batch])`, of one position; the score is the slack."""

    slack: Callable[[Tensor, Tensor], Tensor]
    numbers: Tensor

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        value = self.slack(delta[:, 0], self.numbers)
        return value, value

    def select(self, rows: Tensor) -> Landscape:
        return Landscape(self.slack, self.numbers[rows])

    @property
    def zero(self) -> Tensor:
        return torch.zeros(len(self.numbers), 1, D)


def landscape(slack: Callable[[Tensor, Tensor], Tensor], *numbers: float) -> Landscape:
    return Landscape(slack, torch.tensor(numbers))


class Anything:
    """No constraint."""

    def project(self, delta: Tensor) -> Tensor:
        return delta

    def select(self, rows: Tensor) -> Anything:
        return self


class Nothing:
    """Only zero."""

    def project(self, delta: Tensor) -> Tensor:
        return delta * 0

    def select(self, rows: Tensor) -> Nothing:
        return self


@dataclass(frozen=True, eq=False)
class Own:
    """For each example a set of its own."""

    sets: tuple[Any, ...]

    def project(self, delta: Tensor) -> Tensor:
        return torch.cat([own.project(one[None]) for own, one in zip(self.sets, delta, strict=True)])

    def select(self, rows: Tensor) -> Own:
        return Own(tuple(self.sets[row] for row in rows.tolist()))


class Claimed(torch.autograd.Function):
    """A value with another one's gradient."""

    @staticmethod
    def forward(ctx, value, other):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient
