"""The tables and the figure of `attribution.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from recover.evidence.attribution.parts import VIEWS

WORDS = {
    "full": "full delta",
    "error": "SAE error part",
    "error_linear": "  linear in the residual",
    "error_rest": "  the rest of it",
    "free": "non-clamped features",
    "top_k": "  the top k of these",
    "other": "  the rest of these",
    "clamped": "clamped features",
}
PUBLISHED = {"full": (23, 16), "error": (23, 14), "free": (2, 1), "top_k": (1, 0), "clamped": (0, 0)}
PUBLISHED_WITHOUT = {"top_k": (21, 14)}
"""No refusal and base-like of 24 (reference page; Gemma 2 2B, AdvBench), with a part alone and without it."""
STATES = ("base", "defended", "recovered")
Rows = Sequence[Mapping[str, Any]]


def part_rows(rows: Rows) -> dict[str, dict[str, Any]]:
    """For each part: counts and means over examples, effects as shares of the whole's."""
    n, effect = len(rows), sum(row["recovered"] - row["defended"] for row in rows)
    first, along = (sum(row["views"]["full"][key] for row in rows) for key in ("first_order", "integrated"))
    table = {}
    for name in VIEWS:
        views = [row["views"][name] for row in rows]
        alone = sum(view["replay_score"] - row["defended"] for view, row in zip(views, rows, strict=True))
        table[name] = one = {
            "n": n,
            "norm": fmean(view["norm"] for view in views),
            "first_order": sum(view["first_order"] for view in views) / first,
            "integrated": sum(view["integrated"] for view in views) / along,
            "effect": alone / effect,
            "replay": sum(view["replay_slack"] > 0 for view in views),
            "knockout": sum(view["knockout_slack"] > 0 for view in views),
        }
        if "certificate" in views[0]:
            one["certified"] = sum(view["certificate"]["shows"] for view in views)
            one["held"] = sum(view["certificate"]["held"] for view in views)
            one["preactivation_shift"] = max(view["certificate"]["preactivation_shift"] for view in views)
        for word in ("replay", "knockout"):
            if f"{word}_said" in views[0]:
                for key in ("non_refusal", "base_like"):
                    one[f"{word}_{key}"] = sum(view[f"{word}_said"][key] for view in views)
    table["full"] |= {"gap": 1 - first / effect, "integrated_gap": 1 - along / effect}
    return table


def part_lines(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of replay and knockout; effects are shares of the whole delta's, `alone` of a part's own replay."""
    spoke = "replay_base_like" in table["full"]
    lines = [
        f"{'':26} {'norm':>6} {'1st order':>9} {'integr.':>8} {'alone':>7} {'replay':>7} {'without':>7} {'pre-act.':>8}"
        + (f" {'said: alone':>12} {'without':>9} {'published of 24':>24}" if spoke else "")
    ]
    for name, row in table.items():
        shift = f"{row['preactivation_shift']:8.1e}" if "preactivation_shift" in row else f"{'-':>8}"
        line = (
            f"{WORDS[name]:26} {row['norm']:6.2f} {row['first_order']:9.1%} {row['integrated']:8.1%} "
            f"{row['effect']:7.1%} {row['replay']:4d}/{row['n']:<2d} {row['knockout']:4d}/{row['n']:<2d} {shift}"
        )
        if spoke:
            told = [f"{row[f'{word}_non_refusal']} ({row[f'{word}_base_like']})" for word in ("replay", "knockout")]
            line += f" {told[0]:>12} {told[1]:>9} {_published(name):>24}"
        lines.append(line)
    full = table["full"]
    first = f"the gradient at the defended state misses {full['gap']:.1%} of the effect"
    return [*lines, f"{first}; averaged along the delta {full['integrated_gap']:.2%}"]


def _published(name: str) -> str:
    alone, without = PUBLISHED.get(name), PUBLISHED_WITHOUT.get(name)
    told = [f"{one[0]} ({one[1]}){word}" for one, word in ((alone, ""), (without, " without")) if one is not None]
    return ", ".join(told) or "-"


def path_lines(found: Mapping[str, Any]) -> list[str]:
    """Top components, what doing says of the first so many, and direct effects; all shares of the effect."""
    lines = [f"  {'':9} {'through':>8} {'plain':>8} {'put back':>9} {'put in':>7}"]
    for one in found["top"]:
        figures = f"{one['integrated']:8.1%} {one['plain']:8.1%} {one['gone']:9.1%} {one['come']:7.1%}"
        lines.append(f"  {one['name']:9} {figures}")
    heads = f"{'put back: gone':>15} {'random':>8} {'show':>5} {'put in: come':>13} {'random':>8} {'show':>5}"
    lines.append(f"  {'top':>9} {heads}")
    for point in found["doing"]:
        chance = [f"{point[key]:8.1%}" if key in point else f"{'-':>8}" for key in ("random_gone", "random_come")]
        lines.append(
            f"  {point['size']:9d} {point['gone']:15.1%} {chance[0]} {point['still_shows']:5.0%} "
            f"{point['come']:13.1%} {chance[1]} {point['shows']:5.0%}"
        )
    largest = sorted(found["direct"].items(), key=lambda one: -abs(one[1]))[:6]
    straight = ", ".join(f"{name} {share:.1%}" for name, share in largest)
    itself = f"the delta itself {found['direct']['delta']:.1%}"
    return [*lines, f"  written directly: {straight}; {itself}; all {sum(found['direct'].values()):.2%}"]


def mover_lines(found: Mapping[str, Any]) -> list[str]:
    """Name movers at base, defended and recovered: how much of their attention, and what they write."""
    heads = " ".join(
        f"{f'{word}: {state}' if state == 'base' else state:>12}" for word in ("look", "write") for state in STATES
    )
    lines = [f"  {'':9} {heads}"]
    for head, at in list(found["heads"].items())[:8]:
        figures = " ".join(f"{at[state][key]:12.2f}" for key in ("look", "write") for state in STATES)
        lines.append(f"  {head:9} {figures}")
    total, back = found["written"], found["re_engaged"]
    told = ", ".join(f"{total[state]:.2f} {state}" for state in STATES)
    share = "" if back is None else f": {back:.0%} of what the clamp took is back"
    return [*lines, f"  all {len(found['heads'])} such heads write {told}{share}"]


def figure(found: Mapping[str, Any], path: Path) -> None:
    """Left, what each part does; right, how much goes and comes with the top components."""
    mpl.rcParams.update({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})
    canvas, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    table = found["own"]["table"]
    places = list(range(len(table)))[::-1]
    for shift, key, word in ((0.2, "integrated", "integrated effect"), (-0.2, "effect", "replayed alone")):
        left.barh([place + shift for place in places], [row[key] for row in table.values()], 0.4, label=word)
    left.set_yticks(places, [WORDS[name].strip() for name in table])
    left.set(xlabel="share of the delta's effect", title="Parts of the delta")
    groups = {"own": found["own"], **dict(list(found["shared"].items())[:1])}
    for (name, group), mark in zip(groups.items(), "os", strict=False):
        doing = next(iter(group["carriers"].values()))["paths"]["doing"]
        for key, word, line in (("gone", "put back: gone", "-"), ("come", "put in: come", "--")):
            label = f"{'own' if name == 'own' else 'shared'}, {word}"
            right.plot([p["size"] for p in doing], [p[key] for p in doing], f"{mark}{line}", label=label, markersize=4)
    right.set(
        xscale="log", xlabel="top heads and MLPs", ylabel="share of the effect", title="Components above the site"
    )
    for axes in (left, right):
        axes.legend(frameon=False)
    canvas.savefig(path)
    plt.close(canvas)
