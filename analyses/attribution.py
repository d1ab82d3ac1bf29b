"""Where does a recovery travel? Its parts replayed and knocked out, and the heads and MLPs that carry it.

Of a finished run of `recover check` (or a DEFENSE.yaml, which is then checked first, in OUT/run):

1. *Parts* (`recover.attribution`) of the delta of each valid flip: in the features that are clamped, in others, in what
   the SAE does not reconstruct. Each is replayed alone under the live clamps, by certificate, and knocked out; where the
   behavior is a whole answer, what the model then says is read as well, as published.
2. *Effects* to first order, and integrated along the delta: of the parts, which add up.
3. *Shared deltas*, where the run has them: the same, on the half that each was not fitted to, by the stricter predicate.
4. *Paths* (`recover.paths`): the heads and MLPs above the site through which most goes; put back to what they gave when
   defended, does the recovery go, and put in alone, does it come? Beside as many drawn at random.
5. *Name movers*, where the behavior has a target that its prompt holds: are heads that look at it and write it back?

    python analyses/attribution.py RUN_OR_YAML [--out runs/attribution] [--top-k 16] [--points 8] [--flips N]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import torch
from einops import repeat
from matplotlib import pyplot as plt
from points import Points
from safetensors.torch import load_file

from recover import Schedule, certify, refusal, run_check
from recover.artifacts import CONFIG, DELTAS, EXAMPLES, RUN, RunState, write_whole
from recover.attribution import (
    POINTS,
    TOP_K,
    VIEWS,
    LinearError,
    attribute,
    entering,
    error_activations,
    fit_linear_error,
    parts_of,
)
from recover.behavior import Targeted
from recover.bench import Bench
from recover.config import load_config
from recover.defended import Defended, Delta
from recover.examples import Examples
from recover.heldout import C1
from recover.heldout import split as halves_of
from recover.model import Model
from recover.movers import looks, undefended, writes
from recover.neutral import NEUTRAL
from recover.paths import Carrier, carriers, direct, patched, through, trace
from recover.records import ExampleRecord, without_nan
from recover.setting import Chosen, Setting, build_defense, load_setting
from recover.types import InputError, Site
from recover.zoo import resolve_model

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
"""No refusal and base-like of 24 (reference page; Gemma 2 2B, AdvBench)."""
SIZES = (1, 2, 4, 8, 16, 32, 64)
DRAWS = 8
LOOKS = 0.2


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its material, its valid flips with the records, and the deltas that it saved."""

    bench: Bench
    records: Mapping[str, ExampleRecord]
    deltas: Mapping[str, torch.Tensor]

    def examples(self, ids: Sequence[str]) -> Examples:
        """These examples, without padding that only others needed."""
        return self.bench.examples.select(torch.tensor([self.bench.examples.ids.index(name) for name in ids]))


def open_run(folder: Path) -> Run:
    """Read a run of `recover check`; nothing is written there.

    Raises:
        InputError: it is not finished, or of other files than are here.
    """
    missing = [name for name in (CONFIG, RUN, DELTAS, EXAMPLES) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: holds no finished run with deltas ({missing[0]} is not there); run recover check")
    try:
        state = RunState.model_validate_json((folder / RUN).read_text(encoding="utf-8"))
        lines = (folder / EXAMPLES).read_text(encoding="utf-8").splitlines()
        records = [ExampleRecord.from_json(line) for line in lines]
        deltas = load_file(folder / DELTAS)
    except ValueError as error:
        raise InputError(f"{folder}: is damaged ({' '.join(str(error).split()):.100}); run recover check") from None
    setting = load_setting(load_config(folder / CONFIG))
    if setting.examples.ids != [record.id for record in records]:
        raise InputError(f"{folder}: its examples are not those that its {CONFIG} gives here; run recover check again")
    chosen = [
        Chosen(tuple(features), tuple(value) if isinstance(value, list) else value)
        for features, value in zip(state.features, state.values, strict=True)
    ]
    return Run(bench_of(setting, chosen, state.batch_size), {r.id: r for r in records if r.certificate}, deltas)


def bench_of(setting: Setting, chosen: Sequence[Chosen], batch_size: int) -> Bench:
    """The check's own material."""
    config, exact = setting.config, setting.model
    if config.dtype != config.certificates:
        module = resolve_model(config.model, config.device).module
        exact = Model(module.double() if config.certificates == "float64" else module, setting.loaded.tokenizer)
    search = config.search
    return Bench(
        setting.model,
        exact,
        build_defense(setting, chosen),
        setting.examples,
        search.budget,
        search.placement,
        Schedule(search.steps, seed=config.controls.seed),
        config.plan(),
        batch_size,
        search.sites == "every",
    )


def linear_errors(bench: Bench) -> dict[Site, LinearError]:
    """For each site where a delta enters, fitted on neutral text under the defense."""
    sites = bench.defense.sites if bench.every_site else bench.defense.sites[:1]
    prompts = bench.exact.tokenize(NEUTRAL)
    states = error_activations(bench.exact, bench.defense, prompts, sites, bench.batch_size)
    return {site: fit_linear_error(bench.defense.at(site)[0].sae, states[site], bench.plan.seed) for site in sites}


def effects(
    defended: Defended, delta: Delta, linear: Mapping[Site, LinearError], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Plain values by example: of the whole, and of each part."""
    found = attribute(defended, delta, linear, top_k=options.top_k, points=options.points)
    rows = []
    for row in range(len(delta)):
        views = {name: {k: float(v[row]) for k, v in vars(view).items()} for name, view in found.views.items()}
        rows.append({"defended": float(found.defended[row]), "recovered": float(found.recovered[row]), "views": views})
    return rows


def said(bench: Bench, part: Examples, delta: Delta) -> list[dict[str, bool]]:
    """How what is said under a delta reads."""
    assert part.dialogue is not None
    pairs = zip(bench.replies(part, delta), part.dialogue.texts, strict=True)
    reads = [refusal.read(reply, base) for reply, base in pairs]
    return [{"non_refusal": read.non_refusal, "base_like": read.base_like} for read in reads]


def own_deltas(run: Run, ids: Sequence[str], points: Points, options: argparse.Namespace) -> dict[str, Any]:
    """Parts of the deltas of these flips: effects, replays by certificate, and what is said."""
    bench, part = run.bench, run.examples(ids)
    delta = torch.stack([run.deltas[name] for name in ids]).to(bench.model.device)
    name = points_name(ids)
    linear = linear_errors(bench)
    after, moved = entering(
        bench.defended(part, bench.exact), delta.to(torch.promote_types(bench.exact.dtype, torch.float32))
    )
    rows = points.get(f"effects-{name}", lambda: {"rows": effects(after, moved, linear, options)})["rows"]
    parts = parts_of(after, moved, linear, top_k=options.top_k)
    whole = parts.view("full")
    for view in VIEWS:
        replayed = parts.view(view)

        def replay(replayed: Delta = replayed) -> dict[str, Any]:
            facts = certify(
                bench.exact, bench.defense, part.prompts, part.behavior, replayed, every_site=bench.every_site
            )
            return {
                "score": facts.score.tolist(),
                "shows": facts.shows.tolist(),
                "preactivation_shift": facts.preactivation_shift.amax(dim=1).tolist(),
                "relative_drift": facts.relative_drift.tolist(),
            }

        for row, values in zip(rows, by_row(points.get(f"replay-{view}-{name}", replay)), strict=True):
            row["views"][view]["certificate"] = values
        if part.dialogue is not None:
            for word, one in (("replay", replayed), ("knockout", whole - replayed)):
                read = points.get(
                    f"said-{word}-{view}-{name}",
                    lambda one=one: {"rows": said(bench, part, one.float())},  # type: ignore[misc]
                )
                for row, values in zip(rows, read["rows"], strict=True):
                    row["views"][view][f"{word}_said"] = values
            print(f"  said: {view}", flush=True)
    return {"rows": rows, "linear": {site.hook_name: [one.r2, one.penalty] for site, one in linear.items()}}


def by_row(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns as one dictionary a row."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def points_name(ids: Sequence[str]) -> str:
    """A name for a batch of examples."""
    return f"{ids[0]}-{len(ids)}".replace("/", "_")


def shared_deltas(run: Run) -> dict[str, tuple[Examples, Delta]]:
    """By fold: the examples that the shared C1 delta of the largest norm was not fitted to, and it for each of them."""
    bench, found = run.bench, {}
    names = [name for name in run.deltas if name.startswith("transfer/") and f"/{C1}/" in name]
    for fold in sorted({name.split("/")[1] for name in names}):
        name = max((n for n in names if n.split("/")[1] == fold), key=lambda n: float(n.split("/")[3]))
        ids = [one for batch in bench.batches for one in batch.strict_ids]
        _, others = halves_of(bench, int(fold))
        part = run.examples([ids[row] for row in others.tolist()])
        if part.strict is not None:
            part = replace(part, behavior=part.strict)
        each = repeat(run.deltas[name].to(bench.model.device), "pos d_model -> batch pos d_model", batch=len(part.ids))
        found[f"fold {fold}, norm {float(name.split('/')[3]):.3g}"] = (
            part,
            bench.whole(part, bench.objective(bench.defended(part)), each),
        )
    return found


def carried(defended: Defended, delta: Delta, seed: int, n_points: int) -> dict[str, Any]:
    """The components through which most goes, what doing says of them, and the direct effects."""
    defended, delta = entering(defended, delta)
    zero, every = torch.zeros_like(delta), carriers(defended)
    plain, along = (through(defended, delta, points) for points in (0, n_points))
    off, on = trace(defended, zero), trace(defended, delta)
    effect = float((on.score - off.score).mean())
    ranked = sorted(every, key=lambda carrier: -float(along[carrier].mean()))
    straight = direct(defended, delta, n_points)
    draws = random.Random(seed)

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
    return {
        "n": len(delta),
        "effect": effect,
        "shows": float((on.slack > 0).float().mean()),
        "top": [
            {
                "name": str(carrier),
                "integrated": float(along[carrier].mean()) / effect,
                "plain": float(plain[carrier].mean()) / effect,
                **{key: done([carrier])[key] for key in ("gone", "come")},
            }
            for carrier in ranked[:12]
        ],
        "direct": {name: float(value.mean()) / effect for name, value in straight.by_name.items()},
        "doing": doing,
    }


def named(defended: Defended, delta: Delta, part: Examples) -> dict[str, Any] | None:
    """Heads that look at the target more than at its rivals in the prompt, and write it: at base, defended, recovered.

    The score is that of the stricter predicate where there is one: the target's logit against all other candidates'.
    """
    behavior = part.strict or part.behavior
    if not isinstance(behavior, Targeted) or defended.suffix.n_pos != 1:
        return None
    ids = part.prompts.ids
    target = ids == behavior.target[:, None]
    rival = (ids[:, :, None] == behavior.rivals[:, None]).any(dim=-1) & ~target
    if not bool(target.any(dim=1).all()):
        return None
    defended, delta = entering(defended.asking(behavior), delta)
    zero = torch.zeros_like(delta)
    states = {"base": (undefended(defended), zero), "defended": (defended, zero), "recovered": (defended, delta)}
    read = {
        name: [
            {str(head): float(one.mean()) for head, one in found.items()}
            for found in (looks(*state, target), looks(*state, rival), writes(*state))
        ]
        for name, state in states.items()
    }
    look, other, write = read["base"]
    movers = sorted(
        (h for h in look if look[h] >= LOOKS and look[h] > other[h] and write[h] > 0), key=lambda h: -write[h]
    )
    heads = {
        head: {name: {"look": at[0][head], "rival": at[1][head], "write": at[2][head]} for name, at in read.items()}
        for head in movers
    }
    total = {name: sum(at[2][head] for head in movers) for name, at in read.items()}
    lost = total["base"] - total["defended"]
    back = (total["recovered"] - total["defended"]) / lost if movers and lost else None
    return {"n": len(ids), "heads": heads, "written": total, "re_engaged": back}


def part_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each part: counts and means over examples, effects as shares of the whole's."""
    n, whole = len(rows), sum(row["recovered"] - row["defended"] for row in rows)
    table = {}
    for name in VIEWS:
        views = [row["views"][name] for row in rows]
        along = sum(row["views"]["full"]["integrated"] for row in rows)
        first = sum(row["views"]["full"]["first_order"] for row in rows)
        table[name] = {
            "n": n,
            "norm": fmean(view["norm"] for view in views),
            "first_order": sum(view["first_order"] for view in views) / first,
            "integrated": sum(view["integrated"] for view in views) / along,
            "effect": sum(view["replay_score"] - row["defended"] for view, row in zip(views, rows, strict=True))
            / whole,
            "replay": sum(view["replay_slack"] > 0 for view in views),
            "knockout": sum(view["knockout_slack"] > 0 for view in views),
        }
        if "certificate" in views[0]:
            table[name]["certified"] = sum(view["certificate"]["shows"] for view in views)
            table[name]["preactivation_shift"] = max(view["certificate"]["preactivation_shift"] for view in views)
        for word in ("replay", "knockout"):
            if f"{word}_said" in views[0]:
                for key in ("non_refusal", "base_like"):
                    table[name][f"{word}_{key}"] = sum(view[f"{word}_said"][key] for view in views)
    return table


def part_lines(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of replay and knockout, for people; effects are shares of the whole delta's."""
    spoke = "replay_base_like" in table["full"]
    said_ = f"{'said: replay':>14} {'knockout':>9} {'published of 24':>16}" if spoke else ""
    lines = [
        f"{'':26} {'norm':>6} {'1st order':>9} {'integr.':>8} {'effect':>7} {'replay':>7} {'knockout':>8} {'pre-act.':>8} {said_}"
    ]
    for name, row in table.items():
        shift = f"{row['preactivation_shift']:8.1e}" if "preactivation_shift" in row else f"{'-':>8}"
        beside = ""
        if spoke:
            told = [f"{row[f'{word}_non_refusal']} ({row[f'{word}_base_like']})" for word in ("replay", "knockout")]
            known = [
                f"{word}{hits} ({alike})"
                for word, where in (("", PUBLISHED), ("without: ", PUBLISHED_WITHOUT))
                for hits, alike in [where.get(name, (None, None))]
                if hits is not None
            ]
            beside = f"{told[0]:>14} {told[1]:>9} {', '.join(known) or '-':>16}"
        lines.append(
            f"{WORDS[name]:26} {row['norm']:6.2f} {row['first_order']:9.1%} {row['integrated']:8.1%} "
            f"{row['effect']:7.1%} {row['replay']:4d}/{row['n']:<2d} {row['knockout']:5d}/{row['n']:<2d} {shift} {beside}"
        )
    return lines


def path_lines(found: Mapping[str, Any]) -> list[str]:
    """Top components, what doing says, and direct effects."""
    lines = [
        f"  {'':9} {'through':>8} {'plain':>8} {'put back':>9} {'put in':>7}   (shares of the effect, {found['effect']:.2f})"
    ]
    for one in found["top"]:
        figures = f"{one['integrated']:8.1%} {one['plain']:8.1%} {one['gone']:9.1%} {one['come']:7.1%}"
        lines.append(f"  {one['name']:9} {figures}")
    lines.append(
        f"  {'top':>5} {'gone, put back':>15} {'(random)':>9} {'come, put in':>13} {'(random)':>9} {'still shows':>12} {'shows':>6}"
    )
    for point in found["doing"]:
        chance = [f"{point[key]:9.1%}" if key in point else f"{'-':>9}" for key in ("random_gone", "random_come")]
        lines.append(
            f"  {point['size']:5d} {point['gone']:15.1%} {chance[0]} {point['come']:13.1%} {chance[1]} "
            f"{point['still_shows']:12.0%} {point['shows']:6.0%}"
        )
    largest = sorted(found["direct"].items(), key=lambda one: -abs(one[1]))[:8]
    lines.append("  written directly: " + ", ".join(f"{name} {share:.1%}" for name, share in largest))
    lines.append(f"  these and all others add up to {sum(found['direct'].values()):.2%} of the effect")
    return lines


def mover_lines(found: Mapping[str, Any]) -> list[str]:
    """Name movers at base, defended and recovered."""
    lines = [
        f"  {'':9} {'look at target: base':>21} {'defended':>9} {'recovered':>10} {'write it: base':>15} {'defended':>9} {'recovered':>10}"
    ]
    for head, at in list(found["heads"].items())[:8]:
        figures = [at[state][key] for key in ("look", "write") for state in ("base", "defended", "recovered")]
        lines.append(
            f"  {head:9} {figures[0]:21.2f} {figures[1]:9.2f} {figures[2]:10.2f} {figures[3]:15.2f} {figures[4]:9.2f} {figures[5]:10.2f}"
        )
    total = found["written"]
    back = "-" if found["re_engaged"] is None else f"{found['re_engaged']:.0%}"
    lines.append(
        f"  all {len(found['heads'])} such heads write {total['base']:.2f} at base, {total['defended']:.2f} defended, "
        f"{total['recovered']:.2f} recovered: {back} of what the clamp took is back"
    )
    return lines


def figure(found: Mapping[str, Any], path: Path) -> None:
    """Left, what each part does alone; right, how much goes and comes with the top components."""
    mpl.rcParams.update({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})
    canvas, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    table = found["own"]["table"]
    places = list(range(len(table)))[::-1]
    for shift, (key, word) in zip(
        (0.2, -0.2), (("integrated", "integrated effect"), ("effect", "replayed alone")), strict=True
    ):
        left.barh([place + shift for place in places], [row[key] for row in table.values()], 0.4, label=word)
    left.set_yticks(places, [WORDS[name].strip() for name in table])
    left.set(xlabel="share of the delta's effect", title="Parts of the delta")
    for name, style in (("own", "o"), ("shared", "s")):
        for group in list(found.get(name, {}).get("paths", {}).values())[:1]:
            sizes = [point["size"] for point in group["doing"]]
            for key, word, line in (("gone", "gone, put back", "-"), ("come", "come, put in", "--")):
                right.plot(
                    sizes, [p[key] for p in group["doing"]], f"{style}{line}", label=f"{name}: {word}", markersize=4
                )
    right.set(
        xscale="log", xlabel="top components", ylabel="share of the effect", title="Heads and MLPs above the site"
    )
    for axes in (left, right):
        axes.legend(frameon=False)
    canvas.savefig(path)
    plt.close(canvas)


def report(run: Run, points: Points, options: argparse.Namespace) -> dict[str, Any]:
    """Everything, printed as soon as it is there."""
    bench, seed = run.bench, run.bench.plan.seed
    ids = [name for name in run.records if name in run.deltas][: options.flips]
    if not ids:
        raise InputError("attribution: the run has no valid flip with a saved delta; nothing was suppressed or found")
    found: dict[str, Any] = {"own": {"rows": {}, "paths": {}}}
    parts = [ids[start : start + bench.batch_size] for start in range(0, len(ids), bench.batch_size)]
    for some in parts:
        made = own_deltas(run, some, points, options)
        found["own"]["rows"] |= dict(zip(some, made["rows"], strict=True))
        found["own"]["linear"] = made["linear"]
    rows = found["own"]["rows"]
    found["own"]["table"] = part_rows(list(rows.values()))
    print(f"own deltas: {len(rows)} valid flips", *part_lines(found["own"]["table"]), sep="\n", flush=True)
    for site, (r2, penalty) in found["own"]["linear"].items():
        print(
            f"linear map at {site}: predicts {r2:.1%} of the error's variance on held-out tokens, penalty {penalty:g}"
        )
    saved = {name: run.records[name].certificate["score"] for name in rows}  # type: ignore[index]
    found["own"]["sanity"] = max(
        abs(row["views"]["full"]["certificate"]["score"] - saved[name]) for name, row in rows.items()
    )
    gaps = [
        1
        - sum(row["views"]["full"][key] for row in rows.values())
        / sum(row["recovered"] - row["defended"] for row in rows.values())
        for key in ("first_order", "integrated")
    ]
    found["own"]["gap"], found["own"]["integrated_gap"] = gaps
    print(f"sanity: the full delta's replay is within {found['own']['sanity']:.1e} of the saved score")
    print(f"gap to the effect: {gaps[0]:.1%} to first order, {gaps[1]:.2%} integrated", flush=True)
    for some in parts:
        name = points_name(some)
        part = run.examples(some)
        delta = torch.stack([run.deltas[one] for one in some]).to(bench.model.device)
        made = points.get(
            f"paths-{name}", lambda part=part, delta=delta: carried(bench.defended(part), delta, seed, options.points)
        )  # type: ignore[misc]
        found["own"]["paths"][name] = made
        print(f"paths of {made['n']} own deltas", *path_lines(made), sep="\n", flush=True)
        movers = points.get(
            f"movers-{name}", lambda part=part, delta=delta: {"found": named(bench.defended(part), delta, part)}
        )["found"]  # type: ignore[misc]
        if movers is not None:
            found["own"].setdefault("movers", {})[name] = movers
            print("heads that look at the target and write it, own deltas", *mover_lines(movers), sep="\n", flush=True)
    for name, (part, delta) in shared_deltas(run).items():
        shared = found.setdefault("shared", {"table": {}, "paths": {}, "movers": {}})
        key = name.replace(" ", "-").replace(",", "")
        linear = linear_errors(bench)

        def parts_of_shared(part: Examples = part, delta: Delta = delta) -> dict[str, Any]:
            after, moved = entering(
                bench.defended(part, bench.exact), delta.to(torch.promote_types(bench.exact.dtype, torch.float32))
            )
            return {"rows": effects(after, moved, linear, options)}

        rows_ = points.get(f"effects-shared-{key}", parts_of_shared)["rows"]
        shared["table"][name] = part_rows(rows_)
        print(
            f"shared delta, {name}: {len(rows_)} unseen flips", *part_lines(shared["table"][name]), sep="\n", flush=True
        )
        made = points.get(
            f"paths-shared-{key}",
            lambda part=part, delta=delta: carried(bench.defended(part), delta, seed, options.points),
        )  # type: ignore[misc]
        shared["paths"][name] = made
        print(f"paths of it ({made['shows']:.0%} show)", *path_lines(made), sep="\n", flush=True)
        movers = points.get(
            f"movers-shared-{key}", lambda part=part, delta=delta: {"found": named(bench.defended(part), delta, part)}
        )["found"]  # type: ignore[misc]
        if movers is not None:
            shared["movers"][name] = movers
            print(
                "heads that look at the target and write it, shared delta", *mover_lines(movers), sep="\n", flush=True
            )
    return found


def main() -> None:
    """Run the analysis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder of a finished run, or a DEFENSE.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/attribution"))
    parser.add_argument("--top-k", type=int, default=TOP_K)
    parser.add_argument("--points", type=int, default=POINTS)
    parser.add_argument("--flips", type=int, help="valid flips that are looked at (default: all)")
    options = parser.parse_args()
    try:
        folder = options.source
        if not folder.is_dir():
            folder = options.out.parent / f"{options.out.name}-run"
            run_check(load_config(options.source), folder)
        run = open_run(folder)
        settings = {"top_k": options.top_k, "points": options.points, "run": json.loads((folder / RUN).read_text())}
        points = Points.open(options.out, settings)
        found = report(run, points, options)
    except InputError as error:
        sys.exit(f"attribution: {error}")
    write_whole(options.out / "attribution.json", (json.dumps(without_nan(found), indent=1) + "\n").encode())
    figure(found, options.out / "attribution.svg")
    print(f"figures: {options.out / 'attribution.json'}, {options.out / 'attribution.svg'}")


if __name__ == "__main__":
    main()
