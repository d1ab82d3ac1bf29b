"""Where does a recovery travel? The parts of its perturbations, replayed and knocked out.

Of a finished run of `recover check` (or of a DEFENSE.yaml, which is then checked first, in the folder OUT-run):

1. *Parts* (`attribute`) of the delta of each valid flip: in the features that are clamped, in others, in what the SAE
   does not reconstruct. Each is replayed alone under the live clamps, by certificate, and knocked out; where the
   behavior is a whole answer, what the model then says is read as well, as published.
2. *Effects* to first order, and integrated along the delta: of the parts, which add up.
3. *Shared deltas*, where the run has them: the parts of each, on the half that it was not fitted to.

A delta of `recover check` ends at the edge, so that no part of it can be enough alone; `--stretch 3` looks at one that
is three times as long. Every unit is kept in OUT as soon as it is there; a later start with the same settings goes on.
`attribution_tables.py OUT` prints the tables and draws the figure; `paths.py` does heads and MLPs.

    python analyses/attribution.py RUN_OR_YAML [--out runs/attribution] [--top-k 16] [--points 8] [--stretch 1]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import recover as rc
from recover.evidence.attribution import POINTS, TOP_K, LinearError, attribute, entering, fit_linear_errors
from recover.protocol import Bench, certificate_of, read_replies
from recover.run import Points, load_config
from recover.tasks import NEUTRAL

Linear = Mapping[rc.Site, LinearError]


def rows_of(
    bench: Bench, linear: Callable[[], Linear], options: Any, part: rc.Examples, delta: torch.Tensor, replay: bool
) -> dict[str, Any]:
    """For each example the scores without its delta and with it, and all facts of each part."""
    delta = delta.to(torch.promote_types(bench.exact.dtype, torch.float32))
    defended, delta = entering(bench.defended(part, bench.exact), delta)
    found = attribute(defended, delta, linear(), top_k=options.top_k, points=options.points)
    rows = []
    for row, (start, end) in enumerate(zip(found.defended.tolist(), found.recovered.tolist(), strict=True)):
        views = {n: {k: float(v[row]) for k, v in vars(view).items()} for n, view in found.views.items()}
        rows.append({"defended": start, "recovered": end, "views": views})
    for view, alone in found.deltas.items() if replay else ():
        facts = certificate_of(bench, part, alone)
        shift = facts.preactivation_shift.amax(dim=1)
        values = {"score": facts.score, "shows": facts.shows, "held": facts.held, "preactivation_shift": shift}
        known = {"certificate": [{n: v[row].item() for n, v in values.items()} for row in range(len(delta))]}
        if part.dialogue is not None:
            for name, one in (("replay_said", alone), ("knockout_said", found.deltas["full"] - alone)):
                reads = read_replies(bench, part, one.float())
                known[name] = [{"non_refusal": read.non_refusal, "base_like": read.base_like} for read in reads]
        for name, each in known.items():
            for row, one in zip(rows, each, strict=True):
                row["views"][view][name] = one
    return {"rows": rows}


def main() -> None:
    """Look at the parts; keep what is found in OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder of a finished run, or a DEFENSE.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/attribution"))
    parser.add_argument("--top-k", type=int, default=TOP_K, help=f"features that count as the largest ({TOP_K})")
    parser.add_argument("--points", type=int, default=POINTS, help=f"of the integral along a delta ({POINTS})")
    parser.add_argument("--stretch", type=float, default=1.0, help="make each delta so many times as long")
    parser.add_argument("--flips", type=int, help="valid flips that are looked at (default: all)")
    options = parser.parse_args()
    folder, own, shared = options.source, [], {}
    try:
        if min(options.top_k, options.points, options.flips or 1) < 1:
            raise rc.InputError("--top-k, --points, --flips: must be at least 1")
        if not folder.is_dir():
            folder = options.out.with_name(f"{options.out.name}-run")
            rc.run_check(load_config(options.source), folder)
        run = rc.load_run(folder)
        names = ("top_k", "points", "flips", "stretch")
        settings = {name: getattr(options, name) for name in names} | {"run": run.sha256}
        points, bench = Points.open(options.out, settings), run.bench
        if bench.surface.every and options.stretch != 1:
            raise rc.InputError("--stretch: a pinned delta that is made longer is not pinned; leave it out")
        exact, defense, sites = bench.exact, bench.defense, bench.surface.enters(bench.defense.sites)
        neutral = exact.tokenize(NEUTRAL)
        linear = cache(lambda: fit_linear_errors(exact, defense, neutral, sites, bench.batch_size, bench.plan.seed))
        r2 = points.get("linear", lambda: {site.hook_name: one.r2 for site, one in linear().items()})
        look = partial(rows_of, bench, linear, options)
        for number, (part, delta) in enumerate(run.batches(options.flips)):
            own += points.get(f"own-{number}", partial(look, part, options.stretch * delta, True))["rows"]
        for one in run.shared:
            unit = points.get(f"shared-{one.fold}", partial(look, one.examples, one.delta, False))
            shared[f"fold {one.fold}, norm {one.norm:.3g}"] = unit["rows"]
    except rc.InputError as error:
        sys.exit(f"attribution: {error}")
    saved = [record.certificate.score for record in run.flips.values()] if options.stretch == 1 else []
    replayed = [row["views"]["full"]["certificate"]["score"] for row in own]
    sanity = max((abs(one - other) for one, other in zip(saved, replayed, strict=False)), default=None)
    found = {"own": own, "shared": shared, "linear": r2, "sanity": sanity}
    (options.out / "attribution.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{len(own)} valid flips, {len(shared)} shared deltas: {options.out / 'attribution.json'}")


if __name__ == "__main__":
    main()
