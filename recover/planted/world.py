"""What planted worlds are made of: atoms, a small network around them, an SAE that knows some of the atoms.

1. *Atoms*. A residual is `h = sum_i c_i t_i`, with unit vectors `t_i` (rows of `T`) that are independent and not
   orthogonal. Their duals `w_i` (columns of `W`, `T W = I`, in the span of the atoms) read the coordinates exactly:
   `w_i . h = c_i`.
2. *SAE*. Some atoms are features: encoder `w_i`, decoder `t_i`. As `w_i` is blind to every other atom, a feature is its
   coordinate, and whatever lies along the other atoms is the SAE's error, exactly. Any number of dead features is mixed
   in. A `jumprelu` SAE has no bias; a `standard` one reads `c_i - BIAS`.
3. *Clamp*. Writing `z'` for `z` moves coordinate `i` by `z' - z` and no other: `clamped` gives it in closed form.
4. *Network*. Embedding; `Gather` (positions mix, in context features only); the clamped site; `Elsewhere` (any number
   of nonlinear blocks, blind to what the readout reads); `Readout`, which reads `y = U^T h` and overwrites the output
   coordinates with `f(y)`; a head. So the logits of the answers are `f(U^T h)` at the last position, and nothing else.
5. *Smallest norm*. Where the behavior shows exactly if `s + u . delta > 0`, with `delta` in the complement of the span
   of some directions `B`, the nearest such delta lies along `P u`, and its norm is `-s / ||P u||` (`distance`), where
   `||P u||^2 = u.u - u^T B (B^T B)^-1 B^T u`.

All is drawn in float64 from one generator and rounded to float32 once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from recover.defenses.clamps import Clamp, Defense, Mode, Number
from recover.models.host import Model, Prompts
from recover.numerics.subspaces import NullSpace
from recover.saes.activations import JumpReLU, ReLU
from recover.saes.sae import SAE
from recover.tasks.behaviors import Behavior
from recover.tasks.examples import Examples
from recover.types import Bool, Float, Int, Site, Tensor

THRESHOLD, BIAS, DEAD = 0.3, 0.2, 100.0
SITE = Site(1)
Architecture = Literal["jumprelu", "standard"]


@dataclass(frozen=True, eq=False)
class Planted:
    """A world whose answer is known.

    Attributes:
        name: of its kind.
        model, defense, examples, budget: what `check()` is given. Every example is a valid flip.
        expected: the verdicts that are right, the most telling first.
        content: what the verdict must say once it can; None where nothing follows from the construction.
        smallest_norm: `[batch]`, infinite where no admissible delta of any norm recovers; None where not known.
        bypass: where what recovers lies: in the SAE's error or in features that are not clamped.
        admissible: the deltas, at the first clamped site, that leave every clamped feature of every site as it is.
        shared: `[1 d_model]`, one admissible delta within the budget that recovers every example, where known.
        variant: which of the cases of its kind this is.
        shared_rows: `[batch]`, the examples that `shared` recovers, where it is not every one.
        never_erased: where `content` is None: it may be `True` or "unknown", and not `False`.
        never_content: where `content` is None: of `False` and "unknown" a verdict may say either, but not `True`.
    """

    name: str
    model: Model
    defense: Defense
    examples: Examples
    budget: float
    smallest_norm: Float[Tensor, "batch"] | None
    admissible: NullSpace
    expected: tuple[str, ...] = ("RECOVERABLE",)
    content: bool | None = None
    bypass: Literal["error", "features"] | None = "error"
    shared: Float[Tensor, "1 d_model"] | None = None
    variant: str = ""
    shared_rows: Bool[Tensor, "batch"] | None = None
    never_content: bool = False
    never_erased: bool = False

    @property
    def allowed(self) -> frozenset[bool | None]:
        """What a verdict may say of `content` here; None is "unknown"."""
        if self.content is not None:
            return frozenset({self.content})
        if self.never_erased:
            return frozenset({True, None})
        return frozenset({False, None}) if self.never_content else frozenset({True, False, None})


@dataclass(frozen=True)
class Sizes:
    """How large a planted world is; each kind has defaults of its own, and says which sizes it needs.

    Attributes:
        n_context: features that have nothing to do with the answer.
        d_sae: features of the SAE, dead ones included, at least.
        k: clamped features that gate the answers, where a kind has them.
        length: tokens of a prompt.
        vocab: tokens of the model, at least.
        depth: blocks above the site that read nothing of what the readout reads.
    """

    d_model: int = 48
    n_answers: int = 6
    n_context: int = 6
    d_sae: int = 64
    n_prompts: int = 24
    k: int = 4
    length: int = 4
    vocab: int = 0
    depth: int = 1

    @classmethod
    def of(cls, given: Mapping[str, int], **own: int) -> Sizes:
        """The sizes that are given, and a kind's own for the rest."""
        return cls(**(own | dict(given)))

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """`d_model, n_answers, n_context, n_prompts, d_sae, k`."""
        return self.d_model, self.n_answers, self.n_context, self.n_prompts, self.d_sae, self.k


class Draw:
    """Random numbers of one seed, in float64."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: Number, high: Number, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def number(self, low: Number, high: Number) -> float:
        return float(self.uniform(low, high, 1))

    def coins(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64) < 0.5

    def below(self, n: int) -> int:
        return int(torch.randint(n, (1,), generator=self.generator))

    def architecture(self) -> Architecture:
        return "jumprelu" if self.below(2) else "standard"

    def order(self, n: int) -> Int[Tensor, "n"]:
        return torch.randperm(n, generator=self.generator)

    def orthonormal(self, d_model: int, n: int) -> Float[Tensor, "d_model n"]:
        basis: Tensor = torch.linalg.qr(self.normal(d_model, n)).Q
        return basis

    def answers(self, batch: int, n_answers: int) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]:
        """For each example its answer, and another one; every answer comes up as often as every other."""
        target = (torch.arange(batch) % n_answers)[self.order(batch)]
        step = torch.randint(1, n_answers, (batch,), generator=self.generator)
        return target, (target + step) % n_answers

    def blocks(self, d_model: int, sizes: list[int], spread: list[float]) -> Float[Tensor, "n d_model"]:
        """Atoms in blocks that span orthogonal subspaces, each within its own block as far from orthonormal as said."""
        Q, parts = self.orthonormal(d_model, sum(sizes)), []
        for basis, size, wide in zip(torch.split(Q, sizes, dim=1), sizes, spread, strict=True):
            mixed = torch.eye(size, dtype=torch.float64) + wide * self.normal(size, size) / max(size, 4) ** 0.5
            rows = mixed @ basis.T
            parts.append(rows / rows.norm(dim=1, keepdim=True))
        return torch.cat(parts)

    def codes(self, batch: int, n: int, context: range) -> Float[Tensor, "batch n"]:
        """Coordinates with about half of the `context` features active and everything else zero."""
        codes, shape = torch.zeros(batch, n, dtype=torch.float64), (batch, len(context))
        codes[:, context.start : context.stop] = self.uniform(1.0, 3.0, *shape) * self.coins(*shape)
        return codes


@dataclass(frozen=True, eq=False)
class Atoms:
    """Independent unit vectors `T` (rows) and their duals `W` (columns)."""

    T: Float[Tensor, "n d_model"]
    W: Float[Tensor, "d_model n"]

    @classmethod
    def of(cls, T: Float[Tensor, "n d_model"]) -> Atoms:
        return cls(T, torch.linalg.pinv(T))

    @classmethod
    def draw(cls, draw: Draw, n: int, d_model: int, spread: float = 0.4) -> Atoms:
        """`n` atoms, each an orthonormal vector with a random part of size about `spread` mixed in."""
        if n > d_model:
            raise ValueError(f"{n} atoms are not independent in {d_model} dimensions")
        T = draw.orthonormal(d_model, n).T + spread * draw.normal(n, d_model) / d_model**0.5
        return cls.of(T / T.norm(dim=1, keepdim=True))


def planted_sae(
    draw: Draw,
    T: Float[Tensor, "n d_model"],
    W: Float[Tensor, "d_model n"],
    d_sae: int = 0,
    *,
    dead: Float[Tensor, "d_model m"] | None = None,
    site: Site = SITE,
    architecture: Architecture = "jumprelu",
) -> tuple[SAE, Int[Tensor, "d_sae"]]:
    """An SAE with the `n` features `T`, `W` before `d_sae - n` dead ones, shuffled; and where each of all is now.

    The dead features read random directions, or the columns of `dead`.
    """
    n, d_model = T.shape
    if dead is None:
        dead = draw.normal(d_model, max(d_sae - n, 0)) / d_model**0.5
    columns, d_sae = torch.cat([W, dead], dim=1), n + dead.shape[1]
    rows = torch.cat([T, draw.normal(d_sae - n, d_model) / d_model**0.5])
    shift = torch.full((d_sae,), -DEAD, dtype=torch.float64)
    shift[:n] = 0.0 if architecture == "jumprelu" else -BIAS
    order = draw.order(d_sae)
    activation = JumpReLU(torch.full((d_sae,), THRESHOLD)) if architecture == "jumprelu" else ReLU()
    sae = SAE(
        W_enc=columns[:, order].float().contiguous(),
        b_enc=shift[order].float(),
        W_dec=rows[order].float().contiguous(),
        b_dec=torch.zeros(d_model),
        activation=activation,
        site=site,
        architecture=architecture,
        sha256="0" * 64,
    )
    return sae, order.argsort()


def clamped(
    c: Float[Tensor, "*batch n"], mode: Mode, architecture: str, only_active: bool
) -> Float[Tensor, "*batch n"]:
    """The coordinates of clamped features after the clamp: `c + z' - z`."""
    z = torch.where(c > THRESHOLD, c, 0.0) if architecture == "jumprelu" else torch.relu(c - BIAS)
    edited = mode(z)
    return c + (torch.where(z != 0, edited, z) if only_active else edited) - z


def distance(
    slack: Float[Tensor, "batch"], u: Float[Tensor, "batch d_model"], B: Float[Tensor, "d_model k"]
) -> Float[Tensor, "batch"]:
    """Norm of the nearest delta orthogonal to `B` (independent columns) with `slack + u . delta >= 0`; see 5 above."""
    seen = u @ B
    within = (u * u).sum(dim=1) - (seen * torch.linalg.solve(B.T @ B, seen.T).T).sum(dim=1)
    norms: Tensor = -slack / within.sqrt()
    return norms


def recoverable(
    name: str,
    draw: Draw,
    network: tuple[Model, Prompts],
    clamps: Sequence[Clamp],
    behavior: Behavior,
    smallest: Float[Tensor, "batch"],
    longest: float | None = None,
    most: float = 2.0,
    **told: Any,
) -> Planted:
    """A world with a budget of 1.3 to `most` times `longest`, by default the largest of the `smallest` norms.

    `draw` decides the budget, and whether the clamps leave out the first position; `told` are the other attributes of
    the `Planted`.
    """
    model, prompts = network
    defense = Defense(tuple(clamps), skip_first=draw.below(2))
    budget = (float(smallest.max()) if longest is None else longest) * draw.number(1.3, most)
    examples = numbered(prompts, behavior)
    return Planted(name, model, defense, examples, budget, smallest.float(), **told)


def numbered(prompts: Prompts, behavior: Behavior) -> Examples:
    """The prompts as examples, numbered."""
    return Examples([f"{row:03d}" for row in range(len(prompts))], prompts, behavior)
