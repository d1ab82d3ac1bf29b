"""The figures of a verdict, in the order of a report's questions, as the plain data of `recover.report.figures`.

Figures with a dot for each example need the records of `examples.jsonl`; the verdict alone gives the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recover.evidence.readings import ClusterRate
from recover.numerics.formats import number
from recover.numerics.statistics import wilson
from recover.protocol.records import CertificateRecord, ExampleRecord, PlaceboRecord
from recover.protocol.verdict import certified_norm
from recover.protocol.verdict_model import Recovery, Verdict
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
    rated,
)
from recover.report.words import FigureKey, prose

__all__ = ["figures_of"]

Records = Sequence[ExampleRecord]
NORM = "norm of the perturbation"


def figures_of(verdict: Verdict, records: Records = ()) -> dict[FigureKey, Figure]:
    """The figures of a run by name, without those of parts that were not run.

    Args:
        verdict: the verdict.
        records: the lines of `examples.jsonl`.
    """
    searched = [r for r in records if r.search and r.certificate and r.certificate.suppressed]
    built, words = {name: build(verdict, searched) for name, build in BUILDERS.items()}, prose().figures
    return {
        name: figure(name, words[name].title, words[name].reading, *found)
        for name, found in built.items()
        if found is not None
    }


Built = tuple[Any, ...] | None


def _suppression(verdict: Verdict, _: Records) -> Built:
    counts, features = verdict.counts, verdict.controls.placebo_features
    if not counts.base:
        return None
    flips = (counts.valid_flips, counts.base)
    rows = [_counted("features of the defense", "own", *flips)]
    if features is not None and features.suppressed_rate is not None:
        draws = f"{features.draws} draw{'s, pooled' if features.draws > 1 else ''}"
        rows.append(Row("as many random features", "random", features.suppressed_rate, count=draws))
    return (Intervals(tuple(rows), "suppressed, of examples that show the behavior without the clamp"),)


def _rates(verdict: Verdict, _: Records) -> Built:
    found, controls, n = verdict.recovery, verdict.controls, verdict.recovery.searched
    if not n:
        return None
    rows = [_counted("own target (C1)", "own", found.recovered, n)]
    if (plus := controls.write_orthogonal) is not None and plus.rate is not None:
        rows.append(_counted("own target, C1+", "plus", round(plus.rate * n), n))
    if (placebo := controls.placebo) is not None and placebo.rate is not None:
        hits = round(placebo.rate * placebo.n)
        rows.append(_counted("unrelated target (placebo)", "placebo", hits, placebo.n))
    if (random := controls.random) is not None and random.rate is not None:
        rows.append(_counted("best of the random directions", "random", random.examples_reached, random.n))
        rows.append(Row("one random direction", "random", random.rate, count="of all draws"))
    if (undo := controls.undo) is not None and undo.rate is not None:
        rows.append(_counted("undoing the clamp, best scale", "undo", round(undo.rate * n), n))
    return (Intervals(tuple(rows), "valid flips recovered within the budget"),)


def _replies(verdict: Verdict, _: Records) -> Built:
    read = verdict.recovery.replies
    if read is None:
        return None
    rows = tuple(rated(words, "own", getattr(read, kind), n=read.n) for kind, words in prose().replies.items())
    return (Intervals(rows, "of the replies under the perturbation"),)


def _norms(verdict: Verdict, searched: Records) -> Built:
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
    return Dots(strips, f"smallest {NORM}", (verdict.recovery.budget, "budget")), table


def _smallest(searched: Records) -> list[tuple[str, Tone, list[float | None]]]:
    return [
        ("own target (C1)", "own", [certified_norm(r) for r in searched]),
        ("own target, C1+", "plus", [_reached(r.write_orthogonal) for r in searched]),
        ("unrelated target (placebo)", "placebo", [_reached(r.placebo) for r in searched]),
    ]


def _reached(other: PlaceboRecord | None) -> float | None:
    return None if other is None else other.smallest


def _budget(verdict: Verdict, searched: Records) -> Built:
    budgets = [point.budget for point in verdict.curve]
    if len(budgets) < 2:
        return None
    own = tuple(Point(p.budget, p.rate, *p.wilson95) for p in verdict.curve)
    curves = [Curve("own target (C1)", "own", own)]
    for name, tone, sizes in _smallest(searched)[1:]:
        known = [size for size in sizes if size is not None]
        if known:
            within = [sum(size <= budget for size in known) for budget in budgets]
            points = (Point(at, k / len(known), *wilson(k, len(known))) for at, k in zip(budgets, within, strict=True))
            curves.append(Curve(name, tone, tuple(points)))
    return (Curves(tuple(curves), "budget (largest norm allowed)", (verdict.recovery.budget, "budget")),)


def _sizes(verdict: Verdict, _: Records) -> Built:
    found, smallest = verdict.recovery, verdict.minimum_norm
    if not found.searched:
        return None
    rows = []
    if smallest is not None and smallest.median is not None:
        known = () if None in smallest.interval95 else smallest.interval95
        rows.append(Row("smallest perturbation, median", "own", smallest.median, *known))
    named: Sequence[tuple[str, float | None]] = (
        ("perturbation within the budget, mean", found.norm_mean),
        ("the budget", found.budget),
        ("displacement by the clamp, mean", found.clamp_displacement_mean),
        ("residual stream, mean", _residual(found)),
    )
    rows += [Row(name, "plain", value) for name, value in named if value]
    return (Intervals(tuple(rows), "norm", logarithmic=True),)


def _residual(found: Recovery) -> float | None:
    relative, norm = found.relative_norm_mean, found.norm_mean
    return norm / relative if relative and norm else None


def _drift(_: Verdict, searched: Records) -> Built:
    certificates = [r.certificate for r in searched if r.certificate is not None]

    def strip(name: str, tone: Tone, read: Callable[[CertificateRecord], float | None]) -> Strip:
        values = (read(c) for c in certificates)
        return Strip(name, tone, tuple(value for value in values if value is not None))

    def largest(certificate: CertificateRecord) -> float | None:
        shifts = [abs(shift) for shift in certificate.preactivation_shift if shift is not None]
        return max(shifts, default=None) if len(shifts) == len(certificate.preactivation_shift) else None

    strips = [
        strip("drift of the clamped features", "own", lambda c: c.drift),
        strip("largest shift of their pre-activations", "plus", largest),
        strip("norm of the perturbation, for scale", "plain", lambda c: c.norm),
    ]
    shown = tuple(one for one in strips if one.values)
    return (Dots(shown, "distance moved"),) if shown else None


def _margins(_: Verdict, searched: Records) -> Built:
    margins = [m for r in searched if r.certificate for m in r.certificate.threshold_margin if m is not None]
    if not margins:
        return None
    edges, counts = binned(margins)
    return (Histogram(edges, counts, "pre-activation minus threshold", (0.0, "threshold")),)


TRANSFER: Sequence[tuple[str, Tone, str]] = (
    ("unseen flips (C1)", "own", "heldout_rate"),
    ("random directions", "random", "random_rate"),
    ("undoing the clamp", "undo", "undo_rate"),
)


def _transfer(verdict: Verdict, _: Records) -> Built:
    transfer = verdict.shared
    if transfer is None or len(transfer.curve) < 2:
        return None
    curves = []
    for name, tone, key in TRANSFER:
        points = [Point(p.budget, rate) for p in transfer.curve if (rate := getattr(p, key)) is not None]
        if points:
            curves.append(Curve(name, tone, tuple(points)))
    return (Curves(tuple(curves), "norm of the shared perturbation"),) if curves else None


def _readings(verdict: Verdict, _: Records) -> Built:
    known = verdict.knowledge
    if known is None:
        return None
    read: list[tuple[str, Tone, ClusterRate | None]] = [
        ("the behavior's own rule", "own", known.content.back),
        ("still right, of what was right", "plain", known.content.kept),
        *((other.name, "shuffled", other.holds) for other in known.rule.others),
    ]
    rows = [Row(name, tone, one.rate, *one.interval95) for name, tone, one in read if one and one.rate is not None]
    if known.dealt.n:
        rows.append(_counted("answers dealt at random", "random", known.dealt.hits, known.dealt.n))
    share = verdict.statistics.rules.share
    return (
        (Intervals(tuple(rows), "unseen prompts on which the rule holds", line=(share, "required")),) if rows else None
    )


def _attribution(verdict: Verdict, _: Records) -> Built:
    if verdict.attribution is None:
        return None
    parts = [(prose().parts[name], part) for name, part in verdict.attribution.parts.items()]
    rows = [rated(name, "own", part.replay, "this part alone") for name, part in parts]
    rows += [rated(name, "shuffled", part.knockout, "without this part") for name, part in parts]
    return (Intervals(tuple(rows), "valid flips recovered"),)


BUILDERS: Mapping[FigureKey, Callable[[Verdict, Records], Built]] = {
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
