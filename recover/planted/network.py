"""The small network of a planted world: four kinds of block, and one function that puts them around given atoms.

See `world` for what is where. Its blocks are plain modules, run through the engine like those of any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import nn

from recover.models.host import Model, Prompts
from recover.numerics.subspaces import NullSpace
from recover.planted.world import Atoms, Draw, Sizes
from recover.types import Float, Tensor


class Gather(nn.Module):
    """Adds to each position a linear function of the mean of the positions before it."""

    def __init__(self, carry: Tensor) -> None:
        super().__init__()
        self.carry = nn.Parameter(carry.float())

    def forward(self, h: Tensor) -> Tensor:
        before = torch.arange(h.shape[1], dtype=h.dtype, device=h.device).clamp(min=1)
        carried: Tensor = (h.cumsum(dim=1) - h) / before[:, None] @ self.carry
        return h + carried


class Elsewhere(nn.Module):
    """A nonlinear residual block that reads and writes along `N` alone."""

    def __init__(self, N: Float[Tensor, "d_model n"]) -> None:
        super().__init__()
        self.N = nn.Parameter(N.float())

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(h @ self.N) @ self.N.T


class Linear(nn.Module):
    """A linear block, `h J^T`."""

    def __init__(self, J: Float[Tensor, "d_model d_model"]) -> None:
        super().__init__()
        self.J = nn.Parameter(J.float())

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.J.T


class ReadoutBlock(nn.Module):
    """Overwrites the coordinates along `out` with `f(U^T h)`, whatever was there."""

    def __init__(self, U: Float[Tensor, "d_model n"], f: nn.Module, out: Float[Tensor, "d_model m"]) -> None:
        super().__init__()
        self.U, self.f, self.out = nn.Parameter(U.float()), f, nn.Parameter(out.float())

    def forward(self, h: Tensor) -> Tensor:
        change: Tensor = (self.f(h @ self.U) - h @ self.out) @ self.out.T
        return h + change


class Network(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, embedding: Tensor, blocks: Sequence[nn.Module], head: Tensor, bias: Tensor) -> None:
        super().__init__()
        vocab, d_model = embedding.shape
        self.config = SimpleNamespace(hidden_size=d_model)
        self.embedding = nn.Embedding(vocab, d_model, _weight=embedding.float())
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(d_model, vocab)
        with torch.no_grad():
            self.head.weight.copy_(head)
            self.head.bias.copy_(bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embedding(input_ids)
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(h)
        return logits


class Monotone(nn.Module):
    """An increasing function of each coordinate, the same for all: which of two is larger does not change.

    No slope is below 0.2 where coordinates lie, so that a margin asked in logits is a small one in coordinates.
    """

    NAMES = ("identity", "asinh", "wavy", "softplus", "leaky")

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @classmethod
    def drawn(cls, draw: Draw) -> Monotone:
        return cls(cls.NAMES[draw.below(len(cls.NAMES))])

    def forward(self, y: Tensor) -> Tensor:
        match self.name:
            case "asinh":
                return torch.asinh(y)
            case "wavy":
                return y + 0.5 * torch.sin(y)
            case "softplus":
                return nn.functional.softplus(y) + 0.3 * y
            case "leaky":
                return nn.functional.leaky_relu(y, 0.3)
        return y


def build_network(
    draw: Draw,
    atoms: Atoms,
    codes: Float[Tensor, "batch n"],
    context: Sequence[int],
    U: Float[Tensor, "d_model m"],
    f: nn.Module,
    *,
    n_out: int,
    size: Sizes,
    between: Sequence[nn.Module] = (),
) -> tuple[Model, Prompts]:
    """A network whose residual at the last position of prompt `i`, at `SITE`, has the atom coordinates `codes[i]`.

    Tokens `0 .. n_out - 1` have the logits `f(U^T h)`. The last token of each prompt carries its codes; the fillers
    before it carry `context` features, which `Gather` passes on: what it adds at the last position is taken off the
    embedding there, so that the coordinates at the site are the codes themselves.
    """
    batch, n = codes.shape
    d_model, fillers = U.shape[0], 5
    first = n_out + fillers
    vocab = max(size.vocab, first + batch)
    chosen = torch.tensor(list(context), dtype=torch.long)
    z = torch.zeros(vocab, n, dtype=torch.float64)
    z[:, chosen] = draw.uniform(0.5, 3.0, vocab, len(chosen)) * (draw.uniform(0, 1, vocab, len(chosen)) < 0.5)
    middle = n_out + torch.randint(fillers, (batch, size.length - 1), generator=draw.generator)
    ids = torch.cat([middle, first + torch.arange(batch)[:, None]], dim=1)
    passed = torch.zeros(n, n, dtype=torch.float64)
    passed[chosen, chosen] = 0.2
    z[first : first + batch] = codes - z[middle].mean(dim=1) @ passed
    out = draw.orthonormal(d_model, n_out)
    # Blind to what the readout reads: otherwise the closed forms would not be closed.
    unread = NullSpace.of(U).project(draw.normal(max(d_model - U.shape[1], 0), d_model))
    blocks: list[nn.Module] = [Gather(atoms.W @ passed @ atoms.T), *between]
    for _ in range(size.depth):
        N = torch.linalg.qr(unread.T).Q if len(unread) else torch.zeros(d_model, 1, dtype=torch.float64)
        blocks.append(Elsewhere(0.5 * N[:, : max(1, d_model // 4)]))
        unread = unread.roll(1, dims=0)
    blocks.append(ReadoutBlock(U, f, out))
    head, bias = torch.zeros(vocab, d_model), torch.full((vocab,), -6.0)
    head[:n_out], bias[:n_out] = out.T.float(), 0.0
    module = Network(z @ atoms.T, blocks, head, bias).eval().requires_grad_(False)
    return Model(module), Prompts(ids, torch.ones_like(ids, dtype=torch.bool))
