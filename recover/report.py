"""A verdict for people: a page of text for the terminal, and a plain self-contained HTML page of the same sections."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2

MEANINGS = {
    "RECOVERABLE": "with the clamp held, the behavior was brought back",
    "NOT_RECOVERED_AT_BUDGET": "within this budget, this search did not bring the behavior back",
    "INCONCLUSIVE": "a check of the run itself failed, so it says nothing either way",
    "INVALID": "this setup cannot answer the question",
}
SPECIFIC = {
    "unknown": "whether that is specific to this behavior is unknown",
    True: "and that is specific to this behavior",
    False: "but that is not specific to this behavior: others can be written as easily",
}
EDITS = {"set": "set to {:g}", "scale": "scaled by {:g}", "floor": "kept at {:g} or more"}
RESULTS = {True: "passed", False: "FAILED", None: "not run"}
WIDTH, INDENT = 100, 22
Rows = list[tuple[str, str]]


def headline(verdict: Mapping[str, Any]) -> str:
    """What the verdict means, in words."""
    meaning = MEANINGS[verdict["verdict"]]
    return f"{meaning}; {SPECIFIC[verdict['specific']]}" if verdict["verdict"] == "RECOVERABLE" else meaning


def sections(verdict: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """The figures that a reader needs, each with its name, under headings."""
    return [
        ("Defense", _defense(verdict["threat_model"], verdict["fit"])),
        ("Without the clamp and with it", _accounting(verdict["counts"])),
        ("Search", _search(verdict["threat_model"], verdict["recovery"])),
    ]


def to_text(verdict: Mapping[str, Any]) -> str:
    """The page printed at the end of a check."""
    lines = _wrapped(f"{verdict['verdict']}: {headline(verdict)}", "")
    lines += ["", "Why"]
    for reason in verdict["reasons"]:
        lines += _wrapped(reason, "  - ")
    for heading, rows in sections(verdict):
        lines += ["", heading]
        for name, value in rows:
            lines += _wrapped(value, f"  {name:<{INDENT - 2}}")
    lines += ["", "Gates: what must hold for the verdict to mean what it says"]
    for result in (False, True, None):
        gates = [gate for gate in verdict["gates"] if gate["passed"] is result]
        names = ", ".join(gate["name"] for gate in gates) or "none"
        lines += _wrapped(f"{len(gates)}: {names}" if gates else names, f"  {RESULTS[result]:<{INDENT - 2}}")
    return "\n".join(lines)


def to_html(verdict: Mapping[str, Any], config: str) -> str:
    """A self-contained page: no script, nothing fetched."""
    source = resources.files("recover").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page: str = environment.from_string(source).render(
        verdict=verdict,
        headline=headline(verdict),
        sections=[section for section in sections(verdict) if section[1]],
        results=RESULTS,
        provenance=_provenance(verdict["provenance"]),
        config=config,
    )
    return page


def _defense(threat: Mapping[str, Any], fit: Mapping[str, Any]) -> Rows:
    skipped = threat["skip_first"]
    spared = f" but each prompt's first {f'{skipped} tokens' if skipped > 1 else 'token'}" if skipped else ""
    clamps = [
        f"{clamp['k']} features at {clamp['site']}, {EDITS[clamp['mode']].format(clamp['value'])}"
        f"{' where active' if clamp['only_active'] else ''}, at {clamp['positions']} positions{spared}"
        for clamp in threat["clamps"]
    ]
    described = (
        f"explained variance {_number(fit['explained_variance'])}, loss recovered {_number(fit['loss_recovered'])}, "
        f"{_number(fit['l0'])} features active on a token"
    )
    return [*(("clamp", clamp) for clamp in clamps), ("SAE fit", described)]


def _accounting(counts: Mapping[str, int]) -> Rows:
    return [
        ("without the clamp", f"{counts['base']} of {counts['n']} examples show the behavior"),
        ("with the clamp", f"{counts['defended']} of {counts['n']}"),
        ("valid flips", f"{counts['valid_flips']} show it without the clamp and not with it; all below is about these"),
    ]


def _search(threat: Mapping[str, Any], found: Mapping[str, Any]) -> Rows:
    if not found["searched"]:
        return [("not run", "there was nothing to search, or no use in searching")]
    low, high = found["wilson95"]
    allowed = (
        f"{threat['access']}, of norm at most {threat['budget']:g}, at the {threat['positions']} position, "
        f"{threat['placement'].replace('_', ' the ')}, {threat['constraint']}"
    )
    rate = f"({_share(found['rate'], 0)}; 95% interval {_share(low, 0)} to {_share(high, 0)})"
    return [
        ("allowed", allowed),
        ("brought back", f"{found['recovered']} of {found['searched']} {rate}, measured on the saved perturbations"),
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
    ]


def _provenance(provenance: Mapping[str, Any]) -> Rows:
    def plain(value: Any) -> str:
        return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)

    return [(name.replace("_", " "), plain(value)) for name, value in provenance.items()]


def _wrapped(text: str, label: str) -> list[str]:
    """Lines of `text` after `label`, aligned with where it begins."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False
    ) or [label]


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3g}"


def _share(value: float | None, digits: int) -> str:
    return "not defined" if value is None else f"{value:.{digits}%}"


def _tiny(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.1e}"
