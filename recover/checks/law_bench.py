"""The setup of `recover verify`: a model, an SAE at a site, and prompts with and without a clamp."""

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

RELATIVE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The largest relative error that counts as rounding, by dtype."""
CLAMPED, VALUE = 8, -1.0
SIZE = 0.1
"""Norm of the perturbations, as a share of the residual's."""


@dataclass(frozen=True)
class Law:
    """The result of one law for a model and an SAE; `holds` is None where the law does not apply."""

    name: str
    holds: bool | None
    detail: str


@dataclass(frozen=True, eq=False)
class LawBench:
    """A model, an SAE and prompts on which laws are measured.

    `prompts` is the batch that runs at once: every given prompt, or only the first for a recurrent model, whose state
    would absorb the padding of the others.
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
        """Run the prompts with and without a clamp of the SAE's eight most active features.

        Raises:
            InputError: the SAE has another width, or the model cannot run the prompts, whole or from the site on.
        """
        together = prompts.select(torch.tensor([0])) if model.recurrent else prompts
        run = read(model, together, site)
        residual, logits, tolerance = run.residuals[site], run.logits, RELATIVE[model.dtype]
        _check_width(residual, sae, model)
        with torch.no_grad():
            active = sae.encode(widened(residual[:, -1])).sum(dim=0)
        features = tuple(active.argsort(descending=True)[:CLAMPED].tolist())
        defense = Defense((Clamp(sae, features, Set(VALUE), site=site),))
        defended = defend(model, defense, together, AnswerLikelihood(logits.argmax(dim=-1)))
        return cls(model, sae, site, prompts, together, residual, logits, defense, defended, tolerance)

    def plain(self, ids: TokenIds) -> Float[Tensor, "pos vocab"]:
        """Logits of one prompt `[1 pos]` from a plain forward pass of the module."""
        with torch.no_grad():
            output = self.model.module(input_ids=ids)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits[0].to(self.model.device)

    def row(self, index: int) -> TokenIds:
        """Token ids `[1 pos]` of one prompt, without padding."""
        return self.prompts.select(torch.tensor([index])).ids

    def delta(self, seed: int = 0) -> Float[Tensor, "batch pos d_model"]:
        """Draw random admissible perturbations, `SIZE` times the norm of the residual."""
        drawn = torch.randn(self.defended.zero_delta.shape, generator=torch.Generator().manual_seed(seed))
        space = EncoderOrthogonal.of(*self.defense.clamps)
        return scale_to(space.project(drawn.to(self.model.device)), SIZE * norm(widened(self.defended.residual)))

    def perturbed(self, defended: Defended, delta: Tensor) -> Tensor:
        """Add `delta` to the last positions of the defended state."""
        state = defended.suffix.state.clone()
        state[:, -defended.suffix.n_pos :] += delta.to(state)
        return state

    def law(self, name: str, error: float, subject: str, tolerance: float | None = None, note: str = "") -> Law:
        """Judge a law: it holds if the relative error of `subject` is at most the tolerance."""
        bound = self.tolerance if tolerance is None else tolerance
        return Law(name, error <= bound, f"{subject}: max relative error {error:.1e} (tolerance {bound:.0e}){note}")


def read(model: Model, prompts: Prompts, site: Site) -> Run:
    """Run whole prompts and read the residual at a site.

    Raises:
        InputError: the prompts exceed the module's context or vocabulary.
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
    """The largest absolute difference, relative to the largest absolute value of `other`."""
    size = max(float(other.abs().max()), torch.finfo(torch.float32).tiny)
    return float((one.double() - other.to(one.device).double()).abs().max()) / size


def worst(values: Sequence[Tensor]) -> float:
    """The largest value; NaN counts as the largest."""
    return float(torch.stack([value.double().max() for value in values]).max())
