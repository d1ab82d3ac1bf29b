"""Figures as inline SVG that any width suits: text keeps its size, and only the marks move.

1. Horizontal places are shares of the width (`x="40%"`), vertical ones pixels; there is no `viewBox`, so that nothing
   is scaled. The drawing may reach over its box (`overflow: visible`), into the padding that the page gives it.
2. Colors are classes (`tone-own`), which the page defines for light and dark; each tone has its own marker as well.
3. Each is an image to a screen reader, with a title and a description; the numbers are in the table beside it.

Every id begins with the figure's name, so that none occurs twice on a page.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from html import escape

from recover.numerics.formats import number, percent
from recover.report.figures import Curves, Dots, Figure, Histogram, Intervals, Strip, Tone

__all__ = ["draw", "legend", "logarithmic_ticks", "marker"]

Size = float | int
"""Pixels, or a share of the width."""
Place = Callable[[Size], Size]
"""From a value to a share of the width."""
MARKERS: dict[Tone, str] = {
    "own": "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z",
    "plus": "M0-6 6 0 0 6-6 0Z",
    "placebo": "M-5 4 0-6 5 4Z",
    "random": "M-4-4H4V4H-4Z",
    "shuffled": "M-5-4 0 6 5-4Z",
    "undo": "M-6 0H6M0-6V6",
    "plain": "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0-4 0Z",
}
ROW, LABEL, TICKS = 40, 14, 26
HEIGHT, DOT = 220, 3.2
BINS = 120
"""Dots of a strip that fall into the same of so many columns are laid above each other."""


def draw(figure: Figure) -> str:
    """The figure as an `<svg>` element."""
    match figure.panel:
        case Intervals() as panel:
            height, body = _intervals(panel)
        case Curves() as panel:
            height, body = _curves(panel)
        case Dots() as panel:
            height, body = _dots(panel)
        case Histogram() as panel:
            height, body = _histogram(panel)
    name = escape(figure.name)
    return (
        f'<svg class="plot" role="img" aria-labelledby="{name}-title {name}-alt" width="100%" height="{height}">'
        f'<title id="{name}-title">{escape(figure.title)}</title><desc id="{name}-alt">{escape(figure.alt)}</desc>'
        f"{''.join(body)}</svg>"
    )


def legend(figure: Figure) -> list[tuple[Tone, str]]:
    """Which marker means what, where the drawing does not say so itself."""
    return [(one.tone, one.name) for one in figure.panel.curves] if isinstance(figure.panel, Curves) else []


def marker(tone: Tone) -> str:
    """A marker by itself, for a legend."""
    return f'<svg class="key" width="14" height="14" aria-hidden="true">{_mark(7, 7, tone, unit="")}</svg>'


def logarithmic_ticks(low: Size, high: Size, most: int = 7) -> list[Size]:
    """Round numbers from `low` to `high`: 1, 2 and 5 of each power of ten, or fewer where that is too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leads in ((1, 2, 5), (1, 3), (1,)):
        ticks = [lead * 10.0**power for power in powers for lead in leads if low <= lead * 10.0**power <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def _intervals(panel: Intervals) -> tuple[int, Iterator[str]]:
    groups = len({row.group for row in panel.rows if row.group})
    height = _head(panel) + ROW * len(panel.rows) + 24 * groups + TICKS + 8
    return height, _interval_marks(panel, height - TICKS)


def _interval_marks(panel: Intervals, bottom: int) -> Iterator[str]:
    if panel.logarithmic:
        sizes = [size for row in panel.rows for size in (row.value, row.low, row.high) if size]
        low, high = min(sizes) / 1.3, max(sizes) * 1.3
        place = _logarithmic(low, high)
        yield from _axis([(place(tick), number(tick)) for tick in logarithmic_ticks(low, high)], bottom)
    else:
        place = float
        yield from _axis([(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)], bottom)
    if panel.line is not None:
        yield from _named_line(panel.line, place(panel.line[0]), bottom)
    top, group = _head(panel), ""
    for row in panel.rows:
        if row.group != group:
            group, top = row.group, top + 24
            yield _text(0, top - 6, group, "group")
        middle = top + LABEL + 12
        yield _text(0, top + LABEL, row.name)
        yield _text(1, top + LABEL, _said(row.value, row.low, row.high, panel), "value", "end")
        yield _stroke("track", 0, middle, 1, middle)
        if row.low is not None and row.high is not None:
            yield _stroke(f"whisker tone-{row.tone}", place(row.low), middle, place(row.high), middle)
        yield _mark(place(row.value), middle, row.tone)
        top += ROW


def _said(value: Size, low: float | None, high: float | None, panel: Intervals) -> str:
    form = number if panel.logarithmic else percent
    return form(value) + ("" if low is None or high is None else f" ({form(low)} to {form(high)})")


def _curves(panel: Curves) -> tuple[int, Iterator[str]]:
    return HEIGHT + TICKS, _curve_marks(panel)


def _curve_marks(panel: Curves) -> Iterator[str]:
    norms = sorted({point.at for one in panel.curves for point in one.points})
    place = _logarithmic(norms[0] / 1.15, norms[-1] * 1.15)

    def up(rate: Size) -> Size:
        return 18 + (HEIGHT - 18) * (1 - rate)

    for rate in (0, 0.25, 0.5, 0.75, 1):
        yield _stroke("grid", 0, up(rate), 1, up(rate))
        yield _text(0, up(rate) + 4, f"{rate:.0%}", "tick", "end", shift=-8)
    yield from _axis([(place(norm), number(norm)) for norm in _apart(norms, place)], HEIGHT)
    if panel.line is not None and norms[0] <= panel.line[0] <= norms[-1]:
        yield from _named_line(panel.line, place(panel.line[0]), HEIGHT)
    for one in reversed(panel.curves):
        for left, right_ in zip(one.points, one.points[1:], strict=False):
            yield _stroke(f"line tone-{one.tone}", place(left.at), up(left.rate), place(right_.at), up(right_.rate))
    for one in reversed(panel.curves):
        for point in one.points:
            if point.low is not None and point.high is not None:
                yield _stroke(
                    f"whisker tone-{one.tone}", place(point.at), up(point.low), place(point.at), up(point.high)
                )
            yield _mark(place(point.at), up(point.rate), one.tone)


def _apart(norms: Sequence[Size], place: Place) -> list[Size]:
    """Those whose labels do not meet on a narrow screen, the last among them."""
    kept: list[Size] = []
    for norm in reversed(norms):
        if not kept or place(kept[-1]) - place(norm) > 0.1:
            kept.append(norm)
    return kept


def _dots(panel: Dots) -> tuple[int, Iterator[str]]:
    place = _dot_place(panel)
    laid = [_height(strip, place) for strip in panel.strips]
    return _head(panel) + sum(laid) + TICKS + 8, _dot_marks(panel, laid)


def _head(panel: Intervals | Dots) -> int:
    """Room for the name of a line."""
    return 18 if panel.line is not None else 0


def _named_line(line: tuple[Size, str], at: Size, bottom: Size) -> Iterator[str]:
    """A line down the drawing, with its name at its head."""
    yield _stroke("bar", at, 0, at, bottom)
    yield _text(at, 10, line[1], "tick", "end" if at > 0.5 else "start", -5 if at > 0.5 else 5)


def _height(strip: Strip, place: Place) -> int:
    """Room for the label and the tallest pile of a strip, within bounds."""
    piles = Counter(round(place(value) * BINS) for value in strip.values)
    return 30 + min(max(int(max(piles.values(), default=1) * DOT * 2), 24), 90)


def _dot_place(panel: Dots) -> Place:
    """A logarithmic axis between a column for zeros and one for what was not reached, each only where needed."""
    values = [value for strip in panel.strips for value in strip.values]
    sizes = [value for value in values if 0 < value < math.inf] or [1.0]
    if panel.line is not None:
        sizes.append(panel.line[0])
    left, right = 0.12 * any(value == 0 for value in values), 0.14 * any(map(math.isinf, values))
    place = _logarithmic(min(sizes) / 1.15, max(sizes) * 1.15)

    def at(value: Size) -> Size:
        if value == 0:
            return 0.03
        return 0.95 if math.isinf(value) else left + (1 - left - right) * place(value)

    return at


def _dot_marks(panel: Dots, heights: Sequence[int]) -> Iterator[str]:
    place, bottom = _dot_place(panel), _head(panel) + sum(heights) + 4
    values = [value for strip in panel.strips for value in strip.values]
    sizes = [v for v in values if 0 < v < math.inf] + ([panel.line[0]] if panel.line else [])
    ticks = logarithmic_ticks(min(sizes, default=1) / 1.15, max(sizes, default=1) * 1.15, most=6)
    marks = [(place(tick), f"{tick:.0e}" if tick < 1e-3 else f"{tick:g}") for tick in ticks]
    marks += [(0.03, "0")] * (0 in values) + [(0.95, "not reached")] * (math.inf in values)
    yield from _axis(marks, bottom)
    if panel.line is not None:
        yield from _named_line(panel.line, place(panel.line[0]), bottom)
    top = _head(panel)
    for strip, height in zip(panel.strips, heights, strict=True):
        yield _text(0, top + LABEL, f"{strip.name}: median {number(strip.median)}")
        yield from _pile(strip, place, top + 22, top + height - 2)
        if not math.isnan(strip.median):
            yield _stroke("median", place(strip.median), top + 18, place(strip.median), top + height)
        top += height


def _pile(strip: Strip, place: Place, top: Size, bottom: Size) -> Iterator[str]:
    """Dots around the middle of a strip, those of one column above each other."""
    columns = Counter(round(place(value) * BINS) for value in strip.values)
    step = min(DOT * 2, (bottom - top) / max(columns.values(), default=1))
    middle, laid = (top + bottom) / 2, Counter[int]()
    for value in sorted(strip.values):
        column = round(place(value) * BINS)
        height = middle + step * (laid[column] - (columns[column] - 1) / 2)
        laid[column] += 1
        yield f'<circle class="dot tone-{strip.tone}" cx="{_share(place(value))}" cy="{height:.4g}" r="{DOT}"/>'


def _histogram(panel: Histogram) -> tuple[int, Iterator[str]]:
    return HEIGHT // 2 + TICKS, _bars(panel)


def _bars(panel: Histogram) -> Iterator[str]:
    low, high, bottom = panel.edges[0], panel.edges[-1], HEIGHT // 2
    if panel.line is not None:
        low, high = min(low, panel.line[0]), max(high, panel.line[0])

    def place(value: Size) -> Size:
        return (value - low) / (high - low)

    shown = [panel.edges[0], panel.edges[-1]] + ([panel.line[0]] if panel.line else [])
    ends = [tick for tick in shown if panel.line is None or tick == panel.line[0] or _far(tick, panel.line[0], place)]
    yield from _axis([(place(tick), number(tick)) for tick in ends], bottom)
    tallest = max(panel.counts)
    for left, right, count in zip(panel.edges, panel.edges[1:], panel.counts, strict=False):
        if count:
            tall, width = (bottom - 22) * count / tallest, place(right) - place(left)
            yield (
                f'<rect class="fill tone-own" x="{_share(place(left))}" y="{bottom - tall:.4g}" '
                f'width="{_share(width)}" height="{tall:.4g}"/>'
            )
    if panel.line is not None:
        yield from _named_line(panel.line, place(panel.line[0]), bottom)


def _far(left: Size, right: Size, place: Place) -> bool:
    return abs(place(left) - place(right)) > 0.12


def _logarithmic(low: Size, high: Size) -> Place:
    if low == high:
        return lambda _: 0.5
    return lambda value: (math.log(value) - math.log(low)) / (math.log(high) - math.log(low)) if value > 0 else 0.0


def _axis(marks: Sequence[tuple[Size, str]], bottom: Size) -> Iterator[str]:
    yield _stroke("axis", 0, bottom, 1, bottom)
    for at, label in marks:
        yield _stroke("axis", at, bottom, at, bottom + 5)
        anchor = "end" if at > 0.97 else "start" if at < 0.03 and label != "0" else "middle"
        yield _text(at, bottom + 19, label, "tick", anchor)


def _stroke(kind: str, x1: Size, y1: Size, x2: Size, y2: Size) -> str:
    return f'<line class="{kind}" x1="{_share(x1)}" y1="{y1:.4g}" x2="{_share(x2)}" y2="{y2:.4g}"/>'


def _text(x: Size, y: Size, text: str, kind: str = "label", anchor: str = "start", shift: Size = 0) -> str:
    moved = f' dx="{shift:g}"' if shift else ""
    return f'<text class="{kind}" x="{_share(x)}" y="{y:.4g}" text-anchor="{anchor}"{moved}>{escape(text)}</text>'


def _mark(x: Size, y: Size, tone: Tone, unit: str = "%") -> str:
    place = _share(x) if unit else f"{x:g}"
    return f'<svg class="mark tone-{tone}" x="{place}" y="{y:.4g}" overflow="visible"><path d="{MARKERS[tone]}"/></svg>'


def _share(share: Size) -> str:
    return f"{100 * share:.2f}%"
