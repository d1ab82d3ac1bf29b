"""Kind 9: clamped features whose encoder directions are not what a linear algebra textbook would like.

The world is that of kind 2 with `y_j = a_j + gamma b_j`, `b_j` in the error (see `routes`), logits increasing in `y`.
What is clamped beside the answers' features changes the space `B` that a delta must be orthogonal to, or does not:

=============  ======================================================================================  ==============
variant        clamped as well                                                                         span of `B`
=============  ======================================================================================  ==============
`duplicate`    a twin of each answer's feature: same encoder, and each of the two half of the decoder  unchanged
`dependent`    dead features that read sums of the answers' features                                   unchanged
`zero`         a dead feature with a zero encoder column                                               unchanged
`all`          every feature there is; dead ones read combinations of live ones                        all live duals
`one`          nothing: one answer, one feature, against a token `none` of logit 0                     `w_1`
`full`         every feature there is; dead ones read every direction: `k >= d_model`, rank `d_model`  everything
=============  ======================================================================================  ==============

A dead feature is not active, so that the clamp (of active features) leaves it alone. Twins have the same activation,
and half of the decoder each, so together they are the feature. So the slack after the clamp is that of kind 2,
`s + gamma beta`, and the smallest norm `-(s + gamma beta) / (gamma ||P_B (v_t - v_o)||)` (with `v_t` alone for `one`),
and in `full` there is no admissible delta but zero: infinite. `one` is drawn with a bypass, or (gamma = 0) without one:
infinite.
"""

from __future__ import annotations

import torch
from torch import nn

from recover.defenses.clamps import Clamp, Defense, Set
from recover.numerics.subspaces import NullSpace
from recover.planted.meaning import WithNone
from recover.planted.network import Monotone, build_network
from recover.planted.world import Atoms, Draw, Planted, Sizes, distance, numbered, planted_sae
from recover.tasks.behaviors import LogitDifference

VARIANTS = ("duplicate", "dependent", "zero", "all", "one", "full")


def degenerate_geometry(seed: int, *, n_dead: int = 6, variant: str | None = None, **sizes: int) -> Planted:
    """Kind 9; the variant goes by the seed. Needs `d_model >= 2 n_answers + n_context` and `n_dead >= 1`."""
    draw = Draw(seed)
    size = Sizes.of(sizes, d_model=20, n_answers=4, n_context=5, n_prompts=10)
    d_model, n_answers, n_context, n_prompts, _, _ = size.shape
    variant = variant or VARIANTS[seed % len(VARIANTS)]
    if variant == "one":
        n_answers = 1
    features = n_answers + n_context
    atoms = Atoms.draw(draw, features + n_answers, d_model)
    W, T = atoms.W[:, :features], atoms.T[:features]
    dead = {
        "dependent": lambda: W[:, :n_answers] @ draw.normal(n_answers, n_dead),
        "zero": lambda: torch.zeros(d_model, n_dead, dtype=torch.float64),
        "all": lambda: W @ draw.normal(features, n_dead),
        "full": lambda: draw.normal(d_model, d_model + n_dead),
    }.get(variant, lambda: draw.normal(d_model, n_dead))()
    clamped_too, span = range(0), W[:, :n_answers]
    if variant == "duplicate":
        T = torch.cat([T[:n_answers] / 2, T[n_answers:], T[:n_answers] / 2])
        W = torch.cat([W, W[:, :n_answers]], dim=1)
        clamped_too = range(features, features + n_answers)
    elif variant in ("dependent", "zero"):
        clamped_too = range(features, features + n_dead)
    elif variant in ("all", "full"):
        clamped_too = range(n_answers, features + dead.shape[1])
        span = W if variant == "all" else torch.eye(d_model, dtype=torch.float64)
    sae, where = planted_sae(draw, T, W, dead=dead)

    if variant == "one":
        target, other = torch.zeros(n_prompts, dtype=torch.long), torch.ones(n_prompts, dtype=torch.long)
        gamma = draw.number(0.5, 2.0) * (draw.below(3) > 0)
        f: nn.Module = WithNone(0.0)
    else:
        target, other = draw.answers(n_prompts, n_answers)
        gamma = draw.number(0.5, 2.0)
        f = Monotone.drawn(draw)
    rows = torch.arange(n_prompts)
    value = -draw.number(1.5, 3.0)
    beta = draw.uniform(0.1, 0.4, n_prompts)
    codes = torch.zeros(n_prompts, features + n_answers, dtype=torch.float64)
    codes[rows, target] = draw.uniform(2.0, 4.0, n_prompts)
    codes[rows, features + target] = beta
    on = draw.coins(n_prompts, n_context)
    codes[:, n_answers:features] = draw.uniform(1.0, 3.0, n_prompts, n_context) * on

    copies, context, n_out = atoms.W[:, features:], range(n_answers, features), max(n_answers, 2)
    U = atoms.W[:, :n_answers] + gamma * copies
    model, prompts = build_network(draw, atoms, codes, context, U, f, n_out=n_out, size=size)
    reachable = gamma > 0 and variant != "full"
    v = copies[:, target] - (copies[:, other] if n_answers > 1 else 0.0)
    smallest = torch.full((n_prompts,), torch.inf, dtype=torch.float64)
    if reachable:
        smallest = distance(value + gamma * beta, gamma * v.T, span)
    clamp = Clamp(sae, where[[*range(n_answers), *clamped_too]].tolist(), Set(value), only_active=True)
    return Planted(
        name="degenerate_geometry",
        model=model,
        defense=Defense((clamp,)),
        examples=numbered(prompts, LogitDifference(target, other)),
        budget=(float(smallest.max()) if reachable else 10.0) * draw.number(1.3, 2.0),
        expected=("RECOVERABLE" if reachable else "NOT_RECOVERED_AT_BUDGET",),
        smallest_norm=smallest.float(),
        bypass="error" if reachable else None,
        admissible=NullSpace.of(span),
        variant=variant,
    )
