"""Mixtures: worlds between the pure kinds, for what a rule about evidence says where it is not all or nothing.

As in `meaning`, the answer must be the likeliest of all answers and of a token `none`, so chance is one in the number
of answers (but for `weak_predicate`). `x` and `e_j` are unit error atoms at right angles to everything else. Gates read
`m`: open (`relu(1 - m) = 0`) at base and closed by the clamp, which turns the `k` gate features down, so that the mean
of these is `s <= -1` and `m = s + gamma x` when defended. `clip` is to [-1, 1].

**half_erased.** Answers come in groups of `members`. An unclamped copy `b_G >= 3` tells the *group* of a prompt's
answer; which member it is only the clamped features `a_j` tell, and the clamp sets all of these to one value, active or
not. With `q_j = (a_j + epsilon e_j) / 2 + lean_j`, `lean_j = LEAN` for one fixed member of each group and 0 for others,

    y_j = clip(b_G(j)) + q_j - mean of q over the group - relu(1 - m),        none = 0

A shared delta can open the gate, and can move the `e_j`, by the same amounts for all prompts: whatever it is, prompts
of one group are given one member, so of prompts spread evenly over answers it recovers one in `members` at most. Along
`x` alone it gives the fixed member. One prompt alone is recovered exactly if both are positive:

    y_t        at most  1 + lean_t - mean lean + s + gamma (x_0 + x) - 1 + (epsilon / 2) (e_t - mean e)
    y_t - y_o  = LEAN if `t` is the fixed one, -LEAN if `o` is, + (epsilon / 2) (e_t - e_o)    `o` of the same group

The bound holds as `clip <= 1` and `relu(z) >= z`, and with equality where neither bends, which is so at the nearest
point. Two half-spaces: `corner` gives the norm. Other groups stay below, as their copies read 0.

**partly_erased.** For a `share` of the prompts (sort A) an error atom holds a copy of the answer, `zeta e_t > 1`; for
the others (sort B) it holds nothing. All have a clamped feature `a_t`, set to one value for all answers by the clamp:

    y_j = clip(zeta e_j) + a_j - mean a - relu(1 - m),        none = NONE

Sort A is kind 5: open the gate to `1 - m < 1 - NONE`, norm `(NONE - s) / gamma - x_0`. With the gate open and
nothing else sort B has the same logit, at most 0, for all answers. A prompt of it is recovered by writing its answer,
`b = zeta e_t`, behind a gate opened by `x`: `min(b, 1) - relu(1 - s - gamma (x_0 + x)) > NONE`, which is `b > NONE`,
and, with `r = 1 + NONE - s - gamma x_0`, `b + gamma x > r` and `1 + gamma x > r`. So the nearest point lies on
`b + gamma x = r` with `b` in [NONE, 1], as near as that allows to `b = r zeta^2 / (zeta^2 + gamma^2)`, and the norm is
`hypot(b / zeta, (r - b) / gamma)`. A shared delta that writes one answer besides gives it to that answer's prompts of
sort B: no more than one in the number of answers.

**some_routes.** Kind 5 with a second gate, which reads a clamped feature `c`, inactive in sort A, active in sort B:

    y_j = leaky(min(b_j, 1)) - relu(1 - m) - SHUT relu(-c),        none = 0

where `leaky` has a faint slope, FAINT, below FLOOR, so that the score has a slope also where the search of a prompt of
sort B ends, with the first gate open and other answers pushed down: a search is doubted for want of one. FLOOR is near
0, as a search that follows the score, the answer above the *mean* of others, pushes these down before it opens a gate,
and must not spend its budget on that. The clamp leaves `c` at 0 in sort A, where the rest is kind 5: norm
`-(s / gamma + x_0)`, along `x`, for all alike. In sort B it leaves `c <= -1`, which nothing admissible moves, so
`y_t <= 1 - SHUT < 0`: a complete bottleneck, infinite norm. What is recovered is recovered by one delta, C1+ or not,
each prompt with its own answer. Where sort A is three quarters of the
prompts or more it is, as recovery of held-out prompts by a shared delta is then many times what chance or any fixed
answer gives. Below that nothing is asked: what a rate must be for a mechanism to have survived is a matter of the rule.

**undone_and_route.** Kinds 5 and 8 at once: the decoders of the gate features are `t_k + KAPPA phi_k`, and

    m = mean_k phi_k / KAPPA + gamma x,        y_j = clip(b_j) - RHO relu(TAU - m),        none = 0

with `x` an error atom or a feature. Undoing the clamp opens the gate, and so does `x`. Under C1 both count: `m` rises
fastest along `u = sum_k phi_k / (K KAPPA) + gamma x`, `||u||^2 = 1 / (K KAPPA^2) + gamma^2`. Under C1+ `x` alone is
left, and the norm is that of kind 5. `budget` is above both and `shared` lies along `x`: the mechanism survives whether
or not the clamp may be undone. Content true.

**weak_predicate.** Kind 4, where all that told the answer is gone, and a predicate that asks little: the target's logit
above that of one other answer. `y_j = a_j + gamma e_j + prior_j`. What keeps the other above the target is, by variant,

- `distractor`: the prompt's own `e_o = beta`. Any delta orders the answers in one way for all prompts, up to `beta`, so
  for a pair that was drawn at random it is right about half the time;
- `prior`: a fixed order of the answers. That is what a valid flip under such a predicate looks like where nothing is
  left of the answer: the prior was against it. So one delta that turns the order around recovers *every* prompt, seen
  or not, without knowing anything of any. Targets shuffled across prompts do as well.

The norm is `(prior_o - prior_t + gamma beta) / (gamma sqrt 2)`. Nothing of the answer survives: never to be called
`content: true`, whether a rule says "false" or "unknown" (`Planted.never_content`). The budget is that of kind 4.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange, reduce, repeat
from torch import nn

from recover.defenses.clamps import Clamp, Set
from recover.numerics.subspaces import NullSpace
from recover.planted.meaning import KAPPA, RHO, TAU, Gated, _closing, _gated_codes, likeliest
from recover.planted.network import build_network
from recover.planted.world import Atoms, Draw, Planted, Sizes, clamped, planted_sae, recoverable
from recover.tasks.behaviors import LogitDifference
from recover.types import Bool, Float, InputError, Int, Tensor

NONE, SHUT, FLOOR, FAINT = 0.25, 2.0, -0.25, 0.05


class Grouped(nn.Module):
    """`half_erased`: reads the groups' copies, `(a_j + epsilon e_j) / 2`, and `m`."""

    def __init__(self, lean: Float[Tensor, "n"], members: int) -> None:
        super().__init__()
        self.lean, self.members = nn.Parameter(lean.float()), members

    def forward(self, y: Tensor) -> Tensor:
        n = len(self.lean)
        group = repeat(y[..., : -n - 1].clamp(-1, 1), "... group -> ... (group member)", member=self.members)
        closed = torch.relu(1 - y[..., -1:])
        logits = group + centered(y[..., -n - 1 : -1] + self.lean, self.members) - closed
        return torch.cat([logits, torch.zeros_like(closed)], dim=-1)


class Sorted(nn.Module):
    """`partly_erased`: reads `zeta e_j`, `a_j`, and `m`."""

    def forward(self, y: Tensor) -> Tensor:
        copy, feature = y[..., :-1].chunk(2, dim=-1)
        closed = torch.relu(1 - y[..., -1:])
        logits = copy.clamp(-1, 1) + centered(feature, feature.shape[-1]) - closed
        return torch.cat([logits, torch.full_like(closed, NONE)], dim=-1)


class TwiceGated(nn.Module):
    """`some_routes`: reads the copies, `m` and `c`."""

    def forward(self, y: Tensor) -> Tensor:
        closed = torch.relu(1 - y[..., -2:-1]) + SHUT * torch.relu(-y[..., -1:])
        copies = nn.functional.leaky_relu(y[..., :-2].clamp(max=1) - FLOOR, FAINT) + FLOOR
        return torch.cat([copies - closed, torch.zeros_like(closed)], dim=-1)


class WithPrior(nn.Module):
    """`weak_predicate`: the coordinates, each raised by its prior, and 0."""

    def __init__(self, prior: Float[Tensor, "n"]) -> None:
        super().__init__()
        self.prior = nn.Parameter(prior.float())

    def forward(self, y: Tensor) -> Tensor:
        return torch.cat([y + self.prior, torch.zeros_like(y[..., :1])], dim=-1)


def half_erased(seed: int, *, members: int = 2, **sizes: int) -> Planted:
    """The group of the answer survives, behind a gate; its place in the group is erased.

    Needs `d_model > k + 2 n_answers + n_context + n_answers / members`.

    Raises:
        InputError: the answers do not fill groups of two or more.
    """
    draw = Draw(seed)
    size = Sizes.of(sizes)
    d_model, n_answers, n_context, n_prompts, d_sae, k = size.shape
    if members < 2 or n_answers % members:
        raise InputError(f"half_erased: {n_answers} answers do not fill groups of {members}; give a multiple")
    n_groups = n_answers // members
    T = draw.blocks(d_model, [k + n_answers, n_context + n_groups, 1 + n_answers], spread=[0.4, 0.4, 0.0])
    atoms, a, known = Atoms.of(T), range(k, k + n_answers), k + n_answers + n_context + n_groups
    context, copies, x = range(a.stop, a.stop + n_context), known - n_groups, known
    target, _ = draw.answers(n_prompts, n_answers)
    rows = torch.arange(n_prompts)
    codes = _codes(draw, target, len(T), k, context)
    codes[rows, copies + target // members] = draw.uniform(3.0, 4.0, n_prompts)
    codes[:, x] = draw.uniform(0.3, 0.6, n_prompts)
    gamma, epsilon, lean = draw.number(0.5, 1.5), draw.number(0.5, 2.0), draw.number(0.2, 0.4)
    favorite = torch.randint(members, (n_groups,), generator=draw.generator) + members * torch.arange(n_groups)
    leans = torch.zeros(n_answers, dtype=torch.float64)
    leans[favorite] = lean
    value = -draw.number(2.0, 3.0)
    sae, where = planted_sae(draw, T[:known], atoms.W[:, :known], d_sae)
    e = atoms.W[:, x + 1 :]
    gate = atoms.W[:, :k].mean(dim=1) + gamma * atoms.W[:, x]
    U = torch.cat([atoms.W[:, copies:known], (atoms.W[:, a.start : a.stop] + epsilon * e) / 2, gate[:, None]], dim=1)
    f = Grouped(leans, members)
    network = build_network(draw, atoms, codes, context, U, f, n_out=n_answers + 1, size=size)
    best = favorite[target // members]
    right = best == target
    rival = torch.where(right, target // members * members + (target + 1) % members, best)
    one = torch.eye(n_answers, dtype=torch.float64)
    shift = epsilon / 2 * e.T
    passes = centered(leans, members)[target] + value + gamma * codes[:, x]
    walls = torch.stack(
        [gamma * T[x] + centered(one, members)[target] @ shift, (one[target] - one[rival]) @ shift], dim=1
    )
    smallest = corner(torch.stack([passes, torch.where(right, lean, -lean)], dim=1), walls)
    opened = 1.1 * float((-passes / gamma).max())
    clamp = Clamp(sae, where[: a.stop].tolist(), Set(value), only_active=False)
    behavior = likeliest(target, n_answers + 1)
    longest = max(opened, float(smallest.max()))
    told: dict[str, Any] = {
        "admissible": NullSpace.of(atoms.W[:, : a.stop]),
        "shared": (opened * T[x]).float()[None],
        "shared_rows": right,
    }
    return recoverable("half_erased", draw, network, [clamp], behavior, smallest, longest, most=1.6, **told)


def partly_erased(seed: int, *, share: float = 0.5, **sizes: int) -> Planted:
    """For a `share` of the prompts the answer survives, behind a gate; for the others it is erased.

    Needs `d_model > k + 2 n_answers + n_context`.

    Raises:
        InputError: the share leaves no prompt of one sort.
    """
    draw = Draw(seed)
    size = Sizes.of(sizes)
    d_model, n_answers, n_context, n_prompts, d_sae, k = size.shape
    T = draw.blocks(d_model, [k + n_answers, n_context, 1 + n_answers], spread=[0.4, 0.4, 0.0])
    atoms, a, x = Atoms.of(T), range(k, k + n_answers), k + n_answers + n_context
    context = range(a.stop, x)
    target, survives = _sorts(draw, n_prompts, n_answers, share)
    codes = _codes(draw, target, len(T), k, context)
    copy = draw.uniform(0.8, 1.2, n_prompts)
    codes[torch.arange(n_prompts), x + 1 + target] = torch.where(survives, copy, 0.0)
    codes[:, x] = draw.uniform(0.3, 0.6, n_prompts)
    gamma, zeta, value = draw.number(0.5, 1.5), draw.number(1.5, 2.5), -draw.number(2.0, 3.0)
    sae, where = planted_sae(draw, T[:x], atoms.W[:, :x], d_sae)
    gate = atoms.W[:, :k].mean(dim=1) + gamma * atoms.W[:, x]
    U = torch.cat([zeta * atoms.W[:, x + 1 :], atoms.W[:, a.start : a.stop], gate[:, None]], dim=1)
    network = build_network(draw, atoms, codes, context, U, Sorted(), n_out=n_answers + 1, size=size)
    together = 1 + NONE - value - gamma * codes[:, x]
    written = (together * zeta**2 / (zeta**2 + gamma**2)).clamp(NONE, 1)
    opens = (together - 1) / gamma
    smallest = torch.where(survives, opens, torch.hypot(written / zeta, (together - written) / gamma))
    opened = 1.1 * float(opens[survives].max())
    clamp = Clamp(sae, where[: a.stop].tolist(), Set(value), only_active=False)
    behavior = likeliest(target, n_answers + 1)
    longest = max(opened, float(smallest.max()))
    told: dict[str, Any] = {
        "admissible": NullSpace.of(atoms.W[:, : a.stop]),
        "shared": (opened * T[x]).float()[None],
        "shared_rows": survives,
    }
    return recoverable("partly_erased", draw, network, [clamp], behavior, smallest, longest, most=1.6, **told)


def some_routes(seed: int, *, share: float | None = None, **sizes: int) -> Planted:
    """For a `share` of the prompts (by the seed 1/4, 1/2, 3/4 or 7/8) there is one route, for the others none.

    Needs `d_model > k + 1 + n_answers + n_context`.

    Raises:
        InputError: the share leaves no prompt of one sort.
    """
    draw = Draw(seed)
    size = Sizes.of(sizes, n_prompts=32)
    d_model, n_answers, n_context, n_prompts, d_sae, k = size.shape
    share = (0.25, 0.5, 0.75, 0.875)[draw.below(4)] if share is None else share
    variant: Literal["error", "features"] = "features" if draw.below(2) else "error"
    T = draw.blocks(d_model, [k + 1, n_context + n_answers, 1], spread=[0.4, 0.4, 0.0])
    atoms, context, x = Atoms.of(T), range(k + 1, k + 1 + n_context), k + 1 + n_context + n_answers
    known = len(T) if variant == "features" else x
    target, open_too = _sorts(draw, n_prompts, n_answers, share)
    codes = draw.codes(n_prompts, len(T), context)
    codes[:, :k] = draw.uniform(2.0, 4.0, n_prompts, k)
    codes[:, k] = torch.where(open_too, 0.0, draw.uniform(2.0, 4.0, n_prompts))
    codes[torch.arange(n_prompts), context.stop + target] = draw.uniform(3.0, 4.0, n_prompts)
    codes[:, x] = draw.uniform(0.3, 0.6, n_prompts)
    gamma = draw.number(0.5, 1.5)
    mode, architecture = _closing(draw)
    after = clamped(codes[:, :k], mode, architecture, only_active=True).mean(dim=1)
    sae, where = planted_sae(draw, T[:known], atoms.W[:, :known], d_sae, architecture=architecture)
    gate = atoms.W[:, :k].mean(dim=1) + gamma * atoms.W[:, x]
    U = torch.cat([atoms.W[:, context.stop : x], gate[:, None], atoms.W[:, k : k + 1]], dim=1)
    network = build_network(draw, atoms, codes, context, U, TwiceGated(), n_out=n_answers + 1, size=size)
    opens = -(after / gamma + codes[:, x])
    longest = float(opens[open_too].max())
    clamp, behavior = Clamp(sae, where[: k + 1].tolist(), mode, only_active=True), likeliest(target, n_answers + 1)
    smallest = torch.where(open_too, opens, torch.inf)
    told: dict[str, Any] = {
        "never_erased": True,
        "bypass": variant,
        "admissible": NullSpace.of(atoms.W[:, : k + 1]),
        "shared": (1.1 * longest * T[x]).float()[None],
        "variant": variant,
        "shared_rows": open_too,
    }
    return recoverable("some_routes", draw, network, [clamp], behavior, smallest, longest, most=1.6, **told)


def undone_and_route(seed: int, **sizes: int) -> Planted:
    """Undoing the clamp opens the gate, and so does a route that is not the clamp undone.

    Needs `d_model > 2 k + n_answers + n_context`.
    """
    draw = Draw(seed)
    size = Sizes.of(sizes)
    d_model, n_answers, n_context, n_prompts, d_sae, k = size.shape
    variant: Literal["error", "features"] = "features" if draw.below(2) else "error"
    gamma = draw.number(0.5, 1.5)
    x = k + n_context + n_answers
    T = draw.blocks(d_model, [k, n_context + n_answers, 1, k], spread=[0.4, 0.4, 0.0, 0.0])
    atoms, context, phi = Atoms.of(T), range(k, k + n_context), T[x + 1 :]
    known = x + 1 if variant == "features" else x
    codes, target = _gated_codes(draw, n_prompts, len(T), k, n_context, n_answers)
    codes[:, x] = draw.uniform(0.3, 0.6, n_prompts)
    codes[:, x + 1 :] = KAPPA * codes[:, :k]
    mode, architecture = _closing(draw)
    after = clamped(codes[:, :k], mode, architecture, only_active=True).mean(dim=1)
    decoders = torch.cat([T[:k] + KAPPA * phi, T[k:known]])
    sae, where = planted_sae(draw, decoders, atoms.W[:, :known], d_sae, architecture=architecture)
    u = phi.mean(dim=0) / KAPPA + gamma * T[x]
    U = torch.cat([atoms.W[:, context.stop : x], u[:, None]], dim=1)
    network = build_network(draw, atoms, codes, context, U, Gated(), n_out=n_answers + 1, size=size)
    needed = TAU - 1 / RHO - after - gamma * codes[:, x]
    longest = float(needed.max()) / gamma
    clamp, behavior = Clamp(sae, where[:k].tolist(), mode, only_active=True), likeliest(target, n_answers + 1)
    smallest = needed / (1 / (k * KAPPA**2) + gamma**2) ** 0.5
    told: dict[str, Any] = {
        "content": True,
        "bypass": variant,
        "admissible": NullSpace.of(atoms.W[:, :k]),
        "shared": (1.1 * longest * T[x]).float()[None],
        "variant": variant,
    }
    return recoverable("undone_and_route", draw, network, [clamp], behavior, smallest, longest, most=1.6, **told)


def weak_predicate(seed: int, *, variant: str | None = None, **sizes: int) -> Planted:
    """All that told the answer is erased, and the predicate asks for a target above one other; variant by the seed.

    Needs `d_model >= 2 n_answers + n_context`, and 2 to 15 answers, as their priors are spread over a range of 1.
    """
    draw = Draw(seed)
    size = Sizes.of(sizes, d_model=32, d_sae=48, n_prompts=32)
    d_model, n_answers, n_context, n_prompts, d_sae, _ = size.shape
    variant = variant or ("distractor", "prior")[draw.below(2)]
    features = n_answers + n_context
    T = draw.blocks(d_model, [features, n_answers], spread=[0.4, 0.0])
    atoms, context = Atoms.of(T), range(n_answers, features)
    target, other = draw.answers(n_prompts, n_answers)
    prior = torch.zeros(n_answers, dtype=torch.float64)
    if variant == "prior":
        prior[draw.order(n_answers)] = torch.linspace(0, 1, n_answers, dtype=torch.float64)
        against = prior[other] > prior[target]
        target, other = torch.where(against, target, other), torch.where(against, other, target)
    gamma, value = draw.number(0.5, 2.0), -draw.number(1.0, 3.0)
    beta = torch.where(prior[other] > 0, 0.0, draw.uniform(0.1, 0.3, n_prompts) / gamma)
    codes = _codes(draw, target, len(T), 0, context)
    codes[torch.arange(n_prompts), features + other] = beta
    sae, where = planted_sae(draw, T[:features], atoms.W[:, :features], d_sae)
    U = atoms.W[:, :n_answers] + gamma * atoms.W[:, features:]
    network = build_network(draw, atoms, codes, context, U, WithPrior(prior), n_out=n_answers + 1, size=size)
    around = 1.3 / gamma * (prior.mean() - prior) @ T[features:]
    clamp = Clamp(sae, where[:n_answers].tolist(), Set(value), only_active=False)
    behavior = LogitDifference(target, other)
    smallest = (prior[other] - prior[target] + gamma * beta) / (gamma * 2**0.5)
    longest = max(-value / gamma, float(around.norm()))
    told: dict[str, Any] = {
        "admissible": NullSpace.of(atoms.W[:, :n_answers]),
        "shared": around.float()[None] if variant == "prior" else None,
        "variant": variant,
        "never_content": True,
    }
    return recoverable("weak_predicate", draw, network, [clamp], behavior, smallest, longest, **told)


def centered(y: Float[Tensor, "*batch n"], members: int) -> Float[Tensor, "*batch n"]:
    """`y` less its mean over each group of `members` neighbors."""
    mean = reduce(y, "... (group member) -> ... group 1", "mean", member=members)
    apart = rearrange(y, "... (group member) -> ... group member", member=members) - mean
    return rearrange(apart, "... group member -> ... (group member)")


def corner(slack: Float[Tensor, "batch 2"], u: Float[Tensor, "batch 2 n"]) -> Float[Tensor, "batch"]:
    """Distance from 0 to where both `slack_i + u_i . delta >= 0`, by example; the first does not hold at 0.

    The nearest point of the first half-space, if it lies in the second; else the nearest point of the line where both
    are zero, or of the second half-space, if that lies in the first.
    """
    length = u.norm(dim=-1)
    across = (u[:, 0] * u[:, 1]).sum(dim=-1)
    alone = -slack / length
    keeps = slack.flip(1) + alone * across[:, None] / length >= 0
    gram = torch.einsum("bin,bjn->bij", u, u)
    both = (slack * torch.linalg.solve(gram, slack)).sum(dim=-1).clamp(min=0).sqrt()
    return torch.where(keeps[:, 0], alone[:, 0], torch.where(keeps[:, 1], alone[:, 1], both))


def _codes(draw: Draw, target: Int[Tensor, "batch"], n: int, k: int, context: range) -> Float[Tensor, "batch n"]:
    """Coordinates: the first `k`, gate features, active; after them a feature of each answer, the answer's active."""
    codes = draw.codes(len(target), n, context)
    codes[:, :k] = draw.uniform(2.0, 4.0, len(target), k)
    codes[torch.arange(len(target)), k + target] = draw.uniform(2.0, 4.0, len(target))
    return codes


def _sorts(
    draw: Draw, n_prompts: int, n_answers: int, share: float
) -> tuple[Int[Tensor, "batch"], Bool[Tensor, "batch"]]:
    """The answers, and which prompts are of sort A: a `share`, in each sort every answer as often as every other."""
    first = round(share * n_prompts)
    if not 0 < first < n_prompts:
        raise InputError(f"share: {share} of {n_prompts} prompts is {first}, which leaves one sort empty")
    order = draw.order(n_prompts)
    target = torch.cat([draw.answers(n, n_answers)[0] for n in (first, n_prompts - first)])
    return target[order], (torch.arange(n_prompts) < first)[order]
