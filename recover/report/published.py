"""Published figures beside ours: which figure of a verdict each of them is, and whether the two agree.

1. *Path*. A published figure is named by where ours stands in `verdict.json`: `recovery.rate`, `curve[1].rate`. Which
   numbers there are is read off the schema of a verdict, so a path that leads nowhere is refused before a run.
2. *Agreement*. Ours may differ by the tolerance either way (`within`), or may fall short by it (`at_least`), or may go
   beyond it (`at_most`). Without a tolerance the two only stand side by side.
3. A comparison is made of a verdict that is already reached, and changes nothing in it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from recover.numerics.statistics import wilson
from recover.protocol.verdict_model import PublishedRow, Verdict
from recover.types import InputError

__all__ = ["Agreement", "PublishedFigure", "check_path", "compared", "index_of_curve", "lookup", "told"]

Agreement = Literal["within", "at_least", "at_most"]
STEP = re.compile(r"\.?([A-Za-z_]\w*)|\[(\d+)\]")
UNSOUND = ("INVALID", "INCONCLUSIVE")
SLACK = 1e-9
"""Of a bound: a decimal in a file is not the number that a subtraction gives."""


@dataclass(frozen=True)
class PublishedFigure:
    """A figure as published, and how near ours should be.

    Attributes:
        figure: where ours stands in a verdict.
        value: as published.
        tolerance: None where the two only stand side by side.
        agrees: on which side of it the tolerance bounds ours.
        n: of how many examples it is a share.
    """

    figure: str
    value: float
    tolerance: float | None = None
    agrees: Agreement = "within"
    n: int | None = None


@cache
def known_paths() -> tuple[str, ...]:
    """The numbers of a verdict, as the schema has them; items of a list are `[]`."""
    schema = Verdict.model_json_schema()
    parts = {name: part for name, part in schema["properties"].items() if name != "published"}
    return tuple(dict.fromkeys(_numbers({"properties": parts}, schema["$defs"], "")))


def _numbers(schema: Mapping[str, Any], sections: Mapping[str, Any], path: str) -> Iterator[str]:
    schema = sections[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if schema.get("type") in ("number", "integer"):
        yield path
    for choice in schema.get("anyOf", []):
        yield from _numbers(choice, sections, path)
    for name, part in schema.get("properties", {}).items():
        yield from _numbers(part, sections, f"{path}.{name}".lstrip("."))
    for item in [schema["items"]] if "items" in schema else schema.get("prefixItems", []):
        yield from _numbers(item, sections, f"{path}[]")


def check_path(path: str) -> None:
    """Raises:
    InputError: no number of a verdict stands there.
    """
    known, general = known_paths(), re.sub(r"\[\d+\]", "[]", path)
    if general in known and "[]" not in path and _steps(path) is not None:
        return
    inside = [one for one in known if one.startswith((f"{general}.", f"{general}["))]
    near = inside[:1] or difflib.get_close_matches(general, known, n=1, cutoff=0.4)
    meant = f"did you mean {near[0].replace('[]', '[0]')!r}?" if near else "such as recovery.rate"
    wrong = "is a section of verdict.json and no number in it" if inside else "no number of verdict.json is there"
    raise InputError(f"{path!r}: {wrong}; {meant}")


def index_of_curve(path: str) -> int | None:
    """Which point of the curve it is a figure of; None where it is of something else."""
    steps = _steps(path) or ()
    return int(steps[1]) if len(steps) > 1 and steps[0] == "curve" else None


def _steps(path: str) -> tuple[str | int, ...] | None:
    """Keys and indices; None where the path is none."""
    found = list(STEP.finditer(path))
    if "".join(one[0] for one in found) != path or path.startswith("."):
        return None
    return tuple(one[1] if one[2] is None else int(one[2]) for one in found)


def lookup(verdict: Verdict, path: str) -> Any | None:
    """What stands there; None where that part was not run."""
    found: Any = verdict
    for step in _steps(path) or ():
        try:
            found = found[step] if isinstance(step, int) else getattr(found, step)
        except (AttributeError, IndexError, TypeError):
            return None
    return found


def compared(verdict: Verdict, figures: Sequence[PublishedFigure], source: str) -> tuple[PublishedRow, ...]:
    """Each figure as published, ours, and whether they agree: None where ours was not measured, or none is asked."""
    rows = []
    for one in figures:
        # Of no search there are sums, which are zero, and they are no findings.
        unknown = one.figure.startswith("recovery.") and not verdict.recovery.searched
        ours = None if unknown else lookup(verdict, one.figure)
        low, high = bounds(one)
        agrees = None if ours is None or one.tolerance is None else _between(low, float(ours), high)
        rows.append(
            PublishedRow(
                figure=one.figure,
                source=source,
                published=one.value,
                n=one.n,
                ours=ours,
                wilson95=_interval(verdict, one.figure),
                tolerance=one.tolerance,
                low=low,
                high=high,
                agrees=agrees,
            )
        )
    return tuple(rows)


def bounds(one: PublishedFigure) -> tuple[float | None, float | None]:
    """Between which values ours agrees; None where there is no bound."""
    if one.tolerance is None:
        return None, None
    low = None if one.agrees == "at_most" else one.value - one.tolerance
    high = None if one.agrees == "at_least" else one.value + one.tolerance
    return low, high


def _between(low: float | None, value: float, high: float | None) -> bool:
    return (low is None or value >= low - SLACK) and (high is None or value <= high + SLACK)


def _interval(verdict: Verdict, path: str) -> tuple[float, float] | None:
    """The Wilson interval that stands beside a rate."""
    section, _, name = path.rpartition(".")
    beside = lookup(verdict, f"{section}.wilson95") if section and name == "rate" else None
    return None if beside is None or None in beside else beside


def told(verdict: Verdict) -> list[tuple[str, str]]:
    """For a page: whether each agrees, and the figures; nothing where none was published."""
    lines = []
    if verdict.published and verdict.verdict in UNSOUND:
        lines.append(("caution", f"the run is {verdict.verdict}, so its own figures cannot be relied on"))
    for row in verdict.published:
        result = {True: "agrees", False: "DISAGREES"}.get(row.agrees) if row.agrees is not None else None
        if result is None:
            result = "not measured" if row.ours is None else "not judged"
        known = "none" if row.ours is None else f"{row.ours:.3g}"
        if row.wilson95 is not None:
            known += f" ({_range(row.wilson95)})"
        lines.append((result, f"{row.figure}: published {_published(row)}, ours {known}{_asked(row)}"))
    return lines


def _published(row: PublishedRow) -> str:
    value, n = row.published, row.n
    if n is None:
        return f"{value:.3g}"
    if not 0 <= value <= 1:
        return f"{value:.3g} over {n} examples"
    hits = round(value * n)
    return f"{value:.3g} ({hits} of {n}; {_range(wilson(hits, n))})"


def _range(bounds: Sequence[float]) -> str:
    return f"95% interval {bounds[0]:.3g} to {bounds[1]:.3g}"


def _asked(row: PublishedRow) -> str:
    low, high = row.low, row.high
    if low is None and high is None:
        return ""
    if high is None:
        return f"; agrees if at least {low:.3g}"
    return f"; agrees if at most {high:.3g}" if low is None else f"; agrees if between {low:.3g} and {high:.3g}"
