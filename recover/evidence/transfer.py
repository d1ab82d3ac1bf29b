"""One shared perturbation for many prompts: can the answers still be read, or can a delta merely write them?

A delta made for one prompt can carry that prompt's answer. One delta for all prompts cannot, so what it brings back on
prompts it was not fitted to must come from the model itself. It can carry a rule that picks an answer, such as the
first name in a prompt: that the behavior's own rule survived is not shown. Several are fitted side by side, each a
`Problem`:

1. *Split* the examples in two by a seeded hash of their ids. Deltas are fitted on one half and read on the other.
2. *Fit*. Each delta minimizes the mean over examples of `softplus(1 - slack)`, so that every example counts until it is
   recovered with a margin and hardly after. Steps are momentum over normalized gradients, of a length that falls to
   zero, projected into the problem's admissible space and clipped to its budget.
3. *Smooth*. At every step each example sees the delta with admissible noise of half its budget added (the same draw in
   every problem): what is found must hold in a neighborhood. Without it the fit is perfect on its half and reads worse
   on the other (design, item 7; 0.93 against 0.98 held out on SmolLM2).
4. *Controls* are problems of the same kind: targets shuffled across prompts, so that no example has its own; targets
   of another rule; a `Gate` that is known to be there; and directions drawn at random, which are not fitted at all.
5. *Past flat pieces*: a fit can follow gradients that pass inactive units (`FitSchedule.leaking`, see
   `recover.search.surrogate`), for content behind several of them.

Nothing here knows what the behavior is; it needs a slack, and targets only where they are to be shuffled.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from einops import einsum
from pydantic import PositiveInt
from torch.nn import functional as F

from recover.defenses.defended import Defended
from recover.numerics.metrics import norm
from recover.search.ascent import Feasible, clip, scale_to
from recover.search.constraints.pinned import Pinned
from recover.search.gradient_free import ELEMENTS_AT_ONCE
from recover.search.surrogate import Leaking
from recover.tasks.behaviors import Behavior, Targeted
from recover.types import Float, InputError, Int, PerExample, Residual, Rows, Tensor

Shared = Float[Tensor, "fit pos d_model"]
MARGIN = 1.0


@dataclass(frozen=True)
class FitSchedule:
    """How a shared delta is fitted.

    Args:
        steps: gradient steps over all examples.
        stride: first step's length, as a share of the budget.
        momentum: share of the direction that is kept from step to step.
        noise: norm of the noise that smooths the fit, as a share of the budget.
        seed: of the noise.
        leaking: whether gradients pass inactive units.
    """

    steps: PositiveInt = 45
    stride: float = 0.1
    momentum: float = 0.8
    noise: float = 0.5
    seed: int = 0
    leaking: bool = False


@dataclass(frozen=True, eq=False)
class Gate:
    """A gate planted into the objective: it adds to the slack where a delta turns several units on together.

    With every unit at 1 it adds its height; with one of them off, nothing. The nearest delta that opens it has the norm
    `reach sqrt(unit)`.

    Attributes:
        directions: one for each unit, orthonormal and admissible.
        reach: how far along its direction a unit is at 1.
        height: what is added to the slack, in logits.
    """

    directions: Float[Tensor, "unit pos d_model"]
    reach: float
    height: float

    def __call__(self, delta: Residual) -> PerExample:
        along = einsum(delta, self.directions, "batch pos d_model, unit pos d_model -> batch unit") / self.reach
        on = torch.clamp(torch.relu(along), max=1.0).sum(dim=1)
        return self.height * torch.relu(on - (len(self.directions) - 1))

    @classmethod
    def drawn(
        cls, feasible: Feasible, units: int, norm: float, height: float, like: Residual, seed: int
    ) -> Gate | None:
        """Draw a gate that a delta of this norm opens; None where too few directions are admissible.

        `like [1 pos d_model]` gives shape and device.
        """
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(units, *like.shape[1:], generator=generator).to(like)
        basis, size = torch.linalg.qr(feasible.project(noise).flatten(1).T.double())
        if basis.shape[1] < units or bool((size.diagonal().abs() < 1e-6 * size.abs().max()).any()):
            return None
        directions = basis.T.reshape(noise.shape).to(like)
        return cls(feasible.project(directions), norm / units**0.5, height)


@dataclass(frozen=True, eq=False)
class Problem:
    """One shared delta to be fitted.

    Attributes:
        feasible: the admissible space, the same for all examples.
        budget: largest norm.
        targets: `[batch]`, another target for each example of the pool; None for its own.
        gate: what is planted into the objective.
    """

    feasible: Feasible
    budget: float
    targets: Int[Tensor, "batch"] | None = None
    gate: Gate | None = None


@dataclass(frozen=True, eq=False)
class Pool:
    """Examples under a defense in one or more batches, taken together; rows are counted through all of them.

    Of pinned examples a shared delta is the free part: each adds what corrections it needs.
    """

    parts: tuple[Defended | Pinned, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def shape(self) -> torch.Size:
        """Shape of one example's delta, `[pos d_model]`."""
        return self.parts[0].zero_delta.shape[1:]

    @property
    def targets(self) -> Int[Tensor, "batch"] | None:
        """The target of each example, where the behavior has one."""
        targets = [part.behavior.target for part in self.parts if isinstance(part.behavior, Targeted)]
        return torch.cat(targets) if len(targets) == len(self.parts) else None

    @cached_property
    def residual_norm(self) -> float:
        """Mean norm of the defended residual over the positions that a delta touches."""
        return float(torch.cat([norm(part.residual) for part in self.parts]).double().mean())

    def select(self, rows: Rows) -> Pool:
        """The examples `rows`, in the order in which they stand in the batches."""
        kept, start = [], 0
        for part in self.parts:
            here = rows[(rows >= start) & (rows < start + len(part))] - start
            if len(here):
                kept.append(part.select(here.sort().values))
            start += len(part)
        return Pool(tuple(kept))

    def slack(self, deltas: Shared, targets: Int[Tensor, "batch"] | None = None) -> Float[Tensor, "fit batch"]:
        """The slack of every shared delta on every example; with other targets, where they are given."""
        slack = torch.empty(len(deltas), len(self), device=deltas.device)
        given = None if targets is None else targets.expand(len(deltas), -1)
        with torch.no_grad():
            for fits, rows, objective in self._chunks(len(deltas), given):
                slack[fits, rows] = objective(deltas[fits])[1]
        return slack

    def answers(self, deltas: Shared) -> Int[Tensor, "fit batch"]:
        """The target that shows under every shared delta on every example; -1 where none does.

        Of a behavior without targets 0 stands for the behavior itself.
        """
        found = torch.full((len(deltas), len(self)), -1, device=deltas.device)
        with torch.no_grad():
            for fits, rows, objective in self._chunks(len(deltas), None):
                logits = objective.logits(deltas[fits]).float()
                found[fits, rows] = shown_answer(objective.behavior, logits)
        return found

    def _chunks(
        self, n_fits: int, targets: Int[Tensor, "fit batch"] | None
    ) -> Iterator[tuple[Tensor, Tensor, Defended | Pinned]]:
        """Pairs of a fit and an example, as many as run at once: their numbers, and the objective of the examples."""
        at_once, start = max(1, ELEMENTS_AT_ONCE // self.shape.numel()), 0
        for part in self.parts:
            batch = len(part)
            pairs = torch.arange(n_fits * batch, device=part.zero_delta.device)
            for chosen in torch.split(pairs, at_once):
                fits, rows = chosen // batch, chosen % batch
                chunk = part.select(rows)
                if targets is not None:
                    if not isinstance(chunk.behavior, Targeted):
                        raise InputError("behavior: it names no target, so that it cannot be asked of another one")
                    chunk = chunk.asking(chunk.behavior.retarget(targets[fits, start + rows]))
                yield fits, start + rows, chunk
            start += batch


def fit_shared(
    pool: Pool,
    problems: Sequence[Problem],
    schedule: FitSchedule | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Shared:
    """Fit one shared delta to the pool for each problem, side by side; none depends on which others there are.

    `on_step` is called with (steps done, steps in all).

    Raises:
        InputError: other targets are given, and the behavior has none.
    """
    schedule = schedule or FitSchedule()
    generator = torch.Generator().manual_seed(schedule.seed)
    like = torch.zeros(len(problems), *pool.shape, device=pool.parts[0].zero_delta.device)
    deltas, momentum = like, like
    budgets = torch.tensor([problem.budget for problem in problems], device=like.device)
    own, targets = pool.targets, None
    if any(problem.targets is not None for problem in problems):
        if own is None:
            raise InputError("transfer: this behavior names no target, so targets cannot be shuffled")
        targets = torch.stack([own if p.targets is None else p.targets.to(own) for p in problems])
    for step in range(schedule.steps):
        drawn = torch.randn(len(pool), *pool.shape, generator=generator).to(like)
        with Leaking() if schedule.leaking else contextlib.nullcontext():
            gradient = _gradient(pool, problems, targets, deltas, drawn, schedule.noise)
        steepest = scale_to(_each(problems, gradient), 1.0)
        momentum = schedule.momentum * momentum + (1 - schedule.momentum) * steepest
        length = schedule.stride * (1 - step / schedule.steps)
        moved = _each(problems, deltas - scale_to(momentum, length * budgets))
        deltas = scale_to(moved, torch.minimum(norm(moved), budgets * (1 - 1e-6)))
        if on_step is not None:
            on_step(step + 1, schedule.steps)
    return deltas


def shown_answer(behavior: Behavior, logits: Float[Tensor, "batch ..."]) -> Int[Tensor, "batch"]:
    """The target that shows, `[batch]`; -1 where none does. Of a behavior without targets 0 is the behavior itself."""
    shows = behavior.slack(logits) > 0
    if not isinstance(behavior, Targeted):
        return torch.where(shows, 0, -1)
    if logits.dim() != 2:
        return torch.where(shows, behavior.target, -1)
    tokens, rows = behavior.tokens, torch.arange(len(logits), device=logits.device)
    at = logits.argmax(dim=1)
    likeliest = at if tokens is None else tokens[rows, at]
    asked = behavior.retarget(likeliest)
    if tokens is not None and asked.tokens is not None:
        # The columns of the other question are those of this one in another order.
        same = asked.tokens[:, :, None] == tokens[:, None, :]
        logits = logits.gather(1, same.int().argmax(dim=2)).where(same.any(dim=2), -torch.inf)
    found = torch.where(asked.slack(logits) > 0, likeliest, -1)
    return torch.where(shows, behavior.target, found)


def random_shared(
    feasible: Feasible, budget: float, draws: int, shape: torch.Size, device: torch.device, seed: int
) -> Shared:
    """Admissible directions drawn at random, each of the budget's norm; zero where nothing is admissible."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, *shape, generator=generator).to(device)
    return clip(scale_to(feasible.project(noise), budget), budget)


def halves(
    ids: Sequence[str], seed: int, groups: Sequence[str] | None = None
) -> tuple[Int[Tensor, "fitted"], Int[Tensor, "read"]]:
    """Choose the rows to fit on and those to read on, by a seeded hash of the id, so that their order does not matter.

    No group is in both parts, and the parts are as near in size as that allows.
    """
    members: dict[str, list[int]] = {}
    for row, name in enumerate(groups or ids):
        members.setdefault(name, []).append(row)
    order = sorted(members, key=lambda name: _hash(seed, name))
    sizes = list(accumulate(len(members[name]) for name in order))
    # Either part has a group, where there are two of them.
    cut = min(range(max(1, len(order) - 1)), key=lambda at: abs(2 * sizes[at] - len(ids) - len(ids) % 2))
    parts = [sorted(row for name in some for row in members[name]) for some in (order[: cut + 1], order[cut + 1 :])]
    return torch.tensor(parts[0]), torch.tensor(parts[1], dtype=torch.long)


def derangement(targets: Int[Tensor, "batch"], ids: Sequence[str], seed: int) -> Int[Tensor, "batch"]:
    """The targets, given to other examples: as few as possible keep one that is equal to their own.

    Examples in groups of equal target, in a seeded order, are turned by the size of the largest group; where that group
    is no more than half of all, none keeps its own.
    """
    groups: dict[int, list[int]] = {}
    for row in sorted(range(len(ids)), key=lambda row: _hash(seed, ids[row])):
        groups.setdefault(int(targets[row]), []).append(row)
    inorder = [row for group in groups.values() for row in group]
    largest = max(map(len, groups.values()))
    shuffled = targets.clone()
    for place, row in enumerate(inorder):
        shuffled[row] = targets[inorder[(place + largest) % len(inorder)]]
    return shuffled


def _gradient(
    pool: Pool,
    problems: Sequence[Problem],
    targets: Int[Tensor, "fit batch"] | None,
    deltas: Shared,
    drawn: Float[Tensor, "batch pos d_model"],
    noise: float,
) -> Shared:
    """The gradient of each problem's mean loss, smoothed; what is not finite counts for nothing."""
    total = torch.zeros_like(deltas)
    around = deltas.new_empty(len(problems), *drawn.shape)
    for feasible, members in _by_space(problems):
        unit = scale_to(feasible.project(drawn), noise)
        for fit in members:
            around[fit] = unit * problems[fit].budget
    for fits, rows, objective in pool._chunks(len(problems), targets):
        leaf = deltas.detach().requires_grad_(True)
        seen = leaf[fits] + around[fits, rows]
        _, slack = objective(seen)
        for fit, gate in ((at, problem.gate) for at, problem in enumerate(problems) if problem.gate is not None):
            here = (fits == fit).nonzero().flatten()
            slack = slack.index_add(0, here, gate(seen[here]))
        loss = F.softplus(MARGIN - slack).where(slack.isfinite(), 0.0).sum() / len(pool)
        (gradient,) = torch.autograd.grad(loss, leaf)
        total += gradient.nan_to_num(0.0, 0.0, 0.0)
    return total


def _each(problems: Sequence[Problem], deltas: Shared) -> Shared:
    """Each delta in its own problem's admissible space."""
    projected = torch.empty_like(deltas)
    for feasible, fits in _by_space(problems):
        projected[fits] = feasible.project(deltas[fits])
    return projected


def _by_space(problems: Sequence[Problem]) -> list[tuple[Feasible, list[int]]]:
    """The different admissible spaces, and the problems that belong to each."""
    spaces: dict[int, tuple[Feasible, list[int]]] = {}
    for fit, problem in enumerate(problems):
        spaces.setdefault(id(problem.feasible), (problem.feasible, []))[1].append(fit)
    return list(spaces.values())


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
