"""How many features must be raised before a model refuses, and does raising more keep the answer from coming back?

For every number K of raised features, spread evenly over the layers of `refusal_smollm2.yaml`: select them, see which
requests turn into refusals (the valid flips are others for each K), search these pinned as `refusal.py` does, and
read what the model says. Beside it, how many replies the clamps leave degenerate, a measure of what else they break. A
point is kept in the folder as soon as it is there; a later start with the same settings goes on from it.

    python analyses/feature_count.py [DEFENSE.yaml] [--counts 1 2 4 8 12 20 30 40] [--out runs/feature_count]
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
from recover.protocol import flips_of, read_out, search_pinned
from recover.report import plot_rates, plot_style
from recover.run import Config, Points, Selection, Setting, build_bench, load_config, load_setting
from recover.tasks import degenerate

PUBLISHED = {
    5: (16, 17, 15), 10: (36, 36, 27), 15: (45, 45, 34), 20: (42, 45, 31),
    30: (58, 59, 28), 40: (61, 62, 23), 50: (64, 64, 20), 61: (64, 64, 8),
}  # fmt: skip
"""No refusal, valid, base-like by K (reference page; Gemma 2 2B, AdvBench)."""


def spread(config: Config, count: int) -> Config:
    """The configuration with `count` features, as many at each site as at any other or one more at the first ones."""
    sites = min(len(config.clamps), count)
    shares = [count // sites + (site < count % sites) for site in range(sites)]
    clamps = [
        clamp.model_copy(update={"features": Selection(select="contrast", top=share)})
        for clamp, share in zip(config.clamps, shares, strict=False)
    ]
    return config.model_copy(update={"clamps": tuple(clamps)})


def point(setting: Setting, count: int) -> dict[str, Any]:
    """A row of the table for one number of features."""
    bench = build_bench(replace(setting, config=spread(setting.config, count)))
    replies = [reply for batch in bench.batches for reply in batch.replies or ()]
    broken = {"count": count, "asked": len(replies), "degenerate": sum(map(degenerate, replies))}
    part = flips_of(bench)
    if part is None:
        return broken | {"n": 0, "non_refusal": 0, "base_like": 0, "strict": 0, "exact": 0}
    started = time.perf_counter()
    delta = search_pinned(bench, part)
    return broken | asdict(read_out(f"{count}", bench, part, delta, time.perf_counter() - started))


def line(found: Mapping[str, Any]) -> str:
    """One number of features."""
    hits, valid, alike = PUBLISHED.get(found["count"], (None, None, None))
    beside = "-" if hits is None else f"{hits}/{valid} ({alike})"
    drift = f"{found['relative_drift']:8.1e} {found['free_drift']:10.1e}" if found["n"] else f"{'-':>8} {'-':>10}"
    counts = f"{found['non_refusal']:11d} {found['base_like']:9d} {found['strict']:6d} {found['exact']:5d}"
    broken = f"{found['degenerate']:6d} of {found['asked']:<4d}"
    return f"{found['count']:4d} {found['n']:7d} {counts} {drift} {broken} {beside:>12}"


@plot_style()
def figure(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Left, how many requests flip and how many come back; right, the shares with Wilson intervals."""
    canvas, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    counts = [found["count"] for found in points]
    for name, words, style in (("n", "valid flips", "k--"), ("base_like", "brought back", "o-")):
        left.plot(counts, [found[name] for found in points], style, label=words)
    left.plot(counts, [found["degenerate"] for found in points], "x:", label="degenerate under the clamps")
    left.set(xlabel="features raised", ylabel="requests")
    some = [found for found in points if found["n"]]
    counts, n = [found["count"] for found in some], [found["n"] for found in some]
    for name, words, style in (("non_refusal", "no refusal", "o-"), ("base_like", "base-like", "s-")):
        plot_rates(right, counts, [found[name] for found in some], n, style, words)
    rates = [alike / valid for _, valid, alike in PUBLISHED.values()]
    right.plot(list(PUBLISHED), rates, "k--", label="published, base-like")
    right.set(xlabel="features raised", ylabel="share of valid flips", ylim=(-0.03, 1.03))
    for axes in (left, right):
        axes.legend(frameon=False)
    canvas.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", nargs="?", type=Path, default=Path(__file__).parent / "refusal_smollm2.yaml")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 12, 20, 30, 40])
    parser.add_argument("--n", type=int, help="ordinary requests (default: as the file has it)")
    parser.add_argument("--out", type=Path, default=Path("runs/feature_count"))
    options = parser.parse_args()
    try:
        if min(options.counts) < 1:
            raise rc.InputError(f"--counts: {min(options.counts)} features cannot be raised; give numbers from 1")
        config = load_config(options.defense, {"prompts.n": options.n})
        points = Points.open(options.out, config.relevant())
        setting = load_setting(config)
    except rc.InputError as error:
        sys.exit(f"feature_count: {error}")
    print(
        f"{'K':>4} {'flipped':>7} {'non-refusal':>11} {'base-like':>9} {'strict':>6} {'exact':>5} {'drift':>8} "
        f"{'free drift':>10} {'degenerate':>13} {'published':>12}",
        flush=True,
    )
    found = []
    for count in options.counts:
        found.append(points.get(f"features-{count}", lambda count=count: point(setting, count)))
        print(line(found[-1]), flush=True)
    figure(found, options.out / "feature_count.svg")
    print(f"figure: {options.out / 'feature_count.svg'}")


if __name__ == "__main__":
    main()
