"""Refusal features raised at two layers until SmolLM2 refuses: is the answer still there, with the clamps held?

1. *Defense*: features that are more active before refusals than before answers, each raised to a multiple of its mean
   before a refusal, at every position. Requests that turn from an answer to a refusal are the valid flips.
2. *Methods*: each searches, under the live clamps, for the model's own answer, teacher-forced. What it finds is
   replayed in a fresh run (drift), and in free generation (what is said, and drift along what is said).
3. *Controls*: the answer to *another* request (placebo), random pinned deltas of the same norm, and one delta for all,
   fitted on half of the requests and read on the other half.

    python analyses/refusal.py [--n 48] [--layers 15 18] [--top 6] [--times 1.5] [--budget 40] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import repeat

from recover import Model, Schedule, certify, recover, resolve_model, resolve_sae
from recover import refusal as readouts
from recover.adam import climb
from recover.behavior import ForcedAnswer
from recover.clamp import Defense
from recover.controls import Anywhere
from recover.defended import Defended, defend
from recover.dialogue import Dialogue, ask, raised, refused_under
from recover.generate import answered, generate
from recover.metrics import norm
from recover.pinned_search import recover_pinned
from recover.pinning import Pinned
from recover.probes import recover_probed
from recover.restoration import recover_restored
from recover.search import scale_to
from recover.soft_suffix import SoftSuffix, spoken_with, with_room
from recover.speech import free_drift, say, texts
from recover.tasks.refusal import draw

Delta = torch.Tensor
Search = Callable[[Dialogue, Defense, float, int, int], Delta]
"""Of the flips, the defense, a budget, the answer's columns and steps."""


@dataclass(frozen=True)
class Row:
    """One method over all valid flips: counts, means and largest values."""

    method: str
    n: int
    non_refusal: int
    base_like: int
    strict: int
    exact: int
    norm: float
    relative_drift: float
    preactivation_shift: float
    floor_violation: float
    free_drift: float
    seconds: float


def _defended(flips: Dialogue, defense: Defense, columns: int, *, every_site: bool) -> Defended:
    return defend(flips.model, defense, *flips.forced(columns), every_site=every_site)


def unconstrained(flips: Dialogue, defense: Defense, budget: float, columns: int, steps: int) -> Delta:
    """A delta at every site, with nothing held."""
    target = _defended(flips, defense, columns, every_site=True)
    return recover(target, target.zero_delta, Anywhere(), budget, Schedule(steps=steps)).delta


def pinned(flips: Dialogue, defense: Defense, budget: float, columns: int, steps: int) -> Delta:
    """A delta at every site under which no clamped pre-activation moves."""
    target = Pinned.of(_defended(flips, defense, columns, every_site=True))
    return recover_pinned(target, budget, Schedule(steps=steps)).delta


def jacobian(flips: Dialogue, defense: Defense, budget: float, columns: int, steps: int) -> Delta:
    """A delta at the first site, the features of all sites restored."""
    target = _defended(flips, defense, columns, every_site=False)
    return recover_restored(target, budget, Schedule(steps=steps)).delta


def probes(flips: Dialogue, defense: Defense, budget: float, columns: int, steps: int) -> Delta:
    """The published baseline: a delta at the first site, the row space guessed from 8 random probes."""
    target = _defended(flips, defense, columns, every_site=False)
    return recover_probed(target, budget, Schedule(steps=steps)).delta


METHODS: dict[str, tuple[Search, bool]] = {
    "unconstrained": (unconstrained, True),
    "pinned": (pinned, True),
    "jacobian": (jacobian, False),
    "8 probes": (probes, False),
}
"""Each with whether its delta enters at every site."""


def read_out(
    method: str, flips: Dialogue, defense: Defense, delta: Delta, tokens: int, seconds: float, *, every_site: bool
) -> Row:
    """What a method's deltas do, teacher-forced and in free generation."""
    columns = delta.shape[1] // (len(defense.sites) if every_site else 1)
    facts = certify(flips.model, defense, *flips.forced(columns), delta, every_site=every_site)
    said = say(flips.model, flips.prompts, tokens, defense, delta, every_site=every_site, stop=flips.stop)
    free = free_drift(flips.model, flips.prompts, said, defense, delta, every_site=every_site)
    reads = _reads(flips, said)
    return Row(
        method=method,
        n=len(flips),
        non_refusal=sum(read.non_refusal for read in reads),
        base_like=sum(read.base_like for read in reads),
        strict=sum(read.strict_base_like for read in reads),
        exact=int(facts.shows.sum()),
        norm=float(facts.norm.mean()),
        relative_drift=float(facts.relative_drift.max()),
        preactivation_shift=float(facts.preactivation_shift.max()),
        floor_violation=float(facts.clamp_floor_violation.max()),
        free_drift=float(free.relative_drift.max()),
        seconds=seconds / len(flips),
    )


def soft_suffix(
    flips: Dialogue, defense: Defense, budget: float, columns: int, tokens: int, steps: int, vectors: int = 16
) -> Row:
    """The soft-suffix baseline, read out alike; its drift is over the answer's columns."""
    started = time.perf_counter()
    soft = SoftSuffix.of(flips.model, defense, *flips.forced(columns), n=vectors)
    found = recover(soft, soft.start, Anywhere(), budget, Schedule(steps=steps), climb=climb)
    seconds = time.perf_counter() - started
    room = with_room(flips.prompts, vectors)
    said = generate(flips.model, room, tokens, spoken_with(defense, found.delta), stop=flips.stop)
    along = SoftSuffix.of(
        flips.model, defense, answered(flips.prompts, said[:, :columns]), ForcedAnswer(said[:, :columns]), n=vectors
    )
    reads, drift = _reads(flips, said), float(soft.drift(found.delta).max())
    return Row(
        method="soft suffix",
        n=len(flips),
        non_refusal=sum(read.non_refusal for read in reads),
        base_like=sum(read.base_like for read in reads),
        strict=sum(read.strict_base_like for read in reads),
        exact=int((found.slack > 0).sum()),
        norm=float(norm(found.delta).mean()),
        relative_drift=drift,
        preactivation_shift=float("nan"),
        floor_violation=float("nan"),
        free_drift=float(along.drift(found.delta).max()),
        seconds=seconds / len(flips),
    )


def placebo(flips: Dialogue, defense: Defense, budget: float, columns: int, tokens: int, steps: int) -> Row:
    """A pinned search for the answer to another request: the next one's."""
    other = flips.with_answers_of(flips.select([*range(1, len(flips)), 0]))
    started = time.perf_counter()
    delta = pinned(other, defense, budget, columns, steps)
    return read_out("placebo answer", other, defense, delta, tokens, time.perf_counter() - started, every_site=True)


def random(flips: Dialogue, defense: Defense, length: float, columns: int, tokens: int, seed: int) -> Row:
    """A random pinned delta for each request, as long as those found."""
    target = Pinned.of(_defended(flips, defense, columns, every_site=True))
    noise = torch.randn(target.start.shape, generator=torch.Generator().manual_seed(seed))
    free = target.within(scale_to(target.free.project(noise), length), length)
    return read_out("random delta", flips, defense, target.delta(free), tokens, 0.0, every_site=True)


def shared(flips: Dialogue, defense: Defense, budget: float, columns: int, tokens: int, steps: int) -> Row:
    """One delta for all, fitted on every other request and read on those between.

    The vectors are the free parts with the mean of the corrections, so that they carry nothing of a held-out answer;
    on held-out requests they are therefore not pinned, and their drift says by how much.
    """
    fit, held_out = flips.select(range(0, len(flips), 2)), flips.select(range(1, len(flips), 2))
    started = time.perf_counter()
    target = Pinned.of(_defended(fit, defense, columns, every_site=True))
    mean = torch.zeros_like(target.start[:1])
    heading = torch.zeros_like(mean)
    for step in range(steps):
        leaf = mean.requires_grad_(True)
        score, _ = target(leaf.expand_as(target.start))
        (gradient,) = torch.autograd.grad(score.mean(), leaf)
        heading = 0.8 * heading + scale_to(target.free.project(gradient), 1.0)
        moved = mean.detach() + 0.2 * budget * (1 - step / steps) * scale_to(heading, 1.0)
        mean = moved * (budget / norm(moved)).clamp(max=1.0)[:, None, None]
    delta = target.delta(mean.expand_as(target.start)).mean(dim=0, keepdim=True)
    each = repeat(delta, "1 pos d_model -> batch pos d_model", batch=len(held_out))
    seconds = time.perf_counter() - started
    return read_out("shared, unseen", held_out, defense, each, tokens, seconds, every_site=True)


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [
        f"{'':15} {'n':>3} {'non-refusal':>11} {'base-like':>9} {'strict':>6} {'exact':>5} {'norm':>6} "
        f"{'rel. drift':>10} {'pre. shift':>10} {'floor':>7} {'free drift':>10} {'s each':>6}"
    ]
    lines += [
        f"{r.method:15} {r.n:3d} {r.non_refusal:11d} {r.base_like:9d} {r.strict:6d} {r.exact:5d} {r.norm:6.1f} "
        f"{r.relative_drift:10.1e} {r.preactivation_shift:10.1e} {r.floor_violation:7.4f} {r.free_drift:10.1e} "
        f"{r.seconds:6.2f}"
        for r in rows
    ]
    return "\n".join(lines)


def _reads(flips: Dialogue, said: torch.Tensor) -> list[readouts.Readout]:
    spoken = texts(flips.model.tokenizer, said)
    return [readouts.read(text, base) for text, base in zip(spoken, flips.texts, strict=True)]


def main() -> None:
    """Run the experiment; every row is printed as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=48, help="ordinary requests")
    parser.add_argument("--declined", type=int, default=40, help="requests that the model declines by itself")
    parser.add_argument("--layers", type=int, nargs="+", default=[15, 18])
    parser.add_argument("--top", type=int, default=6, help="features raised at each layer")
    parser.add_argument("--times", type=float, default=1.5, help="multiple of a feature's mean before a refusal")
    parser.add_argument("--budget", type=float, default=40.0)
    parser.add_argument("--columns", type=int, default=24, help="tokens of the answer that a delta reaches")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of free generation")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--skip", nargs="*", default=[], help="methods that are not run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loaded = resolve_model("smollm2")
    model = Model(loaded.module.requires_grad_(False), loaded.tokenizer)
    saes = [resolve_sae(f"smollm2-l{layer}") for layer in args.layers]
    dialogue = ask(model, draw(args.n, args.seed), args.tokens)
    declined = ask(model, draw(args.declined, args.seed, "unservable"), 24)
    defense = raised(dialogue, declined, saes, args.top, args.times)
    flips = dialogue.select(refused_under(dialogue, defense, args.tokens))
    print(
        f"{len(dialogue.served)} of {args.n} requests answered, {len(flips)} of these refused with {args.top} features "
        f"raised at each of layers {' '.join(map(str, args.layers))}",
        flush=True,
    )
    if not len(flips):
        raise SystemExit("refusal: nothing turned into a refusal; raise more features, or to more")
    rows: list[Row] = []

    def show(row: Row) -> None:
        rows.append(row)
        print(table(rows).splitlines()[-1] if len(rows) > 1 else table(rows), flush=True)
        if args.json:
            args.json.write_text(json.dumps([asdict(one) for one in rows], indent=1))

    common = (flips, defense, args.budget, args.columns)
    zero = torch.zeros(len(flips), len(defense.sites) * args.columns, model.d_model)
    show(read_out("clamps alone", flips, defense, zero, args.tokens, 0.0, every_site=True))
    for name, (method, every_site) in METHODS.items():
        if name in args.skip:
            continue
        started = time.perf_counter()
        delta = method(*common, args.steps)
        show(read_out(name, flips, defense, delta, args.tokens, time.perf_counter() - started, every_site=every_site))
    if "soft suffix" not in args.skip:
        show(soft_suffix(*common, args.tokens, args.steps))
    show(placebo(*common, args.tokens, args.steps))
    show(random(flips, defense, args.budget, args.columns, args.tokens, args.seed))
    show(shared(*common, args.tokens, args.steps))


if __name__ == "__main__":
    main()
