"""How much does each part of a recovery's perturbations do? Tables and figure of a folder that `attribution.py` made.

python analyses/attribution_tables.py runs/attribution
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import pyplot as plt

from recover.evidence.attribution import VIEWS
from recover.report import plot_style

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
PUBLISHED = {
    "full": "23 (16)", "error": "23 (14)", "free": "2 (1)", "top_k": "1 (0), 21 (14) without", "clamped": "0 (0)"
}  # fmt: skip
"""No refusal and base-like of 24 (reference page; Gemma 2 2B, AdvBench), with a part alone and without it."""


def part_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
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
            **{word: sum(view[f"{word}_slack"] > 0 for view in views) for word in ("replay", "knockout")},
        }
        if "certificate" in views[0]:
            facts = [view["certificate"] for view in views]
            one |= {"certified": sum(f["shows"] for f in facts), "held": sum(f["held"] for f in facts)}
            one["preactivation_shift"] = max(f["preactivation_shift"] for f in facts)
        said = [(word, key) for word in ("replay", "knockout") for key in ("non_refusal", "base_like")]
        for word, key in said if "replay_said" in views[0] else ():
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
            line += f" {told[0]:>12} {told[1]:>9} {PUBLISHED.get(name, '-'):>24}"
        lines.append(line)
    full = table["full"]
    gap = f"the gradient at the defended state misses {full['gap']:.1%} of the effect"
    return [*lines, f"{gap}; averaged along the delta {full['integrated_gap']:.2%}"]


@plot_style()
def figure(table: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """What each part does."""
    canvas, axes = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    places = list(range(len(table)))[::-1]
    for shift, key, word in ((0.2, "integrated", "integrated effect"), (-0.2, "effect", "replayed alone")):
        axes.barh([place + shift for place in places], [row[key] for row in table.values()], 0.4, label=word)
    axes.set_yticks(places, [WORDS[name].strip() for name in table])
    axes.set(xlabel="share of the delta's effect", title="Parts of the delta")
    axes.legend(frameon=False)
    canvas.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what attribution.py wrote")
    folder = parser.parse_args().folder
    if not (folder / "attribution.json").is_file():
        sys.exit(f"attribution_tables: {folder}: attribution.json is not there; run attribution.py first")
    found = json.loads((folder / "attribution.json").read_text())
    own = part_rows(found["own"])
    print(f"parts of own deltas: {len(found['own'])} valid flips", *part_lines(own), sep="\n")
    for site, r2 in found["linear"].items():
        print(f"linear map at {site}: {r2:.1%} of the error's variance on tokens left out")
    if found["sanity"] is not None:
        print(f"sanity: the full delta's replay is within {found['sanity']:.1e} of the score that the run saved")
    for name, rows in found["shared"].items():
        print(f"\nparts of the shared delta of {name}: {len(rows)} unseen flips")
        print(*part_lines(part_rows(rows)), sep="\n")
    figure(own, folder / "attribution.svg")
    print(f"figure: {folder / 'attribution.svg'}")


if __name__ == "__main__":
    main()
