"""The laws of `recover verify`, each measured on one bench (`recover.checks.law_bench`).

A law compares two computations of one quantity and reports their largest relative error beside its tolerance. The
reference is a plain forward pass of the module over one prompt, without engine, cache, padding or mask.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from recover.checks.law_bench import SIZE, Law, LawBench, apart, worst
from recover.defenses.defended import Defended, defend
from recover.evidence.transfer import FitSchedule, Pool, Problem, fit_shared
from recover.models.components import Component, Kind
from recover.models.generation import generate
from recover.models.host import Change
from recover.numerics.metrics import norm
from recover.saes.decomposition import decompose
from recover.search.constraints.linear import EncoderOrthogonal
from recover.tasks.behaviors import AnswerLikelihood
from recover.types import InputError, Site, Tensor, widened

SLOPE = 0.05
"""Tolerance for the gradient against finite differences, which curvature and rounding disturb."""
TOKENS, FIT_STEPS = 8, 2
ADDED: tuple[Kind, ...] = ("attention", "mlp")


def _blocks(bench: LawBench) -> Law:
    """Compare the residual that the engine reads with one that a PyTorch hook on the module sees."""
    seen: list[Any] = []
    index = min(bench.site.index, bench.model.n_layers - 1)
    block = bench.model.module.get_submodule(f"{bench.model.blocks_path}.{index}")

    def keep(_: object, given: tuple[Any, ...], options: dict[str, Any], output: Any = None) -> None:
        value = (given[0] if given else options["hidden_states"]) if output is None else output
        seen.append(value[0] if isinstance(value, tuple) else value)

    before = bench.site.index < bench.model.n_layers
    register = block.register_forward_pre_hook if before else block.register_forward_hook
    handle = register(keep, with_kwargs=True)
    try:
        ids = bench.row(0)
        bench.plain(ids)
    finally:
        handle.remove()
    differ = apart(bench.residual[:1][:, -ids.shape[1] :], seen[0])
    return bench.law("blocks", differ, "residual against a PyTorch hook")


def _batching(bench: LawBench) -> Law:
    if bench.model.recurrent:
        why = "the recurrent state absorbs the padding of shorter prompts, so prompts run one at a time"
        return Law("batching", None, why)
    alone = torch.stack([bench.plain(bench.row(row))[-1] for row in range(len(bench.prompts))])
    return bench.law("batching", apart(bench.logits, alone), "logits in a padded batch against a plain pass")


def _causal(bench: LawBench) -> Law:
    """Compare the change at earlier positions with that of the perturbed one: attention is weak, so leaks are small."""
    last, n_pos = Site(bench.model.n_layers - 1, "post"), bench.defended.suffix.n_pos
    states = (bench.defended.suffix.state, bench.perturbed(bench.defended, bench.delta()))
    with torch.no_grad():
        before, after = (
            bench.model.run(bench.prompts, start=(bench.site, state), read=[last]).residuals[last] for state in states
        )
    moved = (after - before).masked_fill(~bench.prompts.mask[..., None], 0.0)
    leaked = float(moved[:, :-n_pos].abs().max() / moved[:, -n_pos:].abs().max())
    # What does not see the later position is computed alike: no rounding of whole models is allowed for.
    allowed = min(bench.tolerance, 100 * torch.finfo(bench.model.dtype).eps)
    return bench.law("causal", leaked, "change at earlier positions when a later one is perturbed", allowed)


def _start(bench: LawBench) -> Law:
    with torch.no_grad():
        again = bench.model.run(bench.prompts, start=(bench.site, bench.residual)).logits
    return bench.law("start", apart(again, bench.logits), "logits of a run from the site against a whole run")


def _decomposition(bench: LawBench) -> Law:
    x = widened(bench.residual)[bench.prompts.mask]
    parts = decompose(bench.sae, x)
    later = bench.prompts.positions[bench.prompts.mask] > 0  # first tokens are attention sinks that no SAE describes
    error = float(parts.error[later].norm() / x[later].norm())
    rounding = apart(parts.reconstruction + parts.error, x)
    note = f"; the SAE's error has {error:.0%} of the residual's norm"
    return bench.law("decomposition", rounding, "reconstruction plus error against the residual", 1e-5, note)


def _clamp(bench: LawBench) -> Law:
    (clamp,) = bench.defense.clamps
    x = widened(bench.residual)
    moved = (clamp.apply(x, bench.prompts.mask) - x).double()
    basis = torch.linalg.qr(clamp.decoder.double().mT).Q
    outside = moved - moved @ basis @ basis.mT
    untouched = moved.masked_select(~bench.prompts.mask[..., None]).abs().sum()
    outlying = float(outside.abs().max() / moved.abs().max().clamp(min=1e-30)) + float(untouched)
    return bench.law("clamp", outlying, "displacement outside the span of the decoder rows", 1e-5)


def _suffix(bench: LawBench) -> Law:
    defended, delta = bench.defended, bench.delta()
    with torch.no_grad():
        alone = defended.logits(delta)
        whole = bench.model.run(bench.prompts, start=(bench.site, bench.perturbed(defended, delta))).logits
    note = "; every step runs the whole prompt" if defended.suffix.past is None else ""
    return bench.law("suffix", apart(alone, whole), "logits of the suffix against a whole run", note=note)


def _blindness(bench: LawBench) -> Law:
    (clamp,) = bench.defense.clamps
    state, delta = widened(bench.defended.residual), bench.delta()
    moved = (clamp.pre_activations(state + delta) - clamp.pre_activations(state)).abs().max()
    size = clamp.encoder.norm(dim=0).max() * norm(delta).max()
    return bench.law("blindness", float(moved / size), "clamped pre-activations under an admissible perturbation", 1e-4)


def _gradient(bench: LawBench) -> Law:
    if bench.model.dtype not in (torch.float32, torch.float64):
        return Law("gradient", None, f"finite differences are too coarse in {bench.model.dtype}; verify in float32")
    direction = bench.delta(1)
    leaf = bench.defended.zero_delta.requires_grad_(True)
    (gradient,) = torch.autograd.grad(bench.defended(leaf)[0].sum(), leaf)
    slope = (gradient * direction).flatten(1).sum(dim=1)
    with torch.no_grad():
        # The best of several steps: long ones are curved, short ones are rounded.
        by_step = []
        for step in (0.1, 0.03, 0.01, 0.003):
            ahead, behind = (bench.defended(sign * step * direction)[0] for sign in (1, -1))
            by_step.append(((ahead - behind) / (2 * step) - slope).abs())
        off = float((torch.stack(by_step).amin(dim=0) / slope.abs().max().clamp(min=1e-30)).max())
    return bench.law("gradient", off, "gradient against finite differences", SLOPE)


def _shared(bench: LawBench) -> Law:
    """Compare a shared perturbation's slack in a pool of all prompts with whole runs of each prompt."""
    (clamp,) = bench.defense.clamps
    parts = _parts(bench)
    pool = Pool(parts)
    problem = Problem(EncoderOrthogonal.of(clamp), SIZE * pool.residual_norm)
    shared = fit_shared(pool, [problem], FitSchedule(steps=FIT_STEPS))
    pooled, single, size = pool.slack(shared)[0], [], []
    for part in parts:
        with torch.no_grad():
            run = bench.model.run(part.suffix.prompts, start=(bench.site, bench.perturbed(part, shared)))
        single.append(part.behavior.slack(run.logits.float()))
        size.append(run.logits.abs().max())
    differ = worst([(pooled - torch.cat(single)).abs()]) / worst(size)
    subject = f"slack of a perturbation shared by {len(bench.given)} prompts, pooled against whole runs"
    return bench.law("shared", differ, subject)


def _parts(bench: LawBench) -> tuple[Defended, ...]:
    """Defend every given prompt, in as few batches as the model allows."""
    if not bench.model.recurrent:
        return (bench.defended,)
    rows = [bench.given.select(torch.tensor([row])) for row in range(len(bench.given))]
    with torch.no_grad():
        answers = [bench.model.run(row).logits.argmax(dim=-1) for row in rows]
    return tuple(
        defend(bench.model, bench.defense, row, AnswerLikelihood(answer))
        for row, answer in zip(rows, answers, strict=True)
    )


def _generation(bench: LawBench) -> Law:
    model = bench.model
    if not model.is_language_model:
        return Law("generation", None, "the module is not a transformers language model, so nothing is generated")
    answers, short = generate(model, bench.prompts, TOKENS), []
    for row, answer in enumerate(answers):
        ids = torch.cat([bench.row(row)[0], answer[:-1]])
        logits = bench.plain(ids[None])[-TOKENS:]
        chosen = logits.gather(-1, answer[:, None])[:, 0]
        short.append((logits.amax(dim=-1) - chosen) / logits.abs().amax(dim=-1))
    note = "; without a cache" if model.recurrent else ""
    subject = f"logits of {TOKENS} greedy tokens against the maxima of plain passes"
    return bench.law("generation", worst(short), subject, note=note)


def _components(bench: LawBench) -> Law:
    model = bench.model
    given: dict[Component, Tensor] = {}
    places = [Component(layer, kind) for layer in range(model.n_layers) for kind in ADDED]
    sites = [*(Site(layer) for layer in range(model.n_layers)), Site(model.n_layers - 1, "post")]

    def keeps(place: Component) -> Change:
        return lambda h: given.setdefault(place, h)

    try:
        with torch.no_grad():
            found = model.run(bench.prompts, read=sites, parts={place: keeps(place) for place in places}).residuals
    except InputError as error:
        return Law("components", None, str(error).removeprefix("components: "))
    mask, differences = bench.prompts.mask, []
    for layer, (below, above) in enumerate(pairwise(sites)):
        moved = (found[above] - found[below])[mask]
        added = (given[Component(layer, "attention")] + given[Component(layer, "mlp")])[mask]
        # Of the residual's size where a block does little: its sum is rounded to that.
        differences.append((moved - added).abs().max() / found[above][mask].abs().max())
    differ = worst(differences)
    law = bench.law("components", differ, "sum of attention and MLP against what the block adds")
    why = "; the block scales them, changes them in place, or adds the residual within"
    return law if law.holds else Law(law.name, None, law.detail + why)


LAWS: dict[str, Callable[[LawBench], Law]] = {
    "blocks": _blocks,
    "batching": _batching,
    "causal": _causal,
    "start": _start,
    "decomposition": _decomposition,
    "clamp": _clamp,
    "suffix": _suffix,
    "blindness": _blindness,
    "gradient": _gradient,
    "shared": _shared,
    "generation": _generation,
    "components": _components,
}
"""Each law by name, in the order of the output."""
