"""The controls of a check that are over all valid flips together: the clamp undone, random features, search health."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from recover.defenses.clamps import Clamp, Defense
from recover.defenses.defended import Defended
from recover.defenses.selection import firing_rates, matched
from recover.evidence.controls import averaged, cosine, displacement, undone
from recover.evidence.transfer import halves
from recover.numerics.metrics import norm
from recover.protocol.bench import Batch, Bench
from recover.protocol.phases import Deltas
from recover.search.ascent import find_perturbation
from recover.search.constraints.first_order import admissible
from recover.search.gradient_checks import error_channel, finite_differences
from recover.types import Tensor


def undo(bench: Bench, deltas: Deltas) -> dict[str, Any]:
    """Measure what taking back the admissible part of the clamp's displacement recovers, and how like it the finds are.

    For each example its own displacement, and the mean over all (its own among them, which only helps it).
    """
    batches = [batch for batch in bench.batches if len(batch.flips)]
    moved = [displacement(batch.target) for batch in batches]
    mean = averaged(torch.cat(moved))[:1]
    scales = {scale: {"own": 0, "averaged": 0, "norm": 0.0} for scale in bench.plan.undo_scales}
    likeness, n = 0.0, 0
    for batch, own in zip(batches, moved, strict=True):
        target = bench.objective(batch.target)
        space = bench.feasible(target)
        n += len(own)
        found = torch.stack([deltas.delta(name) for name in batch.flip_ids]).to(own)
        likeness += float(cosine(found, undone(own, space, 1.0)).sum())
        for scale, counts in scales.items():
            for name, back in (("own", own), ("averaged", mean.expand_as(own))):
                with torch.no_grad():
                    counts[name] += int((target(undone(back, space, scale))[1] > 0).sum())
            counts["norm"] += float(norm(undone(own, space, scale)).sum())
    names = {"rate": "own", "averaged_rate": "averaged", "norm_mean": "norm"}
    rates = [
        {"scale": scale} | {name: counts[of] / n for name, of in names.items()} for scale, counts in scales.items()
    ]
    largest = max(max(one["rate"], one["averaged_rate"]) for one in rates)
    return {"rate": largest, "cosine": likeness / n, "scales": rates}


def placebo_features(bench: Bench, draw: int) -> dict[str, Any]:
    """Clamp random features, as many and as often active, in the place of the defense's.

    Gives how many examples show the behavior at base, how many of them this suppresses, and how many of these a search
    within the budget brings back; all None where an SAE has too few other features.
    """
    chosen = _placebo_defense(bench, bench.plan.seed + 1000 * draw)
    if chosen is None:
        return {"suppressed": None, "base": None, "recovered": None}
    other = replace(bench, defense=chosen)
    base, suppressed, recovered = 0, 0, 0
    for batch in other.batches:
        answered = batch.examples.dialogue
        shown = (batch.base > 0).nonzero().flatten().tolist()
        base += len(shown if answered is None else set(shown) & set(answered.served))
        suppressed += len(batch.flips)
        if len(batch.flips):
            target = other.objective(batch.target)
            found = find_perturbation(target, target.zero_delta, other.feasible(target), bench.budget, bench.schedule)
            recovered += int(found.recovered.sum())
    return {"suppressed": suppressed, "base": base, "recovered": recovered}


def _placebo_defense(bench: Bench, seed: int) -> Defense | None:
    clamps = []
    for site in bench.defense.sites:
        here = bench.defense.at(site)
        taken = [feature for clamp in here for feature in clamp.features]
        rates = firing_rates(bench.model, here[0].sae, site, bench.examples.prompts, bench.batch_size)
        for number, clamp in enumerate(here):
            if (features := matched(rates, clamp.features, seed + number, excluded=taken)) is None:
                return None
            taken += features
            clamps.append(Clamp(clamp.sae, features, clamp.mode, clamp.only_active, clamp.positions, clamp.site))
    return replace(bench.defense, clamps=tuple(clamps))


def search_health(bench: Bench) -> dict[str, Any]:
    """Compare gradients with finite differences on some flips, in admissible directions and in the SAE's error."""
    batches = [batch for batch in bench.batches if len(batch.flips)]
    ids = [name for batch in batches for name in batch.flip_ids]
    sample, _ = halves(ids, bench.plan.seed)
    wanted = {ids[row] for row in sample.tolist()[: bench.plan.sample]}
    agree, within_error, n = 0, 0, 0
    for batch in batches:
        rows = torch.tensor([row for row, name in enumerate(batch.flip_ids) if name in wanted], dtype=torch.long)
        if not len(rows):
            continue
        part = _exact(bench, batch, rows)
        target, first = bench.objective(part), part.entered_at(part.surface.first)
        n += len(rows)
        direct = finite_differences(target, bench.feasible(target), target.zero_delta, bench.budget, bench.plan.seed)
        agree += int(direct.agrees.sum())
        # At one site is enough: it is the same decomposition at the others.
        within_error += int(error_channel(first, admissible(first), bench.plan.seed).agrees.sum())
    return {"n": n, "finite_differences": agree, "error_channel": within_error}


def _exact(bench: Bench, batch: Batch, rows: Tensor) -> Defended:
    """These flips in the model of the certificates: in half precision differences would be rounding."""
    if bench.exact is bench.model:
        return batch.target.select(rows)
    return bench.defended(batch.examples.select(batch.flips[rows]), bench.exact)
