"""Which heads and MLPs carry a recovery? Those above the clamped site, ranked, put back and put in; and name movers.

Of a finished run of `recover check`, for the deltas of its valid flips and for its shared deltas, where it has them:

1. *Paths* (`carried`): the heads and MLPs above the site through which most of the effect goes; put back to what they
   gave when defended, does the recovery go, and put in alone, does it come? Beside as many drawn at random.
2. *Name movers* (`name_movers`), where the behavior has a target that its prompt holds: are heads that look at it and
   write it back? Every unit is kept in OUT as soon as it is there; a later start with the same settings goes on.

    python analyses/paths.py RUN [--out runs/paths] [--points 8] [--stretch 1]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt

import recover as rc
from recover.evidence.attribution import POINTS, carried, name_movers
from recover.protocol import Bench
from recover.report import plot_style
from recover.run import Points

STATES = ("base", "defended", "recovered")


def look(bench: Bench, part: rc.Examples, delta: torch.Tensor, points: int) -> dict[str, Any]:
    """What carries these deltas; where the behavior has a target, its name movers."""
    movers = name_movers(bench.defended(replace(part, behavior=part.strict or part.behavior)), delta)
    paths = carried(bench.defended(part), delta, points, bench.plan.seed)
    return {"paths": asdict(paths), "movers": None if movers is None else asdict(movers)}


def path_lines(found: Mapping[str, Any]) -> list[str]:
    """Top components, what doing says of the first so many, and direct effects; all shares of the effect."""
    lines = [f"  {'':9} {'through':>8} {'plain':>8} {'put back':>9} {'put in':>7}"]
    for one in found["top"]:
        figures = f"{one['integrated']:8.1%} {one['plain']:8.1%} {one['gone']:9.1%} {one['come']:7.1%}"
        lines.append(f"  {one['name']:9} {figures}")
    lines.append(f"  {'top':>9} {'put back: gone':>15}   random  show  put in: come   random  show")
    for point in found["doing"]:
        chance = [f"{point[key]:8.1%}" if key in point else f"{'-':>8}" for key in ("random_gone", "random_come")]
        gone = f"{point['size']:9d} {point['gone']:15.1%} {chance[0]} {point['still_shows']:5.0%}"
        lines.append(f"  {gone} {point['come']:13.1%} {chance[1]} {point['shows']:5.0%}")
    largest = sorted(found["direct"].items(), key=lambda one: -abs(one[1]))[:6]
    straight = ", ".join(f"{name} {share:.1%}" for name, share in largest)
    itself = f"the delta itself {found['direct']['delta']:.1%}; all {sum(found['direct'].values()):.2%}"
    return [*lines, f"  written directly: {straight}; {itself}"]


def mover_lines(found: Mapping[str, Any]) -> list[str]:
    """Name movers at base, defended and recovered: how much of their attention, and what they write."""
    heads = ("look: base", *STATES[1:], "write: base", *STATES[1:])
    lines = [f"  {'':9} {' '.join(f'{head:>12}' for head in heads)}"]
    for head, at in list(found["heads"].items())[:8]:
        figures = " ".join(f"{at[state][key]:12.2f}" for key in ("look", "write") for state in STATES)
        lines.append(f"  {head:9} {figures}")
    told = ", ".join(f"{found['written'][state]:.2f} {state}" for state in STATES)
    back = "" if found["re_engaged"] is None else f": {found['re_engaged']:.0%} of what the clamp took is back"
    return [*lines, f"  all {len(found['heads'])} such heads write {told}{back}"]


@plot_style()
def figure(groups: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """How much goes and comes with the top components."""
    canvas, axes = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    for (name, group), mark in zip(groups.items(), "os", strict=False):
        doing = group["paths"]["doing"]
        for key, word, line in (("gone", "put back: gone", "-"), ("come", "put in: come", "--")):
            points = zip(*((p["size"], p[key]) for p in doing), strict=True)
            axes.plot(*points, f"{mark}{line}", label=f"{name}, {word}", markersize=4)
    axes.set(xscale="log", xlabel="top heads and MLPs", ylabel="share of the effect", title="Components above the site")
    axes.legend(frameon=False)
    canvas.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--out", type=Path, default=Path("runs/paths"))
    parser.add_argument("--points", type=int, default=POINTS, help=f"of the integral along a delta ({POINTS})")
    parser.add_argument("--stretch", type=float, default=1.0, help="make each delta so many times as long")
    parser.add_argument("--flips", type=int, help="valid flips that are looked at (default: all)")
    options = parser.parse_args()
    try:
        run = rc.load_run(options.run)
        settings = {name: getattr(options, name) for name in ("points", "flips", "stretch")} | {"run": run.sha256}
        points, bench = Points.open(options.out, settings), run.bench
        if bench.surface.every and options.stretch != 1:
            raise rc.InputError("--stretch: a pinned delta that is made longer is not pinned; leave it out")
        own = enumerate(run.batches(options.flips))
        asked = {f"own-{number}": (part, options.stretch * delta) for number, (part, delta) in own}
        asked |= {f"shared-fold-{one.fold}-{one.norm:.3g}": (one.examples, one.delta) for one in run.shared}
        found = {}
        for name, (part, delta) in asked.items():
            found[name] = one = points.get(name, partial(look, bench, part, delta, options.points))
            paths, movers = one["paths"], one["movers"]
            told = f"{paths['n']} examples, {paths['shows']:.0%} show; effect {paths['effect']:.2f}"
            print("", f"paths, {name}: {told}", *path_lines(paths), sep="\n", flush=True)
            if movers is not None:
                print(f"\nheads that look at the target and write it, {name}", *mover_lines(movers), sep="\n")
    except rc.InputError as error:
        sys.exit(f"paths: {error}")
    (options.out / "paths.json").write_text(json.dumps(found, indent=1) + "\n")
    own, shared = ([name for name in found if name.startswith(kind)][:1] for kind in ("own", "shared"))
    figure({name.split("-")[0]: found[name] for name in own + shared}, options.out / "paths.svg")
    print(f"figures: {options.out / 'paths.json'}, {options.out / 'paths.svg'}")


if __name__ == "__main__":
    main()
