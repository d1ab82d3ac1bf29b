"""Targeted probe perturbation for every class: what ablation does to the probes, and whether a delta undoes it.

1. *Score*. Features of each class by their effect on its probe; SAEBench's score for several numbers of them.
2. *Recovery*. For each class the check's defense: valid flips (the probe says yes without the ablation and not with
   it), searched at each budget with the clamped features free (*unconstrained*) and held (C1, *constrained*), and
   each delta replayed by a certificate.
3. *Table and figure*: recovery against reactivation, one arrow a class from unconstrained to constrained, at the budget
   of the configuration; beside them the published averages, `published.rows` of the configuration (else those of
   `published/tpp_gemma2.yaml`).

Each class is kept in the folder as soon as it is there; a later start with the same settings goes on from it.

    python analyses/tpp.py [DEFENSE.yaml] [--budgets 5 10 20 40] [--counts 16 32 64 128 256] [--out runs/tpp]
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from beside import published_rows
from matplotlib import pyplot as plt
from points import Points

from recover.baselines.tpp import ablated, effect, score
from recover.defenses.selection import largest, mean_activations
from recover.evidence.certificate import certify
from recover.evidence.controls import Anywhere
from recover.models.host import Model
from recover.models.names import resolve_model
from recover.numerics.statistics import wilson
from recover.protocol.bench import Bench
from recover.run.config import Config, Selection, load_config
from recover.run.setting import Setting, build_bench
from recover.saes.names import load_sae
from recover.search.ascent import find_perturbation
from recover.tasks import probe, read_options
from recover.types import InputError, Tensor

DEFAULT = Path(__file__).with_name("tpp_smollm2.yaml")
MEASURES = ("recovered", "clean", "reactivated", "drift", "norm", "share")
WAYS = ("unconstrained", "constrained")
BESIDE = "tpp_gemma2.yaml"
"""Whose published figures stand beside ours, where the defense names none."""
Rows = Mapping[str, Mapping[str, float]]


class Bank:
    """Probes and texts, made when they are first needed."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.clamp = config.clamps[0]

    @cached_property
    def loaded(self) -> Any:
        return resolve_model(self.config.model, self.config.device, self.config.dtype, self.config.device_map)

    @cached_property
    def model(self) -> Model:
        return Model(self.loaded.module, self.loaded.tokenizer)

    @cached_property
    def sae(self) -> Any:
        return load_sae(self.clamp.sae).to(self.model.device)

    @cached_property
    def material(self) -> probe.Material:
        """The task's own, with the options of the configuration."""
        options = read_options("probe", self.config.prompts.model_dump())
        takes = inspect.signature(probe.prepare).parameters
        return probe.prepare(self.model, **{name: value for name, value in options.items() if name in takes})

    def activations(self, texts: probe.Texts) -> Tensor:
        """Mean activation of each feature over each text, `[batch d_sae]`."""
        model = self.material.head(self.model)
        rows = torch.split(torch.arange(len(texts.ids)), model.batch_size(texts.prompts, self.sae.d_sae))
        parts = [mean_activations(model, self.sae, self.material.site, texts.prompts.select(some)) for some in rows]
        return torch.cat(parts)

    def bench(self, target: str, features: Sequence[int]) -> Bench:
        """The check's own, for this class and these features."""
        clamp = self.clamp.model_copy(update={"features": tuple(features)})
        config = self.config.model_copy(update={"clamps": (clamp,)})
        examples = self.material.examples(target, self.config.prompts.n)
        return build_bench(Setting(config, self.loaded, self.model, {clamp.sae: self.sae}, examples))


def scored(bank: Bank, counts: Sequence[int], top: int) -> dict[str, Any]:
    """Accuracy of the probes, the features of each class, and the score for each number of them."""
    material, sae = bank.material, bank.sae
    probes, train, test = material.probes, material.train, material.test
    before, after = bank.activations(train), bank.activations(test)
    head = material.head(bank.model)
    rows = torch.split(torch.arange(len(test.ids)), head.batch_size(test.prompts, sae.d_sae))
    with torch.no_grad():
        clean = torch.cat(
            [
                head.run(test.prompts.select(some), reads=test.prompts.ids.shape[1] - probe.SKIPPED).logits.mean(dim=1)
                for some in rows
            ]
        )
    ranked = [
        largest(found, min(max(*counts, top), int((found > 0).sum())))
        for found in (
            effect(before, train.label == number, sae.W_dec, probes.weight[number])
            for number in range(len(material.labels))
        )
    ]
    by_count = {}
    for count in sorted({*counts, top}):
        under = [ablated(clean, after, features[:count], sae.W_dec, probes.weight) for features in ranked]
        found = score(probes, clean, under, test.label)
        by_count[str(count)] = {"intended": found.intended, "unintended": found.unintended, "total": found.total}
    return {
        "labels": list(material.labels),
        "accuracy": probes.accuracy(clean, test.label).tolist(),
        "train_accuracy": probes.accuracy(probes.logits(material.mean), train.label).tolist(),
        "features": [list(features[:top]) for features in ranked],
        "scores": by_count,
    }


def searched(bench: Bench, budgets: Sequence[float]) -> dict[str, Any]:
    """Recovery of one class's valid flips at each budget, both ways, by certificate."""
    started = time.perf_counter()
    batches = [batch for batch in bench.batches if len(batch.flips)]
    base = sum(int((batch.base > 0).sum()) for batch in bench.batches)
    point: dict[str, Any] = {"texts": len(bench.examples.ids), "base": base}
    point["flips"] = sum(len(batch.flips) for batch in batches)
    point["budgets"] = {f"{budget:g}": {way: _measured(bench, way, budget) for way in WAYS} for budget in budgets}
    point["seconds"] = time.perf_counter() - started
    return point


def _measured(bench: Bench, way: str, budget: float) -> dict[str, Any]:
    """Means over valid flips; `clean` is recovered with no feature reactivated."""
    found: dict[str, list[Tensor]] = {}
    for batch in bench.batches:
        if not len(batch.flips):
            continue
        target = batch.target
        space = Anywhere() if way == "unconstrained" else bench.feasible(target)
        delta = find_perturbation(target, target.zero_delta, space, budget, bench.schedule).delta
        part = batch.flipped
        facts = certify(bench.exact, bench.defense, part.prompts, part.behavior, delta, bench.surface)
        values = {
            "recovered": facts.shows,
            "held": facts.held,
            "clean": facts.shows & (facts.reactivated == 0),
            "reactivated": facts.reactivated / facts.dormant.clamp(min=1),
            "drift": facts.relative_drift,
            "norm": facts.norm,
            "share": facts.relative_norm,
        }
        for name, one in values.items():
            found.setdefault(name, []).append(one.double())
    return {name: float(torch.cat(parts).mean()) for name, parts in found.items()}


def lines(
    scores: Mapping[str, Any], points: Sequence[Mapping[str, Any]], budget: float, top: int, published: Rows
) -> list[str]:
    """The table of one budget."""
    labels, drops = scores["labels"], scores["scores"][str(top)]
    right, known = (sum(scores[name]) / len(labels) for name in ("accuracy", "train_accuracy"))
    told = [
        f"budget {budget:g}: {top} features of each class ablated; probes right on {right:.1%} of unseen texts "
        f"({known:.1%} of those to train with); free: unconstrained, held: under C1",
        f"{'':9} {'':5} {'':7} {'drop of probes':>15} | {'recovered':^23} | {'none react.':^11} | {'reactivated':^13} "
        f"| {'drift':^15} | held",
        f"{'':9} {'probe':>5} {'flips':>7} {'own':>7} {'others':>7} | {'free':>5} {'held':>5} {'95%':>11} | {'free':>5}"
        f" {'held':>5} | {'free':>6} {'held':>6} | {'free':>7} {'held':>7} |  norm share",
    ]
    for number, (label, point) in enumerate(zip(labels, points, strict=True)):
        head = f"{label:9.9} {scores['accuracy'][number]:5.1%} {point['flips']:3d}/{point['base']:3d}"
        head += f" {drops['intended'][number]:7.3f} {drops['unintended'][number]:7.3f}"
        if not point["flips"]:
            told.append(f"{head} | no valid flip")
            continue
        free, held = (point["budgets"][f"{budget:g}"][way] for way in WAYS)
        low, high = wilson(round(held["recovered"] * point["flips"]), point["flips"])
        told.append(f"{head} {_row(free, held, f'{low:4.0%} to {high:4.0%}')}")
    free, held = (averaged(points, budget, way) for way in WAYS)
    means = [sum(drops[kind]) / len(labels) for kind in ("intended", "unintended")]
    told.append(f"{'average':9} {'':13} {means[0]:7.3f} {means[1]:7.3f} {_row(free, held, '')}")
    told.append(f"{'published':9} {'':29} {_row(published['unconstrained'], published['constrained'], '')}")
    return told


def _row(free: Mapping[str, float], held: Mapping[str, float], interval: str) -> str:
    size = f"{held['norm']:5.1f} {held['share']:5.1%}" if "norm" in held else ""
    return (
        f"| {free['recovered']:5.3f} {held['recovered']:5.3f} {interval:>11} | {free['clean']:5.3f} "
        f"{held['clean']:5.3f} | {free['reactivated']:6.4f} {held['reactivated']:6.4f} "
        f"| {free['drift']:7.1e} {held['drift']:7.1e} | {size}"
    )


def averaged(points: Sequence[Mapping[str, Any]], budget: float, way: str) -> dict[str, float]:
    """Means over the classes that have a valid flip."""
    rows = [point["budgets"][f"{budget:g}"][way] for point in points if point["flips"]]
    return {name: sum(row[name] for row in rows) / len(rows) for name in MEASURES}


def figure(
    scores: Mapping[str, Any], points: Sequence[Mapping[str, Any]], budget: float, path: Path, published: Rows
) -> None:
    """Recovery against reactivation, all of it and without reactivation: an arrow a class."""
    mpl.rcParams.update({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})
    canvas, panels = plt.subplots(1, 2, figsize=(8.6, 3.6), layout="constrained", sharex=True, sharey=True)
    for axes, name, words in zip(
        panels, ("recovered", "clean"), ("recovery", "recovery, none reactivated"), strict=True
    ):
        for number, (label, point) in enumerate(zip(scores["labels"], points, strict=True)):
            if point["flips"]:
                ends = [point["budgets"][f"{budget:g}"][way] for way in WAYS]
                _arrow(axes, [(end["reactivated"], end[name]) for end in ends], f"C{number}", label)
        _arrow(axes, [(published[way]["reactivated"], published[way][name]) for way in WAYS], "black", "published mean")
        axes.set(xlabel="share of clamped features reactivated", ylabel=words, ylim=(-0.03, 1.05))
    panels[1].legend(frameon=False, fontsize=8)
    canvas.savefig(path)


def _arrow(axes: Any, ends: Sequence[tuple[float, float]], color: str, label: str) -> None:
    axes.annotate("", xy=ends[1], xytext=ends[0], arrowprops={"arrowstyle": "->", "color": color, "alpha": 0.6})
    axes.plot(*ends[0], "o", color=color, mfc="none")
    axes.plot(*ends[1], "o", color=color, label=label)


def main() -> None:
    """Run all classes; each is printed with the tables at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--budgets", type=float, nargs="+", default=[5.0, 10.0, 20.0, 40.0])
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--n", type=int, help="texts of each class to test with (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/tpp"))
    options = parser.parse_args()
    try:
        if min(options.budgets) <= 0:
            raise InputError(f"--budgets: {min(options.budgets):g} is no norm; give numbers above 0")
        config = load_config(options.defense)
        config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"n": options.n})})
        features = config.clamps[0].features
        if config.task != "probe" or len(config.clamps) > 1 or not isinstance(features, Selection):
            raise InputError(f"{options.defense}: this is for task: probe and one clamp of features by effect")
        published = published_rows(config, BESIDE)
        if any({"recovered", "clean", "reactivated", "drift"} - set(published.get(way, ())) for way in WAYS):
            raise InputError(
                f"{options.defense}: published.rows: must have {' and '.join(WAYS)}, each with recovered, clean, "
                "reactivated and drift"
            )
        budgets = sorted({*options.budgets, config.search.budget})
        settings = {"config": config.relevant(), "budgets": budgets, "counts": sorted(options.counts)}
        kept, bank = Points.open(options.out, settings), Bank(config)
        scores = kept.get("score", lambda: scored(bank, options.counts, features.top))
        points = []
        for label, chosen in zip(scores["labels"], scores["features"], strict=True):
            point = kept.get(
                f"target-{label}",
                lambda label=label, chosen=chosen: searched(bank.bench(label, chosen), budgets),
            )
            print(f"{label}: {point['flips']} valid flips, {point['seconds']:.0f} s", flush=True)
            points.append(point)
    except InputError as error:
        sys.exit(f"tpp: {error}")
    print("\nfeatures  intended  unintended  score")
    for count, found in scores["scores"].items():
        means = [sum(found[kind]) / len(found[kind]) for kind in ("intended", "unintended")]
        print(f"{count:>8} {means[0]:9.3f} {means[1]:11.3f} {found['total']:6.3f}")
    for budget in budgets:
        print("\n" + "\n".join(lines(scores, points, budget, features.top, published)))
    figure(scores, points, config.search.budget, options.out / "tpp.svg", published)
    print(f"\nfigure: {options.out / 'tpp.svg'}, at budget {config.search.budget:g}")


if __name__ == "__main__":
    main()
