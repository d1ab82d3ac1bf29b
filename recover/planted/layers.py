"""Kind 6: two clamped layers, the second of which sees what a delta at the first does.

Atoms at site 1: for each answer `j` a feature `a_j`, a copy `b_j` (a feature) and a copy `c_j` (a feature or an error
atom), and context features. A linear block `J` leads to site 2, where the atoms are `J t_i` and the SAE of that site
has its own duals, `W2 = pinv(T J^T)`: it reads the same coordinates of every prompt, but not of every delta, as
`J^T w2_i` and `w1_i` differ outside the span of the atoms.

Clamped are the `a_j` at site 1 and the `b_j` at site 2. The logits are strictly increasing in
`y_j = (w2_a + gamma1 w2_b + gamma2 w2_c)_j . h2`, so that the behavior `logit_t > logit_o` shows exactly if
`y_t > y_o`.

A delta at site 1 arrives as `J delta`. It moves the pre-activation of no clamped feature, at either site, exactly if it
is orthogonal to

    B = [w1_a, J^T w2_b]           (the row space of the second layer's features, pulled back to the first)

and then the second clamp writes what it wrote before, so that `y_t - y_o = s + u . delta` with
`s = a_t + gamma1 b_t + gamma2 (c_t - c_o)` after both clamps, `u = J^T U (e_t - e_o)`. The smallest norm is
`-s / ||P_B u||`. Orthogonality to `w1_a` alone would leave the features `b` of site 2 free to move. The second clamp
scales, so that what moves a feature before it moves it after it too: under a clamp that sets a value, a feature that is
active, and stays so, is read at that value whatever a delta did, and need not be held.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from recover.defenses.clamps import Clamp, Mode, Scale, Set
from recover.numerics.subspaces import NullSpace
from recover.planted.network import Linear, Monotone, build_network
from recover.planted.world import Architecture, Atoms, Draw, Planted, Sizes, clamped, distance, planted_sae, recoverable
from recover.tasks.behaviors import LogitDifference
from recover.types import Site


def two_layers(seed: int, **sizes: int) -> Planted:
    """Kind 6. Needs `d_model > 3 n_answers + n_context`."""
    draw = Draw(seed)
    size = Sizes.of(sizes, d_model=28, n_answers=4, n_context=5, d_sae=40, n_prompts=10)
    d_model, n_answers, n_context, n_prompts, d_sae, _ = size.shape
    bypass: Literal["error", "features"] = "features" if draw.below(2) else "error"
    a, b = range(n_answers), range(n_answers, 2 * n_answers)
    context = range(2 * n_answers, 2 * n_answers + n_context)
    c = range(context.stop, context.stop + n_answers)
    first = Atoms.draw(draw, c.stop, d_model)
    J = torch.eye(d_model, dtype=torch.float64) + 0.4 * draw.normal(d_model, d_model) / d_model**0.5
    second = Atoms.of(first.T @ J.T)
    known = c.stop if bypass == "features" else c.start

    target, other = draw.answers(n_prompts, n_answers)
    rows = torch.arange(n_prompts)
    codes = torch.zeros(n_prompts, c.stop, dtype=torch.float64)
    codes[rows, target] = draw.uniform(2.0, 4.0, n_prompts)
    codes[rows, b.start + target] = draw.uniform(1.5, 3.0, n_prompts)
    codes[rows, c.start + target] = draw.uniform(0.1, 0.4, n_prompts)
    on = draw.coins(n_prompts, n_context)
    codes[:, context.start : context.stop] = draw.uniform(1.0, 3.0, n_prompts, n_context) * on

    gamma1, gamma2 = draw.number(0.5, 1.0), draw.number(0.5, 1.5)
    architectures: tuple[Architecture, ...] = ("jumprelu", "standard")
    kinds = [architectures[draw.below(2)] for _ in range(2)]
    modes: list[Mode] = [Set(-draw.number(1.0, 2.0)), Scale(-draw.number(0.8, 1.5))]
    sites = (Site(1), Site(2))
    clamps, after = [], []
    for atoms, part, kind, mode, site in zip((first, second), (a, b), kinds, modes, sites, strict=True):
        T, W = atoms.T[:known], atoms.W[:, :known]
        sae, where = planted_sae(draw, T, W, d_sae, site=site, architecture=kind)
        clamps.append(Clamp(sae, where[part.start : part.stop].tolist(), mode, only_active=True))
        after.append(clamped(codes[rows, part.start + target], mode, kind, only_active=True))

    U = second.W[:, a.start : a.stop] + gamma1 * second.W[:, b.start : b.stop] + gamma2 * second.W[:, c.start : c.stop]
    f = Monotone.drawn(draw)
    network = build_network(draw, first, codes, context, U, f, n_out=n_answers, size=size, between=[Linear(J)])
    held = torch.cat([first.W[:, a.start : a.stop], J.T @ second.W[:, b.start : b.stop]], dim=1)
    slack = after[0] + gamma1 * after[1] + gamma2 * codes[rows, c.start + target]
    smallest = distance(slack, (J.T @ (U[:, target] - U[:, other])).T, held)
    told: dict[str, Any] = {"bypass": bypass, "variant": bypass, "admissible": NullSpace.of(held)}
    return recoverable("two_layers", draw, network, clamps, LogitDifference(target, other), smallest, **told)
