"""Which features to clamp: attribution on the task's own prompts; and which others, drawn at random, to compare with.

The attribution of a feature is its activation times the gradient of the behavior's score with respect to it, taken
through an SAE whose error is passed on (reference page, IOI): with `h = D(z) + e` and `e` held, the gradient with
respect to `z` is `dscore/dh @ W_dec^T`. Summed over positions and prompts; the largest positive ones are chosen.
The first token of a prompt counts for nothing: where it is an attention sink its norm is a hundred times the others',
no SAE describes it, and its spurious activations would outweigh all the rest.

A clamp of features that hardly ever fire does little whatever they mean, so the placebo features of the design page are
matched in firing rate:

1. *Rate*: the share of real tokens, first ones left out, on which a feature is active.
2. *Pairs*: for each clamped feature, in a random order, draw one of the unused others that are nearest in the logarithm
   of the rate, a difference of which is a factor whether features are rare or common. What fires and what never does
   are paired apart, as long as that can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from einops import einsum, reduce

from recover.models.host import Model, Prompts
from recover.saes.sae import SAE
from recover.tasks.behaviors import Behavior, positions_read
from recover.tasks.examples import Contrast, Examples
from recover.types import Float, InputError, Progress, Residual, Site, Tensor

Rule = Literal["attribution", "effect", "firing", "contrast"]
RETAIN = 0.01
"""The default for the largest firing rate, on prompts to keep, of a feature selected by `firing`."""

NEAREST = 10
"""One of so many features nearest in rate is drawn, so that draws differ."""
CALIPER = math.log(1.25)
"""But of those farther than this only the nearest: few features fire often, and the ten nearest may fire far less."""


def select_features(
    model: Model,
    sae: SAE,
    site: Site,
    examples: Examples,
    top: int,
    by: Rule = "attribution",
    batch_size: int | None = None,
    retain: float = RETAIN,
) -> tuple[int, ...]:
    """Select the features of one SAE to clamp.

    Args:
        model: the host model, without any clamp.
        sae: the dictionary to select from.
        site: where the SAE reads the residual stream.
        examples: for `attribution`, prompts with their behavior; the other rules read `examples.contrast`.
        top: the number of features.
        by: `attribution` ranks by activation times gradient of the behavior's score (see `attributions`), `effect` by
            the mean difference of activation times gradient (`effects`), `firing` by firing rate on what is to be
            forgotten (`forgettable`), and `contrast` by the difference of mean activations (`contrast`).
        batch_size: prompts per forward pass; all at once by default.
        retain: for `firing`, the largest firing rate allowed on prompts to keep.

    Returns:
        `top` feature indices, the highest-ranked first.

    Raises:
        InputError: fewer than `top` features qualify, or the examples lack the prompts that the rule compares.

    >>> from recover.models.names import load_model
    >>> from recover.saes.names import load_sae
    >>> from recover.tasks.registry import load_examples
    >>> toy, sae = load_model("toy-choice", "cpu"), load_sae("toy-choice-l1")
    >>> examples = load_examples("choice", toy, forget="toy-forget", retain="toy-retain", n=1)
    >>> len(select_features(toy, sae, sae.site, examples, top=2, by="firing"))
    2
    """
    read, _ = examples.read_with(model)
    if by == "attribution":
        return largest(attributions(read, sae, site, examples, batch_size), top)
    kinds = contrast_of(examples, by)
    if by == "effect":
        return largest(effects(read, sae, site, kinds, batch_size), top)
    if by == "contrast":
        return largest(contrast(model, sae, site, kinds.shown, kinds.hidden, batch_size)[0], top)
    shown, hidden = (firing_rates(model, sae, site, prompts, batch_size) for prompts in (kinds.shown, kinds.hidden))
    return forgettable(shown, hidden, top, retain)


def contrast_of(examples: Examples, by: Rule) -> Contrast:
    """Return the prompts of two kinds that the rule `by` compares.

    Raises:
        InputError: the examples have none, or none with the behavior that `effect` ranks by.
    """
    kinds, instead = examples.contrast, "list the features, or select by attribution"
    if kinds is None:
        raise InputError(
            f"features: select {by} compares prompts of two kinds, which this task does not give; {instead}"
        )
    if by == "effect" and kinds.behavior is None:
        raise InputError(f"features: select effect needs a behavior to rank by, and this task gives none; {instead}")
    return kinds


def attributions(
    model: Model,
    sae: SAE,
    site: Site,
    examples: Examples,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "d_sae"]:
    """Sum the attribution of each feature to the behavior's score over all examples, in units of the score.

    Args:
        model: the model that the behavior is read with, without any clamp.
        sae: the dictionary.
        site: where the SAE reads the residual stream.
        examples: prompts with their behavior.
        batch_size: prompts per forward pass; all at once by default.
        progress: called as `progress("attribution", done, total)`.
    """
    total = torch.zeros(sae.d_sae, device=sae.device)
    rows = torch.arange(len(examples.ids))
    for batch in torch.split(rows, batch_size or len(rows)):
        part = examples.select(batch)
        total += attribution_of(model, sae, site, part.prompts, part.behavior)
        if progress is not None:
            progress("attribution", int(batch[-1]) + 1, len(rows))
    return total


def attribution_of(model: Model, sae: SAE, site: Site, prompts: Prompts, behavior: Behavior) -> Float[Tensor, "d_sae"]:
    """Summed attribution of each feature to the score, in units of the score, over one batch of prompts.

    Padding and first tokens count for nothing. Divide by the number of prompts for the mean.
    """
    residual, gradient = _with_gradient(model, site, prompts, behavior)
    with torch.no_grad():
        counted = (prompts.positions > 0).to(sae.dtype)
        features = sae.encode(residual)
        slope = einsum(gradient.to(sae.dtype), sae.W_dec, "batch pos d_model, d_sae d_model -> batch pos d_sae")
        return einsum(features, slope, counted, "batch pos d_sae, batch pos d_sae, batch pos -> d_sae")


def _with_gradient(model: Model, site: Site, prompts: Prompts, behavior: Behavior) -> tuple[Residual, Residual]:
    """The residual at a site, and the gradient of the summed score with respect to it."""
    with torch.no_grad():
        residual = model.run(prompts, read=[site], tokens=behavior.tokens).residuals[site]
    leaf = residual.clone().requires_grad_(True)
    logits = model.run(prompts, start=(site, leaf), tokens=behavior.tokens, reads=positions_read(behavior)).logits
    (gradient,) = torch.autograd.grad(behavior.score(logits).sum(), leaf)
    return residual, gradient


def contrast(
    model: Model, sae: SAE, site: Site, shown: Prompts, hidden: Prompts, batch_size: int | None = None
) -> tuple[Float[Tensor, "d_sae"], Float[Tensor, "d_sae"]]:
    """Difference of each feature's mean activation before a behavior and without it, and its mean before the behavior.

    What counts is the last position of the prompts that the behavior follows (`shown`), and of those that it does not
    follow (`hidden`); the model has no clamp.
    """
    means = []
    for prompts in (shown, hidden):
        total = torch.zeros(sae.d_sae, dtype=sae.dtype, device=sae.device)
        for rows in torch.split(torch.arange(len(prompts)), batch_size or len(prompts)):
            with torch.no_grad():
                residual = model.run(prompts.select(rows), read=[site]).residuals[site]
                total += reduce(sae.encode(residual[:, -1]), "batch d_sae -> d_sae", "sum")
        means.append(total / len(prompts))
    return means[0] - means[1], means[0]


def effects(
    model: Model, sae: SAE, site: Site, kinds: Contrast, batch_size: int | None = None
) -> Float[Tensor, "d_sae"]:
    """How much of a behavior each feature brings about by being more active on prompts of a kind than on others.

    The mean activation over `shown` minus that over `hidden`, where that is positive, times what a unit of the feature
    at every position does for the score to first order. For a probe of the mean residual that is the effect of
    SAEBench's TPP: the decoder row on the probe. First tokens and padding count for nothing. In units of the score;
    the model is what the behavior is read with, without any clamp.
    """
    behavior = kinds.behavior
    assert behavior is not None
    size, slope = batch_size or len(kinds.shown), torch.zeros(sae.d_model, dtype=sae.dtype, device=sae.device)
    for rows in torch.split(torch.arange(len(kinds.shown)), size):
        prompts, asked = kinds.shown.select(rows), behavior.select(rows)
        _, gradient = _with_gradient(model, site, prompts, asked)
        counted = (prompts.positions > 0).to(sae.dtype)
        slope += einsum(gradient.to(sae.dtype), counted, "batch pos d_model, batch pos -> d_model")
    more = _mean_over(model, sae, site, kinds.shown, size) - _mean_over(model, sae, site, kinds.hidden, size)
    row = einsum(sae.W_dec, slope / len(kinds.shown), "d_sae d_model, d_model -> d_sae")
    return more.clamp(min=0) * row


def mean_activations(model: Model, sae: SAE, site: Site, prompts: Prompts) -> Float[Tensor, "batch d_sae"]:
    """Mean activation of each feature over each prompt's real tokens, the first left out."""
    with torch.no_grad():
        features = sae.encode(model.run(prompts, read=[site]).residuals[site])
    counted = (prompts.positions > 0).to(sae.dtype)
    counted = counted / reduce(counted, "batch pos -> batch 1", "sum").clamp(min=1)
    return einsum(features, counted, "batch pos d_sae, batch pos -> batch d_sae")


def _mean_over(model: Model, sae: SAE, site: Site, prompts: Prompts, size: int) -> Float[Tensor, "d_sae"]:
    """Mean of `mean_activations` over the prompts."""
    total = torch.zeros(sae.d_sae, dtype=sae.dtype, device=sae.device)
    for rows in torch.split(torch.arange(len(prompts)), size):
        total += reduce(mean_activations(model, sae, site, prompts.select(rows)), "batch d_sae -> d_sae", "sum")
    return total / len(prompts)


def largest(attributions: Float[Tensor, "d_sae"], top: int) -> tuple[int, ...]:
    """The `top` features of largest positive attribution, largest first; equal ones in the order of their index.

    Raises:
        InputError: fewer than `top` are positive.
    """
    positive = int((attributions > 0).sum())
    if positive < top:
        raise InputError(f"features: top {top} asked, but only {positive} have positive attribution; ask for fewer")
    return tuple(torch.argsort(attributions, descending=True, stable=True)[:top].tolist())


def forgettable(
    shown: Float[Tensor, "d_sae"], hidden: Float[Tensor, "d_sae"], top: int, retain: float
) -> tuple[int, ...]:
    """The `top` features of largest firing rate on what is to be forgotten (`shown`), equal ones in order of index.

    Their rate on what is to be kept (`hidden`) is at most `retain`; as in SAEBench's unlearning and the paper's WMDP
    setting.

    Raises:
        InputError: fewer such features fire at all.
    """
    rates = torch.where(hidden <= retain, shown, 0.0)
    if (there := int((rates > 0).sum())) < top:
        raise InputError(
            f"features: top {top} asked, but only {there} fire on what is to be forgotten and on at most {retain:g} of "
            "the tokens of what is to be kept; ask for fewer, or raise retain"
        )
    return largest(rates, top)


def firing_rates(
    model: Model, sae: SAE, site: Site, prompts: Prompts, batch_size: int | None = None
) -> Float[Tensor, "d_sae"]:
    """The share of real tokens on which each feature is active (not zero), the first token of each prompt left out.

    The model has no clamp, and residuals are cast to the dtype of the SAE. A rate of one in a thousand takes a few
    thousand tokens to see.

    Raises:
        InputError: no prompt has a second token.
    """
    fired, tokens = torch.zeros(sae.d_sae, dtype=torch.long, device=sae.device), 0
    for rows in torch.split(torch.arange(len(prompts)), batch_size or len(prompts)):
        batch = prompts.select(rows)
        with torch.no_grad():
            residual = model.run(batch, read=[site]).residuals[site]
            active = sae.encode(residual[batch.positions > 0]) != 0
        fired += reduce(active.long(), "token d_sae -> d_sae", "sum")
        tokens += len(active)
    if tokens == 0:
        raise InputError("firing rates: no prompt has a second token, and first tokens do not count; give longer ones")
    return fired / tokens


def matched(
    rates: Float[Tensor, "d_sae"], features: Sequence[int], seed: int, excluded: Sequence[int] = ()
) -> tuple[int, ...] | None:
    """Draw as many other features at random, matched in firing rate; None where the SAE has too few others.

    In an order that the seed draws, each feature gets one of the `NEAREST` unused candidates at the least distance
    `|log rate - log rate'|`, all that are as far as the last of these among them; but of those farther than `CALIPER`
    none, or where all are, the nearest alone. A feature that fires gets one that never does only where no other is
    left, and the other way round, where it gets the rarest. Neither `features` nor those `excluded`, such as those of
    another clamp, are drawn. All drawn are different, the match of each of `features` in its place.

    Raises:
        InputError: a feature that the SAE does not have, or rates that are negative or not finite.
    """
    d_sae = len(rates)
    if stray := [feature for feature in (*features, *excluded) if not 0 <= feature < d_sae]:
        raise InputError(f"features: {stray[0]} is not one of the SAE's, 0 to {d_sae - 1}")
    if not bool((rates.isfinite() & (rates >= 0)).all()):
        raise InputError("firing rates: one is negative or not finite; give shares of tokens")
    generator = torch.Generator().manual_seed(seed)
    rates = rates.detach().cpu().double()
    # All that never fires is at one level, far below whatever does: it is the last resort of what fires.
    levels = rates.clamp(min=torch.finfo(rates.dtype).tiny).log()
    unused = torch.ones(d_sae, dtype=torch.bool)
    unused[[*features, *excluded]] = False
    if int(unused.sum()) < len(features):
        return None
    found = [-1] * len(features)
    for place in torch.randperm(len(features), generator=generator).tolist():
        pool = unused.nonzero().flatten()
        distance = (levels[pool] - levels[features[place]]).abs()
        farthest = min(float(distance.kthvalue(min(NEAREST, len(pool))).values), max(CALIPER, float(distance.min())))
        nearest = pool[distance <= farthest]
        found[place] = int(nearest[torch.randint(len(nearest), (), generator=generator)])
        unused[found[place]] = False
    return tuple(found)
