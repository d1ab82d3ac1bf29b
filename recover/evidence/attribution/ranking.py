"""Which heads and MLPs carry a recovery, ranked, and what putting the first so many of them back or in does.

1. *Rank* heads and MLPs by the effect through each, averaged along the delta (`paths.through`).
2. *Put back* the first so many to what they gave when defended: how much of the effect goes? *Put in* them alone, as
   they were when recovered, without the delta: how much of it comes?
3. Beside each size the same of as many components drawn at random.

All figures are shares of the delta's mean effect on the score.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from recover.defenses.defended import Defended
from recover.evidence.attribution.parts import POINTS, entering
from recover.evidence.attribution.paths import Carrier, carriers, direct, patched, through, trace
from recover.types import Delta

SIZES, DRAWS, TOP = (1, 2, 4, 8, 16, 32, 64), 4, 12
"""Components put back and put in together; random draws of as many; components looked at one by one."""


@dataclass(frozen=True)
class Carried:
    """What carries a batch of deltas.

    Attributes:
        n: examples.
        effect: mean change of the score.
        shows: share of the examples whose behavior shows under the delta.
        top: the first components: `name`, the effect through it along the delta (`integrated`) and by the gradient at
            the defended state (`plain`), and what putting it back and in does.
        direct: what each attention, each MLP and the delta itself write into the last residual.
        doing: for each `size`: `gone` and `still_shows` of the first so many put back, `come` and `shows` of them put
            in, and `random_gone` and `random_come` of as many drawn at random.
    """

    n: int
    effect: float
    shows: float
    top: Sequence[Mapping[str, str | float]]
    direct: Mapping[str, float]
    doing: Sequence[Mapping[str, float | int]]


def carried(defended: Defended, delta: Delta, points: int = POINTS, seed: int = 0) -> Carried:
    """Rank the heads and MLPs above the first clamped site, and measure what the first of them do.

    `points` are those of the integral along a delta; `seed` is that of the random draws.

    Raises:
        InputError: no block is above the site, or the model's heads and MLPs cannot be told apart.
    """
    defended, delta = entering(defended, delta)
    zero, every = torch.zeros_like(delta), carriers(defended)
    plain, along = (through(defended, delta, n) for n in (0, points))
    off, on = trace(defended, zero), trace(defended, delta)
    effect = float((on.score - off.score).mean())
    ranked = sorted(every, key=lambda carrier: -float(along[carrier].mean()))
    draws = random.Random(seed)

    def done(chosen: Sequence[Carrier]) -> dict[str, float]:
        back, into = patched(defended, delta, off, chosen), patched(defended, zero, on, chosen)
        return {
            "gone": float((on.score - back[0]).mean()) / effect,
            "come": float((into[0] - off.score).mean()) / effect,
            "still_shows": float((back[1] > 0).float().mean()),
            "shows": float((into[1] > 0).float().mean()),
        }

    doing = []
    for size in [*(size for size in SIZES if size < len(every)), len(every)]:
        point = {"size": size, **done(ranked[:size])}
        if size < len(every):
            drawn = [done(draws.sample(every, size)) for _ in range(DRAWS)]
            point |= {f"random_{name}": fmean(one[name] for one in drawn) for name in ("gone", "come")}
        doing.append(point)
    shares = {carrier: [float(one[carrier].mean()) / effect for one in (along, plain)] for carrier in ranked[:TOP]}
    top: list[dict[str, str | float]] = [
        {"name": str(one), "integrated": i, "plain": p, **done([one])} for one, (i, p) in shares.items()
    ]
    writes = {name: float(v.mean()) / effect for name, v in direct(defended, delta, points).by_name.items()}
    return Carried(len(delta), effect, float((on.slack > 0).float().mean()), top, writes, doing)
