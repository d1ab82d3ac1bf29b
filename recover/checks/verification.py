"""The laws that everything here rests on, held to *your* model and *your* SAE: `recover verify`.

The property tests hold the code to its laws on small random models. What they cannot know is your model: a block that
keeps a state, a tokenizer that pads in its own way, an SAE whose encoder is not what it says. Each law below is
measured once on a few prompts, against a plain forward pass of the module or against arithmetic, with its figure
(`recover.checks.laws`):

================  =====================================================================================================
`blocks`          the residual that goes into the blocks comes out of a forward pass that reads it, unchanged
`batching`        a prompt among longer ones, padded, gives the logits that a plain pass over it alone gives
`causal`          no position sees a later one
`start`           a run that starts at the site, with the residual there, gives the logits of a whole one
`decomposition`   reconstruction and error add up to the residual
`clamp`           a clamp moves the residual within the span of its features' decoder rows, and padding not at all
`suffix`          the perturbed positions alone give the logits of a whole run with that perturbation
`blindness`       clamped pre-activations do not see an admissible perturbation
`gradient`        slopes of the score along a random admissible direction are differences of the score
`shared`          a perturbation fitted to all prompts in a pool does to each what it does in a whole run of it
`generation`      each token of a greedy answer is the likeliest of a plain pass over all before it
`components`      what attention and the MLP give adds up to what a block adds
================  =====================================================================================================

A law that does not apply (`generation` of what is no language model) is told with its reason; and what of the protocols
can be run with this model follows from the laws (`supported`). Where there is no SAE of a model, one that is drawn at
random serves (`stand_in`): no law asks that its features mean anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from recover.checks.law_bench import Law, LawBench, read
from recover.checks.laws import LAWS
from recover.models.host import Model, Prompts
from recover.protocol.gates import fit_gates
from recover.saes.activations import JumpReLU
from recover.saes.fit import measure_fit
from recover.saes.sae import SAE
from recover.types import InputError, Site, widened

__all__ = ["Law", "Support", "fitting", "stand_in", "supported", "told", "verify"]

WIDER, FIRING = 4, 0.05
"""A stand-in's features for each dimension of the residual, and the share of tokens on which each of them is active."""
SEARCH = ("blocks", "causal", "start", "decomposition", "clamp", "suffix", "blindness", "gradient")
"""The laws that any search rests on."""


@dataclass(frozen=True)
class Support:
    """Whether a protocol can be run with a model, and why."""

    protocol: str
    runs: bool
    reason: str


def verify(model: Model, sae: SAE, prompts: Prompts, site: Site | None = None) -> list[Law]:
    """Hold the laws to a model and an SAE.

    Args:
        model: of the user's.
        sae: used at `site`, by default its own.
        prompts: a few, of unequal length; each at least two tokens long.
        site: where the SAE reads.

    Raises:
        InputError: no site is known, the model has no such block or cannot be run from it on, or the SAE is of another
            width.
    """
    place = site or sae.site
    if place is None:
        raise InputError("verify: the SAE does not say where it reads; give the site (`--site`)")
    model.check_site(place)
    bench = LawBench.of(model, sae.to(model.device), place, prompts)
    found = []
    for name, law in LAWS.items():
        try:
            found.append(law(bench))
        except Exception as error:  # of a model that nobody here has seen; the other laws are still worth knowing
            reason = " ".join(str(error).split())
            found.append(Law(name, False, f"could not be measured ({type(error).__name__}: {reason:.160})"))
    return found


def stand_in(model: Model, prompts: Prompts, site: Site, seed: int = 0) -> SAE:
    """An SAE drawn at random: unit directions, each active on the twentieth of these tokens that is farthest along it.

    Args:
        model: whose residual it reads.
        prompts: a few; the first token of each is left out.
        site: where.
        seed: of the directions.

    Raises:
        InputError: the model has no such block, or fails on the prompts.
    """
    model.check_site(site)
    residual = widened(read(model, prompts, site).residuals[site])[prompts.positions > 0]
    d_model = residual.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(WIDER * d_model, d_model, generator=generator).to(residual)
    directions, center = F.normalize(drawn, dim=-1), residual.mean(dim=0)
    ahead = (residual - center) @ directions.mT
    thresholds = torch.quantile(ahead, 1 - FIRING, dim=0).clamp(min=0)
    bias = -(center @ directions.mT)
    return SAE(directions.mT.contiguous(), bias, directions, center, JumpReLU(thresholds), site, "jumprelu", "0" * 64)


def fitting(model: Model, sae: SAE, prompts: Prompts, site: Site) -> list[Support]:
    """Whether the SAE describes this model at this site, as a check asks of it; one that does not may keep all laws.

    Args:
        model: of the user's.
        sae: not one that was drawn at random.
        prompts: some dozens, of any length.
        site: where it is used.

    Raises:
        InputError: the model fails on the longest of the prompts.
    """
    read(model, prompts.select(prompts.mask.sum(dim=1).argmax()[None]), site)
    fit = measure_fit(model, sae.to(model.device), site, prompts, model.batch_size(prompts, sae.d_sae))
    named = {"fit": "check with this SAE", "site": "SAE at this site"}
    return [Support(named[gate.name], gate.passed is True, gate.detail) for gate in fit_gates([fit])]


def supported(model: Model, laws: list[Law]) -> list[Support]:
    """What of the protocols can be run with this model, by its kind and by the laws that it keeps."""
    by_name = {law.name: law for law in laws}

    def of(protocol: str, needs: tuple[str, ...], how: str, hindrance: str | None = None) -> Support:
        broken = ", ".join(name for name in needs if by_name[name].holds is False)
        reason = hindrance or (f"broken: {broken}" if broken else None)
        return Support(protocol, reason is None, reason or how)

    at_once, cached, foreign = None, None, None
    if not model.is_language_model:
        foreign = "it is no language model of transformers, so that nothing is generated"
        at_once = "it takes no attention mask that would hide padding: prompts of one length only"
        cached = "it keeps no keys and values as transformers does: each step runs the whole prompt"
    elif model.recurrent:
        at_once = "its recurrent state takes in the padding of shorter prompts: they run one at a time"
        cached = "its recurrent state is more than keys and values: each step runs the whole prompt"
    generated = "every token runs everything again" if cached else "generated with a cache"
    chat = getattr(model.tokenizer, "chat_template", None)
    requests = foreign if chat else "the tokenizer has no chat template, in which requests are asked"
    parts = by_name["components"]
    return [
        of("search", SEARCH, "for perturbations that no clamped feature sees"),
        of("prompts in batches", ("batching",), "of unequal length, padded on the left", at_once),
        of("search with a cache", SEARCH, "a step runs the perturbed positions alone", cached),
        of("transfer", (*SEARCH, "shared"), "one perturbation for all prompts"),
        of("whole answers", (*SEARCH, "generation"), generated, foreign),
        of("task refusal", (*SEARCH, "generation"), "requests in the tokenizer's chat template", requests),
        of(
            "heads and MLPs",
            ("components",),
            "what carries a recovery can be attributed to them",
            parts.detail if parts.holds is None else None,
        ),
    ]


def told(laws: list[Law], can: list[Support]) -> str:
    """For a page: each law and whether it holds, and what can be run."""
    holds = {True: "holds", False: "BROKEN", None: "not applicable"}
    lines = [f"{law.name:14} {holds[law.holds]:15} {law.detail}" for law in laws]
    runs = [f"{one.protocol:20} {'yes' if one.runs else 'no':4} {one.reason}" for one in can]
    return "\n".join(["", *lines, "", "What can be run with this model", *runs])
