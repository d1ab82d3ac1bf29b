"""Is what was unlearned by a clamp still there? A defense of `task: choice` or `cloze`, beside published WMDP-Bio.

1. *Flips*: wordings (paraphrases, or orders of the answers) of what the model knows and gets wrong with the clamp.
2. *Back*: each flip searched within the budget without a constraint, and under C1; replayed by certificate. Under C1
   only what leaves the clamped features where they were counts.
3. *Curve*: flips that some certified delta of at most this norm brings back, under C1.
4. *Retained*: what the model knows of what is to be kept, asked again with the clamp.

    python analyses/unlearning.py [DEFENSE.yaml] [--n 28] [--out runs/unlearning]

A batch is kept in the folder as soon as it is done; a later start with the same settings goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

from beside import published_rows
from points import Points

from recover.defenses.defended import clamp_edits
from recover.evidence.certificate import certify
from recover.evidence.controls import Anywhere
from recover.numerics.statistics import wilson
from recover.protocol.bench import Batch, Bench
from recover.protocol.phases import BY_GRADIENT
from recover.protocol.records import certificate_values
from recover.run.config import load_config
from recover.run.setting import Setting, build_bench, load_setting
from recover.search.ascent import Feasible
from recover.search.solvers import worst_case
from recover.tasks import choice, cloze, get_task
from recover.tasks.questions import load
from recover.types import InputError

DEFAULT = Path(__file__).parent / "cloze_smollm2.yaml"
BUDGETS = (0.0, 2.0, 5.0, 10.0, 20.0, 40.0)
BESIDE = "wmdp_bio_gemma2.yaml"
"""Whose published figures stand beside ours, where the defense names none."""
HEADS = ("", "flips", "asked of", "free", "drift", "C1", "drift", "residual")


def searched(bench: Bench, batch: Batch, feasible: Feasible) -> dict[str, Any]:
    """For each flip the certificates of the delta within the budget, and of the smallest."""
    part, target = batch.flipped, batch.target
    if not len(part_ids := batch.flip_ids):
        return {"rows": []}
    found = worst_case(target, target.zero_delta, feasible, bench.budget, bench.schedule, BY_GRADIENT)
    within, smallest = (
        certificate_values(certify(bench.exact, bench.defense, part.prompts, part.behavior, delta, bench.surface))
        for delta in (found.delta, found.smallest)
    )
    groups = batch.examples.groups or batch.examples.ids
    asked = [groups[row] for row in batch.flips.tolist()]
    rows = zip(part_ids, asked, within, smallest, strict=True)
    names = ("shows", "held", "norm", "relative_drift", "constraint_residual")
    return {
        "rows": [
            {"id": name, "group": group}
            | {kind: {key: one[key] for key in names} for kind, one in (("within", inner), ("smallest", short))}
            for name, group, inner, short in rows
        ]
    }


def option(setting: Setting, name: str) -> Any:
    """An option of the task as given, or its default."""
    given = setting.config.prompts.model_dump().get(name)
    return signature(get_task(setting.config.task)).parameters[name].default if given is None else given


def kept_facts(setting: Setting, bench: Bench) -> list[tuple[bool, ...]]:
    """Cloze: the facts of the other domains that the model knows, asked with the clamp, by fact and paraphrase."""
    file, forget = option(setting, "file"), option(setting, "forget")
    known = cloze.known(setting.model, cloze.shipped() if file is None else cloze.load_file(file))
    kept = known.select([row for row, fact in enumerate(known.facts) if fact.domain != forget])
    return cloze.right(setting.model, kept, clamp_edits(bench.defense)) if kept.facts else []


def kept_questions(setting: Setting, bench: Bench) -> list[tuple[bool, ...]]:
    """Choice: the questions of `retain` that the model knows, asked with the clamp, by question and order."""
    asked = choice.draw(load(option(setting, "retain")), option(setting, "n"), option(setting, "seed"))
    known = choice.kept(setting.model, asked)
    every = [(question, order) for question in known for order in choice.ORDERS]
    if not every:
        return []
    answered, orders = choice.right(setting.model, every, clamp_edits(bench.defense)).tolist(), len(choice.ORDERS)
    return [tuple(answered[first : first + orders]) for first in range(0, len(answered), orders)]


KEPT: Mapping[str, Callable[[Setting, Bench], list[tuple[bool, ...]]]] = {
    "cloze": kept_facts,
    "choice": kept_questions,
}


def back(row: Mapping[str, Any], constrained: bool) -> bool:
    """Whether the delta within the budget brings a flip back; under a constraint also with all features held."""
    return row["within"]["shows"] and (row["within"]["held"] or not constrained)


def certified_norm(row: Mapping[str, Any]) -> float:
    """The smallest norm certified to bring a flip back with the features held; infinite where none is."""
    kinds = (row["within"], row["smallest"])
    return min((one["norm"] for one in kinds if one["shows"] and one["held"]), default=float("inf"))


def line(name: str, known: int, free: Sequence[Mapping[str, Any]], c1: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A row of the table."""
    hits = [sum(back(row, constrained) for row in rows) for rows, constrained in ((free, False), (c1, True))]
    drifts = [sum(row["within"]["relative_drift"] for row in rows) / len(rows) for rows in (free, c1)]
    residual = max(row["within"]["constraint_residual"] for row in c1)
    return (
        name,
        str(len(c1)),
        f"{len({row['group'] for row in c1})} of {known}",
        f"{hits[0]}/{len(free)}",
        f"{drifts[0]:.3f}",
        f"{hits[1]}/{len(c1)}",
        f"{drifts[1]:.1e}",
        f"{residual:.1e}",
    )


def published_line(row: Mapping[str, float]) -> tuple[str, ...]:
    """The published row of the table: WMDP-Bio on Gemma 2 2B. Norms of another model are not the same norms."""
    flips = f"{row['flips']:g}"
    return (
        "published",
        flips,
        f"{row['questions']:g}",
        f"{row['free']:g}/{flips}",
        f"{row['free_drift']:.3f}",
        f"{row['held']:g}/{flips}",
        f"{row['held_drift']:.3f}",
        "-",
    )


def table(*lines: Sequence[str]) -> str:
    """Columns as wide as they need."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{one:>{width}}" for one, width in zip(each, widths, strict=True)) for each in lines)


def curve(rows: Sequence[Mapping[str, Any]], known: Mapping[str, float]) -> str:
    """Flips back by budget, with 95 % intervals, beside the `known` ones of 6."""
    lines = [("budget", "back", "95 %", "published, of 6")]
    for budget in BUDGETS:
        hits = sum(certified_norm(row) <= budget for row in rows)
        low, high = wilson(hits, len(rows))
        theirs = f"{known[f'{budget:g}']:g}" if f"{budget:g}" in known else "-"
        lines.append((f"{budget:g}", f"{hits}/{len(rows)}", f"{low:.0%} to {high:.0%}", theirs))
    return table(*lines)


def retained(ways: Sequence[Sequence[bool]]) -> str:
    """What is still right of what is to be kept."""
    if not ways:
        return "retained: the model knows nothing of what is to be kept, so nothing can be said"
    every = list(chain.from_iterable(ways))
    whole = sum(map(all, ways))
    return (
        f"retained: {sum(every)} of {len(every)} wordings ({sum(every) / len(every):.1%}) still right with the clamp; "
        f"{whole} of {len(ways)} ({whole / len(ways):.1%}) in every wording"
    )


def main() -> None:
    """Run the experiment; bad input is told in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--n", type=int, help="facts or questions to forget (default: as the file has it)")
    parser.add_argument("--out", type=Path, default=Path("runs/unlearning"))
    options = parser.parse_args()
    try:
        config = load_config(options.defense, {"prompts.n": options.n})
        if config.task not in KEPT:
            raise InputError(f"{options.defense}: its task is {config.task!r}; give a defense of {' or '.join(KEPT)}")
        if len({clamp.sae for clamp in config.clamps}) > 1 or config.search.sites != "first":
            raise InputError(f"{options.defense}: clamps several sites; give a defense at one")
        published = published_rows(config, BESIDE)
        row, by_budget = published.get("wmdp_bio", {}), published.get("by_budget", {})
        if lacking := {"flips", "questions", "free", "free_drift", "held", "held_drift"} - set(row):
            raise InputError(f"{options.defense}: published.rows.wmdp_bio: has no {sorted(lacking)[0]}; write it there")
        points = Points.open(options.out, config.relevant())
        setting = load_setting(config)
        bench = build_bench(setting)
    except InputError as error:
        sys.exit(f"unlearning: {error}")
    free, c1 = [], []
    for number, batch in enumerate(bench.batches):
        print(f"batch {number + 1} of {len(bench.batches)}", file=sys.stderr, flush=True)
        for name, rows, feasible in (
            ("free", free, Anywhere()),
            ("c1", c1, bench.feasible(bench.objective(batch.target))),
        ):
            unit = points.get(f"{name}-{number}", lambda batch=batch, space=feasible: searched(bench, batch, space))
            rows += unit["rows"]
    if not c1:
        sys.exit("unlearning: the clamp turns no answer wrong; clamp more features, or to a lower value")
    known = len(set(bench.examples.groups or bench.examples.ids))
    print(table(HEADS, published_line(row), line(f"{config.task}, {config.model}", known, free, c1)))
    print(
        f"\nfree: without a constraint; both within {bench.budget:g}. By budget, under C1:\n\n{curve(c1, by_budget)}\n"
    )
    print(retained(points.get("kept", lambda: {"ways": KEPT[config.task](setting, bench)})["ways"]))


if __name__ == "__main__":
    main()
