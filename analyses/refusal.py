"""Refusal features raised at two layers until SmolLM2 refuses: is the answer still there, with the clamps held?

1. *Defense* (`refusal_smollm2.yaml`): features that are more active before refusals than before answers, each raised to
   a multiple of its mean before a refusal, at every position. Requests that turn from an answer to a refusal are the
   valid flips.
2. *Methods*: each searches, under the live clamps, for the model's own answer, teacher-forced. What it finds is
   replayed in a fresh run (drift), and in free generation (what is said, and drift along what is said).
3. *Controls*: the answer to *another* request (placebo), random pinned deltas of the budget's norm, and one delta for
   all, fitted on half of the requests and read on the other half.
4. *Beside it* what was published: `published.rows` of the configuration (else those of
   `published/refusal_advbench_gemma2.yaml`).

    python analyses/refusal.py [DEFENSE.yaml] [--skip METHOD ...] [--steps 40] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from beside import published_rows
from einops import repeat

from recover import Schedule, find_perturbation
from recover.baselines.probes import find_probed
from recover.baselines.soft_suffix import SoftSuffix, spoken_with, with_room
from recover.baselines.two_stage import Opening, opened
from recover.defenses.speech import say
from recover.evidence import certificate
from recover.evidence.controls import Anywhere
from recover.evidence.transfer import FitSchedule, Pool, Problem, fit_shared
from recover.models.generation import answered, generate, texts
from recover.numerics.metrics import norm
from recover.protocol.bench import Bench
from recover.protocol.phases import spoken
from recover.run.config import load_config
from recover.run.setting import build_bench, load_setting
from recover.search.adam import ProjectedAdam
from recover.search.ascent import scale_to
from recover.search.constraints.pinned import Pinned
from recover.search.constraints.restored import find_linearized
from recover.search.pinned import find_pinned
from recover.tasks import replies as readouts
from recover.tasks.behaviors import ForcedAnswer, positions_read
from recover.tasks.examples import Examples
from recover.types import Delta, InputError

OPENING = 8
"""Tokens of an opening."""
DEFAULT = Path(__file__).parent / "refusal_smollm2.yaml"
BESIDE = "refusal_advbench_gemma2.yaml"
"""Whose published figures stand beside ours, where the defense names none."""
Search = Callable[[Bench, Examples, Schedule], Delta]
"""Of a bench, the flips and how hard to search; gives deltas as they would be saved."""


@dataclass(frozen=True)
class Row:
    """One method over all valid flips: counts, means and largest values; what it does not have is None."""

    method: str
    n: int
    non_refusal: int
    base_like: int
    strict: int
    exact: int
    norm: float
    relative_norm: float | None
    relative_drift: float
    preactivation_shift: float | None
    floor_violation: float | None
    free_drift: float
    seconds: float


def flips_of(bench: Bench) -> Examples | None:
    """The requests that are answered, and refused under the defense; None where there are none."""
    rows = [rows[batch.flips] for rows, batch in zip(bench.rows, bench.batches, strict=True)]
    chosen = torch.cat(rows)
    return bench.examples.select(chosen) if len(chosen) else None


def unconstrained(bench: Bench, part: Examples, schedule: Schedule) -> Delta:
    """A delta at every site, with nothing held."""
    target = bench.defended(part)
    return find_perturbation(target, target.zero_delta, Anywhere(), bench.budget, schedule).delta


def pinned(bench: Bench, part: Examples, schedule: Schedule) -> Delta:
    """A delta at every site under which no clamped pre-activation moves."""
    target = Pinned.of(bench.defended(part))
    return bench.whole(part, target, find_pinned(target, bench.budget, schedule).free)[0]


def two_stage(bench: Bench, part: Examples, schedule: Schedule) -> Delta:
    """The same, begun with the answer's opening against that of the refusal, as published."""
    dialogue = part.dialogue
    assert dialogue is not None
    refused = say(bench.model, dialogue.prompts, OPENING, bench.defense, stop=dialogue.stop)
    pins = [
        Pinned.of(bench.defended(Examples.of(replace(dialogue, answers=answers), OPENING)))
        for answers in (dialogue.answers, refused)
    ]
    target = Pinned.of(bench.defended(part))
    opening = Opening(*pins, columns=positions_read(part.behavior))
    start = opened(opening, target.start, target.free, bench.budget, schedule)
    return bench.whole(part, target, find_pinned(target, bench.budget, schedule, start=start).free)[0]


def jacobian(bench: Bench, part: Examples, schedule: Schedule) -> Delta:
    """A delta at the first site, the features of all sites restored."""
    return find_linearized(bench.defended(part), bench.budget, schedule).delta


def probes(bench: Bench, part: Examples, schedule: Schedule) -> Delta:
    """The published baseline: a delta at the first site, the row space guessed from 8 random probes."""
    return find_probed(bench.defended(part), bench.budget, schedule).delta


METHODS: dict[str, tuple[Search, bool]] = {
    "unconstrained": (unconstrained, True),
    "pinned": (pinned, True),
    "two-stage": (two_stage, True),
    "jacobian": (jacobian, False),
    "8 probes": (probes, False),
}
"""Each with whether its delta enters at every site."""


def read_out(method: str, bench: Bench, part: Examples, delta: Delta, seconds: float) -> Row:
    """What a method's deltas do, teacher-forced and in free generation."""
    facts = certificate(bench.exact, bench.defense, part.prompts, part.behavior, delta, bench.surface)
    replies = spoken(bench, part, delta)
    return Row(
        method=method,
        n=len(part.ids),
        non_refusal=sum(not reply["refusal"] and not reply["safety_cue"] for reply in replies),
        base_like=sum(reply["base_like"] for reply in replies),
        strict=sum(reply["strict_base_like"] for reply in replies),
        exact=int(facts.shows.sum()),
        norm=float(facts.norm.mean()),
        relative_norm=float(facts.relative_norm.mean()),
        relative_drift=float(facts.relative_drift.max()),
        preactivation_shift=float(facts.preactivation_shift.max()),
        floor_violation=float(facts.clamp_floor_violation.max()),
        free_drift=max(reply["relative_drift"] for reply in replies),
        seconds=seconds / len(part.ids),
    )


def run(method: str, search: Search, bench: Bench, part: Examples, schedule: Schedule) -> Row:
    """Search, and read out."""
    started = time.perf_counter()
    delta = search(bench, part, schedule)
    return read_out(method, bench, part, delta, time.perf_counter() - started)


def soft_suffix(bench: Bench, part: Examples, schedule: Schedule, vectors: int = 16) -> Row:
    """The soft-suffix baseline, read out alike; its drift is over the answer's columns."""
    dialogue, defense, model = part.dialogue, bench.defense, bench.model
    assert dialogue is not None
    started = time.perf_counter()
    soft = SoftSuffix.of(model, defense, part.prompts, part.behavior, n=vectors)
    found = find_perturbation(soft, soft.start, Anywhere(), bench.budget, schedule, rule=ProjectedAdam)
    seconds = time.perf_counter() - started
    room = with_room(dialogue.prompts, vectors)
    said = generate(model, room, dialogue.answers.shape[1], spoken_with(defense, found.delta), stop=dialogue.stop)
    columns = said[:, : part.behavior.reads]
    along = SoftSuffix.of(model, defense, answered(dialogue.prompts, columns), ForcedAnswer(columns), n=vectors)
    pairs = zip(texts(model.tokenizer, said), dialogue.texts, strict=True)
    reads = [readouts.read(reply, base) for reply, base in pairs]
    return Row(
        method="soft suffix",
        n=len(part.ids),
        non_refusal=sum(read.non_refusal for read in reads),
        base_like=sum(read.base_like for read in reads),
        strict=sum(read.strict_base_like for read in reads),
        exact=int((found.slack > 0).sum()),
        norm=float(norm(found.delta).mean()),
        relative_norm=None,
        relative_drift=float(soft.drift(found.delta).max()),
        preactivation_shift=None,
        floor_violation=None,
        free_drift=float(along.drift(found.delta).max()),
        seconds=seconds / len(part.ids),
    )


def placebo(bench: Bench, part: Examples, schedule: Schedule) -> Row:
    """A pinned search for the answer to another request: the next one's."""
    assert part.dialogue is not None
    others = part.dialogue.select([*range(1, len(part.ids)), 0])
    return run("placebo answer", pinned, bench, part.answered_as(others), schedule)


def random(bench: Bench, part: Examples, schedule: Schedule) -> Row:
    """A random pinned delta for each request, as long as the budget."""
    target = Pinned.of(bench.defended(part))
    drawn = torch.randn(target.start.shape, generator=torch.Generator().manual_seed(schedule.seed))
    noise = drawn.to(target.start)
    free = target.within(scale_to(target.free.project(noise), bench.budget), bench.budget)
    return read_out("random delta", bench, part, bench.whole(part, target, free)[0], 0.0)


def shared(bench: Bench, part: Examples, schedule: Schedule) -> Row:
    """One delta for all, fitted on every other request and read on those between.

    The vectors are the free parts with the mean of the corrections, so that they carry nothing of a held-out answer;
    on held-out requests they are therefore not pinned, and their drift says by how much.
    """
    index = torch.arange(len(part.ids))
    fit, held_out = part.select(index[::2]), part.select(index[1::2])
    started = time.perf_counter()
    target = Pinned.of(bench.defended(fit))
    problem = Problem(target.free, bench.budget)
    free = fit_shared(Pool((target,)), [problem], FitSchedule(steps=schedule.steps, seed=schedule.seed))
    corrected = target.delta(free.expand_as(target.start)).mean(dim=0)
    each = repeat(corrected, "pos d_model -> batch pos d_model", batch=len(held_out.ids))
    return read_out("shared, unseen", bench, held_out, each, time.perf_counter() - started)


HEADINGS = (
    f"{'':15} {'n':>3} {'non-refusal':>11} {'base-like':>9} {'strict':>6} {'exact':>5} {'norm':>6} {'share':>6} "
    f"{'drift':>8} {'pre-act.':>8} {'floor':>7} {'free drift':>10} {'s each':>6}"
)

PUBLISHED = {
    "n": (".0f", 3), "non_refusal": (".0f", 11), "base_like": (".0f", 9), "strict": (".0f", 6), "exact": (".0f", 5),
    "norm": (".1f", 6), "share": (".1%", 6), "drift": (".3f", 8), "shift": (".3f", 8), "floor": (".3f", 7),
}  # fmt: skip
"""The columns that `published.rows` may have: how each is written, and how wide."""


def line(row: Row) -> str:
    """One row of the table."""

    def figure(value: float | None, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    return (
        f"{row.method:15} {row.n:3d} {row.non_refusal:11d} {row.base_like:9d} {row.strict:6d} {row.exact:5d} "
        f"{row.norm:6.1f} {figure(row.relative_norm, '.1%', 6)} {row.relative_drift:8.1e} "
        f"{figure(row.preactivation_shift, '.1e', 8)} {figure(row.floor_violation, '.4f', 7)} {row.free_drift:10.1e} "
        f"{row.seconds:6.2f}"
    )


def published_line(name: str, row: Mapping[str, float]) -> str:
    """A row as published, under the same headings; its drift is a mean, where ours is the largest."""
    told = (f"{format(row[key], form) if key in row else '-':>{width}}" for key, (form, width) in PUBLISHED.items())
    return f"{name:15} {' '.join(told)}"


def rows(bench: Bench, part: Examples, schedule: Schedule, skipped: Sequence[str]) -> Any:
    """Every row, as soon as it is there."""
    first = bench.entered_at(bench.surface.first)
    zero = bench.defended(part).zero_delta
    yield read_out("clamps alone", bench, part, zero, 0.0)
    for name, (search, every_site) in METHODS.items():
        if name not in skipped:
            yield run(name, search, bench if every_site else first, part, schedule)
    for name, control in {
        "soft suffix": soft_suffix,
        "placebo answer": placebo,
        "random delta": random,
        "shared, unseen": shared,
    }.items():
        if name not in skipped:
            yield control(bench, part, schedule)


def main() -> None:
    """Run the experiment; every row is printed as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--n", type=int, help="ordinary requests (default: as the file has it)")
    parser.add_argument("--flips", type=int, help="valid flips that are searched (default: all)")
    parser.add_argument("--steps", type=int, help="gradient steps of a search (default: as the file has it)")
    parser.add_argument("--skip", nargs="*", default=[], help="methods that are not run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        config = load_config(options.defense, {"prompts.n": options.n, "search.steps": options.steps})
        setting = load_setting(config)
        bench = build_bench(setting)
    except InputError as error:
        sys.exit(f"refusal: {error}")
    part = flips_of(bench)
    if part is None:
        sys.exit("refusal: nothing turned into a refusal; raise more features, or to more")
    part = part.select(torch.arange(min(len(part.ids), options.flips or len(part.ids))))
    served = bench.examples.dialogue.served if bench.examples.dialogue else []
    flipped = sum(len(batch.flips) for batch in bench.batches)
    print(f"{len(served)} of {len(bench.examples.ids)} requests answered, {flipped} of these refused", flush=True)
    print(HEADINGS, flush=True)
    found: list[Row] = []
    for row in rows(bench, part, bench.schedule, options.skip):
        found.append(row)
        print(line(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    print("as published (Gemma 2 2B):")
    for name, figures in published_rows(config, BESIDE).items():
        print(published_line(name, figures))


if __name__ == "__main__":
    main()
