"""Which figures a verdict has, in the order of a report's questions; see `recover.report.figures` for what a figure is.

`verdict.json` alone gives all but the ones with a dot an example, which need the records of `examples.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recover.numerics.statistics import wilson
from recover.protocol.records import CertificateRecord, ExampleRecord, PlaceboRecord
from recover.protocol.verdict import certified_norm
from recover.report.figures import (
    Curve,
    Curves,
    Dots,
    Figure,
    Histogram,
    Intervals,
    Point,
    Row,
    Strip,
    Tone,
    binned,
    figure,
    interval,
    number,
    rated,
)
from recover.report.words import PARTS, READING, REPLIES, TITLES

__all__ = ["figures_of"]

Records = Sequence[ExampleRecord]
NORM = "norm of the perturbation"


def figures_of(verdict: Mapping[str, Any], records: Records = ()) -> dict[str, Figure]:
    """The figures of a run by name; those of parts that were not run are left out.

    Args:
        verdict: what `verdict.json` holds.
        records: the lines of `examples.jsonl`.
    """
    searched = [r for r in records if r.search and r.certificate and r.certificate.suppressed]
    built = {name: build(verdict, searched) for name, build in BUILDERS.items()}
    return {
        name: figure(name, TITLES[name], READING[name], *found) for name, found in built.items() if found is not None
    }


Built = tuple[Any, ...] | None


def _suppression(verdict: Mapping[str, Any], _: Records) -> Built:
    counts, features = verdict["counts"], verdict["controls"]["placebo_features"]
    if not counts["base"]:
        return None
    flips = (counts["valid_flips"], counts["base"])
    rows = [_counted("features of the defense", "own", *flips)]
    if features is not None:
        draws = f"{features['draws']} draws together"
        rows.append(Row("random features, as many", "random", features["suppressed_rate"], count=draws))
    return (Intervals(tuple(rows), "suppressed, of what shows without a clamp"),)


def _rates(verdict: Mapping[str, Any], _: Records) -> Built:
    found, controls, n = verdict["recovery"], verdict["controls"], verdict["recovery"]["searched"]
    if not n:
        return None
    rows = [_counted("own target (C1)", "own", found["recovered"], n)]
    if (plus := controls["write_orthogonal"]) is not None:
        rows.append(_counted("own target, C1+", "plus", round(plus["rate"] * n), n))
    if (placebo := controls["placebo"]) is not None:
        hits = round(placebo["rate"] * placebo["n"])
        rows.append(_counted("unrelated target (placebo)", "placebo", hits, placebo["n"]))
    if (random := controls["random"]) is not None:
        rows.append(_counted("best of the random draws", "random", random["examples_reached"], random["n"]))
        rows.append(Row("one random direction", "random", random["rate"], count="share of all draws"))
    if (undo := controls["undo"]) is not None:
        rows.append(_counted("clamp undone, best scale", "undo", round(undo["rate"] * n), n))
    return (Intervals(tuple(rows), "valid flips brought back within the budget"),)


def _replies(verdict: Mapping[str, Any], _: Records) -> Built:
    read = verdict["recovery"]["replies"]
    if read is None:
        return None
    rows = tuple(
        Row(words, "own", read[kind]["rate"], **interval(read[kind]["wilson95"]), count=_of(read[kind]["hits"], read))
        for kind, words in REPLIES.items()
    )
    return (Intervals(rows, "of what is said under the perturbation"),)


def _norms(verdict: Mapping[str, Any], searched: Records) -> Built:
    columns = _smallest(searched)
    strips = tuple(
        Strip(name, tone, tuple(size for size in sizes if size is not None))
        for name, tone, sizes in columns
        if any(size is not None for size in sizes)
    )
    if not strips:
        return None
    rows = [
        (r.id, *("not run" if sizes[row] is None else number(sizes[row]) for _, _, sizes in columns))
        for row, r in enumerate(searched)
    ]
    table = [("example", *(name for name, _, _ in columns)), *rows]
    return Dots(strips, f"smallest {NORM}", (verdict["recovery"]["budget"], "budget")), table


def _smallest(searched: Records) -> list[tuple[str, Tone, list[float | None]]]:
    return [
        ("own target (C1)", "own", [certified_norm(r) for r in searched]),
        ("own target, C1+", "plus", [_reached(r.write_orthogonal) for r in searched]),
        ("unrelated target (placebo)", "placebo", [_reached(r.placebo) for r in searched]),
    ]


def _reached(other: PlaceboRecord | None) -> float | None:
    return None if other is None else other.smallest


def _budget(verdict: Mapping[str, Any], searched: Records) -> Built:
    budgets = [point["budget"] for point in verdict["curve"]]
    if len(budgets) < 2:
        return None
    own = tuple(Point(p["budget"], p["rate"], *p["wilson95"]) for p in verdict["curve"])
    curves = [Curve("own target (C1)", "own", own)]
    for name, tone, sizes in _smallest(searched)[1:]:
        known = [size for size in sizes if size is not None]
        if known:
            within = [sum(size <= budget for size in known) for budget in budgets]
            points = (Point(at, k / len(known), *wilson(k, len(known))) for at, k in zip(budgets, within, strict=True))
            curves.append(Curve(name, tone, tuple(points)))
    return (Curves(tuple(curves), "budget: largest norm allowed", (verdict["recovery"]["budget"], "budget")),)


def _sizes(verdict: Mapping[str, Any], _: Records) -> Built:
    found, smallest = verdict["recovery"], verdict["minimum_norm"]
    if not found["searched"]:
        return None
    rows = []
    if smallest is not None and smallest["median"] is not None:
        rows.append(Row("smallest found, median", "own", smallest["median"], **interval(smallest["interval95"])))
    named: Sequence[tuple[str, float | None]] = (
        ("found within the budget, mean", found["norm_mean"]),
        ("the budget", found["budget"]),
        ("what the clamp moves, mean", found["clamp_displacement_mean"]),
        ("the residual itself, mean", _residual(found)),
    )
    rows += [Row(name, "plain", value) for name, value in named if value]
    return (Intervals(tuple(rows), "norm", logarithmic=True),)


def _residual(found: Mapping[str, Any]) -> float | None:
    relative, norm = found["relative_norm_mean"], found["norm_mean"]
    return norm / relative if relative and norm else None


def _drift(_: Mapping[str, Any], searched: Records) -> Built:
    certificates = [r.certificate for r in searched if r.certificate is not None]

    def strip(name: str, tone: Tone, read: Callable[[CertificateRecord], float | None]) -> Strip:
        values = (read(c) for c in certificates)
        return Strip(name, tone, tuple(value for value in values if value is not None))

    def largest(certificate: CertificateRecord) -> float | None:
        shifts = [abs(shift) for shift in certificate.preactivation_shift if shift is not None]
        return max(shifts, default=None) if len(shifts) == len(certificate.preactivation_shift) else None

    strips = [
        strip("clamped features moved by", "own", lambda c: c.drift),
        strip("their pre-activations, the most", "plus", largest),
        strip("for scale: the perturbation's norm", "plain", lambda c: c.norm),
    ]
    shown = tuple(one for one in strips if one.values)
    return (Dots(shown, "moved by"),) if shown else None


def _margins(_: Mapping[str, Any], searched: Records) -> Built:
    margins = [m for r in searched if r.certificate for m in r.certificate.threshold_margin if m is not None]
    if not margins:
        return None
    edges, counts = binned(margins)
    return (Histogram(edges, counts, "pre-activation minus threshold", (0.0, "threshold")),)


TRANSFER: Sequence[tuple[str, Tone, str, str]] = (
    ("held out (C1)", "own", "heldout_rate", "own"),
    ("held out, C1+", "plus", "write_orthogonal_heldout_rate", "write_orthogonal"),
    ("shuffled targets", "shuffled", "shuffled_rate", "shuffled"),
    ("random directions", "random", "random_rate", "random"),
)


def _ran(verdict: Mapping[str, Any]) -> Mapping[str, Any] | None:
    transfer = verdict["transfer"]
    return None if transfer is None or "refused" in transfer else transfer


def _transfer(verdict: Mapping[str, Any], _: Records) -> Built:
    transfer = _ran(verdict)
    if transfer is None or len(transfer["curve"]) < 2:
        return None
    keys = [one[:3] for one in TRANSFER] + [
        ("clamp undone", "undo", "undo_rate"),
        ("on the prompts fitted to", "plain", "train_rate"),
    ]
    curves = []
    for name, tone, key in keys:
        points = [Point(p["budget"], p[key]) for p in transfer["curve"] if p[key] is not None]
        if points:
            curves.append(Curve(name, tone, tuple(points)))
    return (Curves(tuple(curves), "norm of the shared perturbation"),) if curves else None


def _readings(verdict: Mapping[str, Any], _: Records) -> Built:
    transfer = _ran(verdict)
    if transfer is None:
        return None
    named = [(name, tone, key) for name, tone, _, key in TRANSFER] + [("targets dealt at random", "shuffled", "dealt")]
    readings = transfer["readings"]
    rows = tuple(
        _counted(name, tone, readings[key]["hits"], readings[key]["n"])
        for name, tone, key in named
        if readings.get(key) and readings[key]["n"]
    )
    most = verdict["statistics"]["rules"]["most"]
    return (Intervals(rows, "brought back, of prompts not fitted to", line=(most, "asked for")),) if rows else None


def _attribution(verdict: Mapping[str, Any], _: Records) -> Built:
    found = verdict.get("attribution")
    if not found:
        return None
    tried: Sequence[tuple[str, str, Tone]] = (
        ("replay", "this part alone", "own"),
        ("knockout", "without this part", "shuffled"),
    )
    rows = [
        rated(PARTS.get(name, name), tone, part[how], group)
        for how, group, tone in tried
        for name, part in found["parts"].items()
        if part.get(how)
    ]
    return (Intervals(tuple(rows), "valid flips brought back"),) if rows else None


BUILDERS: Mapping[str, Callable[[Mapping[str, Any], Records], Built]] = {
    "suppression": _suppression,
    "rates": _rates,
    "replies": _replies,
    "norms": _norms,
    "budget": _budget,
    "sizes": _sizes,
    "drift": _drift,
    "margins": _margins,
    "readings": _readings,
    "transfer": _transfer,
    "attribution": _attribution,
}


def _counted(name: str, tone: Tone, hits: int, n: int) -> Row:
    return Row(name, tone, hits / n, *wilson(hits, n), count=f"{hits} of {n}")


def _of(hits: int, read: Mapping[str, Any]) -> str:
    return f"{hits} of {read['n']}"
