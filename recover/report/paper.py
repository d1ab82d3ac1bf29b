"""The plotting style of papers and analyses, and the figures of a report in it: PDF, PNG, and CSV of the numbers.

Text stays text (`pdf.fonttype` 42, TrueType), the colors are Okabe and Ito's, which the color-blind can tell apart,
and every kind of mark has its own shape. Figures are those of `report.html`, from the same data, without a title, which
the caption gives. Importing matplotlib takes a second that a check does without, and so functions import it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recover.numerics.formats import number
from recover.protocol.folder import write_whole
from recover.report.evidence_figures import figures_of
from recover.report.figures import Curves, Dots, Figure, Histogram, Intervals, Tone
from recover.report.finished import FinishedRun
from recover.report.markdown import summary_rows
from recover.types import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["COLORS", "MARKERS", "plot_style", "write_figures"]

COLORS: Mapping[Tone, str] = {
    "own": "#0072B2",
    "plus": "#009E73",
    "placebo": "#D55E00",
    "random": "#555555",
    "shuffled": "#CC79A7",
    "undo": "#B8860B",
    "plain": "#000000",
}
MARKERS: Mapping[Tone, str] = {
    "own": "o",
    "plus": "D",
    "placebo": "^",
    "random": "s",
    "shuffled": "v",
    "undo": "P",
    "plain": ".",
}
STYLE: Any = {
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "figure.constrained_layout.use": True,
    "lines.linewidth": 1.2,
}
INCHES, DPI = 5.5, 300
"""Width: a column of text on most pages."""


@contextlib.contextmanager
def plot_style(changes: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Plot within this context in the style of the reports; afterwards matplotlib is as it was.

    `changes` are rcParams on top of it. Colors and markers by kind are in `COLORS` and `MARKERS`.

    >>> from matplotlib import pyplot as plt
    >>> with plot_style({"font.size": 9}):
    ...     canvas, axes = plt.subplots()
    ...     _ = axes.plot([5, 10, 20], [0.1, 0.4, 1.0], color=COLORS["own"], marker=MARKERS["own"])
    >>> bool(axes.spines["top"].get_visible())
    False
    """
    import matplotlib as mpl

    style: Any = {**STYLE, **(changes or {})}
    with mpl.rc_context(style):
        yield


def write_figures(run: FinishedRun, out: Path) -> list[Path]:
    """Write `NAME.pdf`, `NAME.png` and `NAME.csv` of each figure of a run, and its `summary.csv`.

    Raises:
        InputError: `out` cannot be written.
    """
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for figure in figures_of(run.verdict, run.records).values():
            for suffix, content in rendered(figure).items():
                written.append(out / f"{figure.name}.{suffix}")
                write_whole(written[-1], content)
        written.append(out / "summary.csv")
        write_whole(written[-1], _csv([("figure", "value"), *summary_rows(run.verdict)]))
    except OSError as error:
        raise InputError(f"--figures {out}: cannot be written ({error.strerror}); give another folder") from None
    return written


def rendered(figure: Figure) -> dict[str, bytes]:
    """The files of a figure by suffix; the same bytes for the same figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    with plot_style():
        canvas = _drawn(figure)
        files: dict[str, bytes] = {}
        for suffix, backend, metadata in (
            ("pdf", FigureCanvasPdf, {"CreationDate": None, "Title": figure.title}),
            ("png", FigureCanvasAgg, {"Title": figure.title}),
        ):
            page = io.BytesIO()
            backend(canvas).print_figure(page, format=suffix, dpi=DPI, metadata=metadata)
            files[suffix] = page.getvalue()
    return files | {"csv": _csv(figure.table)}


def _drawn(figure: Figure) -> Canvas:
    from matplotlib.figure import Figure as Canvas

    match figure.panel:
        case Intervals() as panel:
            canvas = Canvas(figsize=(INCHES, 0.75 + 0.27 * len(panel.rows)))
            _intervals(canvas.add_subplot(), panel)
        case Curves() as panel:
            canvas = Canvas(figsize=(INCHES, 2.8))
            _curves(canvas.add_subplot(), panel)
        case Dots() as panel:
            canvas = Canvas(figsize=(INCHES, 0.8 + 0.5 * len(panel.strips)))
            _dots(canvas.add_subplot(), panel)
        case Histogram() as panel:
            canvas = Canvas(figsize=(INCHES, 2.0))
            axes = canvas.add_subplot()
            axes.stairs(panel.counts, panel.edges, fill=True, color=COLORS["own"])
            axes.set_ylabel("count")
            _line(axes, panel.line)
    axes = canvas.axes[0]
    axes.set_xlabel(figure.panel.axis)
    return canvas


def _intervals(axes: Any, panel: Intervals) -> None:
    for height, row in enumerate(panel.rows):
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [height, height], color=COLORS[row.tone], linewidth=2.5, alpha=0.5)
        axes.plot(row.value, height, MARKERS[row.tone], color=COLORS[row.tone], markersize=5)
    names = [f"{row.group}: {row.name}" if row.group else row.name for row in panel.rows]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if panel.logarithmic:
        axes.set_xscale("log")
    else:
        _shares(axes, "x")
    _line(axes, panel.line)


def _curves(axes: Any, panel: Curves) -> None:
    for one in panel.curves:
        norms, rates = [p.at for p in one.points], [p.rate for p in one.points]
        axes.plot(norms, rates, color=COLORS[one.tone], marker=MARKERS[one.tone], markersize=4, label=one.name)
        for point in one.points:
            if point.low is not None and point.high is not None:
                axes.plot([point.at] * 2, [point.low, point.high], color=COLORS[one.tone], linewidth=2.5, alpha=0.35)
    axes.set_xscale("log")
    norms = sorted({point.at for one in panel.curves for point in one.points})
    axes.set_xticks(norms, [number(norm) for norm in norms])
    axes.minorticks_off()
    _shares(axes, "y")
    _line(axes, panel.line)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _dots(axes: Any, panel: Dots) -> None:
    """Zeros at the left edge and what was not reached at the right one, each named, as a logarithm has neither."""
    sizes = [v for strip in panel.strips for v in strip.values if 0 < v < math.inf]
    sizes += [panel.line[0]] if panel.line else []
    low, high = min(sizes, default=1.0), max(sizes, default=1.0)
    edge = max(high / low, 2.0) ** 0.12
    for height, strip in enumerate(panel.strips):
        places = [low / edge if v == 0 else high * edge if math.isinf(v) else v for v in strip.values]
        offsets = [height + 0.3 * ((index * 0.618) % 1 - 0.5) for index in range(len(places))]
        axes.plot(places, offsets, MARKERS[strip.tone], color=COLORS[strip.tone], markersize=2.5, alpha=0.6)
        if not math.isnan(strip.median):
            middle = min(max(strip.median, low / edge), high * edge)
            axes.plot([middle] * 2, [height - 0.32, height + 0.32], color="black", linewidth=1.5)
    axes.set_xscale("log")
    values = {value for strip in panel.strips for value in strip.values}
    for present, place, words in ((0 in values, low / edge, "0"), (math.inf in values, high * edge, "not reached")):
        if present:
            axes.annotate(words, (place, -0.5), ha="center", va="bottom", fontsize=7)
    axes.set_yticks(range(len(panel.strips)), [strip.name for strip in panel.strips])
    axes.set_ylim(len(panel.strips) - 0.5, -0.5)
    _line(axes, panel.line)


def _shares(axes: Any, side: str) -> None:
    getattr(axes, f"set_{side}lim")(-0.03, 1.03)
    getattr(axes, f"set_{side}ticks")([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])


def _line(axes: Any, line: tuple[float, str] | None) -> None:
    if line is not None:
        axes.axvline(line[0], color="#767676", linestyle="--", linewidth=0.8, zorder=0)
        top = axes.get_xaxis_transform()
        axes.annotate(line[1], (line[0], 1.0), xycoords=top, ha="center", va="bottom", fontsize=7, color="#555555")


def _csv(rows: Any) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
