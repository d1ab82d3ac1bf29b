"""A table of readings: what shared perturbations make of prompts that they were not fitted to.

Each *draw* is a split of the prompts in two, and a fit on one part; what is read stands in the columns of the other
part, and `UNREAD` in those that it was fitted to. Prompts that ask the same thing are a *cluster* and count once: what
is read of a cluster is the mean over its prompts and draws, and all counts and tests below are over clusters.

Rows are only the prompts that are right without the defense. The defense makes some of them wrong (`flips`); the
others, which are right under it as well, must stay right under a perturbation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import ConfigDict, Field, with_config

from recover.numerics.statistics import sign_test, wilson
from recover.types import Share

Ints = Int[np.ndarray, "..."]
Floats = Float[np.ndarray, "..."]
Bools = Bool[np.ndarray, "..."]
NONE, UNREAD = -1, -2
"""No known answer shows; the prompt was fitted to."""
Count = Annotated[int, Field(ge=0)]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Reading:
    """How many of several readings show the behavior."""

    hits: Annotated[Count, Field(description="readings that show the behavior")]
    n: Annotated[Count, Field(description="readings in all")]

    @property
    def rate(self) -> float:
        """NaN where nothing was read."""
        return self.hits / self.n if self.n else math.nan

    @property
    def wilson95(self) -> tuple[float, float]:
        """The 95% Wilson interval of the rate."""
        return wilson(self.hits, self.n)


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class ClusterRate:
    """A rate over clusters of prompts, each the mean of its readings."""

    rate: Annotated[Share | None, Field(description="mean over clusters; null where there is none")]
    n: Annotated[Count, Field(description="clusters")]
    interval95: Annotated[tuple[Share, Share], Field(description="95% Wilson interval over clusters")]

    @classmethod
    def of(cls, values: Float[np.ndarray, "cluster"]) -> ClusterRate:
        """Summarize one value from 0 to 1 for each cluster."""
        n, total = len(values), float(values.sum())
        return cls(total / n if n else None, n, wilson(min(total, n), n))


@dataclass(frozen=True, eq=False)
class Other:
    """Readings of another rule, fitted and read as the behavior's own is.

    Attributes:
        name: of the rule, as a reader is told it.
        answers: what the rule answers, `[example]`.
        norms: the smallest norm read at which that shows, `[draw example]`; infinite where none, NaN where unread.
    """

    name: str
    answers: Ints
    norms: Floats


@dataclass(frozen=True, eq=False)
class Table:
    """What shared perturbations make of unseen prompts.

    Attributes:
        own: the right answer, `[example]`.
        flips: where the defense makes the behavior go, `[example]`; elsewhere it is right under the defense.
        clusters: `[example]`, equal for prompts that ask the same thing.
        shown: the known answer that shows under the own fit at the largest norm, `[draw example]`.
        below: the same at the next largest norm.
        norms: the smallest norm read at which the right answer shows, `[draw example]`, as in `Other`.
        best_norms: the same over all own fits, those included that no other rule had.
        others: other rules.
        strata: prompts of a kind, `[example]`, by the kind's name.
        dealt: how often an answer dealt at random shows, under fits to answers dealt at random.
        trained: of each draw, the share of what it was fitted to that shows.
        planted: gates planted into the objective that the same fits opened; None where none was tried.
    """

    own: Ints
    flips: Bools
    clusters: Ints
    shown: Ints
    below: Ints
    norms: Floats
    best_norms: Floats
    others: tuple[Other, ...]
    strata: Mapping[str, Bools]
    dealt: Reading
    trained: tuple[float, ...]
    planted: Reading | None = None

    @cached_property
    def read(self) -> Bools:
        """What was read, `[draw example]`."""
        read: Bools = self.shown != UNREAD
        return read

    @property
    def right(self) -> Bools:
        """Where the right answer shows, `[draw example]`."""
        right: Bools = self.shown == self.own
        return right

    @property
    def one_target(self) -> bool:
        """Whether all prompts have the same right answer, which a shared perturbation can carry."""
        return len(set(self.own.tolist())) == 1

    def by_cluster(self, values: Floats | Bools, which: Bools) -> Float[np.ndarray, "cluster"]:
        """The mean of `values [draw example]` over what was read of each cluster of the examples `which`."""
        chosen = self.read & which
        names = np.broadcast_to(self.clusters, chosen.shape)[chosen]
        _, places = np.unique(names, return_inverse=True)
        given = np.broadcast_to(values, chosen.shape)[chosen].astype(np.float64)
        return np.bincount(places, given) / np.maximum(np.bincount(places), 1)

    def rate(self, values: Floats | Bools, which: Bools) -> ClusterRate:
        """Summarize `values` over the clusters of `which`."""
        return ClusterRate.of(self.by_cluster(values, which))

    def beats(self, answers: Ints) -> float:
        """P-value that the right answer shows no more often than these `answers [example]` are right, over clusters."""
        lead = self.by_cluster(self.right.astype(np.float64) - (answers == self.own), np.ones_like(self.flips))
        return sign_test(int((lead > 0).sum()), int((lead < 0).sum()))
