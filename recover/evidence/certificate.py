"""The certificate: facts about saved deltas, measured by forward passes that share nothing with the search.

A search reads `k` encoder columns, starts at the clamped site and holds the prefix. Here instead:

1. the whole prompt runs through the whole model;
2. the clamp is made the long way: encode every feature, edit the clamped ones, decode, add the error;
3. the saved delta is added, and the result is encoded again from scratch;
4. the constraint is measured on the delta's own numbers, `||A^T delta||`.

All of it is in float32, or in float64 where the model is: a token whose residual is ten times the others' is rounded in
float32 by more than some bounds on a pre-activation allow.

So a mistake in the projector, the prefix, the clamp's shortcut or the optimizer shows up as a disagreement, not as a
result. (The SAE's own `encode` and `decode` are shared; they are tested against sae_lens.) Under C1 and a
pointwise SAE a feature's pre-activation cannot move; the certificate says how far it did, and how far each clamped
feature stood from its threshold: where all are far below, zero drift is true of *any* delta and shows nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import einsum, reduce
from torch.nn.functional import pad

from recover.defenses.clamps import Clamp, Defense
from recover.defenses.defended import check_fits
from recover.models.generation import NO_TOKEN, answered
from recover.models.host import Edit, Model, Prompts
from recover.numerics import metrics
from recover.saes.decomposition import Decomposition, decompose, recompose
from recover.tasks.behaviors import Behavior, ForcedAnswer, positions_read
from recover.types import Bool, Float, InputError, Mask, PerExample, Residual, Surface, Tensor, TokenIds, widened

ROUNDING = 1e-5
"""Share of what a clamped pre-activation could at most be, up to which a change of it is rounding in float32."""


@dataclass(frozen=True, eq=False)
class Certificate:
    """What is true of a batch of deltas, `[batch]` each unless said otherwise. Norms are in units of the residual.

    Attributes:
        shows: the behavior is back, with the clamp held.
        slack, score: of the recovered state; `defended_slack` of the defended one, measured in the same way.
        norm, relative_norm: of delta, and as a share of `||h_def||` at the positions it touches.
        displacement: `||h_def - h||` there: what the clamp itself moved.
        displacement_everywhere: the same over all positions and clamped sites.
        constraint_residual: `||A^T delta|| / (||A|| ||delta||)`, Frobenius norms; 0 for no delta.
        preactivation_shift: `[batch k]`, largest absolute move of each clamped pre-activation over positions.
        threshold_margin: `[batch k]`, defended pre-activation minus threshold at the position where it is
            closest; negative below, NaN where features compete.
        drift, relative_drift, decode_drift, clamp_floor_violation: reference page, Definitions.
        rounding: `1e-5 max_j ||A_j|| (||h_def|| + ||delta||)`: shifts and drifts up to this count as rounding. Each
            site has its own, with what delta has become there; this is the largest.
        held: the clamped features stayed where they were: residual, shift and drift are all rounding, at every site.
        dormant, reactivated: counts of clamped (feature, position) pairs at or below zero when defended, and of those
            of them above zero when recovered.
    """

    shows: Bool[Tensor, "batch"]
    score: PerExample
    slack: PerExample
    defended_slack: PerExample
    norm: PerExample
    relative_norm: PerExample
    displacement: PerExample
    constraint_residual: PerExample
    preactivation_shift: Float[Tensor, "batch k"]
    threshold_margin: Float[Tensor, "batch k"]
    drift: PerExample
    relative_drift: PerExample
    decode_drift: PerExample
    clamp_floor_violation: PerExample
    rounding: PerExample
    held: Bool[Tensor, "batch"]
    dormant: PerExample
    reactivated: PerExample
    displacement_everywhere: PerExample

    def select(self, rows: Tensor) -> Certificate:
        """Select a subset of the deltas."""
        return Certificate(**{name: values[rows] for name, values in vars(self).items()})


class _ClampFacts(NamedTuple):
    """Features of one clamp, defended and recovered; their pre-activation shift, margin and the change written."""

    z_def: Float[Tensor, "batch pos k"]
    z_rec: Float[Tensor, "batch pos k"]
    shift: Float[Tensor, "batch pos k"]
    margin: Float[Tensor, "batch k"]
    written: Residual


def _together(facts: Iterable[_ClampFacts]) -> list[Tensor]:
    """Features defended and recovered, shift and margin, of the features of several clamps."""
    return [torch.cat(values, dim=-1) for values in list(zip(*facts, strict=True))[:4]]


class _Replay(NamedTuple):
    """Logits, and the states around the clamps of each site; `after` with the delta added."""

    logits: Tensor
    before: Mapping[int, Residual]
    after: Mapping[int, Residual]


def certify(
    model: Model,
    defense: Defense,
    prompts: Prompts,
    behavior: Behavior,
    delta: Float[Tensor, "batch n_pos d_model"],
    surface: Surface = Surface(),
) -> Certificate:
    """Measure saved deltas afresh.

    Args:
        model: the host model; its dtype is that of the measurement, so give it in float32 or float64.
        defense: the clamps, live.
        prompts: one for each delta.
        behavior: the predicate, one entry for each delta.
        delta: at the last `n_pos` positions of the first clamped site; or, site after site, of every one.
        surface: where delta enters.

    Raises:
        InputError: shapes that do not belong together, or a defense that does not fit the model.
    """
    check_fits(model, defense, n_answer=positions_read(behavior) - 1)
    dtype = torch.promote_types(model.dtype, torch.float32)
    defense = defense.to(dtype)
    sites = surface.enters(defense.sites)
    batch, d_model = delta.shape[0], delta.shape[2]
    n_pos, apart = divmod(delta.shape[1], len(sites))
    shortest = int(prompts.mask.sum(dim=-1).min())
    if batch != len(prompts) or d_model != model.d_model or apart or not 1 <= n_pos <= shortest:
        raise InputError(
            f"delta: its shape {tuple(delta.shape)} does not belong to {len(prompts)} prompts of at least "
            f"{shortest} tokens and {model.d_model} dimensions"
        )
    delta = delta.detach().to(model.device, dtype)
    parts = dict(zip((site.index for site in sites), torch.split(delta, n_pos, dim=1), strict=True))
    nothing = {index: torch.zeros_like(part) for index, part in parts.items()}
    with torch.no_grad():
        defended = _replay(model, defense, prompts, behavior, nothing, surface)
        recovered = _replay(model, defense, prompts, behavior, parts, surface)
    site = defense.sites[0]
    h, h_def = (
        torch.cat([states[index][:, -n_pos:] for index in parts], dim=1) for states in (defended.before, defended.after)
    )
    facts = {
        clamp: _clamp_facts(clamp, defended.after[clamp.site.index], recovered.after[clamp.site.index], n_pos)
        for clamp in defense.clamps
    }
    z_def, z_rec, shift, margin = _together(facts.values())
    # At later sites delta holds a correction along what is read there: shift and drift say whether it was right.
    residual = constraint_residual(defense.at(site), parts[site.index])
    by_site, limits, held = [], [], residual <= ROUNDING
    for place in defense.sites:
        here = [facts[clamp] for clamp in defense.at(place)]
        # What several clamps write at one site adds up before its norm is taken.
        by_site.append(torch.stack([one.written for one in here]).sum(dim=0))
        before, after = (run.after[place.index][:, -n_pos:] for run in (defended, recovered))
        limits.append(_rounding(defense.at(place), before, parts[place.index] if place == site else after - before))
        z_before, z_after, moved, _ = _together(here)
        drift = metrics.activation_drift(z_after, z_before)
        held = held & (moved.flatten(1).amax(dim=1) <= limits[-1]) & (drift <= limits[-1])
    reactivation, slack = metrics.reactivation(z_rec, z_def), behavior.slack(recovered.logits)
    return Certificate(
        shows=slack > 0,
        score=behavior.score(recovered.logits),
        slack=slack,
        defended_slack=behavior.slack(defended.logits),
        norm=delta.flatten(1).norm(dim=1),
        relative_norm=metrics.relative_norm(delta, h_def),
        displacement=(h_def - h).flatten(1).norm(dim=1),
        constraint_residual=residual,
        preactivation_shift=reduce(shift, "batch pos k -> batch k", "max"),
        threshold_margin=margin,
        drift=metrics.activation_drift(z_rec, z_def),
        relative_drift=metrics.relative_drift(z_rec, z_def),
        decode_drift=metrics.norm(torch.cat(by_site, dim=1)),
        clamp_floor_violation=metrics.clamp_floor_violation(z_rec, z_def),
        rounding=torch.stack(limits).amax(dim=0),
        held=held,
        dormant=reactivation.inactive.float(),
        reactivated=reactivation.count.float(),
        displacement_everywhere=torch.cat(
            [(defended.after[index] - defended.before[index]).flatten(1) for index in defended.after], dim=1
        ).norm(dim=1),
    )


def constraint_residual(clamps: tuple[Clamp, ...], delta: Residual) -> PerExample:
    """`||A^T delta|| / (||A|| ||delta||)` in delta's dtype, `A` all clamped columns of a site; 0 for no delta."""
    A = torch.cat([encoder_columns(clamp) for clamp in clamps], dim=1).to(delta)
    seen = einsum(A, delta, "d_model k, batch pos d_model -> batch pos k").flatten(1).norm(dim=1)
    scale = A.norm() * delta.flatten(1).norm(dim=1)
    return torch.where(seen == 0, 0.0, seen / scale)


def _rounding(clamps: tuple[Clamp, ...], h_def: Residual, arrived: Residual) -> PerExample:
    """What counts as rounding at a site where the defended state `h_def` is moved by `arrived`."""
    longest = torch.stack([encoder_columns(clamp).norm(dim=0).max() for clamp in clamps]).max()
    limit: Tensor = ROUNDING * longest * (h_def.flatten(1).norm(dim=1) + arrived.flatten(1).norm(dim=1))
    return limit


def encoder_columns(clamp: Clamp) -> Float[Tensor, "d_model k"]:
    """`A`, cut from the SAE by the features' own numbers and not taken from what the projector was built of."""
    return clamp.sae.W_enc[:, list(clamp.features)]


def _replay(
    model: Model,
    defense: Defense,
    prompts: Prompts,
    behavior: Behavior,
    delta: Mapping[int, Residual],
    surface: Surface,
) -> _Replay:
    """One whole forward pass, the clamps made the long way, the parts of `delta` added at their sites."""
    before: dict[int, Residual] = {}
    after: dict[int, Residual] = {}
    reads, width = positions_read(behavior), prompts.ids.shape[1]

    def at(index: int, clamps: tuple[Clamp, ...]) -> Edit:
        def edit(residual: Residual, positions: TokenIds) -> Residual:
            before[index] = state = widened(residual)
            reach = torch.zeros_like(state)
            if index in delta:
                reach[:, -delta[index].shape[1] :] = delta[index]
            if surface.placement == "before_clamp":
                state = state + reach
            state = _clamp_the_long_way(clamps, state, positions >= defense.skip_first, width - reads)
            if surface.placement == "after_clamp":
                state = state + reach
            after[index] = state
            return state.to(residual.dtype)

        return edit

    edits = {site: at(site.index, defense.at(site)) for site in defense.sites}
    run = model.run(prompts, edits=edits, reads=reads)
    logits = run.logits if behavior.tokens is None else run.logits.gather(1, behavior.tokens)
    return _Replay(logits, before, after)


def _clamp_the_long_way(clamps: tuple[Clamp, ...], state: Residual, mask: Mask, end: int) -> Residual:
    """Encode everything, edit the clamped features, decode, add the error (reference: Definitions).

    `end` is the column of the prompt's last token.
    """
    sae = clamps[0].sae
    parts = decompose(sae, state)
    features = parts.features.clone()
    for clamp in clamps:
        where = mask.clone()
        column = torch.arange(where.shape[1], device=where.device)
        if clamp.positions == "last":
            where = where & (column == end)
        elif clamp.positions == "prompt":
            where = where & (column <= end)
        elif clamp.positions == "answer":
            where = where & (column > end)
        chosen = features[..., clamp.indices]
        edited = clamp.mode(chosen)
        if clamp.only_active:
            edited = torch.where(chosen == 0, chosen, edited)
        features[..., clamp.indices] = torch.where(where[..., None], edited, chosen)
    changed = recompose(sae, Decomposition(features, parts.reconstruction, parts.error))
    untouched = (features == parts.features).all(dim=-1, keepdim=True)
    return torch.where(untouched, state, changed)


def _clamp_facts(clamp: Clamp, defended: Residual, recovered: Residual, n_pos: int) -> _ClampFacts:
    defended, recovered = defended[:, -n_pos:], recovered[:, -n_pos:]
    sae, chosen = clamp.sae, clamp.indices
    z_def, z_rec = sae.encode(defended)[..., chosen], sae.encode(recovered)[..., chosen]
    pre_def, pre_rec = sae.pre_activations(defended)[..., chosen], sae.pre_activations(recovered)[..., chosen]
    margin = pre_def - clamp.threshold
    nearest = margin.abs().argmin(dim=1, keepdim=True)
    written = einsum(z_rec - z_def, clamp.decoder, "batch pos k, k d_model -> batch pos d_model")
    return _ClampFacts(z_def, z_rec, (pre_rec - pre_def).abs(), margin.gather(1, nearest)[:, 0], written)


def free_drift(
    model: Model,
    prompts: Prompts,
    answers: TokenIds,
    defense: Defense,
    delta: Float[Tensor, "batch site_pos d_model"],
    surface: Surface = Surface(),
) -> Certificate:
    """Certify a delta over the answers that `say` gave under it: what drifted during free generation.

    The model is in float32 or float64, and prompts come without their answers. The delta enters after the clamps, as
    in `say`; columns that an answer has and the delta has not are left alone.
    """
    surface = replace(surface, placement="after_clamp")
    columns = delta.shape[1] // len(surface.enters(defense.sites))
    said = pad(answers[:, :columns], (0, max(0, columns - answers.shape[1])), value=NO_TOKEN)
    return certify(model, defense, answered(prompts, said), ForcedAnswer(said), delta, surface)
