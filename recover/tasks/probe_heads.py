"""Linear probes as the head of a model: a behavior that is read in the middle of it.

1. *Probe*. For each class a linear function of the residual at one site, averaged over the positions of a text, that is
   positive where the text is of the class (SAEBench's TPP; paper, TPP): logistic regression of one class against the
   rest, either side of the same weight, on standardized residuals with an L2 penalty. The problem is convex and is
   solved from zero, so that nothing is drawn.
2. *Head*. The host's blocks below the site, the site itself, and in the place of final norm and unembedding the probes.
   A probe is linear, so that the mean over positions of what this head gives is the probe of the mean residual.
3. *Behavior*. The logit of a class, averaged over all positions but the first ones: positive is yes.

The engine runs such a model like any other: it is the same module, cut short, with the host's weights shared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import einsum, rearrange, reduce
from torch import nn
from torch.nn import functional as F

from recover.models.host import Model, Prompts
from recover.types import Float, InputError, Int, PerExample, Rows, Site, Tensor

AGREES = 1e-3
"""Largest difference, as a share of the largest logit, of a head from the probes of the host's residual."""
INSTRUMENT = "__nnsight__"
"""Under this name a traced module holds the tracer's state, beside a `forward` of its own."""


@dataclass(frozen=True, eq=False)
class Probes:
    """One linear probe a class, of a mean residual: `logits = mean @ weight.T + bias`."""

    weight: Float[Tensor, "choice d_model"]
    bias: Float[Tensor, "choice"]
    labels: tuple[str, ...]

    def logits(self, mean: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch choice"]:
        """Positive where a probe says yes."""
        return einsum(mean, self.weight, "batch d_model, choice d_model -> batch choice") + self.bias

    def accuracy(self, logits: Float[Tensor, "batch choice"], label: Int[Tensor, "batch"]) -> Float[Tensor, "choice"]:
        """Balanced accuracy of each probe: its class and the rest weigh the same."""
        own = F.one_hot(label, len(self.labels)).bool()
        yes = logits > 0
        told = [(yes & own).sum(dim=0) / own.sum(dim=0), (~yes & ~own).sum(dim=0) / (~own).sum(dim=0)]
        return torch.stack(told).mean(dim=0)


def train_probes(
    mean: Float[Tensor, "batch d_model"], label: Int[Tensor, "batch"], labels: Sequence[str], l2: float = 1e-2
) -> Probes:
    """Fit one probe a class to mean residuals; `label` is the class of each text, an index into `labels`.

    The penalty has the weight `l2`, on the mean over texts, in standardized coordinates.

    Raises:
        InputError: fewer than two classes, or one without a text.
    """
    counts = torch.bincount(label, minlength=len(labels))
    if len(labels) < 2 or not bool((counts > 0).all()):
        raise InputError(
            "probes: a probe tells a class from others; give texts of at least two, and of each that is named"
        )
    x = mean.double()
    center, spread = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-8)
    x = (x - center) / spread
    own = F.one_hot(label, len(labels)).double()
    share = 0.5 * (own / counts + (1 - own) / (len(label) - counts))
    weight = torch.zeros(len(labels), x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(len(labels), dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        logits = einsum(x, weight, "batch d_model, choice d_model -> batch choice") + bias
        value = (share * F.binary_cross_entropy_with_logits(logits, own, reduction="none")).sum()
        value = value + 0.5 * l2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    slope = weight.detach() / spread
    shift = bias.detach() - einsum(slope, center, "choice d_model, d_model -> choice")
    return Probes(slope.to(mean.dtype), shift.to(mean.dtype), tuple(labels))


def pooled_residuals(
    model: Model,
    prompts: Prompts,
    site: Site,
    skip_first: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> Float[Tensor, "batch d_model"]:
    """The residual at a site, averaged over the real positions of each prompt but the first `skip_first`.

    `on_batch` is called with the number of prompts that are read.
    """
    means = []
    for rows in torch.split(torch.arange(len(prompts)), batch_size):
        part = prompts.select(rows)
        with torch.no_grad():
            residual = model.run(part, read=[site]).residuals[site].float()
        counted = (part.positions >= skip_first).to(residual.dtype)
        total = einsum(residual, counted, "batch pos d_model, batch pos -> batch d_model")
        means.append(total / reduce(counted, "batch pos -> batch 1", "sum"))
        if on_batch is not None:
            on_batch(int(rows[-1]) + 1)
    return torch.cat(means)


@dataclass(frozen=True, eq=False)
class PooledProbe:
    """The logit of a class's probe on the mean residual of the last `reads` positions; shows where it is positive.

    Attributes:
        target: `[batch]`, the class whose probe should say yes.
        reads: over how many of the last positions the residual is averaged.
        choices: all classes, of which another one may be asked for.
    """

    target: Int[Tensor, "batch"]
    reads: int
    choices: Int[Tensor, "choice"]

    @property
    def tokens(self) -> None:
        return None

    def score(self, logits: Float[Tensor, "batch pos choice"]) -> PerExample:
        flat = rearrange(logits, "batch ... choice -> batch (...) choice")
        mean = reduce(flat, "batch pos choice -> batch choice", "mean")
        return mean.gather(1, self.target[:, None])[:, 0]

    def slack(self, logits: Float[Tensor, "batch pos choice"]) -> PerExample:
        return self.score(logits)

    def select(self, rows: Rows) -> PooledProbe:
        return PooledProbe(self.target[rows], self.reads, self.choices)

    @property
    def rivals(self) -> Int[Tensor, "batch 0"]:
        return self.target[:, None][:, :0]

    def retarget(self, target: Int[Tensor, "batch"]) -> PooledProbe:
        """The probe of another class, on the same text."""
        return PooledProbe(target, self.reads, self.choices)


@dataclass(frozen=True, eq=False)
class ProbeHead:
    """A readout that turns a host model into one that ends in probes at a site.

    Attributes:
        sha256: of what the probes were trained on.
    """

    probes: Probes
    site: Site
    sha256: str

    def __call__(self, model: Model) -> Model:
        """The host cut short at the site, with the probes as its head; its weights are the host's.

        Raises:
            InputError: the site is not in the model, or the module is not built as blocks, a norm and a linear head.
        """
        index = self.site.index
        if not 0 < index < model.n_layers:
            raise InputError(
                f"probe: {self.site.hook_name} has no blocks below it and above it; the model has {model.n_layers}, so "
                f"take a layer from 1 to {model.n_layers - 1}"
            )
        module = _shortened(model, index, self.probes)
        read = Model(module, model.tokenizer, blocks=model.blocks_path)
        self._agrees(model, read)
        return read

    def _agrees(self, model: Model, read: Model) -> None:
        """Raises:
        InputError: on one text of two tokens the head gives something other than the probes of the host's residual.
        """
        ids = torch.tensor([[1, 2]], device=model.device)
        prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool))
        with torch.no_grad():
            given = read.run(prompts, reads=None).logits.double()
            residual = model.run(prompts, read=[self.site]).residuals[self.site]
            weight, bias = self.probes.weight.double(), self.probes.bias.double()
            wanted = einsum(residual.double(), weight, "batch pos d_model, choice d_model -> batch pos choice") + bias
        coarse = math.sqrt(torch.finfo(model.dtype).eps)
        if given.shape != wanted.shape or float((given - wanted).abs().max()) > max(AGREES, coarse) * float(
            wanted.abs().max()
        ):
            raise InputError(
                f"probe: {type(model.module).__name__} cannot be cut short at {self.site.hook_name}; its head is "
                "something other than a norm and one linear map"
            )


class Unchanged(nn.Module):
    """A block that hands on what it is given, so that there is a place between the last block and the head."""

    def __init__(self, like: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        for name in ("attention_type", "layer_type"):  # by which some models choose the mask of a block
            if hasattr(like, name):
                setattr(self, name, getattr(like, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if self.as_tuple else hidden_states


def _shortened(model: Model, index: int, probes: Probes) -> nn.Module:
    host = model.module
    blocks = cast(nn.ModuleList, host.get_submodule(model.blocks_path))
    kept = [*blocks[:index], Unchanged(blocks[0], model.returns_tuples)]
    module = _replaced(host, model.blocks_path, nn.ModuleList(kept))
    stack, _, name = model.blocks_path.rpartition(".")
    parent = module.get_submodule(stack)
    below = [child for child, _ in parent.named_children()].index(name)
    for child, part in list(parent.named_children())[below + 1 :]:
        if "Norm" in type(part).__name__:
            module = _replaced(module, f"{stack}.{child}".lstrip("."), nn.Identity())
    found = cast(Any, host).get_output_embeddings() if hasattr(host, "get_output_embeddings") else None
    path = next((where for where, part in host.named_modules() if part is found and found is not None), None)
    if path is None:
        raise InputError(f"probe: {type(host).__name__} has no linear head that probes could take the place of")
    head = nn.Linear(model.d_model, len(probes.labels)).requires_grad_(False)
    head.weight.copy_(probes.weight)
    head.bias.copy_(probes.bias)
    module = _replaced(module, path, head.to(model.device, model.dtype))
    cut = cast(Any, module)
    if getattr(getattr(cut, "config", None), "final_logit_softcapping", None) is not None:
        cut.config = copy.copy(cut.config)
        cut.config.final_logit_softcapping = None
    return module


def _replaced(module: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """The module with another part at this path; what is not on the way there is shared."""
    twin = copy.copy(module)
    # `copy` shares the tables of parts and of hooks, of which the twin needs its own.
    vars(twin).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    if vars(twin).pop(INSTRUMENT, None) is not None:
        vars(twin).pop("forward", None)  # a tracer's, bound to the module that was copied
    first, _, rest = path.partition(".")
    twin._modules[first] = _replaced(cast(nn.Module, module._modules[first]), rest, part) if rest else part
    return twin
