"""Text tables and plots that the analyses share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recover.numerics.statistics import wilson

__all__ = ["columns", "plot_rates"]


def columns(*lines: Sequence[str]) -> str:
    """Lines of cells as text, each column right-aligned and as wide as it needs.

    >>> print(columns(("budget", "back"), ("5", "1/4")))
    budget  back
         5   1/4
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{one:>{width}}" for one, width in zip(each, widths, strict=True)) for each in lines)


def plot_rates(
    axes: Any, xs: Sequence[float], hits: Sequence[int], n: Sequence[int], style: str, label: str, alpha: float = 1.0
) -> None:
    """Draw the rates `hits / n` with their 95% Wilson intervals into Matplotlib axes."""
    rates = [hit / of for hit, of in zip(hits, n, strict=True)]
    ends = [wilson(hit, of) for hit, of in zip(hits, n, strict=True)]
    below = [max(0.0, rate - low) for rate, (low, _) in zip(rates, ends, strict=True)]
    above = [max(0.0, high - rate) for rate, (_, high) in zip(rates, ends, strict=True)]
    axes.errorbar(xs, rates, yerr=[below, above], fmt=style, capsize=2, label=label, alpha=alpha)
