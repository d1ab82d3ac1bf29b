"""Transfer, as a check runs it: shared deltas fitted on one half of the flips and read on the other.

For each fold (`transfer`, how a delta is fitted; `evidence`, what the readings mean):

1. *Budgets*: shares of the mean norm of the defended residual, and the search's own budget. The largest is the one that
   evidence is read at.
2. *Fits* under C1 and C1+ at each budget, to shuffled targets at each, several at the largest; all side by side.
3. *Reading* (`reading`) on the other half: of all of these; of random directions of the same norm; of the clamp undone,
   averaged over the half that was fitted on. What counts as evidence is read by the certificate, which replays the
   saved deltas: the behavior is back and the clamped features stayed where they were.
4. *Beside it* the same by the check's own predicate, where a stricter one is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import repeat

from recover.evidence.certificate import certify
from recover.evidence.controls import averaged, cosine, displacement, undone
from recover.evidence.rules import Reading
from recover.evidence.transfer import FitSchedule, Pool, Problem, fit_shared, halves, random_shared
from recover.models.generation import texts
from recover.numerics.metrics import norm
from recover.protocol.bench import Bench
from recover.protocol.phases import BatchProgress, Deltas, Done
from recover.protocol.reading import exchangeable, exchanged, one_for_all, parts_of, shown, shown_as_asked
from recover.protocol.verdict_model import Transfer, TransferPoint, TransferReadings
from recover.search.constraints.first_order import JacobianOrthogonal
from recover.search.constraints.pinned import Pinned
from recover.tasks import replies as refusal
from recover.types import Int, Tensor

C1, C1_PLUS, SHUFFLED = "c1", "c1_plus", "shuffled"


@dataclass(frozen=True)
class FoldFit:
    """One fit: what it is of, its budget, and which of several."""

    kind: str
    budget: float
    draw: int

    def name(self, fold: int) -> str:
        """Name under which its delta is saved."""
        return f"transfer/{fold}/{self.kind}/{self.budget:.6g}/{self.draw}"


def refused(bench: Bench) -> str | None:
    """Say why transfer cannot be run here; None where it can."""
    pool = bench.pool
    if len(bench.defense.sites) > 1 and not bench.surface.every:
        return "several sites are clamped, so that what is admissible differs from prompt to prompt"
    if len(pool) < 2:
        return f"only {len(pool)} example flips by the predicate that it is read with"
    if len({group for batch in bench.batches for group in batch.strict_groups}) < 2:
        return "all flips by the predicate that it is read with are of one group of examples that ask the same thing"
    if not 0 < pool.residual_norm < math.inf:
        return f"the defended residual's norm is {pool.residual_norm:g}, of which no share can be taken"
    if isinstance(bench.feasible(pool.parts[0]), JacobianOrthogonal):
        return "what is admissible differs from prompt to prompt"
    return None


def budgets(bench: Bench) -> list[float]:
    """Budgets of the curve, smallest first; evidence is read at the last."""
    typical = bench.pool.residual_norm
    return sorted({*(share * typical for share in bench.plan.transfer.norms), bench.budget})


def split(bench: Bench, fold: int) -> tuple[Int[Tensor, "fitted"], Int[Tensor, "read"]]:
    """Rows of the pool to fit on and to read on."""
    ids = [name for batch in bench.batches for name in batch.strict_ids]
    first, second = halves(ids, bench.plan.seed, [group for batch in bench.batches for group in batch.strict_groups])
    return (first, second) if fold == 0 else (second, first)


def fit(bench: Bench, fold: int, progress: BatchProgress) -> Done:
    """Fit every shared delta of a fold."""
    pool, plan = bench.pool, bench.plan
    rows, _ = split(bench, fold)
    half, fits = pool.select(rows), _fits(bench, exchangeable(bench))
    spaces = {C1: bench.feasible(pool.parts[0]), C1_PLUS: bench.feasible(pool.parts[0], write_orthogonal=True)}
    schedule: FitSchedule = replace(plan.transfer.fit, seed=plan.seed)
    shuffles = {
        draw: exchanged(bench, half, rows, _seed(plan.seed, fold, draw), draw)
        for draw in {one.draw for one in fits if one.kind == SHUFFLED}
    }
    targets = [shuffles[one.draw].targets if one.kind == SHUFFLED else None for one in fits]
    problems = [
        Problem(spaces.get(one.kind, spaces[C1]), one.budget, asked) for one, asked in zip(fits, targets, strict=True)
    ]
    # Those over the same examples are fitted side by side; other answers to a request are other examples.
    pools = [shuffles[one.draw].pool if one.kind == SHUFFLED else half for one in fits]
    distinct = list({id(each): each for each in pools}.values())
    shared = torch.stack([torch.zeros(half.shape, device=half.parts[0].zero_delta.device) for _ in fits])
    for turn, each in enumerate(distinct):
        mine = [at for at, one in enumerate(pools) if one is each]

        def step(done: int, steps: int, turn: int = turn) -> None:
            progress(turn * steps + done, len(distinct) * steps)

        shared[mine] = fit_shared(each, [problems[at] for at in mine], schedule, step)
    back = shown(bench, half, rows, shared).sum(dim=1).tolist()
    values = {one.name(fold): {"fitted": hits, "n": len(half)} for one, hits in zip(fits, back, strict=True)}
    return Done(values, {one.name(fold): delta.cpu() for one, delta in zip(fits, shared, strict=True)})


def read(bench: Bench, fold: int, deltas: Deltas) -> dict[str, Any]:
    """Read a fold's saved deltas, and the controls that are not fitted, on the other half."""
    pool, plan = bench.pool, bench.plan
    rows, others = split(bench, fold)
    half, seen = pool.select(others), pool.select(rows)
    fits, space = _fits(bench, exchangeable(bench)), bench.feasible(pool.parts[0])
    device = pool.parts[0].zero_delta.device
    saved = torch.stack([deltas.delta(one.name(fold)) for one in fits]).to(device)
    strict = shown(bench, half, others, saved)
    weak, flips = strict, torch.ones(len(half), dtype=torch.bool, device=device)
    if bench.examples.strict is not None:
        weak = shown_as_asked(bench, others, saved)
        flips = ~shown_as_asked(bench, others, torch.zeros_like(saved[:1]))[0]
    dealt = _dealt(bench, half, others, fold, fits, saved)
    moved = torch.cat([displacement(part.defended if isinstance(part, Pinned) else part) for part in seen.parts])
    back = undone(averaged(moved)[:1], space, 1.0)
    readings = []
    for budget in budgets(bench):
        drawn = random_shared(space, budget, plan.transfer.draws, pool.shape, device, _seed(plan.seed, fold, 100))
        random = shown(bench, half, others, drawn)
        # Undoing more than all of the clamp is not undoing; nor is what is longer than what it is compared with.
        size = max(float(norm(back)), torch.finfo(torch.float32).tiny)
        scales = sorted({min(scale, budget / size) for scale in plan.undo_scales})
        undo = shown(bench, half, others, torch.cat([scale * back for scale in scales]))
        by_chance = {"hits": int(random.sum()), "n": random.numel()}
        undone_at_best = {"hits": int(undo.sum(dim=1).max()), "n": len(half)}
        readings.append({"budget": budget, "random": by_chance, "undo": undone_at_best})
    values: dict[str, Any] = {
        "readings": readings,
        "one_for_all": one_for_all(bench),
        "fits": [
            {
                "kind": one.kind,
                "budget": one.budget,
                "hits": int(strict[at].sum()),
                "n": len(half),
                "weak_hits": int((weak[at] & flips).sum()),
                "weak_n": int(flips.sum()),
                "norm": float(norm(saved[at : at + 1])),
                "undo_cosine": float(cosine(saved[at : at + 1], back)),
                "dealt_hits": dealt.get(at, 0),
                "dealt_n": len(half) if at in dealt else 0,
            }
            for at, one in enumerate(fits)
        ],
    }
    main = max(one.budget for one in fits)
    for kind in (C1, C1_PLUS):
        at = next(at for at, one in enumerate(fits) if (one.kind, one.budget) == (kind, main))
        values[kind] = _certified(bench, others, saved[at])
        if kind == C1_PLUS and not saved[at].any():
            values[kind] |= {"hits": 0, "n": 0}  # nothing is admissible, which is no reading
    return values


def _dealt(
    bench: Bench, half: Pool, rows: Int[Tensor, "rows"], fold: int, fits: Sequence[FoldFit], saved: Tensor
) -> dict[int, int]:
    """Count, for each fit to shuffled targets, the examples that show a target dealt to them at random."""
    hits = {}
    for at, one in enumerate(fits):
        if one.kind == SHUFFLED:
            dealt = exchanged(bench, half, rows, _seed(bench.plan.seed, fold, 200 + one.draw), one.draw)
            hits[at] = int(dealt.shown(bench, rows, saved[at : at + 1]).sum())
    return hits


def _certified(bench: Bench, rows: Int[Tensor, "rows"], delta: Tensor) -> dict[str, Any]:
    """Count the rows of the pool that one delta recovers, of those that the certificate too finds defended."""
    hits, moved, n, shifts, residuals = 0, 0, 0, [], []
    for batch, here, part in parts_of(bench, rows):
        behavior = part.strict or part.behavior
        each = repeat(delta, "pos d_model -> batch pos d_model", batch=len(here))
        (each,) = bench.whole(part, bench.objective(batch.strict_target.select(here)), each)
        facts = certify(bench.exact, bench.defense, part.prompts, behavior, each, bench.surface)
        gone, shows = facts.defended_slack <= 0, facts.shows
        if part.dialogue is not None:
            replies = texts(bench.model.tokenizer, bench.said(part.dialogue, each))
            shows = torch.tensor([refusal.base_like(*pair) for pair in zip(replies, part.dialogue.texts, strict=True)])
        n += int(gone.sum())
        hits += int((gone & shows & facts.held).sum())
        moved += int((gone & shows & ~facts.held).sum())
        shifts.append(float(facts.preactivation_shift.max()))
        residuals.append(float(facts.constraint_residual.max()))
    counts = {"hits": hits, "n": n, "back_but_features_moved": moved}
    return counts | {"preactivation_shift_max": _largest(shifts), "constraint_residual_max": _largest(residuals)}


def summary(folds: Sequence[tuple[dict[str, Any], dict[str, Any]]], residual_norm: float) -> Transfer:
    """Make the section `transfer` of the verdict from the fitted and the read values of each fold."""
    reads, fitted = [read for _, read in folds], [one for fit, _ in folds for one in fit.items()]
    levels = [reading["budget"] for reading in reads[0]["readings"]]
    main = levels[-1]

    def total(parts: list[dict[str, Any]], hits: str = "hits", n: str = "n") -> Reading:
        return Reading(sum(part[hits] for part in parts), sum(part[n] for part in parts))

    def fits(kind: str, budget: float) -> list[dict[str, Any]]:
        return [one for read in reads for one in read["fits"] if (one["kind"], one["budget"]) == (kind, budget)]

    def of(kind: str, budget: float, hits: str = "hits", n: str = "n") -> Reading:
        return total(fits(kind, budget), hits, n)

    def control(name: str, budget: float) -> Reading:
        return total([r[name] for read in reads for r in read["readings"] if r["budget"] == budget])

    def trained(kind: str, budget: float) -> Reading:
        return total([v for name, v in fitted if f"/{kind}/{budget:.6g}/" in name], "fitted")

    def cosine_of(kind: str) -> float:
        known = (one["undo_cosine"] for one in fits(kind, main) if one["undo_cosine"] is not None)
        return max(known, key=abs, default=math.nan)

    curve = tuple(
        TransferPoint(
            budget=budget,
            relative_norm=budget / residual_norm,
            train_rate=trained(C1, budget).rate,
            heldout_rate=of(C1, budget).rate,
            write_orthogonal_heldout_rate=of(C1_PLUS, budget).rate,
            shuffled_rate=of(SHUFFLED, budget).rate,
            random_rate=control("random", budget).rate,
            undo_rate=control("undo", budget).rate,
            weak_heldout_rate=of(C1, budget, "weak_hits", "weak_n").rate,
            weak_shuffled_rate=of(SHUFFLED, budget, "weak_hits", "weak_n").rate,
        )
        for budget in levels
    )
    own, plus = (total([read[kind] for read in reads]) for kind in (C1, C1_PLUS))
    dealt, last = of(SHUFFLED, main, "dealt_hits", "dealt_n"), curve[-1]
    readings = TransferReadings(
        own=own, write_orthogonal=plus, shuffled=of(SHUFFLED, main), dealt=dealt, random=control("random", main)
    )
    certified = [read[kind] for read in reads for kind in (C1, C1_PLUS)]
    chances = (rate for rate in (dealt.rate, readings.random.rate) if not math.isnan(rate))
    return Transfer(
        residual_norm=residual_norm,
        one_for_all=any(read.get("one_for_all", False) for read in reads),
        n=own.n,
        hits=own.hits,
        wilson95=own.wilson95,
        dealt_rate=dealt.rate,
        chance_rate=max(chances, default=math.nan),
        undo_cosine=cosine_of(C1),
        write_orthogonal_wilson95=plus.wilson95,
        write_orthogonal_undo_cosine=cosine_of(C1_PLUS),
        back_but_features_moved=sum(one["back_but_features_moved"] for one in certified),
        preactivation_shift_max=_largest([one["preactivation_shift_max"] for one in certified]),
        constraint_residual_max=_largest([one["constraint_residual_max"] for one in certified]),
        readings=readings,
        curve=curve,
        # What evidence is read at is the last point; held-out rates of it are by certificate.
        **dict(last) | {"heldout_rate": own.rate, "write_orthogonal_heldout_rate": plus.rate},
    )


def _fits(bench: Bench, targeted: bool) -> list[FoldFit]:
    levels, shuffles = budgets(bench), bench.plan.transfer.shuffles if targeted else 0
    own = [FoldFit(kind, budget, 0) for kind in (C1, C1_PLUS) for budget in levels]
    few = [FoldFit(SHUFFLED, budget, 0) for budget in levels[:-1] if shuffles]
    return own + few + [FoldFit(SHUFFLED, levels[-1], draw) for draw in range(shuffles)]


def _largest(values: Sequence[float | None]) -> float:
    """The largest; NaN where one of them is no number."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return max(known) if known and len(known) == len(values) else math.nan


def _seed(seed: int, fold: int, draw: int) -> int:
    return 10_000 * seed + 1_000 * fold + draw
