"""Kinds 4, 5 and 8: all three are recoverable, and only one of them says anything about the behavior.

The behavior: the answer is the likeliest of all answers and of a token `none`, whose logit is constant. Chance is one
in the number of answers.

**Kind 4, write-only.** Atoms: a clamped feature `a_j` for each answer, context features, and outside the dictionary, at
right angles to all of these, one direction `b_j` for each answer along which no prompt has anything. Logits
`y_j = a_j + gamma b_j`, `none` 0. The clamp sets *every* `a_j` to `-v`, active or not, so the defended state is the
same whatever the answer was: the information is gone. Yet `delta = (v / gamma) b_j` lifts `y_j` to that of `none`, for
the right answer and for any other at the same cost: the smallest norm is `v / gamma` for every target (raising `y_t` by
`v` is needed, and `b_t`, a unit vector orthogonal to all that is held, is the shortest way). One shared delta moves
every prompt's logits alike, so it gives all prompts the same answer: right for its share of them. Content false.

**Kinds 5 and 8, a closed gate.** Every prompt carries its answer in a copy `b_t >= 3` (a feature, not clamped), read as

    y_j = clip(b_j, -1, 1) - RHO relu(TAU - m),    none = 0

where `m` is the gate. At base `m >= TAU`. The clamp turns the `K` gate features `g` down to `s_k` and closes it.
As the first term cannot exceed 1, the behavior needs `RHO (TAU - m) < 1`, that is a rise of `m` by more than
`needed = TAU - 1 / RHO - m_def`; and that is enough where the copies stay clipped. With `m = m_def + u . delta` the
smallest norm is `needed / ||P u||`, along `P u`, the same direction for every prompt: the longest of these deltas
recovers every prompt, with each its own answer. Another answer would need a copy to be taken down and another raised.

*Kind 5, shared route:* `m = mean_k g_k + gamma x`, with `x` an atom (in the error or a feature) at right angles to the
gate features' encoder and decoder directions, which span the same space. `P u = gamma x`, under C1 and under C1+ alike.
What the clamp wrote lies in that space, so undoing it moves `m` by nothing that is admissible. The mechanism survives;
one delta opens it for prompts never seen. Content true.

*Kind 8, undone clamp:* the decoder of gate feature `k` is `t_k + KAPPA phi_k`, with `phi_k` orthonormal directions
that no encoder sees. Residuals hold `KAPPA g_k` along `phi_k`, so the SAE is exact, and the clamp, writing along the
decoder, takes `phi_k` down with `g_k`. The gate reads `m = mean_k phi_k / KAPPA`, so `u = sum_k phi_k / (K KAPPA)`.
Under C1 `P u = u`. Orthogonal to the decoders as well (C1+) `phi_k . delta = (d_k - t_k) . delta / KAPPA = 0`, as `t_k`
is in the span of the gate features' encoders: nothing admissible moves `m`, and behind a closed gate no answer can pass
`none`. The only way back is to cancel what the clamp wrote. In the variant `answers` there is no gate: feature `a_j` of
answer `j` has the decoder `t_j + KAPPA phi_j`, the logits are `phi_j / KAPPA`, `none` is 1; the clamp leaves
`phi_t / KAPPA = s`, and the smallest norm is `KAPPA (1 - s)`. The content is there (behind the gate, or as the
coordinate that is negative), whether or not a shared delta reads it: never erased.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from recover.defenses.clamps import Clamp, Mode, Scale, Set
from recover.numerics.subspaces import NullSpace
from recover.planted.network import build_network
from recover.planted.world import Architecture, Atoms, Draw, Planted, Sizes, clamped, planted_sae, recoverable
from recover.tasks.behaviors import ChoiceMargin
from recover.types import Tensor

TAU, RHO, KAPPA = 1.0, 1.0, 0.7


class WithNone(nn.Module):
    """The coordinates as they are, and a constant logit for the token `none`."""

    def __init__(self, none: float) -> None:
        super().__init__()
        self.none = none

    def forward(self, y: Tensor) -> Tensor:
        return torch.cat([y, torch.full_like(y[..., :1], self.none)], dim=-1)


class Gated(nn.Module):
    """`clip(b_j, -1, 1) - RHO relu(TAU - m)` for each answer, and 0; `m` is the last coordinate."""

    def forward(self, y: Tensor) -> Tensor:
        closed = RHO * torch.relu(TAU - y[..., -1:])
        return torch.cat([y[..., :-1].clamp(-1, 1) - closed, torch.zeros_like(closed)], dim=-1)


def write_only(seed: int, **sizes: int) -> Planted:
    """Kind 4. Needs `d_model >= 2 n_answers + n_context`."""
    draw = Draw(seed)
    size = Sizes.of(sizes, d_model=32, d_sae=48)
    d_model, n_answers, n_context, n_prompts, d_sae, _ = size.shape
    features = n_answers + n_context
    atoms = Atoms.of(draw.blocks(d_model, [features, n_answers], spread=[0.4, 0.0]))
    target, _ = draw.answers(n_prompts, n_answers)
    codes = draw.codes(n_prompts, len(atoms.T), range(n_answers, features))
    codes[torch.arange(n_prompts), target] = draw.uniform(2.0, 4.0, n_prompts)
    gamma, v = draw.number(0.5, 2.0), draw.number(1.0, 3.0)
    sae, where = planted_sae(draw, atoms.T[:features], atoms.W[:, :features], d_sae)
    U, f = atoms.W[:, :n_answers] + gamma * atoms.W[:, features:], WithNone(0.0)
    network = build_network(draw, atoms, codes, range(n_answers, features), U, f, n_out=n_answers + 1, size=size)
    clamp = Clamp(sae, where[:n_answers].tolist(), Set(-v), only_active=False)
    told: dict[str, Any] = {"content": False, "admissible": NullSpace.of(atoms.W[:, :n_answers])}
    smallest, behavior = torch.full((n_prompts,), v / gamma), likeliest(target, n_answers + 1)
    return recoverable("write_only", draw, network, [clamp], behavior, smallest, longest=v / gamma, **told)


def shared_route(seed: int, **sizes: int) -> Planted:
    """Kind 5. Needs `d_model > k + n_answers + n_context`."""
    draw = Draw(seed)
    size = Sizes.of(sizes)
    d_model, n_answers, n_context, n_prompts, d_sae, k = size.shape
    variant: Literal["error", "features"] = "features" if draw.below(2) else "error"
    gamma = draw.number(0.5, 1.5)
    route = k + n_context + n_answers
    T = draw.blocks(d_model, [k, n_context + n_answers, 1], spread=[0.4, 0.4, 0.0])
    atoms = Atoms.of(T)
    known = len(T) if variant == "features" else route
    codes, target = _gated_codes(draw, n_prompts, len(T), k, n_context, n_answers)
    codes[:, route] = draw.uniform(0.3, 0.6, n_prompts)
    mode, architecture = _closing(draw)
    after = clamped(codes[:, :k], mode, architecture, only_active=True)
    sae, where = planted_sae(draw, T[:known], atoms.W[:, :known], d_sae, architecture=architecture)
    gate = atoms.W[:, :k].mean(dim=1) + gamma * atoms.W[:, route]
    needed = TAU - 1 / RHO - after.mean(dim=1) - gamma * codes[:, route]
    U, smallest = torch.cat([atoms.W[:, k + n_context : route], gate[:, None]], dim=1), needed / gamma
    network = build_network(draw, atoms, codes, range(k, k + n_context), U, Gated(), n_out=n_answers + 1, size=size)
    return recoverable(
        "shared_route",
        draw,
        network,
        [Clamp(sae, where[:k].tolist(), mode, only_active=True)],
        likeliest(target, n_answers + 1),
        smallest,
        most=1.6,
        content=True,
        bypass=variant,
        admissible=NullSpace.of(atoms.W[:, :k]),
        shared=(1.1 * smallest.max() * T[route]).float()[None],
        variant=variant,
    )


def undone_clamp(seed: int, **sizes: int) -> Planted:
    """Kind 8. Needs `d_model >= 2 k + n_answers + n_context`, or `2 n_answers + n_context` in the variant `answers`."""
    draw = Draw(seed)
    size = Sizes.of(sizes)
    d_model, n_answers, n_context, n_prompts, d_sae, k = size.shape
    gated = draw.below(3) > 0
    k = k if gated else n_answers
    copies = n_answers if gated else 0
    unseen = k + n_context + copies
    T = draw.blocks(d_model, [k, n_context + copies, k], spread=[0.4, 0.4, 0.0])
    atoms = Atoms.of(T)
    phi = atoms.T[unseen:]
    mode, architecture = _closing(draw)
    if gated:
        codes, target = _gated_codes(draw, n_prompts, len(T), k, n_context, n_answers)
    else:
        target, _ = draw.answers(n_prompts, n_answers)
        codes = draw.codes(n_prompts, len(T), range(k, k + n_context))
        codes[torch.arange(n_prompts), target] = draw.uniform(2.0, 4.0, n_prompts)
    codes[:, unseen:] = KAPPA * codes[:, :k]
    after = clamped(codes[:, :k], mode, architecture, only_active=True)
    decoders = torch.cat([T[:k] + KAPPA * phi, T[k:unseen]])
    sae, where = planted_sae(draw, decoders, atoms.W[:, :unseen], d_sae, architecture=architecture)
    f: nn.Module
    if gated:
        U = torch.cat([atoms.W[:, k + n_context : unseen], phi.mean(dim=0)[:, None] / KAPPA], dim=1)
        f, u = Gated(), phi.mean(dim=0).expand(n_prompts, -1) / KAPPA
        smallest = (TAU - 1 / RHO - after.mean(dim=1)) / u.norm(dim=1)
        shared = 1.1 * float(smallest.max()) * u[:1] / u[0].norm()
    else:
        U, f, shared = phi.T / KAPPA, WithNone(1.0), None
        smallest = KAPPA * (1 - after[torch.arange(n_prompts), target])
    network = build_network(draw, atoms, codes, range(k, k + n_context), U, f, n_out=n_answers + 1, size=size)
    clamp, behavior = Clamp(sae, where[:k].tolist(), mode, only_active=True), likeliest(target, n_answers + 1)
    told: dict[str, Any] = {
        "never_erased": True,
        "admissible": NullSpace.of(atoms.W[:, :k]),
        "shared": None if shared is None else shared.float(),
        "variant": "gate" if gated else "answers",
    }
    return recoverable("undone_clamp", draw, network, [clamp], behavior, smallest, most=1.6, **told)


def likeliest(target: Tensor, n_tokens: int) -> ChoiceMargin:
    """The target against all other tokens below `n_tokens`."""
    others = [[token for token in range(n_tokens) if token != one] for one in target.tolist()]
    return ChoiceMargin(target, torch.tensor(others))


def _gated_codes(draw: Draw, batch: int, n: int, k: int, n_context: int, n_answers: int) -> tuple[Tensor, Tensor]:
    """Every gate feature active, the copy of the answer at 3 or more; and the answers."""
    target, _ = draw.answers(batch, n_answers)
    codes = draw.codes(batch, n, range(k, k + n_context))
    codes[:, :k] = draw.uniform(2.0, 4.0, batch, k)
    codes[torch.arange(batch), k + n_context + target] = draw.uniform(3.0, 4.0, batch)
    return codes, target


def _closing(draw: Draw) -> tuple[Mode, Architecture]:
    """A clamp that leaves active features at -1 or less, and the architecture of the SAE."""
    architecture = draw.architecture()
    mode: Mode = Set(-draw.number(2.0, 3.0)) if draw.below(2) else Scale(-draw.number(0.8, 1.2))
    return mode, architecture
