"""Targeted probe perturbation for every class: what ablation does to the probes, and whether a delta undoes it.

1. *Score*. Features of each class by their effect on its probe; SAEBench's score for several numbers of them.
2. *Recovery*. For each class the check's defense: valid flips (the probe says yes without the ablation and not with
   it), searched at each budget with the clamped features free (*unconstrained*) and held (C1, *constrained*).

Each class is kept in the folder as soon as it is there; a later start with the same settings goes on from it.
`tpp_table.py` makes the tables and the figure of the folder, beside the published averages.

    python analyses/tpp.py [DEFENSE.yaml] [--budgets 5 10 20 40] [--counts 16 32 64 128 256] [--out runs/tpp]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import recover as rc
from recover.baselines import class_scores
from recover.evidence import Anywhere
from recover.protocol import Bench, certificate_of
from recover.run import Config, Points, Selection, build_bench, load_config, load_setting
from recover.tasks import prepare_probes, read_options

WAYS = ("unconstrained", "constrained")


class Classes:
    """The setting, and the material of every class, made when it is first needed."""

    def __init__(self, config: Config) -> None:
        setting = load_setting(config)
        given = read_options("probe", config.prompts.model_dump())
        options = {name: value for name, value in given.items() if name not in ("target", "n")}
        self.setting, self.material = setting, prepare_probes(setting.model, **options)

    def scores(self, counts: Sequence[int]) -> dict[str, Any]:
        """The features of each class, and SAEBench's score for each number of them."""
        (sae,) = self.setting.saes.values()
        return asdict(class_scores(self.setting.model, sae, self.material, counts))

    def bench(self, target: str, features: Sequence[int]) -> Bench:
        """The check's own, for a class and its features."""
        config = self.setting.config
        clamp = config.clamps[0].model_copy(update={"features": tuple(features)})
        examples = self.material.examples(target, config.prompts.n)
        config = config.model_copy(update={"clamps": (clamp,)})
        return build_bench(replace(self.setting, config=config, examples=examples))


def searched(
    classes: Callable[[], Classes], target: str, features: Sequence[int], budgets: Sequence[float]
) -> dict[str, Any]:
    """Recovery of one class's valid flips at each budget, both ways, by certificate."""
    started, bench = time.perf_counter(), classes().bench(target, features)
    found = {f"{budget:g}": {way: measured(bench, way, budget) for way in WAYS} for budget in budgets}
    base = sum(int((batch.base > 0).sum()) for batch in bench.batches)
    flips = sum(len(batch.flips) for batch in bench.batches)
    seconds = time.perf_counter() - started
    return {"texts": len(bench.examples.ids), "base": base, "flips": flips, "budgets": found, "seconds": seconds}


def measured(bench: Bench, way: str, budget: float) -> dict[str, Any]:
    """Means over valid flips; `clean` is recovered with no feature reactivated."""
    found: dict[str, list[torch.Tensor]] = {}
    for batch in (batch for batch in bench.batches if len(batch.flips)):
        target = batch.target
        space = Anywhere() if way == "unconstrained" else bench.feasible(target)
        delta = rc.find_perturbation(target, target.zero_delta, space, budget, bench.schedule).delta
        facts = certificate_of(bench, batch.flipped, delta)
        values = {"recovered": facts.shows, "held": facts.held, "clean": facts.shows & (facts.reactivated == 0)}
        values |= {"reactivated": facts.reactivated / facts.dormant.clamp(min=1), "drift": facts.relative_drift}
        for name, one in (values | {"norm": facts.norm, "share": facts.relative_norm}).items():
            found.setdefault(name, []).append(one.double())
    return {name: float(torch.cat(parts).mean()) for name, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", nargs="?", type=Path, default=Path(__file__).with_name("tpp_smollm2.yaml"))
    parser.add_argument("--budgets", type=float, nargs="+", default=[5.0, 10.0, 20.0, 40.0])
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--n", type=int, help="texts of each class to test with (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/tpp"))
    options = parser.parse_args()
    try:
        if min(options.budgets) <= 0:
            raise rc.InputError(f"--budgets: a budget must be above 0, got {min(options.budgets):g}")
        config = load_config(options.defense)
        config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"n": options.n})})
        rule = config.clamps[0].features
        if config.task != "probe" or len(config.clamps) > 1 or not isinstance(rule, Selection):
            raise rc.InputError(f"{options.defense}: this is for task: probe and one clamp of features by effect")
        budgets = sorted({*options.budgets, config.search.budget})
        settings = {"config": config.relevant(), "budgets": budgets, "counts": sorted(options.counts)}
        points, classes = Points.open(options.out, settings), cache(lambda: Classes(config))
        scores = points.get("score", lambda: classes().scores([*options.counts, rule.top]))
        for label, features in zip(scores["labels"], scores["features"], strict=True):
            point = points.get(f"target-{label}", partial(searched, classes, label, features[: rule.top], budgets))
            print(f"{label}: {point['flips']} valid flips, {point['seconds']:.0f} s", flush=True)
    except rc.InputError as error:
        sys.exit(f"tpp: {error}")
    print("\nfeatures  intended  unintended  score")
    for count, found in scores["scores"].items():
        means = [fmean(found[kind]) for kind in ("intended", "unintended")]
        print(f"{count:>8} {means[0]:9.3f} {means[1]:11.3f} {means[0] - means[1]:6.3f}")
    print(f"\ntables and figure: python analyses/tpp_table.py {options.out}")


if __name__ == "__main__":
    main()
