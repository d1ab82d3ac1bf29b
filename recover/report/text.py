"""A verdict for people: the page of text for the terminal, and the rows of figures that every page shows."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from recover.protocol.verdict_model import Verdict
from recover.report.published import told
from recover.report.words import REPLIES, SUMMANDS, clamps, headline

RESULTS = {True: "passed", False: "FAILED", None: "not run"}
WIDTH, INDENT = 100, 22
PUBLISHED = "Published"
"""What the heading of published figures begins with."""
Rows = list[tuple[str, str]]


def sections(verdict: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """The figures that a reader needs, each with its name, under headings."""
    published = verdict.get("published") or []
    return [
        ("Defense", _defense(verdict["threat_model"], verdict["fit"])),
        ("Without the clamp and with it", _accounting(verdict["counts"])),
        ("Search", _search(verdict["threat_model"], verdict["recovery"], verdict["minimum_norm"], verdict["curve"])),
        (
            "Where it travels: parts of the perturbation, each alone under the clamp",
            _travel(verdict.get("attribution")),
        ),
        ("Controls: what is found where there should be less to find", _controls(verdict["controls"])),
        ("Transfer: one perturbation for all prompts, read on prompts it was not fitted to", _transfer(verdict)),
        *((f"{PUBLISHED}: {row['source']}", told(Verdict.model_validate(verdict))) for row in published[:1]),
    ]


def to_text(verdict: Mapping[str, Any]) -> str:
    """The page printed at the end of a check."""
    lines = _wrapped(f"{verdict['verdict']}: {headline(verdict)}", "")
    lines += ["", "Why"]
    for reason in verdict["reasons"]:
        lines += _wrapped(reason, "  - ")
    for heading, rows in sections(verdict):
        lines += ["", heading]
        for name, value in rows or [("not run", "there was nothing for it to work on")]:
            lines += _wrapped(value, f"  {name:<{INDENT - 2}}")
    lines += ["", "Gates: what must hold for the verdict to mean what it says"]
    for result in (False, True, None):
        gates = [gate for gate in verdict["gates"] if gate["passed"] is result]
        names = ", ".join(gate["name"] for gate in gates) or "none"
        lines += _wrapped(f"{len(gates)}: {names}" if gates else names, f"  {RESULTS[result]:<{INDENT - 2}}")
    return "\n".join(lines)


def seeds_to_text(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """How often each verdict came over several seeds, and a line for each of them."""
    said = [_said(verdict) for verdict in verdicts]
    lines = [
        f"{said.count(one)} of {len(said)} seeds: {one}" for one in dict.fromkeys(sorted(said, key=said.count)[::-1])
    ]
    lines += ["", "seed  back       held out  C1+    shuffled  placebo norm / own  verdict"]
    for verdict, one in zip(verdicts, said, strict=True):
        transfer, placebo, found = verdict["transfer"] or {}, verdict["controls"]["placebo"], verdict["recovery"]
        norms = "-" if placebo is None else f"{_norm(placebo['median_norm'])} / {_norm(placebo['own_median_norm'])}"
        back = f"{found['recovered']} of {found['searched']}"
        rates = [_rate(transfer.get(key)) for key in ("heldout_rate", "write_orthogonal_heldout_rate", "shuffled_rate")]
        seed = verdict["provenance"]["control_seed"]
        lines.append(f"{seed:>4}  {back:<9}  {rates[0]:<8}  {rates[1]:<5}  {rates[2]:<8}  {norms:<18}  {one}")
    return "\n".join(lines)


def _said(verdict: Mapping[str, Any]) -> str:
    words = {True: "specific", False: "not specific", "unknown": "specific unknown"}
    name = str(verdict["verdict"])
    return f"{name}, {words[verdict['specific']]}" if name == "RECOVERABLE" else name


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _defense(threat: Mapping[str, Any], fit: Mapping[str, Any]) -> Rows:
    described = (
        f"explained variance {_number(fit['explained_variance'])}, loss recovered {_number(fit['loss_recovered'])}, "
        f"{_number(fit['l0'])} features active on a token"
    )
    utility = fit["utility"]
    cost = [
        (
            "neutral text",
            f"loss {utility['loss_off']:.2f} nats a token without the defense, {utility['loss_on']:.2f} with",
        )
        for _ in range(utility is not None and None not in (utility["loss_off"], utility["loss_on"]))
    ]
    return [*(("clamp", clamp) for clamp in clamps(threat)), ("SAE fit", described), *cost]


def _accounting(counts: Mapping[str, int]) -> Rows:
    return [
        ("without the clamp", f"{counts['base']} of {counts['n']} examples show the behavior"),
        ("with the clamp", f"{counts['defended']} of {counts['n']}"),
        ("valid flips", f"{counts['valid_flips']} show it without the clamp and not with it; all below is about these"),
    ]


def _search(
    threat: Mapping[str, Any],
    found: Mapping[str, Any],
    smallest: Mapping[str, Any] | None,
    curve: Sequence[Mapping[str, Any]],
) -> Rows:
    if not found["searched"]:
        return [("not run", "there was nothing to search, or no use in searching")]
    low, high = found["wilson95"]
    several = threat["positions"] != "last"
    where = f"{threat['positions']} position{'s' * several}"
    if len(threat["sites"]) > 1:
        where += f" at {' and '.join(threat['delta_sites'])}"
    allowed = (
        f"{threat['access']}, of norm at most {threat['budget']:g}, at the {where}, "
        f"{threat['placement'].replace('_', ' the ')}, {threat['constraint']}"
    )
    rate = f"({_share(found['rate'], 0)}; 95% interval {_share(low, 0)} to {_share(high, 0)})"
    return [
        ("allowed", allowed),
        ("brought back", f"{found['recovered']} of {found['searched']} {rate}, measured on the saved perturbations"),
        *_replies(found["replies"]),
        (
            "size",
            f"norm {_number(found['norm_mean'])} on average, {_share(found['relative_norm_mean'], 1)} of the residual's"
            f"; the clamp itself moves the residual by {_number(found['clamp_displacement_mean'])}",
        ),
        (
            "did the clamp hold?",
            f"clamped features moved by at most {_tiny(found['drift_max'])}, their pre-activations by at most "
            f"{_tiny(found['preactivation_shift_max'])}; {_share(found['reactivated_share'], 1)} of those at zero "
            "were reactivated",
        ),
        *_smallest(smallest),
        *((("by budget", ", ".join(f"{p['budget']:g}: {p['rate']:.0%}" for p in curve)),) if curve else ()),
        ("found by", ", ".join(f"{name} {count}" for name, count in found["won_by"].items()) or "none"),
    ]


def _replies(read: Mapping[str, Any] | None) -> Rows:
    if read is None:
        return []
    told = []
    for kind, words in REPLIES.items():
        low, high = read[kind]["wilson95"]
        told.append(f"{read[kind]['hits']} {words} ({_share(low, 0)} to {_share(high, 0)})")
    drifted = (
        f"relative drift {_tiny(read['relative_drift_max'])}, pre-activations {_tiny(read['preactivation_shift_max'])} "
        "at most, along what was said"
    )
    return [("said freely", f"of {read['n']}: {'; '.join(told)}"), ("drift along it", drifted)]


def _smallest(smallest: Mapping[str, Any] | None) -> Rows:
    if smallest is None:
        return []
    low, high = smallest["quartiles"]
    words = (
        f"median {_norm(smallest['median'])}, quartiles {_norm(low)} and {_norm(high)}; the median is "
        f"{_share(smallest['median_over_residual'], 1)} of the residual's norm and "
        f"{_share(smallest['median_over_displacement'], 1)} of what the clamp displaces"
    )
    return [("smallest norm", words)]


def _travel(found: Mapping[str, Any] | None) -> Rows:
    if found is None:
        return []
    rows = []
    for name, words in SUMMANDS.items():
        part = found["parts"][name]
        said = f"; said, {part['said']['base_like']['hits']} like the model's own" if part["said"] else ""
        rows.append(
            (
                words,
                f"{_share(part['integrated_share'], 0)} of the effect on the score; alone it brings the behavior back "
                f"on {part['replay']['hits']} of {found['n']}{said}; without it the rest still does on "
                f"{part['knockout']['hits']}",
            )
        )
    gaps = f"the gradient at the defended state misses {_share(found['gap'], 0)} of the effect"
    return [*rows, ("first order", f"{gaps}, averaged along the perturbation {_share(found['integrated_gap'], 1)}")]


def _controls(controls: Mapping[str, Any]) -> Rows:
    rows: Rows = []
    if (placebo := controls["placebo"]) is not None:
        rows.append(
            (
                "placebo target",
                f"an unrelated target of the same kind is reached on {_share(placebo['rate'], 0)} of {placebo['n']}, "
                f"median smallest norm {_norm(placebo['median_norm'])}; the own one on "
                f"{_share(placebo['own_rate'], 0)}, {_norm(placebo['own_median_norm'])}",
            )
        )
    if (random := controls["random"]) is not None:
        rows.append(
            (
                "random directions",
                f"{_share(random['rate'], 2)} of the draws at the budget's norm, on {random['examples_reached']} of "
                f"{random['n']} examples at least one",
            )
        )
    if (features := controls["placebo_features"]) is not None:
        rows.append(
            (
                "random features",
                f"clamped instead, as many and as often active, they suppress the behavior on "
                f"{_share(features['suppressed_rate'], 0)} of the examples"
                + (f"; {_share(features['rate'], 0)} of these are brought back" if features["suppressed"] else ""),
            )
        )
    if (undo := controls["undo"]) is not None:
        rows.append(
            (
                "clamp undone",
                f"taking back the admissible part of what the clamp displaced recovers {_share(undo['rate'], 0)} at "
                f"most; cosine {_number(undo['cosine'])} with the perturbations found",
            )
        )
    if (plus := controls["write_orthogonal"]) is not None:
        rows.append(
            (
                "C1+",
                f"orthogonal to what the clamp writes as well: {_share(plus['rate'], 0)}, median smallest norm "
                f"{_norm(plus['median_norm'])}",
            )
        )
    if controls["undefended"] is not None and controls["unbounded"] is not None:
        rows.append(
            (
                "search itself",
                f"a way back known to exist is found on {_share(controls['undefended']['rate'], 0)}; without a budget "
                f"{_share(controls['unbounded']['rate'], 0)} are recovered",
            )
        )
    return rows


def _transfer(verdict: Mapping[str, Any]) -> Rows:
    transfer = verdict["transfer"]
    if transfer is None:
        return []
    if "refused" in transfer:
        return [("not run", transfer["refused"])]
    points = [
        (
            f"norm {point['budget']:.3g}",
            f"{_share(point['relative_norm'], 0)} of the residual's: held out {_share(point['heldout_rate'], 0)}, "
            f"C1+ {_share(point['write_orthogonal_heldout_rate'], 0)}; shuffled {_share(point['shuffled_rate'], 0)}, "
            f"random {_share(point['random_rate'], 0)}, clamp undone {_share(point['undo_rate'], 0)}",
        )
        for point in transfer["curve"]
    ]
    held = (
        f"{transfer['hits']} of {transfer['n']} by certificate, 95% interval {_share(transfer['wilson95'][0], 0)} to "
        f"{_share(transfer['wilson95'][1], 0)}; chance satisfies the predicate {_share(transfer['chance_rate'], 1)} of "
        "the time"
    )
    if verdict["counts"]["strict_flips"] != verdict["counts"]["valid_flips"]:
        held += (
            f"; by the check's own, weaker predicate {_share(transfer['weak_heldout_rate'], 0)}, and "
            f"{_share(transfer['weak_shuffled_rate'], 0)} with shuffled targets"
        )
    return [*points, ("at the last norm", held)]


def _wrapped(text: str, label: str) -> list[str]:
    """Lines of `text` after `label`, aligned with where it begins."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False
    ) or [label]


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3g}"


def _share(value: float | None, digits: int) -> str:
    return "not defined" if value is None else f"{value:.{digits}%}"


def _norm(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.3g}"


def _tiny(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.1e}"
