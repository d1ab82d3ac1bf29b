"""Is the recovery that `refusal.py` finds specific? Its pinned search, beside three controls.

1. *Placebo answer*: the same search for the answer to *another* request, the next one's.
2. *Random delta*: a random pinned delta for each request, as long as the budget.
3. *Shared, unseen*: one delta for all, fitted on every other request and read on those between. It is the free parts
   with the mean of the corrections, so that it carries nothing of a held-out answer; on held-out requests it is not
   pinned therefore, and its drift says by how much.

    python analyses/refusal_controls.py [DEFENSE.yaml] [--skip CONTROL ...] [--steps 40] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from einops import repeat

import recover as rc
from recover.evidence import FitSchedule, Problem
from recover.protocol import Bench, ReadOut, flips_of, read_out, search_pinned
from recover.run import build_bench, load_config, load_setting
from recover.search import scale_to

HERE = Path(__file__).parent


def placebo(bench: Bench, part: rc.Examples) -> ReadOut:
    """A pinned search for the answer to another request."""
    asked, started = part.answered_as(part.dialogue.select([*range(1, len(part.ids)), 0])), time.perf_counter()
    delta = search_pinned(bench, asked)
    return read_out("placebo answer", bench, asked, delta, time.perf_counter() - started)


def random(bench: Bench, part: rc.Examples) -> ReadOut:
    """A random pinned delta for each request, as long as the budget."""
    target = bench.objective(bench.defended(part))
    drawn = torch.randn(target.start.shape, generator=torch.Generator().manual_seed(bench.schedule.seed))
    noise = drawn.to(target.start)
    free = target.within(scale_to(target.free.project(noise), bench.budget), bench.budget)
    return read_out("random delta", bench, part, bench.whole(part, target, free)[0], 0.0)


def shared(bench: Bench, part: rc.Examples) -> ReadOut:
    """One delta for all, fitted on every other request and read on those between."""
    index = torch.arange(len(part.ids))
    fit, held_out = part.select(index[::2]), part.select(index[1::2])
    started = time.perf_counter()
    target = bench.objective(bench.defended(fit))
    schedule = FitSchedule(steps=bench.schedule.steps, seed=bench.schedule.seed)
    free = rc.fit_shared(rc.Pool((target,)), [Problem(target.free, bench.budget)], schedule)
    corrected = target.delta(free.expand_as(target.start)).mean(dim=0)
    each = repeat(corrected, "pos d_model -> batch pos d_model", batch=len(held_out.ids))
    return read_out("shared, unseen", bench, held_out, each, time.perf_counter() - started)


CONTROLS = {"placebo answer": placebo, "random delta": random, "shared, unseen": shared}


def rows(bench: Bench, part: rc.Examples, skipped: list[str]) -> Iterator[ReadOut]:
    """Each control, as soon as it is there."""
    yield read_out("clamps alone", bench, part, bench.defended(part).zero_delta, 0.0)
    for name, control in CONTROLS.items():
        if name not in skipped:
            yield control(bench, part)


def main() -> None:
    """Run the controls; every row is printed as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", nargs="?", type=Path, default=HERE / "refusal_smollm2.yaml")
    parser.add_argument("--n", type=int, help="ordinary requests (default: as the file has it)")
    parser.add_argument("--flips", type=int, help="valid flips that are searched (default: all)")
    parser.add_argument("--steps", type=int, help="gradient steps of a search (default: as the file has it)")
    parser.add_argument("--skip", nargs="*", default=[], help="controls that are not run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        config = load_config(options.defense, {"prompts.n": options.n, "search.steps": options.steps})
        bench = build_bench(load_setting(config))
    except rc.InputError as error:
        sys.exit(f"refusal_controls: {error}")
    part = flips_of(bench)
    if part is None:
        sys.exit("refusal_controls: nothing turned into a refusal; raise more features, or to more")
    part = part.select(torch.arange(min(len(part.ids), options.flips or len(part.ids))))
    print(ReadOut.HEADINGS, flush=True)
    found = []
    for row in rows(bench, part, options.skip):
        found.append(row)
        print(row, flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
