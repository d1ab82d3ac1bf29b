"""What the laws of `recover verify` are measured on: a model, an SAE at a site, and a few prompts, clamped and not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recover.defenses.clamps import Clamp, Defense, Set
from recover.defenses.defended import Defended, defend
from recover.models.host import Model, Prompts, Run
from recover.numerics.metrics import norm
from recover.saes.sae import SAE
from recover.search.ascent import scale_to
from recover.search.constraints.linear import EncoderOrthogonal
from recover.tasks.behaviors import AnswerLikelihood
from recover.types import Float, InputError, Site, Tensor, TokenIds, widened

__all__ = ["SIZE", "Law", "LawBench", "apart", "read", "worst"]

RELATIVE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""What may differ, as a share of what is compared: rounding, summed over blocks."""
CLAMPED, VALUE = 8, -1.0
SIZE = 0.1
"""Norm of the perturbations, as a share of the residual's."""


@dataclass(frozen=True)
class Law:
    """One law on one model and SAE; `holds` is None where it does not apply."""

    name: str
    holds: bool | None
    detail: str


@dataclass(frozen=True, eq=False)
class LawBench:
    """What the laws are measured on.

    `prompts` are those that run at once: all that were given, or the first of them where a recurrent state would take
    in the padding of the others.
    """

    model: Model
    sae: SAE
    site: Site
    given: Prompts
    prompts: Prompts
    residual: Float[Tensor, "batch pos d_model"]
    logits: Float[Tensor, "batch vocab"]
    defense: Defense
    defended: Defended
    tolerance: float

    @classmethod
    def of(cls, model: Model, sae: SAE, site: Site, prompts: Prompts) -> LawBench:
        """Run the prompts, with eight of the SAE's most active features clamped and without.

        Raises:
            InputError: the SAE is of another width, or the model cannot be run on the prompts, or from a site on.
        """
        together = prompts.select(torch.tensor([0])) if model.recurrent else prompts
        run = read(model, together, site)
        residual, logits = run.residuals[site], run.logits
        _check_width(residual, sae, model)
        with torch.no_grad():
            active = sae.encode(widened(residual[:, -1])).sum(dim=0)
        features = tuple(active.argsort(descending=True)[:CLAMPED].tolist())
        defense = Defense((Clamp(sae, features, Set(VALUE), site=site),))
        defended = defend(model, defense, together, AnswerLikelihood(logits.argmax(dim=-1)))
        return cls(
            model, sae, site, prompts, together, residual, logits, defense, defended, RELATIVE[model.dtype]
        )  # fmt: skip

    def plain(self, ids: TokenIds) -> Float[Tensor, "pos vocab"]:
        """Logits of one prompt `[1 pos]` by the module alone."""
        with torch.no_grad():
            output = self.model.module(input_ids=ids)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits[0].to(self.model.device)

    def row(self, index: int) -> TokenIds:
        """The tokens `[1 pos]` of one prompt, without padding."""
        return self.prompts.select(torch.tensor([index])).ids

    def delta(self, seed: int = 0) -> Float[Tensor, "batch pos d_model"]:
        """Random admissible perturbations."""
        drawn = torch.randn(self.defended.zero_delta.shape, generator=torch.Generator().manual_seed(seed))
        space = EncoderOrthogonal.of(*self.defense.clamps)
        return scale_to(space.project(drawn.to(self.model.device)), SIZE * norm(widened(self.defended.residual)))

    def perturbed(self, defended: Defended, delta: Tensor) -> Tensor:
        """The whole defended state, with `delta` at its last positions."""
        state = defended.suffix.state.clone()
        state[:, -defended.suffix.n_pos :] += delta.to(state)
        return state

    def law(self, name: str, apart: float, what: str, tolerance: float | None = None) -> Law:
        """A law that holds where `apart` is within the tolerance; `what` is put into words."""
        bound = self.tolerance if tolerance is None else tolerance
        return Law(name, apart <= bound, f"{what} by at most {apart:.1e} of its size; {bound:.0e} allowed")


def read(model: Model, prompts: Prompts, site: Site) -> Run:
    """A pass over whole prompts that reads a site.

    Raises:
        InputError: the module has no such positions or tokens.
    """
    try:
        with torch.no_grad():
            return model.run(prompts, read=[site])
    except IndexError as error:  # of an embedding: no such position, or no such token
        raise InputError(
            f"verify: {type(model.module).__name__} fails on prompts of {int(prompts.mask.sum(dim=1).max())} tokens "
            f"({' '.join(str(error).split()):.120}); its context is shorter, or the tokenizer is another model's"
        ) from error


def _check_width(residual: Tensor, sae: SAE, model: Model) -> None:
    if residual.ndim != 3:
        raise InputError(
            f"verify: between blocks {type(model.module).__name__} passes on a state with {residual.ndim} dimensions "
            "and not one residual stream [batch pos d_model], which SAEs and clamps are about; use another model"
        )
    if residual.shape[-1] != sae.d_model:
        raise InputError(
            f"verify: the SAE reads a residual of width {sae.d_model} and the model's is {residual.shape[-1]} wide; "
            "give an SAE of this model"
        )


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    size = max(float(other.abs().max()), torch.finfo(torch.float32).tiny)
    return float((one.double() - other.to(one.device).double()).abs().max()) / size


def worst(values: Sequence[Tensor]) -> float:
    """The largest; what is not a number counts as the worst."""
    return float(torch.stack([value.double().max() for value in values]).max())
