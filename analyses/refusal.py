"""Refusal features raised at two layers until SmolLM2 refuses: is the answer still there, with the clamps held?

1. *Defense* (`refusal_smollm2.yaml`): features that are more active before refusals than before answers, each raised to
   a multiple of its mean before a refusal, at every position. Requests that turn from an answer to a refusal are the
   valid flips.
2. *Methods*: each searches, under the live clamps, for the model's own answer, teacher-forced. What it finds is
   replayed in a fresh run (drift), and in free generation (what is said, and drift along it).
3. *Beside it* what was published. `refusal_controls.py` runs the controls.

    python analyses/refusal.py [DEFENSE.yaml] [--skip METHOD ...] [--steps 40] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

import recover as rc
from recover.baselines import Opening, SoftSuffix, find_probed, opened
from recover.defenses import say
from recover.evidence import Anywhere
from recover.protocol import Bench, ReadOut, flips_of, read_out, read_out_suffix, search_pinned
from recover.run import Config, build_bench, load_config, load_setting
from recover.search import ProjectedAdam, find_linearized

HERE, OPENING, VECTORS = Path(__file__).parent, 8, 16
BESIDE = HERE / "published" / "refusal_advbench_gemma2.yaml"


def unconstrained(bench: Bench, part: rc.Examples) -> torch.Tensor:
    """A delta at every site, with nothing held."""
    target = bench.defended(part)
    return rc.find_perturbation(target, target.zero_delta, Anywhere(), bench.budget, bench.schedule).delta


def two_stage(bench: Bench, part: rc.Examples) -> torch.Tensor:
    """Pinned, begun with the answer's opening against that of the refusal, as published."""
    refused = say(bench.model, part.dialogue.prompts, OPENING, bench.defense, stop=part.dialogue.stop)
    own, refusal = (
        bench.objective(bench.defended(rc.Examples.of(replace(part.dialogue, answers=answers), OPENING)))
        for answers in (part.dialogue.answers, refused)
    )
    target = bench.objective(bench.defended(part))
    opening = Opening(own, refusal, columns=part.behavior.reads)
    return search_pinned(bench, part, opened(opening, target.start, target.free, bench.budget, bench.schedule))


def jacobian(bench: Bench, part: rc.Examples) -> torch.Tensor:
    """A delta at the first site, the features of all sites restored."""
    return find_linearized(bench.defended(part), bench.budget, bench.schedule).delta


def probes(bench: Bench, part: rc.Examples) -> torch.Tensor:
    """The published baseline: a delta at the first site, the row space guessed from 8 random probes."""
    return find_probed(bench.defended(part), bench.budget, bench.schedule).delta


def soft_suffix(bench: Bench, part: rc.Examples) -> ReadOut:
    """The published baseline that puts vectors behind the prompt, read out like the others."""
    started = time.perf_counter()
    soft = SoftSuffix.of(bench.model, bench.defense, part.prompts, part.behavior, n=VECTORS)
    found = rc.find_perturbation(soft, soft.start, Anywhere(), bench.budget, bench.schedule, rule=ProjectedAdam)
    return read_out_suffix("soft suffix", bench, part, soft, found, time.perf_counter() - started)


EVERY_SITE = {"unconstrained": unconstrained, "pinned": search_pinned, "two-stage": two_stage}
FIRST_SITE = {"jacobian": jacobian, "8 probes": probes}


def published(config: Config) -> Mapping[str, Mapping[str, float]]:
    """The published rows of the configuration, else those of AdvBench."""
    return (config.published and config.published.rows) or load_config(BESIDE).published.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", nargs="?", type=Path, default=HERE / "refusal_smollm2.yaml")
    parser.add_argument("--n", type=int, help="ordinary requests (default: as the file has it)")
    parser.add_argument("--flips", type=int, help="valid flips that are searched (default: all)")
    parser.add_argument("--steps", type=int, help="gradient steps of a search (default: as the file has it)")
    parser.add_argument("--skip", nargs="*", default=[], help="methods that are not run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        config = load_config(options.defense, {"prompts.n": options.n, "search.steps": options.steps})
        bench = build_bench(load_setting(config))
    except rc.InputError as error:
        sys.exit(f"refusal: {error}")
    part = flips_of(bench)
    if part is None:
        sys.exit("refusal: nothing turned into a refusal; raise more features, or to more")
    n, served, flipped = (len(ids) for ids in (bench.examples.ids, bench.examples.dialogue.served, part.ids))
    print(f"{served} of {n} requests answered, {flipped} of these refused", flush=True)
    part = part.select(torch.arange(min(flipped, options.flips or flipped)))
    rows = [read_out("clamps alone", bench, part, bench.defended(part).zero_delta, 0.0)]
    print(ReadOut.HEADINGS, rows[0], sep="\n", flush=True)
    for name, search in {**EVERY_SITE, **FIRST_SITE, "soft suffix": soft_suffix}.items():
        if name in options.skip:
            continue
        here = bench.entered_at(bench.surface.first) if name in FIRST_SITE else bench
        started = time.perf_counter()
        found = search(here, part)
        seconds = time.perf_counter() - started
        rows.append(found if isinstance(found, ReadOut) else read_out(name, here, part, found, seconds))
        print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    print("as published (Gemma 2 2B):")
    print(*(ReadOut.published(*row) for row in published(config).items()), sep="\n")


if __name__ == "__main__":
    main()
