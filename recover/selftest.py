"""`recover selftest`: can this checker, on this machine, tell defenses apart whose answer is known?

For every kind of planted world (`recover.planted`) and every seed:

1. *Verdict*: `check()` is run on it as on any model. Where two sites are clamped, which `check()` does not take, the
   same is done with primitives: a search in the space of deltas that no clamped feature of either site sees, and a
   certificate whose replay watches both.
2. *Smallest norm*: measured, and held against the closed form.
3. *Miss*: another verdict than the construction implies, or a smallest norm off by more than 1 %.

The kinds and their derivations are in `recover.planted`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from recover.certify import certify
from recover.check import check
from recover.constraint import EncoderOrthogonal
from recover.defended import defend
from recover.gradient_free import reexamined
from recover.minimum import smallest_norm
from recover.planted import KINDS, Planted
from recover.records import without_nan
from recover.search import Feasible, recover
from recover.verdict import MAX_REPLAY_DIFFERENCE

TOLERANCE = 0.01
"""Largest relative error of a smallest norm."""
PENDING = ("write_only", "shared_route", "undone_clamp")
"""Kinds whose `specific` needs controls that `check()` does not have yet: shown, not judged."""
UNMEASURED = ("hard_readout",)
"""Kinds whose smallest norm a method that follows gradients cannot be asked for."""
MOST_SHIFT = 1e-3


@dataclass(frozen=True)
class Outcome:
    """One world, judged.

    Attributes:
        expected: the verdicts that are right, with what `specific` must be where that is known.
        given: the verdict, with what it said of `specific` where that matters.
        norm_error: largest relative error of the smallest norm over the examples; None where not measured.
        why: the verdict's own reasons.
    """

    kind: str
    variant: str
    seed: int
    expected: tuple[str, ...]
    given: str
    norm_error: float | None
    seconds: float
    why: tuple[str, ...]

    @property
    def miss(self) -> bool:
        """Whether the checker was wrong."""
        wrong = self.given.removesuffix(" (pending)") not in {
            right.partition(" (")[0] if self.given.endswith(" (pending)") else right for right in self.expected
        }
        return wrong or not (self.norm_error is None or self.norm_error <= TOLERANCE)


def selftest(
    seeds: Iterable[int],
    kinds: Sequence[str] = tuple(KINDS),
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Outcome]:
    """Judge a world of every kind for every seed; `progress(phase, done, total)` is called after each."""
    worlds = [(kind, seed) for seed in seeds for kind in kinds]
    outcomes = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the worlds are so small that threads would mostly wait for each other
    try:
        for done, (kind, seed) in enumerate(worlds, start=1):
            outcomes.append(judge(KINDS[kind](seed), seed))
            if progress is not None:
                progress("planted worlds", done, len(worlds))
    finally:
        torch.set_num_threads(threads)
    return sorted(outcomes, key=lambda outcome: kinds.index(outcome.kind))


def judge(world: Planted, seed: int) -> Outcome:
    """What the checker says of a world, beside what is true."""
    start = time.monotonic()
    verdict, specific, why = _verdict(world)
    if world.specific is not None:
        verdict += " (pending)" if world.name in PENDING else f" ({_in_words(specific)})"
    return Outcome(
        kind=world.name,
        variant=world.variant,
        seed=seed,
        expected=tuple(
            name if world.specific is None else f"{name} ({_in_words(world.specific)})" for name in world.expected
        ),
        given=verdict,
        norm_error=None if world.name in UNMEASURED else norm_error(world),
        seconds=time.monotonic() - start,
        why=why,
    )


def norm_error(world: Planted) -> float | None:
    """Largest relative error of the smallest norm; infinite where what cannot be reached was, or the reverse."""
    if world.smallest_norm is None:
        return None
    defended = defend(world.model, world.defense, world.examples.prompts, world.examples.behavior)
    measured = smallest_norm(defended, defended.zero_delta, _admissible(world)).norm
    known = world.smallest_norm.to(measured)
    same = torch.isinf(known) & torch.isinf(measured)
    return float(torch.where(same, 0.0, (measured - known).abs() / known).nan_to_num(nan=torch.inf).max())


def _admissible(world: Planted) -> Feasible:
    """What a delta must keep to: the encoders' own null space, or, over two sites, the one pulled back to the first."""
    if len(world.defense.sites) > 1:
        return world.admissible
    return EncoderOrthogonal.of(*world.defense.clamps)


def _verdict(world: Planted) -> tuple[str, bool | None, tuple[str, ...]]:
    """Verdict, specific, reasons."""
    if len(world.defense.sites) == 1:
        said = check(world.model, world.defense, world.examples, budget=world.budget)
        return said.verdict, said.specific, said.reasons
    prompts, behavior = world.examples.prompts, world.examples.behavior
    defended = defend(world.model, world.defense, prompts, behavior)
    if len(defended.valid_flips) < len(prompts):
        return "INVALID", None, ("not every example is a valid flip",)
    admissible = _admissible(world)
    solution = recover(defended, defended.zero_delta, admissible, world.budget)
    solution = reexamined(defended, solution, admissible, world.budget)
    facts = certify(world.model, world.defense, prompts, behavior, solution.delta)
    shift, apart = float(facts.preactivation_shift.max()), float((facts.slack - solution.slack).abs().max())
    if shift > MOST_SHIFT or apart > MAX_REPLAY_DIFFERENCE["float32"] or bool((facts.norm > world.budget).any()):
        why = f"clamped features of both sites moved by {shift:.1e}, search and replay differ by {apart:.1e}"
        return "INCONCLUSIVE", None, (why,)
    recovered = int(facts.shows.sum())
    why = f"{recovered} of {len(prompts)} recovered; clamped features of both sites moved by at most {shift:.1e}"
    return "RECOVERABLE" if recovered else "NOT_RECOVERED_AT_BUDGET", None, (why,)


def _in_words(specific: bool | None) -> str:
    return {True: "specific", False: "not specific", None: "specific unknown"}[specific]


def report(outcomes: Sequence[Outcome]) -> str:
    """The confusion matrix, a line for each kind, and every miss with the verdict's own reasons."""
    counts = Counter((" or ".join(outcome.expected), outcome.given) for outcome in outcomes)
    rows, columns = (sorted({pair[i] for pair in counts}) for i in range(2))
    matrix = [["expected \\ given", *columns]] + [
        [row, *(str(counts[row, column] or ".") for column in columns)] for row in rows
    ]
    kinds = [["kind", "worlds", "misses", "norm error", "seconds"]]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        errors = [outcome.norm_error for outcome in of_kind if outcome.norm_error is not None]
        kinds.append(
            [
                kind,
                str(len(of_kind)),
                str(sum(outcome.miss for outcome in of_kind)),
                f"{max(errors):.3%}" if errors else "-",
                f"{sum(outcome.seconds for outcome in of_kind):.1f}",
            ]
        )
    misses = [outcome for outcome in outcomes if outcome.miss]
    lines = [
        _table(matrix),
        "",
        _table(kinds),
        "",
        f"{len(misses)} misses in {len(outcomes)} worlds; norm error: largest relative error of the smallest norm.",
    ]
    if any(outcome.given.endswith("(pending)") for outcome in outcomes):
        lines.append("pending: whether a finding is specific is not judged yet.")
    for outcome in misses:
        name = " ".join(filter(None, (outcome.kind, outcome.variant, f"seed {outcome.seed}")))
        error = "" if outcome.norm_error is None else f"; norm error {outcome.norm_error:.2%}"
        lines.append(f"MISS {name}: {outcome.given}, expected {' or '.join(outcome.expected)}{error}")
        lines += [f"     {reason}" for reason in outcome.why]
    return "\n".join(lines)


def to_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Plain values; a norm error that is infinite becomes null, as the miss says."""
    return {
        "misses": sum(outcome.miss for outcome in outcomes),
        "worlds": [without_nan(asdict(outcome) | {"miss": outcome.miss}) for outcome in outcomes],
    }


def _table(rows: list[list[str]]) -> str:
    """Left-aligned first column, right-aligned others."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
