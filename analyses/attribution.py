"""Where does a recovery travel? Its parts replayed and knocked out, and the heads and MLPs that carry it.

Of a finished run of `recover check` (or of a DEFENSE.yaml, which is then checked first, in the folder OUT-run):

1. *Parts* (`recover.attribution`) of the delta of each valid flip: in the features that are clamped, in others, in what
   the SAE does not reconstruct. Each is replayed alone under the live clamps, by certificate, and knocked out; where
   the behavior is a whole answer, what the model then says is read as well, as published.
2. *Effects* to first order, and integrated along the delta: of the parts, which add up.
3. *Shared deltas*, where the run has them: the same, on the half that each was not fitted to, by the stricter
   predicate.
4. *Paths* (`paths`): the heads and MLPs above the site through which most goes; put back to what they gave when
   defended, does the recovery go, and put in alone, does it come? Beside as many drawn at random.
5. *Name movers* (`movers`), where the behavior has a target that its prompt holds: are heads that look at it
   and write it back?

A delta of `recover check` ends at the edge, so that no part of it can be enough alone; `--stretch 3` looks at one that
is three times as long. Every unit is kept in OUT as soon as it is there; a later start with the same settings goes on.

    python analyses/attribution.py RUN_OR_YAML [--out runs/attribution] [--top-k 16] [--points 8] [--stretch 1]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from attribution_tables import figure, mover_lines, part_lines, part_rows, path_lines
from einops import repeat
from finished import Run, digest, open_run
from points import Points

from recover import run_check
from recover.defenses.defended import Defended
from recover.evidence import certificate
from recover.evidence.attribution.movers import looks, undefended, writes
from recover.evidence.attribution.parts import POINTS, TOP_K, VIEWS, attribute, entering, parts_of
from recover.evidence.attribution.paths import Carrier, carriers, direct, patched, through, trace
from recover.models.generation import texts
from recover.protocol.folder import write_whole
from recover.protocol.heldout import C1
from recover.protocol.heldout import split as halves_of
from recover.protocol.records import without_nan
from recover.run.config import load_config
from recover.tasks import replies as refusal
from recover.tasks.behaviors import Targeted
from recover.tasks.examples import Examples
from recover.types import Delta, InputError, Mask

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""How many of the top components are put back and put in together."""
DRAWS = 4
TOP = 12
LOOKS = 0.2
"""Attention at base above which a head that writes the target counts as a name mover."""


def effects(run: Run, part: Examples, delta: Delta) -> dict[str, Any]:
    """For each example the scores without its delta and with it, and all facts of each part."""
    defended, moved = run.exactly(part, delta)
    found = attribute(defended, moved, run.linear, top_k=run.top_k, points=run.n_points)
    return {
        "rows": [
            {
                "defended": float(found.defended[row]),
                "recovered": float(found.recovered[row]),
                "views": {n: {k: float(v[row]) for k, v in vars(view).items()} for n, view in found.views.items()},
            }
            for row in range(len(delta))
        ]
    }


def replay(run: Run, part: Examples, delta: Delta) -> dict[str, Any]:
    """What the certificate says of one part alone."""
    bench = run.bench
    facts = certificate(bench.exact, bench.defense, part.prompts, part.behavior, delta, bench.surface)
    columns = {
        "score": facts.score.tolist(),
        "shows": facts.shows.tolist(),
        "held": facts.held.tolist(),
        "preactivation_shift": facts.preactivation_shift.amax(dim=1).tolist(),
    }
    return {"rows": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]}


def said(run: Run, part: Examples, delta: Delta) -> dict[str, Any]:
    """How what the model says with one part alone, or without it, reads."""
    assert part.dialogue is not None
    replies = texts(run.bench.model.tokenizer, run.bench.said(part.dialogue, delta.float()))
    reads = [refusal.read(reply, base) for reply, base in zip(replies, part.dialogue.texts, strict=True)]
    return {"rows": [{"non_refusal": read.non_refusal, "base_like": read.base_like} for read in reads]}


def own_rows(run: Run, ids: Sequence[str], name: str) -> list[dict[str, Any]]:
    """Parts of the deltas of these flips: effects, replays by certificate, and what is said."""
    part, delta = run.examples(ids), run.saved(ids)
    rows: list[dict[str, Any]] = run.points.get(f"effects-{name}", lambda: effects(run, part, delta))["rows"]
    parts = parts_of(*run.exactly(part, delta), run.linear, top_k=run.top_k)
    for view in VIEWS:
        alone = parts.view(view)
        without = parts.view("full") - alone
        units = {"certificate": (f"replay-{view}-{name}", replay, alone)}
        if part.dialogue is not None:
            units["replay_said"] = (f"said-replay-{view}-{name}", said, alone)
            units["knockout_said"] = (f"said-knockout-{view}-{name}", said, without)
        for key, (unit, work, one) in units.items():
            values = run.points.get(unit, partial(work, run, part, one))["rows"]
            for row, value in zip(rows, values, strict=True):
                row["views"][view][key] = value
    return rows


def shared_deltas(run: Run) -> dict[str, tuple[Examples, Delta]]:
    """By fold: the examples that the shared C1 delta of the largest norm was not fitted to, and it for each of them."""
    bench, found = run.bench, {}
    names = [name.split("/") for name in run.deltas if name.startswith("transfer/") and name.split("/")[2] == C1]
    ids = [name for batch in bench.batches for name in batch.strict_ids]
    for fold in sorted({name[1] for name in names}):
        largest = max((name for name in names if name[1] == fold), key=lambda name: float(name[3]))
        part = run.examples([ids[row] for row in halves_of(bench, int(fold))[1].tolist()])
        part = part if part.strict is None else replace(part, behavior=part.strict)
        one = run.deltas["/".join(largest)].to(bench.model.device)
        each = repeat(one, "pos d_model -> batch pos d_model", batch=len(part.ids))
        (whole,) = bench.whole(part, bench.objective(bench.defended(part)), each)
        found[f"fold {fold}, norm {float(largest[3]):.3g}"] = (part, whole)
    return found


def carried(run: Run, part: Examples, delta: Delta) -> dict[str, Any]:
    """The components through which most goes, what doing says of them, and the direct effects; shares of the effect."""
    defended, delta = entering(run.bench.defended(part), delta)
    zero, every = torch.zeros_like(delta), carriers(defended)
    plain, along = (through(defended, delta, points) for points in (0, run.n_points))
    off, on = trace(defended, zero), trace(defended, delta)
    effect = float((on.score - off.score).mean())
    ranked = sorted(every, key=lambda carrier: -float(along[carrier].mean()))
    draws = random.Random(run.bench.plan.seed)

    def done(chosen: Sequence[Carrier]) -> dict[str, float]:
        back, into = patched(defended, delta, off, chosen), patched(defended, zero, on, chosen)
        return {
            "gone": float((on.score - back[0]).mean()) / effect,
            "come": float((into[0] - off.score).mean()) / effect,
            "still_shows": float((back[1] > 0).float().mean()),
            "shows": float((into[1] > 0).float().mean()),
        }

    doing = []
    for size in [*(size for size in SIZES if size < len(every)), len(every)]:
        point = {"size": size, **done(ranked[:size])}
        if size < len(every):
            drawn = [done(draws.sample(every, size)) for _ in range(DRAWS)]
            point |= {f"random_{name}": fmean(one[name] for one in drawn) for name in ("gone", "come")}
        doing.append(point)
    shares = {carrier: [float(one[carrier].mean()) / effect for one in (along, plain)] for carrier in ranked[:TOP]}
    return {
        "n": len(delta),
        "effect": effect,
        "shows": float((on.slack > 0).float().mean()),
        "top": [
            {"name": str(carrier), "integrated": integrated, "plain": first, **done([carrier])}
            for carrier, (integrated, first) in shares.items()
        ],
        "direct": {n: float(v.mean()) / effect for n, v in direct(defended, delta, run.n_points).by_name.items()},
        "doing": doing,
    }


def named(run: Run, part: Examples, delta: Delta) -> dict[str, Any]:
    """Heads that look at the target more than at its rivals in the prompt, and write it: at base, defended, recovered.

    What they write is the score of the stricter predicate where there is one: the target's logit against all other
    candidates'. Nothing is found where the behavior has no target, or a prompt does not hold it.
    """
    behavior, ids = part.strict or part.behavior, part.prompts.ids
    if not isinstance(behavior, Targeted):
        return {"found": None}
    target = ids == behavior.target[:, None]
    rival = torch.stack([torch.isin(row, tokens) for row, tokens in zip(ids, behavior.rivals, strict=True)]) & ~target
    if not bool(target.any(dim=1).all()):
        return {"found": None}
    defended, delta = entering(run.bench.defended(part).asking(behavior), delta)
    zero = torch.zeros_like(delta)
    states = {"base": (undefended(defended), zero), "defended": (defended, zero), "recovered": (defended, delta)}
    read = {name: _at(*state, target, rival) for name, state in states.items()}
    base = read["base"]
    movers = [head for head, at in base.items() if at["look"] >= max(LOOKS, at["rival"]) and at["write"] > 0]
    movers.sort(key=lambda head: -base[head]["write"])
    total = {name: sum(at[head]["write"] for head in movers) for name, at in read.items()}
    lost = total["base"] - total["defended"]
    return {
        "found": {
            "n": len(ids),
            "heads": {head: {name: at[head] for name, at in read.items()} for head in movers},
            "written": total,
            "re_engaged": (total["recovered"] - total["defended"]) / lost if lost else None,
        }
    }


def _at(defended: Defended, delta: Delta, target: Mask, rival: Mask) -> dict[str, dict[str, float]]:
    """Means over examples for each head in one state."""
    found = looks(defended, delta, target), looks(defended, delta, rival), writes(defended, delta)
    return {
        str(head): {k: float(one[head].mean()) for k, one in zip(("look", "rival", "write"), found, strict=True)}
        for head in found[0]
    }


def tell(heading: str, lines: Sequence[str]) -> None:
    """Print a table."""
    print("", heading, *lines, sep="\n", flush=True)


def paths_and_movers(run: Run, part: Examples, delta: Delta, name: str) -> dict[str, Any]:
    """Which components carry these deltas; where the behavior has a target, whether its movers are re-engaged."""
    paths = run.points.get(f"paths-{name}", lambda: carried(run, part, delta))
    tell(
        f"paths, {name}: {paths['n']} examples, {paths['shows']:.0%} show; effect {paths['effect']:.2f}",
        path_lines(paths),
    )
    movers = run.points.get(f"movers-{name}", lambda: named(run, part, delta))["found"]
    if movers is not None:
        tell(f"heads that look at the target and write it, {name}", mover_lines(movers))
    return {"paths": paths, "movers": movers}


def own(run: Run, ids: Sequence[str]) -> dict[str, Any]:
    """All of the deltas that were found for one example each."""
    size, rows = run.bench.batch_size, {}
    parts = {f"own-{start // size}": ids[start : start + size] for start in range(0, len(ids), size)}
    for name, some in parts.items():
        rows |= dict(zip(some, own_rows(run, some, name), strict=True))
    table = part_rows(list(rows.values()))
    tell(f"parts of own deltas: {len(rows)} valid flips", part_lines(table))
    for site, fitted in run.linear.items():
        print(f"linear map at {site.hook_name}: {fitted.r2:.1%} of the error's variance on tokens left out")
    certificates = {name: run.records[name].certificate or {} for name in rows}
    replayed = {name: row["views"]["full"]["certificate"]["score"] for name, row in rows.items()}
    apart = max(abs(replayed[name] - certificates[name]["score"]) for name in rows) if run.stretch == 1 else None
    if apart is not None:
        print(f"sanity: the full delta's replay is within {apart:.1e} of the score that the run saved", flush=True)
    carriers_ = {name: paths_and_movers(run, run.examples(some), run.saved(some), name) for name, some in parts.items()}
    return {"rows": rows, "table": table, "sanity": apart, "carriers": carriers_}


def shared(run: Run) -> dict[str, Any]:
    """All of the shared deltas."""
    found = {}
    for name, (part, delta) in shared_deltas(run).items():
        unit = "shared-" + name.replace(", norm ", "-").replace(" ", "-")
        rows = run.points.get(f"effects-{unit}", partial(effects, run, part, delta))["rows"]
        table = part_rows(rows)
        tell(f"parts of the shared delta of {name}: {len(rows)} unseen flips", part_lines(table))
        found[name] = {"rows": rows, "table": table, "carriers": {unit: paths_and_movers(run, part, delta, unit)}}
    return found


def main() -> None:
    """Run the analysis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder of a finished run, or a DEFENSE.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/attribution"))
    parser.add_argument("--top-k", type=int, default=TOP_K, help=f"features that count as the largest ({TOP_K})")
    parser.add_argument("--points", type=int, default=POINTS, help=f"of the integral along a delta ({POINTS})")
    parser.add_argument("--stretch", type=float, default=1.0, help="make each delta so many times as long")
    parser.add_argument("--flips", type=int, help="valid flips that are looked at (default: all)")
    options = parser.parse_args()
    folder = options.source
    try:
        if min(options.top_k, options.points, options.flips or 1) < 1:
            raise InputError("--top-k, --points, --flips: must be at least 1")
        if not folder.is_dir():
            folder = options.out.with_name(f"{options.out.name}-run")
            run_check(load_config(options.source), folder)
        settings = {"top_k": options.top_k, "points": options.points, "flips": options.flips, "run": digest(folder)}
        settings |= {} if options.stretch == 1 else {"stretch": options.stretch}
        points = Points.open(options.out, settings)
        run = open_run(folder, points, options.top_k, options.points, options.stretch)
        found = {"own": own(run, list(run.records)[: options.flips]), "shared": shared(run)}
    except InputError as error:
        sys.exit(f"attribution: {error}")
    write_whole(options.out / "attribution.json", (json.dumps(without_nan(found), indent=1) + "\n").encode())
    figure(found, options.out / "attribution.svg")
    print(f"figures: {options.out / 'attribution.json'}, {options.out / 'attribution.svg'}")


if __name__ == "__main__":
    main()
