"""The figures of a report as plain data, drawn elsewhere: as SVG in `report.html`, by matplotlib for a paper.

1. `evidence_figures` builds each `Figure` from a verdict and its records.
2. A figure holds one `Panel`: rates or norms with intervals, curves, one dot for each example, or a histogram.
3. A figure says how it is read, and holds the table of the numbers that it shows; both renderers use them.

Rates are shares of 1, norms are in the units of the residual stream, slacks in logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from recover.numerics.formats import number, percent
from recover.protocol.verdict_model import Rate

__all__ = ["Curve", "Curves", "Dots", "Figure", "Histogram", "Intervals", "Panel", "Point", "Row", "Strip", "Tone"]

Tone = Literal["own", "plus", "placebo", "random", "shuffled", "undo", "plain"]
"""The meaning of a mark, which looks the same in every figure."""
Table = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Row:
    """One value, with its interval if there is one; `group` heads the rows that share it."""

    name: str
    tone: Tone
    value: float
    low: float | None = None
    high: float | None = None
    count: str = ""
    group: str = ""


@dataclass(frozen=True)
class Intervals:
    """Rows over one axis: shares from 0 to 1, or norms on a logarithmic one.

    Attributes:
        line: a share that is asked for, and its name.
    """

    rows: tuple[Row, ...]
    axis: str
    logarithmic: bool = False
    line: tuple[float, str] | None = None


@dataclass(frozen=True)
class Point:
    """A rate at a norm, with its interval if there is one."""

    at: float
    rate: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """Rates over norms."""

    name: str
    tone: Tone
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curves:
    """Curves over one logarithmic axis of norms.

    Attributes:
        line: a norm that matters, such as the budget, and its name.
    """

    curves: tuple[Curve, ...]
    axis: str
    line: tuple[float, str] | None = None


@dataclass(frozen=True)
class Strip:
    """One value for each example; infinite if not reached. Zeros are drawn apart, since they have no logarithm."""

    name: str
    tone: Tone
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The upper median, as in `verdict.json`; NaN if there are no values."""
        known = sorted(value for value in self.values if not math.isnan(value))
        return known[len(known) // 2] if known else math.nan


@dataclass(frozen=True)
class Dots:
    """Strips over one logarithmic axis."""

    strips: tuple[Strip, ...]
    axis: str
    line: tuple[float, str] | None = None


@dataclass(frozen=True)
class Histogram:
    """Counts between edges, one more edge than counts.

    Attributes:
        line: a value that matters, and its name.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    axis: str
    line: tuple[float, str] | None = None


Panel = Intervals | Curves | Dots | Histogram


@dataclass(frozen=True)
class Figure:
    """A panel with its words.

    Attributes:
        name: name of its files and anchors.
        reading: how it is read.
        alt: description for readers who cannot see it.
        table: the numbers, a header and rows.
    """

    name: str
    title: str
    reading: str
    alt: str
    panel: Panel
    table: Table

    def __post_init__(self) -> None:
        if any(len(row) != len(self.table[0]) for row in self.table):
            raise ValueError(f"figure {self.name}: rows of its table differ in length")


def figure(name: str, title: str, reading: str, panel: Panel, table: Table | None = None) -> Figure:
    """A figure whose alternative text, and table where none is given, follow from its panel."""
    return Figure(name, title, reading, f"{title}: {told(panel)}.", panel, table or table_of(panel))


def told(panel: Panel) -> str:
    """Describe a panel in words and numbers."""
    match panel:
        case Intervals(rows):
            return "; ".join(f"{row.name} {_value(row.value, panel)}" for row in rows)
        case Curves(curves):
            return "; ".join(
                f"{one.name} {percent(one.points[0].rate)} at norm {number(one.points[0].at)} and "
                f"{percent(one.points[-1].rate)} at {number(one.points[-1].at)}"
                for one in curves
            )
        case Dots(strips):
            return "; ".join(
                f"{strip.name}, {len(strip.values)} examples, median {number(strip.median)}" for strip in strips
            )
        case Histogram(edges, counts):
            return f"{sum(counts)} values between {number(edges[0])} and {number(edges[-1])}"


def table_of(panel: Panel) -> Table:
    """The numbers of a panel: a header and rows."""
    match panel:
        case Intervals(rows):
            return [
                ("", panel.axis, "95% interval", "count"),
                *(
                    (
                        f"{row.group}: {row.name}" if row.group else row.name,
                        _value(row.value, panel),
                        "" if row.low is None else f"{_value(row.low, panel)} to {_value(row.high, panel)}",
                        row.count,
                    )
                    for row in rows
                ),
            ]
        case Curves(curves):
            norms = sorted({point.at for one in curves for point in one.points})
            cells = [{point.at: point for point in one.points} for one in curves]
            return [
                (panel.axis, *(one.name for one in curves)),
                *((number(norm), *(_point(points.get(norm)) for points in cells)) for norm in norms),
            ]
        case Dots(strips):
            return [
                (
                    panel.axis,
                    "examples",
                    "smallest",
                    "lower quartile",
                    "median",
                    "upper quartile",
                    "largest",
                    "not reached",
                ),
                *((strip.name, *_quantiles(strip.values)) for strip in strips),
            ]
        case Histogram(edges, counts):
            bins = zip(edges, edges[1:], counts, strict=False)
            return [
                ("from", "to", "count"),
                *((number(low), number(high), str(count)) for low, high, count in bins),
            ]


def binned(values: Sequence[float], bins: int = 30) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Edges and counts of a histogram; a value at the last edge is in the last bin."""
    counts, edges = np.histogram(values, bins)
    return tuple(edges.tolist()), tuple(counts.tolist())


def rated(name: str, tone: Tone, found: Rate, group: str = "", n: int | None = None) -> Row:
    """The row of a rate, which is of `n` where that is told."""
    count = f"{found.hits}" if n is None else f"{found.hits} of {n}"
    return Row(name, tone, found.rate, *found.wilson95, count=count, group=group)


def _value(value: float | None, panel: Intervals) -> str:
    return number(value) if panel.logarithmic else percent(value)


def _point(point: Point | None) -> str:
    if point is None:
        return ""
    return percent(point.rate) + ("" if point.low is None else f" ({percent(point.low)} to {percent(point.high)})")


def _quantiles(values: Sequence[float]) -> tuple[str, ...]:
    known = sorted(value for value in values if not math.isnan(value))
    last = len(known) - 1
    at = [known[min(math.ceil(share * last), last)] for share in (0, 0.25, 0.5, 0.75, 1)] if known else [math.nan] * 5
    return (str(len(known)), *map(number, at), str(sum(map(math.isinf, known))))
