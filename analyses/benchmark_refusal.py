"""Ours against the published loop for refusal, on the same requests, defense and budget, in one run.

The published loop (`recover.baselines.PublishedAnswerLoop`) takes one request at a time, with plain PyTorch hooks, and
always all its steps. The publication does not give their number; 20 + 40 here. Ours is `search_pinned` on all flips at
once, accounting apart in both. Both deltas are certified and read out alike. Seconds count per *recovered* (base-like)
request; ratios are of these, side by side.

    python analyses/benchmark_refusal.py [DEFENSE.yaml] [--flips 3] [--steps 60] [--n 100] [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import recover as rc
from recover.baselines import PublishedAnswerLoop
from recover.protocol import Bench, ReadOut, flips_of, read_out, search_pinned
from recover.run import build_bench, load_config, load_setting


def published(bench: Bench, part: rc.Examples, steps: int) -> torch.Tensor:
    """The published loop over these requests, one after another."""
    under = bench.defended(part).defended_logits[:, 0].argmax(dim=-1)
    generator, deltas = torch.Generator().manual_seed(0), []
    for row in tqdm(range(len(part.ids)), desc="published loop", leave=False):
        one = part.select(torch.tensor([row]))
        loop = PublishedAnswerLoop(bench.model, bench.defense, one.prompts, one.behavior, under.unique())
        deltas.append(loop.search(bench.budget, steps, generator))
    return torch.stack(deltas).flatten(1, 2)


def main() -> None:
    """Time both; print both rows and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent / "refusal_smollm2.yaml"
    parser.add_argument("defense", nargs="?", type=Path, default=default)
    parser.add_argument("--flips", type=int, default=3, help="requests that the published loop searches")
    parser.add_argument("--steps", type=int, default=60, help="of the published loop")
    parser.add_argument("--n", type=int, help="ordinary requests (default: as the file has it)")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: as the file has it)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        config = load_config(options.defense, {"prompts.n": options.n, "device": options.device})
        bench = build_bench(load_setting(config))
        part = flips_of(bench)
        if part is None or not 1 <= options.flips <= len(part.ids):
            raise rc.InputError(f"--flips {options.flips}: there are {len(part.ids) if part else 0} valid flips")
    except rc.InputError as error:
        sys.exit(f"benchmark_refusal: {error}")
    bench.model.module.requires_grad_(False)
    some = part.select(torch.arange(options.flips))
    print(ReadOut.HEADINGS, flush=True)
    rows = []
    for name, asked, search in (
        ("published loop", some, lambda: published(bench, some, options.steps)),
        ("pinned, all", part, lambda: search_pinned(bench, part)),
    ):
        started = time.perf_counter()
        delta = search()
        rows.append(read_out(name, bench, asked, delta, time.perf_counter() - started))
        print(rows[-1], flush=True)
    each = [row.seconds * row.n / max(row.base_like, 1) for row in rows]
    print(f"seconds per recovered request: {each[0]:.1f} and {each[1]:.2f}; {each[0] / each[1]:.0f} times")
    if options.json:
        values = {"published": asdict(rows[0]), "ours": asdict(rows[1]), "ratio": each[0] / each[1]}
        options.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
