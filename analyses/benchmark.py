"""Ours against the published loop, on the same model, SAE, prompts and valid flips, in one run.

The published loop (`recover.baselines.published_loop`) takes one prompt at a time; ours, `find_perturbation`, takes all
flips at once. Both get a prompt's tokens and the features, and both are timed from there to the deltas, accounting
included in ours. Every delta is measured by the same certificate. Ratios are of seconds per prompt, side by side.

    python analyses/benchmark.py [DEFENSE.yaml] [--flips N] [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import recover as rc
from recover.baselines import published_loop
from recover.numerics import wilson
from recover.run import build_bench, load_config, load_setting


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    seconds_per_prompt: float
    recovered: int
    flips: int
    norm: float
    drift: float
    residual: float

    @classmethod
    def of(cls, name: str, seconds: float, certificate: rc.Certificate) -> Row:
        """From the certificate alone."""
        return cls(
            name=name,
            seconds_per_prompt=seconds / len(certificate.shows),
            recovered=int(certificate.shows.sum()),
            flips=len(certificate.shows),
            norm=certificate.norm.mean().item(),
            drift=certificate.drift.mean().item(),
            residual=certificate.constraint_residual.max().item(),
        )

    def line(self, ours: Row) -> str:
        """Under the headings of `main`."""
        low, high = wilson(self.recovered, self.flips)
        return (
            f"{self.name:<22}{self.seconds_per_prompt:>9.3f}{self.recovered:>8}/{self.flips:<3}{low:>7.0%}-{high:<4.0%}"
            f"{self.norm:>8.2f}{self.drift:>10.1e}{self.residual:>10.1e}"
            f"{self.seconds_per_prompt / ours.seconds_per_prompt:>8.1f}"
        )


def now(device: torch.device) -> float:
    """The time in seconds at which all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Time both; print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", nargs="?", type=Path, default=Path(__file__).parent / "ioi_smollm2.yaml")
    parser.add_argument("--flips", type=int, help="only the first N valid flips (default: all)")
    parser.add_argument("--unconstrained", action="store_true", help="also the published loop without projection")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: as the file has it)")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()

    bench = build_bench(load_setting(load_config(options.defense, {"device": options.device})))
    model, defense, budget = bench.model, bench.defense, bench.budget
    held = rc.EncoderOrthogonal.of(*defense.clamps)
    everything = rc.defend(model, defense, bench.examples.prompts, bench.examples.behavior)
    chosen = bench.examples.select(everything.valid_flips[: options.flips])
    prompts, behavior, n = chosen.prompts, chosen.behavior, len(chosen.ids)
    print(f"{n} valid flips, budget {budget:g}, {torch.get_num_threads()} threads, {model.device}")

    def published(feasible: rc.EncoderOrthogonal | None, name: str) -> torch.Tensor:
        each = (torch.tensor([index]) for index in tqdm(range(n), desc=name))
        found = (
            published_loop(model, defense, prompts.select(one), behavior.select(one), budget, feasible) for one in each
        )
        return torch.cat(list(found))

    def ours(_: None, name: str) -> torch.Tensor:
        target = rc.defend(model, defense, prompts, behavior)
        return rc.find_perturbation(target, target.zero_delta, held, budget).delta

    searches = [("published, projected", published, held), ("recover", ours, None)]
    searches[1:1] = [("published", published, None)] * options.unconstrained
    rows = []
    for name, search, feasible in searches:
        started = now(model.device)
        delta = search(feasible, name)
        seconds = now(model.device) - started
        rows.append(Row.of(name, seconds, rc.certify(model, defense, prompts, behavior, delta)))

    print(f"{'':<22}{'s/prompt':>9}{'recovered':>12}{'95 %':>12}{'norm':>8}{'drift':>10}{'residual':>10}{'ratio':>8}")
    print(*(row.line(rows[-1]) for row in rows), sep="\n")
    if options.json:
        options.json.write_text(json.dumps([vars(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
