"""What do the finds use? A statement of its own, about each example's perturbation within the budget.

Of the finds, four things may hold, each true, false or unknown, by intervals over examples:

==================  ======================================================  ============================================
use                 true                                                    false
==================  ======================================================  ============================================
`undone`            they move the logits as lifting the clamp does          the mean cosine is below `unlike`
                    (mean cosine above `alike`)                             (upper end)
`direct_writing`    unrelated answers are reached within the budget on      the own answer is clearly nearer on more
                    most examples, and the own one is clearly nearer on     than half of the pairs (lower end)
                    less than half of the pairs (upper bound)
`dormant`           the behavior survives at base without what they move    it mostly does not
                    on most examples, and without what the clamp takes
                    out it does not: the test can see a use
`outside_sae`       the part in the SAE's error alone brings the behavior   the part in the error alone does not
                    back on most examples, and the part in features does
                    not
==================  ======================================================  ============================================

`route` is the first of these that is true, in this order, and "unknown" where none is. What is compared as "no more" or
"as easily" is an interval, never a test that failed to reject.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Literal

from recover.numerics.statistics import upper_share, wilson

ALIKE, UNLIKE, HALF, NEARER, LEAST = 0.9, 0.8, 0.5, 0.1, 5
"""Mean cosines above and below which moves are alike and unlike; half of examples; share by which a norm must be
smaller to be clearly so; and fewest examples."""
Route = Literal["undone", "direct_writing", "dormant", "outside_sae", "unknown"]


@dataclass(frozen=True)
class Share:
    """How often something holds over examples."""

    hits: int
    n: int

    @property
    def low(self) -> float:
        """Lower end of the 95% Wilson interval."""
        return wilson(self.hits, self.n)[0]

    @property
    def high(self) -> float:
        """Upper end of it."""
        return wilson(self.hits, self.n)[1]


@dataclass(frozen=True)
class Mean:
    """A mean over examples, with its 95% interval."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """Student's interval by its normal limit; None for fewer than two values."""
        known = [value for value in values if math.isfinite(value)]
        if len(known) < 2:
            return None
        mean, half = fmean(known), NormalDist().inv_cdf(0.975) * stdev(known) / math.sqrt(len(known))
        return cls(mean, mean - half, mean + half, len(known))


@dataclass(frozen=True)
class Found:
    """What is known of the finds of a check.

    Attributes:
        likeness: of their move of the logits with that of lifting the clamp.
        own, unrelated: smallest norms of the own answer and of an unrelated one, by the same solvers, pair by pair.
        unrelated_within: how many of the unrelated answers are reached within the budget.
        error, features: how many come back by the part in the SAE's error alone, and by the part in features.
        without_find, without_clamp: how many show the behavior at base without what the find moves, and without what
            the clamp takes out.
    """

    likeness: Sequence[float]
    own: Sequence[float]
    unrelated: Sequence[float]
    unrelated_within: Share
    error: Share
    features: Share
    without_find: Share
    without_clamp: Share


@dataclass(frozen=True)
class Uses:
    """What was decided: each use, and the route that is named."""

    undone: bool | None
    direct_writing: bool | None
    dormant: bool | None
    outside_sae: bool | None

    @property
    def route(self) -> Route:
        """The first use that holds."""
        if self.undone:
            return "undone"
        if self.direct_writing:
            return "direct_writing"
        if self.dormant:
            return "dormant"
        return "outside_sae" if self.outside_sae else "unknown"


def judge_uses(found: Found) -> Uses:
    """Apply the table above."""
    return Uses(_undone(found), _written(found), _dormant(found), _outside(found))


def nearer(found: Found) -> Share:
    """On how many pairs the own answer is clearly nearer than the unrelated one."""
    pairs = list(zip(found.own, found.unrelated, strict=True))
    return Share(sum(own < (1 - NEARER) * other for own, other in pairs), len(pairs))


def _undone(found: Found) -> bool | None:
    mean = Mean.of(found.likeness)
    if mean is None or mean.n < LEAST:
        return None
    return True if mean.low > ALIKE else False if mean.high < UNLIKE else None


def _written(found: Found) -> bool | None:
    share = nearer(found)
    if share.n < LEAST:
        return None
    if share.low > HALF:
        return False
    as_easy = upper_share(share.hits, share.n) < HALF and found.unrelated_within.low > HALF
    return True if as_easy else None


def _dormant(found: Found) -> bool | None:
    if found.without_find.n < LEAST:
        return None
    if found.without_find.high < HALF:
        return False
    return True if found.without_find.low > HALF and found.without_clamp.high < found.without_find.low else None


def _outside(found: Found) -> bool | None:
    if found.error.n < LEAST:
        return None
    if found.error.high < HALF:
        return False
    return True if found.error.low > HALF and found.features.high < HALF else None
