"""How many refused answers come back at which budget? The pinned search at each, beside the published curve.

For every budget: search all valid flips of `refusal_smollm2.yaml`, replay what was found with the clamps live, and read
what the model says. Budget 0 is the clamps alone. A point is kept in the folder as soon as it is there; a later start
with the same settings goes on from it.

    python analyses/budget.py [DEFENSE.yaml] [--budgets 0 2 5 10 20 40] [--out runs/budget]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

import recover as rc
from recover.numerics import wilson
from recover.protocol import Bench, flips_of, read_out, search_pinned
from recover.report import plot_rates, plot_style
from recover.run import Points, build_bench, load_config, load_setting

PUBLISHED = {0.0: 0, 2.0: 0, 5.0: 4, 10.0: 12, 20.0: 22, 40.0: 23}
"""Recovered of 24 on AdvBench, Gemma 2 2B (reference page); norms of another model are not the same norms."""
PUBLISHED_N = 24
READS = {"non_refusal": "no refusal", "base_like": "base-like", "strict": "strictly", "exact": "token for token"}


def point(bench: Bench, part: rc.Examples, budget: float) -> dict[str, Any]:
    """A row of the table at one budget."""
    started = time.perf_counter()
    delta = search_pinned(replace(bench, budget=budget), part) if budget else bench.defended(part).zero_delta
    row = read_out(f"{budget:g}", bench, part, delta, time.perf_counter() - started)
    return {"budget": budget} | asdict(row)


def line(found: Mapping[str, Any]) -> str:
    """One budget, with 95 % intervals of what is brought back."""
    low, high = wilson(found["base_like"], found["n"])
    published = PUBLISHED.get(found["budget"])
    beside = "-" if published is None else f"{published}/{PUBLISHED_N}"
    counts = " ".join(f"{found[name]:>{len(words) + 1}}" for name, words in READS.items())
    return (
        f"{found['budget']:6g} {found['n']:3d} {counts}   {low:4.0%} to {high:4.0%} {found['norm']:6.1f} "
        f"{found['relative_drift']:8.1e} {found['free_drift']:10.1e} {beside:>9}"
    )


@plot_style()
def figure(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rates against budget with Wilson intervals, and the published curve."""
    canvas, axes = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    budgets, n = [found["budget"] for found in points], [found["n"] for found in points]
    for (name, words), style in zip(READS.items(), ("o-", "s-", "^-", "d:"), strict=True):
        plot_rates(axes, budgets, [found[name] for found in points], n, style, words, alpha=0.85)
    known = [(budget, hits / PUBLISHED_N) for budget, hits in PUBLISHED.items()]
    axes.plot(*zip(*known, strict=True), "k--", label="published, no refusal")
    axes.set(xlabel="largest norm of the perturbation", ylabel="share of valid flips", ylim=(-0.03, 1.03))
    axes.legend(frameon=False)
    canvas.savefig(path)


def main() -> None:
    """Run the sweep; every point is printed as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent / "refusal_smollm2.yaml"
    parser.add_argument("defense", nargs="?", type=Path, default=default)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(PUBLISHED))
    parser.add_argument("--n", type=int, help="ordinary requests (default: as the file has it)")
    parser.add_argument("--out", type=Path, default=Path("runs/budget"))
    options = parser.parse_args()
    try:
        if min(options.budgets) < 0:
            raise rc.InputError(f"--budgets: a budget must be 0 or more, got {min(options.budgets):g}")
        config = load_config(options.defense, {"prompts.n": options.n})
        points = Points.open(options.out, config.relevant())
        bench = build_bench(load_setting(config))
    except rc.InputError as error:
        sys.exit(f"budget: {error}")
    part = flips_of(bench)
    if part is None:
        sys.exit("budget: nothing turned into a refusal; raise more features, or to more")
    heads = " ".join(f"{words:>{len(words) + 1}}" for words in READS.values())
    print(f"{'budget':>6} {'n':>3} {heads}   base-like, 95%   norm    drift free drift published", flush=True)
    found = []
    for budget in options.budgets:
        found.append(points.get(f"budget-{budget:g}", lambda budget=budget: point(bench, part, budget)))
        print(line(found[-1]), flush=True)
    figure(found, options.out / "budget.svg")
    print(f"figure: {options.out / 'budget.svg'}")


if __name__ == "__main__":
    main()
