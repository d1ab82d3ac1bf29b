"""Is what was unlearned by a clamp still there? A defense of `task: choice` or `cloze`, beside published WMDP-Bio.

1. *Flips*: wordings (paraphrases, or orders of the answers) of what the model knows and gets wrong with the clamp.
2. *Back*: each flip searched within the budget without a constraint, and under C1; replayed by certificate. Under C1
   only what leaves the clamped features where they were counts.
3. *Curve*: flips that some certified delta of at most this norm brings back, under C1.
4. *Retained*: what the model knows of what is to be kept, asked again with the clamp.

A batch is kept in the folder as soon as it is done; a later start with the same settings goes on from there.

    python analyses/unlearning.py [DEFENSE.yaml] [--n 28] [--out runs/unlearning]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import recover as rc
from recover.defenses import clamp_edits
from recover.evidence import Anywhere
from recover.numerics import wilson
from recover.protocol import Batch, Bench, certificate_of, certificate_values
from recover.report import columns
from recover.run import Points, build_bench, load_config, load_setting
from recover.search import SOLVERS, Feasible, worst_case
from recover.tasks import still_right

HERE, BUDGETS = Path(__file__).parent, (0.0, 2.0, 5.0, 10.0, 20.0, 40.0)
BESIDE = HERE / "published" / "wmdp_bio_gemma2.yaml"
HEADS = ("", "flips", "asked of", "free", "drift", "C1", "drift", "residual")
PUBLISHED = ("flips", "questions", "free", "free_drift", "held", "held_drift")
BY_GRADIENT = {name: solver for name, solver in SOLVERS.items() if name != "random"}


def searched(bench: Bench, batch: Batch, feasible: Feasible) -> dict[str, Any]:
    """For each flip the certificates of the delta within the budget, and of the smallest."""
    if not len(batch.flips):
        return {"rows": []}
    part, target, rows = batch.flipped, batch.target, []
    found = worst_case(target, target.zero_delta, feasible, bench.budget, bench.schedule, BY_GRADIENT)
    facts = [certificate_values(certificate_of(bench, part, delta)) for delta in (found.delta, found.smallest)]
    for name, group, within, smallest in zip(part.ids, part.groups or part.ids, *facts, strict=True):
        rows.append({"id": name, "group": group, "within": within, "smallest": smallest})
    return {"rows": rows}


def back(row: Mapping[str, Any], constrained: bool) -> bool:
    """Whether the delta within the budget brings a flip back; under a constraint also with all features held."""
    return row["within"]["shows"] and (row["within"]["held"] or not constrained)


def certified_norm(row: Mapping[str, Any]) -> float:
    """The smallest norm certified to bring a flip back with the features held; infinite where none is."""
    kinds = (row["within"], row["smallest"])
    return min((one["norm"] for one in kinds if one["shows"] and one["held"]), default=float("inf"))


def line(name: str, known: int, free: Sequence[Mapping[str, Any]], c1: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A row of the table. A drift is infinite, null in JSON, where all clamped features read zero when defended."""
    hits = [sum(back(row, constrained) for row in rows) for rows, constrained in ((free, False), (c1, True))]
    told = [[row["within"]["relative_drift"] for row in rows] for rows in (free, c1)]
    drifts = [sum(float("inf") if one is None else one for one in each) / len(each) for each in told]
    residual = max(row["within"]["constraint_residual"] for row in c1)
    counts = (f"{hits[0]}/{len(free)}", f"{drifts[0]:.3f}", f"{hits[1]}/{len(c1)}", f"{drifts[1]:.1e}")
    return (name, str(len(c1)), f"{len({row['group'] for row in c1})} of {known}", *counts, f"{residual:.1e}")


def curve(rows: Sequence[Mapping[str, Any]], known: Mapping[str, float]) -> str:
    """Flips back by budget, with 95 % intervals, beside the `known` ones of 6."""
    lines, told = [("budget", "back", "95 %", "published, of 6")], {k: f"{v:g}" for k, v in known.items()}
    for budget in (f"{budget:g}" for budget in BUDGETS):
        hits = sum(certified_norm(row) <= float(budget) for row in rows)
        low, high = wilson(hits, len(rows))
        lines.append((budget, f"{hits}/{len(rows)}", f"{low:.0%} to {high:.0%}", told.get(budget, "-")))
    return columns(*lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", nargs="?", type=Path, default=HERE / "cloze_smollm2.yaml")
    parser.add_argument("--n", type=int, help="facts or questions to forget (default: as the file has it)")
    parser.add_argument("--out", type=Path, default=Path("runs/unlearning"))
    options = parser.parse_args()
    try:
        config = load_config(options.defense, {"prompts.n": options.n})
        if config.task not in ("cloze", "choice") or len({clamp.sae for clamp in config.clamps}) > 1:
            raise rc.InputError(f"{options.defense}: its task is {config.task!r}; give cloze or choice, at one site")
        published = (config.published and config.published.rows) or load_config(BESIDE).published.rows
        theirs, by_budget = published.get("wmdp_bio", {}), published.get("by_budget", {})
        if lacking := [name for name in PUBLISHED if name not in theirs]:
            raise rc.InputError(f"{options.defense}: published.rows.wmdp_bio: has no {lacking[0]}; write it there")
        points = Points.open(options.out, config.relevant())
        bench = build_bench(load_setting(config))
    except rc.InputError as error:
        sys.exit(f"unlearning: {error}")
    found = {"free": [], "c1": []}
    for number, batch in enumerate(bench.batches):
        print(f"batch {number + 1} of {len(bench.batches)}", file=sys.stderr, flush=True)
        for name, space in (("free", Anywhere()), ("c1", bench.feasible(batch.target))):
            found[name] += points.get(f"{name}-{number}", partial(searched, bench, batch, space))["rows"]
    if not found["c1"]:
        sys.exit("unlearning: the clamp turns no answer wrong; clamp more features, or to a lower value")
    known = len(set(bench.examples.groups or bench.examples.ids))
    flips, asked, free, free_drift, held, held_drift = (theirs[name] for name in PUBLISHED)
    counts = (f"{free:g}/{flips:g}", f"{free_drift:.3f}", f"{held:g}/{flips:g}", f"{held_drift:.3f}", "-")
    ours = line(f"{config.task}, {config.model}", known, found["free"], found["c1"])
    print(columns(HEADS, ("published", f"{flips:g}", f"{asked:g}", *counts), ours))
    print(f"\nfree: without a constraint; both within {bench.budget:g}. By budget, under C1:\n")
    print(curve(found["c1"], by_budget), end="\n\n")
    kept = still_right(config.task, bench.model, config.prompts.model_dump(), clamp_edits(bench.defense))
    print(f"what is to be kept, with the clamp: {kept}")


if __name__ == "__main__":
    main()
