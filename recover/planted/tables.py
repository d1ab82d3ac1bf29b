"""Tables of readings drawn at random, whose truth is known: how often do the rules of evidence err, how often decide?

No model is run. A table is drawn as a check would fill it: prompts in clusters, each unseen in half of the draws; in a
draw the same fit is read on all its unseen prompts, so that what a fit is good at raises all of them at once.

1. *Content*. The answer of a cluster survives with the probability `survives`; where it does, it shows in a reading but
   for a few (`missed`). Where it does not, what shows is nothing, or the one answer that the fit of this draw writes
   (`writes`), or the answer of something that goes with the right one (`correlate`), right that share of the time.
2. *Rule*. The norm of another rule is the own one's times `exp(harder)`, with noise of its own for every prompt
   (`spread`) and for every fit (`fit_spread`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from recover.evidence.readings import NONE, UNREAD, Other, Reading, Table
from recover.types import Finite, Share


@dataclass(frozen=True)
class TableWorld:
    """What is true where a table is drawn, and what may be said of it.

    Attributes:
        content, rule: the only decided value that is true of it; None where neither true nor false is.
        survives: share of clusters whose answer survives.
        writes: whether fits write one answer where it does not.
        correlate: how often something that is read in its place is right; None where there is none.
        exactly: the share `correlate` of the prompts, and not each with that probability.
        commonest: share of prompts with the commonest answer; None for equal shares.
        kept: share of what was right under the defense that stays so.
        harder: of two other rules, the logarithm of how much larger their norms are than the own rule's.
        fit_spread: standard deviation of the logarithm of norms from fit to fit.
        opened: share of planted gates that fits open.
        dealt: how often an answer dealt at random shows.
    """

    content: bool | None
    rule: bool | None
    survives: Share = 1.0
    writes: bool = False
    correlate: Share | None = None
    exactly: bool = True
    commonest: Share | None = None
    kept: Share = 0.95
    harder: tuple[Finite, Finite] = (0.0, 0.3)
    fit_spread: float = 0.1
    opened: Share = 1.0
    dealt: Share = 0.03


ANSWERS, MISSED, SPREAD, FITTED = 6, 0.05, 0.3, 0.95
TABLES: Mapping[str, TableWorld] = {
    "all of it survives": TableWorld(content=True, rule=False, harder=(0.0, 0.2)),
    "80 % survives": TableWorld(content=True, rule=False, survives=0.8, harder=(0.0, 0.2)),
    "80 % survives, one answer is written to the rest": TableWorld(
        content=True, rule=False, survives=0.8, writes=True, harder=(0.0, 0.2)
    ),
    "half survives": TableWorld(content=True, rule=False, survives=0.5),
    "30 % survives": TableWorld(content=None, rule=False, survives=0.3, writes=True),
    "erased, one answer is written": TableWorld(
        content=False, rule=False, survives=0.0, writes=True, harder=(-0.7, 0.0)
    ),
    "erased, nothing is written": TableWorld(content=False, rule=False, survives=0.0, harder=(-0.7, 0.0)),
    "erased, the commonest answer is 75 %": TableWorld(
        content=False, rule=False, survives=0.0, writes=True, commonest=0.75, harder=(0.0, 0.2)
    ),
    "a correlate is right on 85 %": TableWorld(content=None, rule=False, survives=0.0, correlate=0.85),
    "what was right breaks": TableWorld(content=None, rule=None, kept=0.1, harder=(0.5, 0.5)),
    "fits fail": TableWorld(content=None, rule=None, survives=0.0, opened=0.5),
    "a weak predicate": TableWorld(content=None, rule=None, dealt=0.5, harder=(0.5, 0.5)),
    "the own rule is easier, equal fits": TableWorld(
        content=True, rule=True, survives=0.9, harder=(0.5, 0.7), fit_spread=0.0
    ),
    "the own rule is easier": TableWorld(content=True, rule=True, survives=0.9, harder=(0.5, 0.7)),
    "80 % survives, the own rule is easier": TableWorld(content=True, rule=True, survives=0.8, harder=(0.5, 0.7)),
    "one rule is equal, the other harder": TableWorld(content=True, rule=False, harder=(0.0, 0.7), fit_spread=0.1),
    "rules are equal, fits vary": TableWorld(content=True, rule=False, harder=(0.0, 0.0), fit_spread=0.2),
    "another rule is easier": TableWorld(content=True, rule=False, harder=(-0.5, 0.3)),
}
"""Kinds of tables, by name."""


def drawn_table(world: TableWorld, n: int, seed: int, *, splits: int = 3, cluster: int = 1, kept: int = 6) -> Table:
    """Draw a table of `n` flips and `kept` prompts that are right under the defense.

    `cluster` prompts at a time ask the same thing; their answer survives or not together.
    """
    draw = np.random.default_rng([seed, n, cluster])
    total = n + kept
    clusters = np.concatenate([np.arange(n) // cluster, n + np.arange(kept)])
    _, place = np.unique(clusters, return_inverse=True)
    groups = int(place.max()) + 1
    own = _answers(world, draw, groups)[place]
    survives = (draw.random(groups) < world.survives)[place]
    wrong = (own + draw.integers(1, ANSWERS, groups)[place]) % ANSWERS
    instead = own.copy()
    if world.correlate is not None:
        off = _off(world, draw, int(place[:n].max()) + 1)[place[:n]]
        instead = np.where(np.append(off, np.zeros(kept, dtype=bool)), wrong, own)
    flips = np.arange(total) < n
    keeps = draw.random(total) < world.kept
    shape = (2 * splits, total)
    shown, below = np.full(shape, UNREAD), np.full(shape, UNREAD)
    norms, others = np.full(shape, np.nan), [np.full(shape, np.nan) for _ in world.harder]
    levels, prompt = draw.normal(0, SPREAD, total), [draw.normal(0, SPREAD, total) for _ in world.harder]
    for split in range(splits):
        side = (draw.permutation(groups) % 2)[place]
        for half in (0, 1):
            at, read = 2 * split + half, side == half
            written = int(draw.integers(ANSWERS)) if world.commonest is None else 0
            for grid in (shown, below):
                answer = np.where(survives & (draw.random(total) >= MISSED), own, written if world.writes else NONE)
                if world.correlate is not None:
                    answer = instead
                answer = np.where(flips, answer, np.where(keeps, own, NONE))
                grid[at, read] = answer[read]
            own_fit, *other_fits = draw.normal(0, world.fit_spread, 1 + len(others))
            size = np.exp(levels + own_fit)
            norms[at, read] = np.where(shown[at] == own, size, np.inf)[read]
            for grid, harder, noise, fit in zip(others, world.harder, prompt, other_fits, strict=True):
                grid[at, read] = np.exp(levels + harder + noise + fit)[read]
    names = ("the first rule", "the second rule")
    return Table(
        own=own,
        flips=flips,
        clusters=clusters,
        shown=shown,
        below=below,
        norms=norms,
        best_norms=norms,
        others=tuple(
            Other(name, (own + number) % ANSWERS, grid)
            for number, (name, grid) in enumerate(zip(names, others, strict=True), start=1)
        ),
        strata={f"answer {answer}": own == answer for answer in range(ANSWERS)},
        dealt=Reading(int(draw.binomial(2 * n, world.dealt)), 2 * n),
        trained=(FITTED,) * (2 * splits),
        planted=Reading(round(8 * world.opened), 8),
    )


def _answers(world: TableWorld, draw: np.random.Generator, n: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    if world.commonest is None:
        return draw.permutation(np.arange(n) % ANSWERS)
    rare = 1 + np.arange(n) % (ANSWERS - 1)
    return draw.permutation(np.where(np.arange(n) < round(world.commonest * n), 0, rare))


def _off(world: TableWorld, draw: np.random.Generator, n: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Where the correlate is wrong."""
    assert world.correlate is not None
    if not world.exactly:
        return draw.random(n) >= world.correlate
    return draw.permutation(np.arange(n) >= round(world.correlate * n))
