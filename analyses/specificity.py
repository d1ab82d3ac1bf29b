"""Is a recovery specific to the behavior? The experiment that decides it, over budgets.

1. *Per example*: a perturbation for each valid flip, toward its own answer, and toward an unrelated one (placebo).
2. *Transfer*: one perturbation for all prompts, fitted on half of them and read on the others, with the answer the
   likeliest of all candidates as the predicate; against the same fit to shuffled answers, random directions of the same
   norm, and the clamp undone; under C1, and under C1+, where it must keep out of what the clamp writes as well.

    python analyses/specificity.py [DEFENSE.yaml] [--n 256] [--figure FILE] [--json FILE]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from matplotlib import pyplot as plt

from recover.protocol import (
    Bench,
    ExampleRecord,
    InMemoryStore,
    Transfer,
    certified_norm,
    curve,
    placebo_pairs,
    run_phases,
    run_transfer,
)
from recover.report import plot_style
from recover.run import build_bench, load_config, load_setting, shown

LINES = {
    "heldout_rate": ("held out, C1", "o-"),
    "write_orthogonal_heldout_rate": ("held out, C1+", "s-"),
    "shuffled_rate": ("shuffled targets", "x--"),
    "random_rate": ("random directions", "+:"),
    "undo_rate": ("clamp undone", "d:"),
}


def table(bench: Bench, records: list[ExampleRecord], shared: Transfer) -> str:
    """What was found, for people."""
    flips = [record for record in records if record.search is not None]
    pairs = placebo_pairs(records)
    assert pairs is not None
    lines = [f"per example: {len(flips)} valid flips", "     norm   own  placebo"]
    for point in curve(flips, [share * bench.budget for share in bench.plan.curve]):
        reached = [record.placebo.smallest <= point.budget for record in flips if record.placebo is not None]
        lines.append(f"  {point.budget:>7.4g}  {point.rate:>4.0%}  {sum(reached) / len(reached):>7.0%}")
    lines += [
        f"  the own answer is nearer on {pairs.smaller} of {pairs.n}, farther on {pairs.larger}; "
        f"median ratio of norms {pairs.median_ratio:.2f}, sign test p = {pairs.p:.2g}",
        "",
        f"transfer: {shared.n} flips by the strict predicate, mean residual norm {shared.residual_norm:.1f}",
        "     norm  share  train  held out     C1+  shuffled  random  undone | weak: held out  shuffled",
    ]
    for at in shared.curve:
        shares = (getattr(at, key) for key in ("heldout_rate", "write_orthogonal_heldout_rate", "shuffled_rate"))
        held, plus, shuffled = (f"{share:.1%}" for share in shares)
        weak = f"{at.weak_heldout_rate:>14.0%}  {at.weak_shuffled_rate:>8.0%}"
        lines.append(
            f"  {at.budget:>7.4g}  {at.relative_norm:>5.2f}  {at.train_rate:>5.0%}  {held:>8}  {plus:>6}  "
            f"{shuffled:>8}  {at.random_rate:>6.1%}  {at.undo_rate:>6.1%} | {weak}"
        )
    low, high = shared.wilson95
    return "\n".join(
        [
            *lines,
            f"  at the last norm, by certificate: {shared.hits} of {shared.n} held out (95% interval "
            f"{low:.1%} to {high:.1%}), C1+ {shared.write_orthogonal_heldout_rate:.1%}",
            f"  cosine with the clamp undone: {shared.undo_cosine:.3f} under C1, "
            f"{shared.write_orthogonal_undo_cosine:.1e} under C1+",
        ]
    )


@plot_style()
def figure(bench: Bench, records: list[ExampleRecord], shared: Transfer, path: Path) -> None:
    """Left, the share of examples within each norm, own answer and placebo; right, the transfer curve."""
    canvas, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    flips = [record for record in records if record.placebo is not None]
    own = [certified_norm(record) for record in flips]
    unrelated = [record.placebo.smallest for record in flips if record.placebo is not None]
    for norms, name in ((own, "own answer"), (unrelated, "unrelated answer")):
        reached = sorted(norm for norm in norms if math.isfinite(norm))
        left.step(reached, [(i + 1) / len(norms) for i in range(len(reached))], where="post", label=name)
    left.set(xlabel="norm of the perturbation", ylabel="share of examples", title="One perturbation an example")
    for key, (name, style) in LINES.items():
        points = shared.curve
        right.plot([p.budget for p in points], [getattr(p, key) for p in points], style, label=name)
    right.set(xlabel="norm of the perturbation", title="One perturbation for all, unseen prompts", ylim=(-0.03, 1.03))
    for axes in (left, right):
        axes.legend(frameon=False)
    canvas.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", nargs="?", type=Path, default=Path(__file__).parent / "ioi_smollm2.yaml")
    parser.add_argument("--n", type=int, default=256, help="prompts (default: 256)")
    parser.add_argument("--figure", type=Path, default=Path("specificity.svg"), help="where to save the figure")
    parser.add_argument("--json", type=Path, help="where to save the figures behind it")
    options = parser.parse_args()
    # Random directions are another question, and the slowest part.
    config = load_config(options.defense, {"prompts.n": options.n, "controls.random_draws": 100})
    bench, store = build_bench(load_setting(config)), InMemoryStore()
    with shown() as progress:
        records = run_phases(bench, ("search", "certificates", "placebo"), store, progress)
        shared = run_transfer(bench, store, progress)
    print(table(bench, records, shared))
    figure(bench, records, shared, options.figure)
    if options.json is not None:
        options.json.write_text(shared.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print(f"figure: {options.figure}")


if __name__ == "__main__":
    main()
