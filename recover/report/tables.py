"""Text tables and plots that the analyses share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recover.numerics.statistics import wilson
from recover.types import InputError

__all__ = ["columns", "filled", "plot_rates"]


def columns(*lines: Sequence[str]) -> str:
    """Lines of cells as text, each column right-aligned and as wide as it needs.

    >>> print(columns(("budget", "back"), ("5", "1/4")))
    budget  back
         5   1/4
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{one:>{width}}" for one, width in zip(each, widths, strict=True)) for each in lines)


def filled(page: str, name: str, content: str) -> str:
    """Put content into a page, between the marks `<!-- name -->` and `<!-- end name -->`.

    Raises:
        InputError: the page has no such marks.

    >>> filled("<!-- x --> old <!-- end x -->", "x", "new").split()
    ['<!--', 'x', '-->', 'new', '<!--', 'end', 'x', '-->']
    """
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise InputError(f"--out: the page needs the marks {begin} and {end}, between which the table goes")
    return f"{before}{begin}\n{content}\n{end}{after}"


def plot_rates(
    axes: Any, xs: Sequence[float], hits: Sequence[int], n: Sequence[int], style: str, label: str, alpha: float = 1.0
) -> None:
    """Draw the rates `hits / n` with their 95% Wilson intervals into Matplotlib axes."""
    rates = [hit / of for hit, of in zip(hits, n, strict=True)]
    ends = [wilson(hit, of) for hit, of in zip(hits, n, strict=True)]
    below = [max(0.0, rate - low) for rate, (low, _) in zip(rates, ends, strict=True)]
    above = [max(0.0, high - rate) for rate, (_, high) in zip(rates, ends, strict=True)]
    axes.errorbar(xs, rates, yerr=[below, above], fmt=style, capsize=2, label=label, alpha=alpha)
