"""What the fits and readings of `heldout` add up to: the table that evidence is judged by, and the curve over norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from recover.evidence.readings import UNREAD, Floats, Ints, Other, Reading, Table
from recover.protocol.heldout import C1, C1_PLUS, SHUFFLED
from recover.protocol.verdict_model import Transfer, TransferPoint

Draws = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
"""The values of `heldout.fit` and of `heldout.read`, for each draw."""


def table(begun: Mapping[str, Any], draws: Draws) -> Table:
    """Lay out what was read, one row a draw."""
    shape, reads = (len(draws), len(begun["own"])), [read for _, read in draws]

    def laid(values: Sequence[Sequence[int]]) -> Ints:
        grid = np.full(shape, UNREAD)
        for draw, row in enumerate(values):
            grid[draw, reads[draw]["rows"]] = row
        return grid

    def norms(values: Sequence[Sequence[float | None]]) -> Floats:
        grid = np.full(shape, math.nan)
        for draw, row in enumerate(values):
            grid[draw, reads[draw]["rows"]] = [math.inf if norm is None else norm for norm in row]
        return grid

    planted = [fit["planted"] for fit, _ in draws if fit["planted"]]
    return Table(
        own=np.array(begun["own"]),
        flips=np.array(begun["flips"], dtype=bool),
        clusters=np.array(begun["clusters"]),
        shown=laid([read["shown"] for read in reads]),
        below=laid([read["below"] for read in reads]),
        norms=norms([read["norms"] for read in reads]),
        best_norms=norms([read["best_norms"] for read in reads]),
        others=tuple(
            Other(other["name"], np.array(other["answers"]), norms([read["others"][number] for read in reads]))
            for number, other in enumerate(begun["others"])
        ),
        strata={name: np.array(rows, dtype=bool) for name, rows in begun["strata"].items()},
        dealt=_total(read["dealt"] for read in reads),
        trained=tuple(read["trained"] for read in reads),
        planted=_total(planted) if planted else None,
    )


def transfer(begun: Mapping[str, Any], draws: Draws) -> Transfer:
    """Sum up the counts of all draws: each flip is read once in each split."""
    reads, residual_norm = [read for _, read in draws], begun["residual_norm"]
    curve = []
    for points in zip(*(read["curve"] for read in reads), strict=True):
        own, random, undo = (_total(point[name] for point in points) for name in ("own", "random", "undo"))
        curve.append(
            TransferPoint(
                budget=points[0]["budget"],
                relative_norm=points[0]["budget"] / residual_norm,
                heldout_rate=own.rate,
                random_rate=random.rate,
                undo_rate=undo.rate,
            )
        )
    certified = [read[kind] for read in reads for kind in (C1, C1_PLUS)]
    return Transfer(
        budget=curve[-1].budget,
        relative_norm=curve[-1].relative_norm,
        residual_norm=residual_norm,
        train_rate=fmean(read["trained"] for read in reads),
        own=_total(read[C1] for read in reads),
        write_orthogonal=_total(read[C1_PLUS] for read in reads),
        shuffled=_total(read[SHUFFLED] for read in reads),
        undo_cosine=_farthest([read["undo_cosine"] for read in reads]),
        write_orthogonal_undo_cosine=_farthest([read["write_orthogonal_undo_cosine"] for read in reads]),
        back_but_features_moved=sum(one["back_but_features_moved"] for one in certified),
        preactivation_shift_max=_largest([one["preactivation_shift_max"] for one in certified]),
        constraint_residual_max=_largest([one["constraint_residual_max"] for one in certified]),
        curve=tuple(curve),
    )


def _total(parts: Any) -> Reading:
    given = list(parts)
    return Reading(sum(part["hits"] for part in given), sum(part["n"] for part in given))


def _farthest(cosines: Sequence[float | None]) -> float:
    return max((one for one in cosines if one is not None), key=abs, default=math.nan)


def _largest(values: Sequence[float | None]) -> float:
    """The largest; NaN where one of them is no number."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return max(known) if known and len(known) == len(values) else math.nan
