"""Numbers as people read them: the one set of formatters for pages, figures, tables and sentences.

>>> number(142.37), number(None), norm(None), percent(0.4216, 1), percent(-2e-7), percent(0.0042)
('142', 'not defined', 'not reached', '42.2%', '0%', '0.42%')
>>> tiny(1.93e-5), counted(9, 12, (0.468, 0.911))
('1.9e-05', '9 of 12 (75%; 95% interval 47% to 91%)')
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["counted", "interval", "norm", "number", "p_value", "percent", "tiny"]

UNDEFINED, UNREACHED = "not defined", "not reached"


def number(value: float | None) -> str:
    """Three significant digits; infinite values read "not reached", missing ones "not defined"."""
    if value is None or math.isnan(value):
        return UNDEFINED
    return UNREACHED if math.isinf(value) else f"{value:.3g}"


def norm(value: float | None) -> str:
    """A smallest norm; None, which is how JSON holds an infinite one, reads "not reached"."""
    return UNREACHED if value is None else number(value)


def percent(share: float | None, digits: int = 0) -> str:
    """A share of 1 with `digits` decimals, or two where it is below 1%; what rounds to zero is "0%"."""
    if share is None or math.isnan(share):
        return UNDEFINED
    text = f"{share:.{max(digits, 2) if 0 < abs(share) < 0.01 else digits}%}"
    return "0%" if float(text[:-1]) == 0 else text


def tiny(value: float | None) -> str:
    """A number that may be far below 1, such as a drift: two digits and a power of ten."""
    return UNDEFINED if value is None else f"{value:.1e}"


def p_value(p: float) -> str:
    """Two significant digits."""
    return f"{p:.2g}"


def interval(bounds: Sequence[float | None], digits: int = 0) -> str:
    """An interval of shares: "47% to 91%"."""
    low, high = bounds
    return f"{percent(low, digits)} to {percent(high, digits)}"


def counted(hits: int, n: int, bounds: Sequence[float | None] | None = None, name: str = "95% interval ") -> str:
    """A count with its rate and, where there are `bounds`, the interval called `name`; a dash where n is 0."""
    if not n:
        return "-"
    return f"{hits} of {n} ({percent(hits / n)}{'' if bounds is None else f'; {name}{interval(bounds)}'})"
