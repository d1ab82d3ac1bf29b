"""`recover selftest`: can this checker, on this machine, tell defenses apart whose answer is known?

For every kind of planted world (`recover.planted`) and every seed:

1. *Verdict*: `check()` is run on it as on any model, the whole protocol.
2. *Smallest norm*: as the check measured and certified it, held against the closed form.
3. *Miss*: another verdict than the construction implies, another word about `content` than may be said, or
   a smallest norm off by more than 1 %.

The kinds and their derivations are in `recover.planted`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from recover.planted.kinds import KINDS, MIXTURES
from recover.planted.world import Planted
from recover.protocol.checking import check
from recover.protocol.plan import Plan, TransferPlan
from recover.protocol.records import without_nan
from recover.protocol.verdict import Verdict, certified_norm
from recover.types import Progress

TOLERANCE = 0.01
"""Largest relative error of a smallest norm."""
PLAN = Plan(
    random_draws=300,
    planted_routes=4,
    placebo_features=1,
    transfer=TransferPlan(norms=(0.6,), splits=2, rules=2, scales=(0.25, 0.5, 0.75, 1.0), draws=20),
)
"""Every part of the protocol, and of what is drawn less than by default: worlds are many."""
UNMEASURED = ("hard_readout",)
"""Kinds whose smallest norm a method that follows gradients cannot be asked for."""
WORTH_PROCESSES = 40
"""So many worlds take longer than the start of other processes."""
WORDS: dict[bool | None, str] = {True: "content: true", False: "content: false", None: "content: unknown"}


@dataclass(frozen=True)
class Outcome:
    """One world, judged.

    Attributes:
        expected: the verdicts that are right, with what may be said of `content` where that is known.
        given: the verdict, with what it said of `content` where that matters.
        right: whether the verdict is one of these.
        norm_error: largest relative error of the smallest norm over the examples; None where not measured.
        why: the verdict's own reasons.
    """

    kind: str
    variant: str
    seed: int
    expected: tuple[str, ...]
    given: str
    right: bool
    norm_error: float | None
    seconds: float
    why: tuple[str, ...]

    @property
    def miss(self) -> bool:
        """Whether the checker was wrong."""
        return not self.right or not (self.norm_error is None or self.norm_error <= TOLERANCE)


def run_selftest(
    seeds: Iterable[int],
    kinds: Sequence[str] = tuple(KINDS),
    progress: Progress | None = None,
    processes: int | None = None,
) -> list[Outcome]:
    """Judge a world of every kind (of `KINDS` and `MIXTURES`) for every seed; `progress` is called after each.

    By default one of the `processes` runs on each core, and for a few worlds none beside this one.
    """
    worlds = [(kind, seed) for seed in seeds for kind in kinds]
    processes = processes or (cores() if len(worlds) >= WORTH_PROCESSES else 1)
    outcomes = []
    with _judges(processes) as judged:
        for done, outcome in enumerate(judged(worlds), start=1):
            outcomes.append(outcome)
            if progress is not None:
                progress("planted worlds", done, len(worlds))
    return sorted(outcomes, key=lambda outcome: kinds.index(outcome.kind))


def cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _judges(processes: int) -> Iterator[Callable[[list[tuple[str, int]]], Iterator[Outcome]]]:
    """What judges many worlds, one after the other in each process."""
    # The worlds are so small that threads would mostly wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if processes == 1:
            yield lambda worlds: map(_judge_seed, worlds)
            return
        # Not forked: torch does not survive a fork once it has used threads.
        with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
            yield lambda worlds: pool.imap(_judge_seed, worlds, chunksize=4)
    finally:
        torch.set_num_threads(threads)


def _judge_seed(world: tuple[str, int]) -> Outcome:
    kind, seed = world
    return judge((KINDS | MIXTURES)[kind](seed), seed)


def judge(world: Planted, seed: int) -> Outcome:
    """What the checker says of a world, beside what is true."""
    start = time.monotonic()
    said = check(world.model, world.defense, world.examples, world.budget, plan=PLAN)
    asked = world.allowed != frozenset(WORDS)
    words = " or ".join(WORDS[allowed] for allowed in (True, False, None) if allowed in world.allowed)
    return Outcome(
        kind=world.name,
        variant=world.variant,
        seed=seed,
        expected=tuple(f"{name} ({words})" if name == "RECOVERABLE" and asked else name for name in world.expected),
        given=f"{said.verdict} ({WORDS[said.content]})" if said.verdict == "RECOVERABLE" and asked else said.verdict,
        right=said.verdict in world.expected and (said.verdict != "RECOVERABLE" or said.content in world.allowed),
        norm_error=None if world.name in UNMEASURED else norm_error(world, said),
        seconds=time.monotonic() - start,
        why=said.reasons,
    )


def norm_error(world: Planted, said: Verdict) -> float | None:
    """Largest relative error of the smallest norm; infinite where what cannot be reached was, or the reverse."""
    if world.smallest_norm is None:
        return None
    measured = torch.tensor([certified_norm(record) for record in said.records], dtype=torch.float64)
    known = world.smallest_norm.double().cpu()
    same = torch.isinf(known) & torch.isinf(measured)
    return float(torch.where(same, 0.0, (measured - known).abs() / known).nan_to_num(nan=torch.inf).max())


def selftest_report(outcomes: Sequence[Outcome]) -> str:
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
        misses, seconds = (sum(getattr(outcome, name) for outcome in of_kind) for name in ("miss", "seconds"))
        worst = f"{max(errors):.3%}" if errors else "-"
        kinds.append([kind, str(len(of_kind)), str(misses), worst, f"{seconds:.1f}"])
    missed = [outcome for outcome in outcomes if outcome.miss]
    total = f"{len(missed)} misses in {len(outcomes)} worlds; norm error: largest relative error of the smallest norm."
    lines = [_table(matrix), "", _table(kinds), "", total]
    for outcome in missed:
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
