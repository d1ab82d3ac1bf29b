"""Shared deltas, as a check runs them: fitted on one part of the prompts and read on the other.

The prompts are those that are right without the defense, flips or not (`Bench.pool`). For each *draw*, a split of them
in two and one of its two sides (`transfer`, how a delta is fitted; `content` and `own_rule`, what readings mean):

1. *Norms*: shares of the mean norm of the defended residual, and the search's own budget. Evidence is read at the
   largest.
2. *Fits* of the behavior's own answers under C1 at each norm, and under C1+ at the largest; at the largest also of the
   answers of other rules, and of answers dealt at random. All side by side.
3. *In doubt*, where the own fit brings back few of the other part: the same fits with gradients that pass inactive
   units, and fits to gates that are planted, so that a failure to fit is not taken for absence.
4. *Reading* on the other part: which answer shows; and for the own rule and each other one the smallest norm on the ray
   of its fit at which its answer shows. What counts for the own answers is read by the certificate, which replays the
   saved deltas. Where the SAE's features compete, C1 does not hold them: then nothing counts, of any rule, without a
   certificate that they held.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange, repeat

from recover.evidence.certificate import certify
from recover.evidence.content import LEAST
from recover.evidence.controls import averaged, cosine, displacement, undone
from recover.evidence.readings import NONE
from recover.evidence.transfer import FitSchedule, Gate, Pool, Problem, fit_shared, halves, random_shared
from recover.models.generation import texts
from recover.numerics.metrics import norm
from recover.protocol.bench import Bench
from recover.protocol.phases import BatchProgress, Deltas, Done
from recover.protocol.reading import Exchanged, answers, asked_by, exchangeable, exchanged, parts_of, shown
from recover.search.constraints.first_order import JacobianOrthogonal
from recover.search.constraints.pinned import Pinned
from recover.tasks import replies as refusal
from recover.types import Bool, Float, Int, Rows, Tensor

C1, C1_PLUS, LEAKING, SHUFFLED, RULE = "c1", "c1_plus", "leaking", "shuffled", "rule"
DOUBT = 0.5
"""Share of unseen flips up to which an own fit is doubted."""
GATES, GATE_AT = (1, 4), 0.75
"""Units of the planted gates, and the norm that opens them as a share of the largest norm."""
DIRECTIONS = 3
"""Principal directions of the defended residuals, either side of which is a kind of prompt."""
Shared = Float[Tensor, "fit pos d_model"]


@dataclass(frozen=True)
class SharedFit:
    """One fit: what it is of, its norm, and which of several."""

    kind: str
    budget: float
    number: int = 0

    def name(self, draw: int) -> str:
        """Name under which its delta is saved."""
        return f"transfer/{draw}/{self.kind}/{self.budget:.6g}/{self.number}"


def refused(bench: Bench) -> str | None:
    """Say why shared deltas cannot be fitted here; None where they can."""
    if len(bench.defense.sites) > 1 and not bench.surface.every:
        return "several sites are clamped, so that what is admissible differs from prompt to prompt"
    flips = [name for name, turned in zip(bench.pool_clusters, bench.pool_turned.tolist(), strict=True) if turned]
    if len(flips) < 2:
        return f"only {len(flips)} example flips by the predicate that it is read with"
    if len(set(flips)) < 2:
        return "all flips by the predicate that it is read with are of one group of examples that ask the same thing"
    pool = bench.pool
    if not 0 < pool.residual_norm < math.inf:
        return f"the defended residual's norm is {pool.residual_norm:g}, of which no share can be taken"
    if isinstance(bench.feasible(pool.parts[0]), JacobianOrthogonal):
        return "what is admissible differs from prompt to prompt"
    return None


def begin(bench: Bench) -> dict[str, Any]:
    """Say why shared deltas cannot be fitted, or what they will be read against: plain values of the prompts."""
    if (why := refused(bench)) is not None:
        return {"refused": why}
    pool, names = bench.pool, bench.pool_clusters
    own: list[int] = bench.pool_own.tolist()
    places = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return {
        "refused": None,
        "residual_norm": pool.residual_norm,
        "own": own,
        "flips": bench.pool_turned.tolist(),
        "clusters": [places[name] for name in names],
        "strata": _strata(bench, own),
        "others": [
            {"name": rule.name, "answers": _answers_of(bench, rule.targets, number)}
            for number, rule in enumerate(bench.other_rules)
        ],
    }


def draws(bench: Bench) -> int:
    """How many fits of each kind there are."""
    return bench.plan.transfer.folds * bench.plan.transfer.splits


def budgets(bench: Bench) -> list[float]:
    """Norms of the own fits, smallest first; evidence is read at the last."""
    typical = bench.pool.residual_norm
    return sorted({*(share * typical for share in bench.plan.transfer.norms), bench.budget})


def split(bench: Bench, draw: int) -> tuple[Int[Tensor, "fitted"], Int[Tensor, "read"]]:
    """Rows of the pool to fit on and to read on."""
    number, side = divmod(draw, bench.plan.transfer.folds)
    first, second = halves(bench.pool_ids, bench.plan.seed + 7919 * number, bench.pool_clusters)
    return (first, second) if side == 0 else (second, first)


def fit(bench: Bench, draw: int, progress: BatchProgress) -> Done:
    """Fit every shared delta of a draw."""
    pool, plan = bench.pool, bench.plan
    rows, others = split(bench, draw)
    half, fits = pool.select(rows), _fits(bench)
    spaces = {C1: bench.feasible(pool.parts[0]), C1_PLUS: bench.feasible(pool.parts[0], write_orthogonal=True)}
    schedule: FitSchedule = replace(plan.transfer.fit, seed=_seed(plan.seed, draw, 0))
    asked = _asked(bench, draw, half, rows, fits)
    problems = [
        Problem(spaces.get(one.kind, spaces[C1]), one.budget, None if each is None else each.targets)
        for one, each in zip(fits, asked, strict=True)
    ]
    # Those over the same examples are fitted side by side; other answers to a request are other examples.
    pools = [half if each is None else each.pool for each in asked]
    distinct = list({id(each): each for each in pools}.values())
    device = half.parts[0].zero_delta.device
    shared = torch.zeros(len(fits), *half.shape, device=device)
    for turn, each in enumerate(distinct):
        mine = [at for at, one in enumerate(pools) if one is each]

        def step(done: int, steps: int, turn: int = turn) -> None:
            progress(turn * steps + done, len(distinct) * steps)

        shared[mine] = fit_shared(each, [problems[at] for at in mine], schedule, step)
    values: dict[str, dict[str, int]] = {"planted": {}}
    deltas = {one.name(draw): delta.cpu() for one, delta in zip(fits, shared, strict=True)}
    own = [at for at, one in enumerate(fits) if one.kind == C1]
    turned, unseen = bench.pool_turned[others].to(device), pool.select(others)
    if bench.examples.dialogue is None and bool(turned.any()):
        back = (unseen.slack(shared[own[-1:]])[0] > 0)[turned]
        if float(back.double().mean()) <= DOUBT:
            more, values["planted"] = _in_doubt(bench, draw, half, unseen)
            deltas |= {one.name(draw): delta.cpu() for one, delta in more.items()}
            fits, shared = [*fits, *more], torch.cat([shared, torch.stack(list(more.values()))])
    told = [at for at, one in enumerate(fits) if one.kind in (C1, C1_PLUS, LEAKING)]
    for at, hits in zip(told, shown(bench, half, rows, shared[told]).sum(dim=1).tolist(), strict=True):
        values[fits[at].name(draw)] = {"fitted": hits, "n": len(half)}
    return Done(values, deltas)


def _in_doubt(bench: Bench, draw: int, half: Pool, unseen: Pool) -> tuple[dict[SharedFit, Tensor], dict[str, int]]:
    """Fit the own answers again past inactive units; beside them, gates that are planted: how many were opened."""
    space, top = bench.feasible(half.parts[0]), budgets(bench)[-1]
    zero = half.parts[0].zero_delta[:1]
    height = float(half.slack(torch.zeros_like(zero)).abs().max()) + 2.0
    seeds = {units: _seed(bench.plan.seed, draw, 300 + units) for units in GATES}
    drawn = [Gate.drawn(space, units, GATE_AT * top, height, zero, seed) for units, seed in seeds.items()]
    gates = [gate for gate in drawn if gate is not None]
    problems = [Problem(space, top), *(Problem(space, top, gate=gate) for gate in gates)]
    schedule = replace(bench.plan.transfer.fit, seed=_seed(bench.plan.seed, draw, 0), leaking=True)
    shared = fit_shared(half, problems, schedule)
    opened = 0
    for gate, delta in zip(gates, shared[1:], strict=True):
        behind = unseen.slack(delta[None])[0] + gate(delta[None])
        opened += int(float((behind > 0).double().mean()) > DOUBT)
    return {SharedFit(LEAKING, top): shared[0]}, {"hits": opened, "n": len(gates)}


def read(bench: Bench, draw: int, fitted: Mapping[str, Any], deltas: Deltas) -> dict[str, Any]:
    """Read a draw's saved deltas, and the controls that are not fitted, on the other part.

    `fitted` are the values that `fit` gave.
    """
    pool, plan = bench.pool, bench.plan
    rows, others = split(bench, draw)
    half, seen = pool.select(others), pool.select(rows)
    space, device = bench.feasible(pool.parts[0]), pool.parts[0].zero_delta.device
    levels, flips = budgets(bench), bench.pool_turned[others]
    saved = {
        one: deltas.delta(one.name(draw)).to(device)
        for one in [*_fits(bench), SharedFit(LEAKING, levels[-1])]
        if one.kind != LEAKING or one.name(draw) in fitted
    }
    own = {level: saved[SharedFit(C1, level)] for level in levels}
    best = _better(draw, fitted, levels[-1])
    holding = _Holding(bench, others)
    shows = holding.answers(half, torch.stack([*list(own.values())[:-1], saved[best]]))
    moved = torch.cat([displacement(part.defended if isinstance(part, Pinned) else part) for part in seen.parts])
    back = undone(averaged(moved)[:1], space, 1.0)
    targets = bench.pool_own[others]
    certified, replayed = _certified(bench, others, saved[best])
    shows[-1] = torch.where(replayed, targets, shows[-1].where(shows[-1] != targets, NONE))
    plus = saved[SharedFit(C1_PLUS, levels[-1])]
    plus_counts, _ = _certified(bench, others, plus)
    curve = []
    for level, answer in zip(levels, shows, strict=True):
        drawn = random_shared(space, level, plan.transfer.draws, pool.shape, device, _seed(plan.seed, draw, 100))
        random = shown(bench, half, others, drawn)[:, flips]
        # Undoing more than all of the clamp is not undoing; nor is what is longer than what it is compared with.
        size = max(float(norm(back)), torch.finfo(torch.float32).tiny)
        scales = sorted({min(scale, level / size) for scale in plan.undo_scales})
        undo = shown(bench, half, others, torch.cat([scale * back for scale in scales]))[:, flips]
        curve.append(
            {
                "budget": level,
                "own": _count((answer == targets)[flips]),
                "random": _count(random),
                "undo": {"hits": int(undo.sum(dim=1).max()), "n": int(flips.sum())},
            }
        )
    values: dict[str, Any] = {
        "rows": others.tolist(),
        "shown": shows[-1].tolist(),
        "below": shows[-2 if len(levels) > 1 else -1].tolist(),
        "trained": _rate(fitted, best.name(draw)),
        "curve": curve,
        C1: certified,
        C1_PLUS: plus_counts if plus.any() else plus_counts | {"hits": 0, "n": 0},  # nothing admissible is no reading
        "undo_cosine": float(cosine(saved[best][None], back)),
        "write_orthogonal_undo_cosine": float(cosine(plus[None], back)),
    }
    return values | _compared(bench, draw, saved, half, others, holding)


def _compared(
    bench: Bench, draw: int, saved: Mapping[SharedFit, Tensor], half: Pool, rows: Rows, holding: _Holding
) -> dict[str, Any]:
    """The smallest norms at which the own rule and the others show; and how often what is dealt at random does."""
    top = budgets(bench)[-1]
    own_rule = Exchanged(half, None, holding.own_texts)

    def smallest(kind: str, number: int, asked: Exchanged) -> list[float | None]:
        if (one := SharedFit(kind, top, number)) not in saved:
            return [None] * len(rows)
        ray = torch.stack([scale * saved[one] for scale in holding.scales])
        held = asked.shown(bench, rows, ray) & holding.held(ray)
        sizes = rearrange(norm(ray), "point -> point 1").expand(held.shape)
        return [size if math.isfinite(size) else None for size in sizes.where(held, math.inf).amin(dim=0).tolist()]

    own, further = smallest(C1, 0, own_rule), smallest(LEAKING, 0, own_rule)
    best = [min((n for n in pair if n is not None), default=None) for pair in zip(own, further, strict=True)]
    dealt_hits = dealt_n = 0
    for one in (one for one in saved if one.kind == SHUFFLED):
        dealt = exchanged(bench, half, rows, _seed(bench.plan.seed, draw, 200 + one.number))
        dealt_hits += int(dealt.shown(bench, rows, saved[one][None]).sum())
        dealt_n += len(rows)
    shuffled = [saved[one] for one in saved if one.kind == SHUFFLED]
    flips = bench.pool_turned[rows]
    by_shuffled = shown(bench, half, rows, torch.stack(shuffled))[:, flips] if shuffled else torch.zeros(0, 0)
    return {
        "norms": own,
        "best_norms": best,
        "others": [
            smallest(RULE, number, asked_by(bench, half, rows, rule)) for number, rule in enumerate(bench.other_rules)
        ],
        "dealt": {"hits": dealt_hits, "n": dealt_n},
        SHUFFLED: _count(by_shuffled),
    }


class _Holding:
    """Whether the clamped features stay under shared deltas, for the rows of a half.

    Under C1 they do by construction where features do not compete. Where they do, each delta is certified on every
    example, and shares of it are not read.
    """

    def __init__(self, bench: Bench, rows: Rows) -> None:
        self.bench, self.rows = bench, rows
        self.competing = not all(clamp.sae.pointwise for clamp in bench.defense.clamps)
        whole = bench.examples.dialogue is not None
        self.scales = (1.0,) if self.competing or whole else bench.plan.transfer.scales
        dialogue = bench.examples.dialogue
        self.own_texts = None if dialogue is None else [dialogue.texts[row] for row in bench.pool_rows[rows].tolist()]

    def held(self, deltas: Shared) -> Bool[Tensor, "fit batch"]:
        if not self.competing:
            return torch.ones(len(deltas), len(self.rows), dtype=torch.bool, device=deltas.device)
        return torch.stack([_replayed(self.bench, self.rows, delta)[1] for delta in deltas])

    def answers(self, half: Pool, deltas: Shared) -> Int[Tensor, "fit batch"]:
        """The answers that show with the clamped features in place; -1 elsewhere."""
        return answers(self.bench, half, self.rows, deltas).where(self.held(deltas), NONE).cpu()


def _better(draw: int, fitted: Mapping[str, Any], top: float) -> SharedFit:
    """The own fit that brings back more of what it was fitted to."""
    plain, leaking = SharedFit(C1, top), SharedFit(LEAKING, top)
    if leaking.name(draw) not in fitted:
        return plain
    return leaking if _rate(fitted, leaking.name(draw)) > _rate(fitted, plain.name(draw)) else plain


def _rate(fitted: Mapping[str, Any], name: str) -> float:
    return float(fitted[name]["fitted"] / fitted[name]["n"])


def _certified(bench: Bench, rows: Rows, delta: Tensor) -> tuple[dict[str, Any], Bool[Tensor, "rows"]]:
    """Count the flips among these rows of the pool that one delta brings back, by certificate.

    Beside the counts, where the right answer shows with the clamped features in place, flip or not.
    """
    shows, held, gone, shifts, residuals = _replayed_facts(bench, rows, delta)
    flips = bench.pool_turned[rows] & gone
    counts = {
        "hits": int((flips & shows & held).sum()),
        "n": int(flips.sum()),
        "back_but_features_moved": int((flips & shows & ~held).sum()),
        "preactivation_shift_max": _largest(shifts),
        "constraint_residual_max": _largest(residuals),
    }
    return counts, shows & held


def _replayed(bench: Bench, rows: Rows, delta: Tensor) -> tuple[Bool[Tensor, "rows"], Bool[Tensor, "rows"]]:
    """Where the right answer shows under one delta, and where the clamped features stay, by certificate."""
    shows, held, *_ = _replayed_facts(bench, rows, delta)
    return shows, held


def _replayed_facts(bench: Bench, rows: Rows, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, list[float], list[float]]:
    shows, held, gone, shifts, residuals = [], [], [], [], []
    for batch, here, part in parts_of(bench, rows):
        behavior = part.strict or part.behavior
        each = repeat(delta, "pos d_model -> batch pos d_model", batch=len(here))
        (each,) = bench.whole(part, bench.objective(batch.right_target.select(here)), each)
        facts = certify(bench.exact, bench.defense, part.prompts, behavior, each, bench.surface)
        back = facts.shows
        if part.dialogue is not None:
            replies = texts(bench.model.tokenizer, bench.said(part.dialogue, each))
            back = torch.tensor([refusal.base_like(*pair) for pair in zip(replies, part.dialogue.texts, strict=True)])
        shows.append(back.cpu())
        held.append(facts.held.cpu())
        gone.append((facts.defended_slack <= 0).cpu())
        shifts.append(float(facts.preactivation_shift.max()))
        residuals.append(float(facts.constraint_residual.max()))
    return torch.cat(shows), torch.cat(held), torch.cat(gone), shifts, residuals


def _asked(bench: Bench, draw: int, half: Pool, rows: Rows, fits: Sequence[SharedFit]) -> list[Exchanged | None]:
    """What each fit is asked for in the place of the own answers; None for these."""
    shuffles = {
        one.number: exchanged(bench, half, rows, _seed(bench.plan.seed, draw, 1 + one.number))
        for one in fits
        if one.kind == SHUFFLED
    }
    rules = {number: asked_by(bench, half, rows, rule) for number, rule in enumerate(bench.other_rules)}
    of = {SHUFFLED: shuffles, RULE: rules}
    return [of[one.kind][one.number] if one.kind in of else None for one in fits]


def _fits(bench: Bench) -> list[SharedFit]:
    levels = budgets(bench)
    shuffles = bench.plan.transfer.shuffles if exchangeable(bench) and len(set(bench.pool_own.tolist())) > 1 else 0
    return [
        *(SharedFit(C1, level) for level in levels),
        SharedFit(C1_PLUS, levels[-1]),
        *(SharedFit(SHUFFLED, levels[-1], number) for number in range(shuffles)),
        *(SharedFit(RULE, levels[-1], number) for number in range(len(bench.other_rules))),
    ]


def _answers_of(bench: Bench, targets: Tensor | None, number: int) -> list[int]:
    """What a rule answers to the prompts of the pool; of whole answers, something that is no prompt's own."""
    if targets is None:
        return [-10 - number] * len(bench.pool)
    answered: list[int] = targets.cpu()[bench.pool_rows].tolist()
    return answered


def _strata(bench: Bench, own: Sequence[int]) -> dict[str, list[bool]]:
    """Kinds of prompts: by their answer, and by the side of the principal directions of their defended residuals."""
    known = [answer for answer, n in sorted(Counter(own).items()) if n >= LEAST]
    kinds = {f"answer {answer}": [one == answer for one in own] for answer in known}
    states = torch.cat([part.residual.flatten(1) for part in bench.pool.parts]).double().cpu()
    states = states - states.mean(dim=0)
    if bool(states.isfinite().all()) and len(states) > DIRECTIONS:
        _, _, directions = torch.linalg.svd(states, full_matrices=False)
        for number, along in enumerate((states @ directions[:DIRECTIONS].T).T, start=1):
            for side, there in (("above", along > 0), ("below", along <= 0)):
                kinds[f"{side} the mean of residual direction {number}"] = there.tolist()
    return kinds


def _count(hits: Tensor) -> dict[str, int]:
    return {"hits": int(hits.sum()), "n": hits.numel()}


def _largest(values: Sequence[float]) -> float:
    """The largest; NaN where one of them is no number."""
    return max(values) if values and not any(map(math.isnan, values)) else math.nan


def _seed(seed: int, draw: int, number: int) -> int:
    return 100_000 * seed + 1_000 * draw + number
