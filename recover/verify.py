"""The laws that everything here rests on, held to *your* model and *your* SAE: `recover verify`.

The property tests hold the code to its laws on small random models. What they cannot know is your model: a block that
keeps a state, a tokenizer that pads in its own way, an SAE whose encoder is not what it says. Each law below is
measured once on a few prompts, against a plain forward pass of the module or against arithmetic, with its figure:

================  =====================================================================================================
`blocks`          the residual that goes into the blocks comes out of a forward pass that reads it, unchanged
`batching`        a prompt among longer ones, padded, gives the logits that it gives alone
`start`           a run that starts at the site, with the residual there, gives the logits of a whole one
`decomposition`   reconstruction and error add up to the residual
`clamp`           a clamp moves the residual within the span of its features' decoder rows, and an empty one not at all
`suffix`          the perturbed positions alone give the logits of a whole run with that perturbation
`blindness`       clamped pre-activations do not see an admissible perturbation
`gradient`        slopes of the score along a random admissible direction are differences of the score
`generation`      greedy generation with a cache is generation without
================  =====================================================================================================

A law that does not apply (`generation` of what is no language model) is told with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from recover.behavior import AnswerLikelihood
from recover.clamp import Clamp, Defense, Set
from recover.constraint import EncoderOrthogonal
from recover.decompose import decompose
from recover.defended import Defended, defend
from recover.generate import generate
from recover.metrics import norm
from recover.model import Model, Prompts
from recover.sae import SAE
from recover.search import scale_to
from recover.types import Float, InputError, Int, Site, Tensor, widened

__all__ = ["Law", "verify"]

RELATIVE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""What may differ, as a share of what is compared: rounding, summed over blocks."""
SLOPE = 0.05
"""What a slope may differ from a difference by: curvature and rounding."""
CLAMPED, VALUE, TOKENS = 8, -1.0, 8


@dataclass(frozen=True)
class Law:
    """One law on one model and SAE; `holds` is None where it does not apply."""

    name: str
    holds: bool | None
    detail: str


def verify(model: Model, sae: SAE, prompts: Prompts, site: Site | None = None) -> list[Law]:
    """Hold the laws to a model and an SAE.

    Args:
        model: of the user's.
        sae: used at `site`, by default its own.
        prompts: a few, of unequal length; each at least two tokens long.
        site: where the SAE reads.

    Raises:
        InputError: no site is known, the model has no such block, or the SAE is of another width.
    """
    place = site or sae.site
    if place is None:
        raise InputError("verify: the SAE does not say where it reads; give it a site")
    model.check_site(place)
    sae = sae.to(model.device)
    bench = _Bench.of(model, sae, place, prompts)
    laws: dict[str, Callable[[_Bench], Law]] = {
        "blocks": _blocks,
        "batching": _batching,
        "start": _start,
        "decomposition": _decomposition,
        "clamp": _clamp,
        "suffix": _suffix,
        "blindness": _blindness,
        "gradient": _gradient,
        "generation": _generation,
    }
    found = []
    for name, law in laws.items():
        try:
            found.append(law(bench))
        except (InputError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            found.append(Law(name, False, f"could not be measured ({type(error).__name__}: {reason:.160})"))
    return found


@dataclass(frozen=True, eq=False)
class _Bench:
    """What the laws are measured on."""

    model: Model
    sae: SAE
    site: Site
    prompts: Prompts
    residual: Float[Tensor, "batch pos d_model"]
    logits: Float[Tensor, "batch vocab"]
    defense: Defense
    defended: Defended
    tolerance: float

    @classmethod
    def of(cls, model: Model, sae: SAE, site: Site, prompts: Prompts) -> _Bench:
        with torch.no_grad():
            run = model.run(prompts, read=[site])
            residual, logits = run.residuals[site], run.logits
            if residual.shape[-1] != sae.W_enc.shape[0]:
                raise InputError(
                    f"verify: the SAE reads a residual of width {sae.W_enc.shape[0]} and the model's is "
                    f"{residual.shape[-1]} wide; give an SAE of this model"
                )
            active = sae.encode(widened(residual[:, -1])).sum(dim=0)
        features = tuple(active.argsort(descending=True)[:CLAMPED].tolist())
        defense = Defense((Clamp(sae, features, Set(VALUE), site=site),))
        behavior = AnswerLikelihood(logits.argmax(dim=-1))
        defended = defend(model, defense, prompts, behavior)
        return cls(model, sae, site, prompts, residual, logits, defense, defended, RELATIVE[model.dtype])

    @property
    def real(self) -> Tensor:
        """`[batch pos 1]`: which positions hold tokens."""
        return self.prompts.mask[..., None]

    def delta(self, seed: int = 0) -> Float[Tensor, "batch pos d_model"]:
        """Random admissible perturbations, a tenth as long as the residual."""
        drawn = torch.randn(self.defended.zero_delta.shape, generator=torch.Generator().manual_seed(seed))
        space = EncoderOrthogonal.of(*self.defense.clamps)
        return scale_to(space.project(drawn.to(self.model.device)), 0.1 * norm(widened(self.defended.residual)))

    def law(self, name: str, apart: float, what: str, tolerance: float | None = None) -> Law:
        bound = self.tolerance if tolerance is None else tolerance
        return Law(name, apart <= bound, f"{what} by at most {apart:.1e} of its size; {bound:.0e} allowed")


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    size = max(float(other.abs().max()), torch.finfo(torch.float32).tiny)
    return float((one.double() - other.double()).abs().max()) / size


def _blocks(bench: _Bench) -> Law:
    """Against a hook of PyTorch on the module itself."""
    seen: list[Any] = []
    path = bench.model.blocks_path
    block = bench.model.module.get_submodule(f"{path}.{min(bench.site.index, bench.model.n_layers - 1)}")
    before = bench.site.index < bench.model.n_layers

    def keep(_: object, given: tuple[Any, ...], options: dict[str, Any], output: Any = None) -> None:
        value = (given[0] if given else options["hidden_states"]) if output is None else output
        seen.append(value[0] if isinstance(value, tuple) else value)

    handle = (
        block.register_forward_pre_hook(keep, with_kwargs=True)
        if before
        else block.register_forward_hook(keep, with_kwargs=True)
    )
    try:
        with torch.no_grad():
            row = bench.prompts.select(torch.tensor([0]))
            bench.model.module(input_ids=row.ids)
    finally:
        handle.remove()
    ours = bench.residual[:1][:, -row.ids.shape[1] :]
    return bench.law("blocks", _apart(ours, seen[0]), "a PyTorch hook reads the same residual, apart")


def _batching(bench: _Bench) -> Law:
    with torch.no_grad():
        rows = [bench.model.run(bench.prompts.select(torch.tensor([row]))).logits for row in range(len(bench.prompts))]
    apart = _apart(bench.logits, torch.cat(rows))
    note = " (a recurrent state takes in padding: prompts run one at a time)" if bench.model.recurrent else ""
    if bench.model.recurrent:
        return Law("batching", None, f"padding changes logits by {apart:.1e} of their size{note}")
    return bench.law("batching", apart, "alone and among longer ones logits differ")


def _start(bench: _Bench) -> Law:
    with torch.no_grad():
        again = bench.model.run(bench.prompts, start=(bench.site, bench.residual)).logits
    return bench.law("start", _apart(again, bench.logits), "logits differ")


def _decomposition(bench: _Bench) -> Law:
    x = widened(bench.residual)[bench.prompts.mask]
    parts = decompose(bench.sae, x)
    later = bench.prompts.positions[bench.prompts.mask] > 0  # first tokens are attention sinks that no SAE describes
    error = float(parts.error[later].norm() / x[later].norm())
    law = bench.law("decomposition", _apart(parts.reconstruction + parts.error, x), "the sum is off", 1e-5)
    return Law(law.name, law.holds, f"{law.detail}; the error is {error:.0%} of the residual's norm")


def _clamp(bench: _Bench) -> Law:
    (clamp,) = bench.defense.clamps
    x = widened(bench.residual)
    moved = (clamp.apply(x, bench.prompts.mask) - x).double()
    basis = torch.linalg.qr(clamp.decoder.double().mT).Q
    outside = moved - moved @ basis @ basis.mT
    untouched = moved.masked_select(~bench.real).abs().sum()
    apart = float(outside.abs().max() / moved.abs().max().clamp(min=1e-30)) + float(untouched)
    return bench.law("clamp", apart, "what is moved lies outside", 1e-5)


def _suffix(bench: _Bench) -> Law:
    defended, delta = bench.defended, bench.delta()
    with torch.no_grad():
        alone = defended.logits(delta)
        n_pos = defended.suffix.n_pos
        state = defended.suffix.state.clone()
        state[:, -n_pos:] += delta.to(state)
        whole = bench.model.run(bench.prompts, start=(bench.site, state)).logits
    note = " (the whole prompt is run again at each step)" if defended.suffix.past is None else ""
    law = bench.law("suffix", _apart(alone, whole), "logits differ")
    return Law(law.name, law.holds, law.detail + note)


def _blindness(bench: _Bench) -> Law:
    (clamp,) = bench.defense.clamps
    state, delta = widened(bench.defended.residual), bench.delta()
    moved = (clamp.pre_activations(state + delta) - clamp.pre_activations(state)).abs().max()
    size = clamp.encoder.norm(dim=0).max() * norm(delta).max()
    return bench.law("blindness", float(moved / size), "pre-activations move", 1e-4)


def _gradient(bench: _Bench) -> Law:
    if bench.model.dtype not in (torch.float32, torch.float64):
        return Law("gradient", None, f"differences say nothing in {bench.model.dtype}; verify in float32")
    direction, worst = bench.delta(1), 0.0
    leaf = bench.defended.zero_delta.requires_grad_(True)
    (gradient,) = torch.autograd.grad(bench.defended(leaf)[0].sum(), leaf)
    slope = (gradient * direction).flatten(1).sum(dim=1)
    with torch.no_grad():
        # The best of several steps: long ones are curved, short ones are rounded.
        by_step = []
        for step in (0.1, 0.03, 0.01, 0.003):
            ahead, behind = (bench.defended(sign * step * direction)[0] for sign in (1, -1))
            by_step.append(((ahead - behind) / (2 * step) - slope).abs())
        worst = float((torch.stack(by_step).amin(dim=0) / slope.abs().max().clamp(min=1e-30)).max())
    return bench.law("gradient", worst, "slopes and differences differ", SLOPE)


def _generation(bench: _Bench) -> Law:
    model = bench.model
    if not model.is_language_model:
        return Law("generation", None, "no language model of transformers, so that nothing is generated")
    prompts = bench.prompts if not model.recurrent else bench.prompts.select(torch.tensor([0]))
    cached, plain = (generate(model, prompts, TOKENS, use_cache=use) for use in (not model.recurrent, False))
    same = _same(cached, plain)
    note = "; a recurrent state is run without a cache" if model.recurrent else ""
    return Law(
        "generation", same, f"{TOKENS} tokens with a cache and without are {'the same' if same else 'not'}{note}"
    )


def _same(one: Int[Tensor, "batch pos"], other: Int[Tensor, "batch pos"]) -> bool:
    return one.shape == other.shape and bool((one == other).all())
