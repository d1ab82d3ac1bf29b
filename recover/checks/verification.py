"""Verify that a user's model and SAE keep the laws that every check relies on: `recover verify`.

The property tests hold the code to its laws on small random models. They cannot know your model: a block that keeps
state, a tokenizer that pads in its own way, an SAE whose encoder is not what it claims. Each law below is measured once
on a few prompts, against a plain forward pass of the module or against arithmetic (`recover.checks.laws`):

================  =====================================================================================================
`blocks`          the residual that goes into the blocks comes out of a forward pass that reads it, unchanged
`batching`        a prompt in a padded batch gives the logits of a plain pass over it alone
`causal`          no position sees a later one
`start`           a run from the site, given the residual there, gives the logits of a whole run
`decomposition`   reconstruction and error add up to the residual
`clamp`           a clamp moves the residual within the span of its features' decoder rows, and padding not at all
`suffix`          running the perturbed positions alone gives the logits of a whole run with the perturbation
`blindness`       an admissible perturbation leaves the clamped pre-activations unchanged
`gradient`        the gradient along a random admissible direction equals finite differences of the score
`shared`          a perturbation fitted to a pool of prompts has the same effect in a whole run of each
`generation`      each token of a greedy answer is the most likely one in a plain pass over all earlier tokens
`components`      the outputs of attention and MLP add up to what the block adds
================  =====================================================================================================

A law that does not apply (`generation`, for a module that is no language model) is reported with the reason. Which
protocols can run with the model follows from the laws (`supported`). Without an SAE for the model, a random one serves
(`stand_in`): no law requires that its features mean anything.
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

WIDER, FIRING = 4, 0.05
"""For a random SAE: features per dimension of the residual, and the share of tokens on which each is active."""
SEARCH = ("blocks", "causal", "start", "decomposition", "clamp", "suffix", "blindness", "gradient")
"""The laws that any search relies on."""


@dataclass(frozen=True)
class Support:
    """Whether a protocol can run with a model, and the reason."""

    protocol: str
    runs: bool
    reason: str


def verify(model: Model, sae: SAE, prompts: Prompts, site: Site | None = None) -> list[Law]:
    """Measure every law on a model and an SAE.

    Args:
        model: the user's model.
        sae: the user's SAE, or one from `stand_in`.
        prompts: a few prompts of unequal length, each at least two tokens long.
        site: where the SAE reads the residual stream; by default the SAE's own site.

    Returns:
        One `Law` for each entry of `LAWS`, in that order.

    Raises:
        InputError: no site is known, the model has no such block or cannot run from it on, or the SAE has another
            width.

    >>> from recover.models.names import load_model
    >>> from recover.saes.names import load_sae
    >>> toy = load_model("toy-choice", "cpu")
    >>> prompts = toy.tokenize(["What does Anna like? A", "Anna"])
    >>> verify(toy, load_sae("toy-choice-l1"), prompts)[0].holds
    True
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
    """Draw a random SAE with unit decoder rows, each active on the 5 % of the prompts' tokens farthest along it.

    The first token of each prompt is left out.

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
    """Test whether an SAE describes the model's residuals well enough for a check, which no law requires.

    It takes some dozens of prompts, of any length.

    Raises:
        InputError: the model fails on the longest of the prompts.
    """
    read(model, prompts.select(prompts.mask.sum(dim=1).argmax()[None]), site)
    fit = measure_fit(model, sae.to(model.device), site, prompts, model.batch_size(prompts, sae.d_sae))
    named = {"fit": "check with this SAE", "site": "SAE at this site"}
    return [Support(named[gate.name], gate.passed is True, gate.detail) for gate in fit_gates([fit])]


def supported(model: Model, laws: list[Law]) -> list[Support]:
    """List the protocols and whether each can run with this model, given its kind and the laws that it keeps."""
    by_name = {law.name: law for law in laws}

    def of(protocol: str, needs: tuple[str, ...], how: str, hindrance: str | None = None) -> Support:
        broken = ", ".join(name for name in needs if by_name[name].holds is False)
        reason = hindrance or (f"broken: {broken}" if broken else None)
        return Support(protocol, reason is None, reason or how)

    at_once, cached, foreign = None, None, None
    if not model.is_language_model:
        foreign = "the module is not a transformers language model, so nothing is generated"
        at_once = "the module takes no attention mask to hide padding: prompts of one length only"
        cached = "the module keeps no keys and values: each step runs the whole prompt"
    elif model.recurrent:
        at_once = "the recurrent state absorbs the padding of shorter prompts: they run one at a time"
        cached = "the recurrent state is more than keys and values: each step runs the whole prompt"
    generated = "each token runs the whole prompt again" if cached else "generated with a cache"
    chat = getattr(model.tokenizer, "chat_template", None)
    requests = foreign if chat else "the tokenizer has no chat template to ask requests in"
    parts = by_name["components"]
    untold = parts.detail if parts.holds is None else None
    return [
        of("search", SEARCH, "perturbations that leave the clamped features unchanged"),
        of("prompts in batches", ("batching",), "prompts of unequal length, padded on the left", at_once),
        of("search with a cache", SEARCH, "each step runs the perturbed positions only", cached),
        of("transfer", (*SEARCH, "shared"), "one perturbation for all prompts"),
        of("whole answers", (*SEARCH, "generation"), generated, foreign),
        of("task refusal", (*SEARCH, "generation"), "requests in the tokenizer's chat template", requests),
        of("heads and MLPs", ("components",), "a recovery can be attributed to them", untold),
    ]


def told(laws: list[Law], can: list[Support]) -> str:
    """Format the laws and the supported protocols as the output of `recover verify`."""
    holds = {True: "holds", False: "BROKEN", None: "not applicable"}
    lines = [f"{law.name:14} {holds[law.holds]:15} {law.detail}" for law in laws]
    runs = [f"{one.protocol:20} {'yes' if one.runs else 'no':4} {one.reason}" for one in can]
    return "\n".join(["", *lines, "", "Protocols this model supports", *runs])
