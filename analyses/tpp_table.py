"""Does holding the ablated features cost recovery? Tables and figure of a folder that `tpp.py` made.

1. *Table*, one a budget: the classes' recovery with the clamped features free (unconstrained) and held (C1), with none
   of them reactivated, the share reactivated, drift; averages over classes, and the published ones.
2. *Figure*: recovery against reactivation, one arrow a class from unconstrained to constrained, at the budget of the
   configuration. Published averages are `published.rows` of the configuration (else those of
   `published/tpp_gemma2.yaml`).

    python analyses/tpp_table.py runs/tpp [DEFENSE.yaml]
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

import recover as rc
from recover.numerics import wilson
from recover.report import columns, plot_style
from recover.run import load_config

HERE, WAYS = Path(__file__).parent, ("unconstrained", "constrained")
BESIDE = HERE / "published" / "tpp_gemma2.yaml"
FORMS = {"recovered": ".3f", "clean": ".3f", "reactivated": ".4f", "drift": ".1e"}
HEADS = [
    ("", "", "", "drop of probes", "", "recovered", "", "", "none react.", "", "react.", "", "drift", "", "held", ""),
    ("", "probe", "flips", "own", "others", "free", "held", "95%", *3 * ("free", "held"), "norm", "share"),
]  # fmt: skip
Rows, Points = Mapping[str, Mapping[str, float]], Sequence[Mapping[str, Any]]


def cells(rows: Rows, interval: str = "") -> list[str]:
    """The columns of recovery, both ways side by side."""
    told = [format(rows[way][name], form) for name, form in FORMS.items() for way in WAYS]
    held = rows["constrained"]
    size = [f"{held['norm']:.1f}", f"{held['share']:.1%}"] if "norm" in held else ["", ""]
    return [*told[:2], interval, *told[2:], *size]


def averaged(points: Points, budget: str) -> Rows:
    """Means over the classes that have a valid flip."""
    rows = [point["budgets"][budget] for point in points if point["flips"]]
    return {way: {name: fmean(row[way][name] for row in rows) for name in (*FORMS, "norm", "share")} for way in WAYS}


def table(
    scores: Mapping[str, Any], points: Sequence[Mapping[str, Any]], budget: str, top: int, published: Rows
) -> str:
    """The table of one budget."""
    drops, lines = scores["scores"][str(top)], list(HEADS)
    for number, (label, point) in enumerate(zip(scores["labels"], points, strict=True)):
        own, others = (f"{drops[kind][number]:.3f}" for kind in ("intended", "unintended"))
        head = [label[:9], f"{scores['accuracy'][number]:.1%}", f"{point['flips']}/{point['base']}", own, others]
        if not point["flips"]:
            lines.append([*head, "no valid flip", *10 * [""]])
            continue
        rows = point["budgets"][budget]
        low, high = wilson(round(rows["constrained"]["recovered"] * point["flips"]), point["flips"])
        lines.append([*head, *cells(rows, f"{low:.0%} to {high:.0%}")])
    means = [f"{fmean(drops[kind]):.3f}" for kind in ("intended", "unintended")]
    lines.append(["average", "", "", *means, *cells(averaged(points, budget))])
    lines.append(["published", *4 * [""], *cells(published)])
    right, known = (fmean(scores[name]) for name in ("accuracy", "train_accuracy"))
    return (
        f"budget {budget}: {top} features of each class ablated; probes right on {right:.1%} of unseen texts "
        f"({known:.1%} of those to train with); free: unconstrained, held: under C1\n{columns(*lines)}"
    )


@plot_style()
def figure(
    labels: Sequence[str], points: Sequence[Mapping[str, Any]], budget: str, path: Path, published: Rows
) -> None:
    """Recovery against reactivation, all of it and without reactivation: an arrow a class."""
    canvas, panels = plt.subplots(1, 2, figsize=(8.6, 3.6), layout="constrained", sharex=True, sharey=True)
    classes = [(f"C{at}", label, point["budgets"][budget]) for at, (label, point) in
               enumerate(zip(labels, points, strict=True)) if point["flips"]]  # fmt: skip
    for axes, name, words in zip(panels, FORMS, ("recovery", "recovery, none reactivated"), strict=False):
        for color, label, rows in [*classes, ("black", "published mean", published)]:
            start, end = ((rows[way]["reactivated"], rows[way][name]) for way in WAYS)
            axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": color, "alpha": 0.6})
            axes.plot(*start, "o", color=color, mfc="none")
            axes.plot(*end, "o", color=color, label=label)
        axes.set(xlabel="share of clamped features reactivated", ylabel=words, ylim=(-0.03, 1.05))
    panels[1].legend(frameon=False, fontsize=8)
    canvas.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what tpp.py wrote")
    parser.add_argument("defense", nargs="?", type=Path, default=HERE / "tpp_smollm2.yaml")
    options = parser.parse_args()
    try:
        config = load_config(options.defense)
        published = (config.published and config.published.rows) or load_config(BESIDE).published.rows
        if any(set(FORMS) - set(published.get(way, ())) for way in WAYS):
            needs = f"must have {' and '.join(WAYS)}, each with {', '.join(FORMS)}"
            raise rc.InputError(f"{options.defense}: published.rows: {needs}")
        settings, scores = (json.loads((options.folder / f"{name}.json").read_text()) for name in ("settings", "score"))
        names = [f"target-{label}.json" for label in scores["labels"]]
        points = [json.loads((options.folder / name).read_text()) for name in names]
    except (rc.InputError, OSError) as error:
        sys.exit(f"tpp_table: {error}")
    for budget in settings["budgets"]:
        print(table(scores, points, f"{budget:g}", config.clamps[0].features.top, published), end="\n\n")
    path = options.folder / "tpp.svg"
    figure(scores["labels"], points, f"{config.search.budget:g}", path, published)
    print(f"figure: {path}, at budget {config.search.budget:g}")


if __name__ == "__main__":
    main()
