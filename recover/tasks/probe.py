"""Targeted probe perturbation (SAEBench's TPP; paper, TPP): does a linear probe still say what a text is about?

1. *Texts* of several classes (`recover.tasks.labeled`), cut to one number of tokens, shorter ones left out, so that all
   means are over as many positions; the first token, an attention sink, counts for nothing.
2. *Probes*, one a class, are trained on the mean residual at a layer, on texts to train with (`probe_heads`).
3. *Examples* are texts of the target class to test with. The behavior is the logit of its probe; it shows where that
   is positive, and a delta reaches every position that the mean is over.
4. *Features* are selected with `effect` on the texts to train with, and ablated with `mode: set, value: 0`.

The probe may be at the clamped site, as in SAEBench, or above it. At the clamped site it is a linear function of what a
delta is added to, so that a delta can always write it: a check then says that recovery is not specific, and what is
left to learn is how large the smallest one is.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, PositiveInt

from recover.models.host import Model, Prompts
from recover.tasks.examples import Contrast, Examples
from recover.tasks.labeled import Data, Labeled, draw, load
from recover.tasks.probe_heads import PooledProbe, ProbeHead, Probes, pooled_residuals, train_probes
from recover.tasks.rules import OtherRule
from recover.types import Bool, Float, InputError, Int, Site, Tensor

SKIPPED = 1
"""First tokens that no mean is over."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts of all classes, tokenized: their ids, words, prompts of one length, and classes by number."""

    ids: tuple[str, ...]
    words: tuple[str, ...]
    prompts: Prompts
    label: Int[Tensor, "batch"]

    def of(self, kept: Bool[Tensor, "batch"]) -> Texts:
        """The texts that are kept."""
        rows = kept.nonzero().flatten()
        names, words = ([all_of[row] for row in rows.tolist()] for all_of in (self.ids, self.words))
        return Texts(tuple(names), tuple(words), self.prompts.select(rows), self.label[rows])


@dataclass(frozen=True, eq=False)
class Material:
    """Probes and the texts that they were trained on and are tested with.

    Attributes:
        mean: the mean residual at the site of the texts to train with.
    """

    probes: Probes
    site: Site
    train: Texts
    test: Texts
    mean: Float[Tensor, "batch d_model"]

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of their numbers."""
        return self.probes.labels

    @property
    def head(self) -> ProbeHead:
        """The readout that turns the host into a model that ends in these probes."""
        told = repr((self.labels, self.site, self.train.prompts.ids.tolist(), self.train.label.tolist()))
        return ProbeHead(self.probes, self.site, hashlib.sha256(told.encode()).hexdigest())

    def behavior(self, target: str, n: int) -> PooledProbe:
        """The probe of a class, for `n` texts."""
        device, reads = self.train.label.device, self.train.prompts.ids.shape[1] - SKIPPED
        choices = torch.arange(len(self.labels), device=device)
        return PooledProbe(choices[self.labels.index(target)].expand(n), reads, choices)

    def examples(self, target: str, n: int | None = None) -> Examples:
        """Texts of a class to test with, and what features are selected from.

        Raises:
            InputError: no such class, or no such text.
        """
        if target not in self.labels:
            near = difflib.get_close_matches(target, self.labels, n=1, cutoff=0.5)
            known = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(self.labels)}"
            raise InputError(f"prompts.target: no class {target!r} among the texts; {known}")
        number = self.labels.index(target)
        asked, own = self.test.of(self.test.label == number), self.train.label == number
        if not asked.ids:
            raise InputError(f"prompts.target: no text of {target!r} to test with is long enough; ask for fewer tokens")
        shown, hidden = self.train.of(own), self.train.of(~own)
        first = torch.arange(len(asked.ids))[:n]
        behavior = self.behavior(target, len(first))
        return Examples(
            asked.ids[:n],
            asked.prompts.select(first),
            behavior,
            asked.words[:n],
            contrast=Contrast(shown.prompts, hidden.prompts, self.behavior(target, len(shown.ids))),
            readout=self.head,
            rules=[OtherRule("another class", torch.full_like(behavior.target, (number + 1) % len(self.labels)))],
        )


def make_examples(
    model: Model,
    *,
    target: str,
    layer: PositiveInt,
    data: Data = "glosses",
    file: Path | str | None = None,
    n: PositiveInt | None = None,
    seed: int = 0,
    train: PositiveInt = 300,
    tokens: Annotated[int, Field(ge=3)] = 14,
    l2: Annotated[float, Field(gt=0)] = 0.01,
    progress: Callable[[str, int, int], None] | None = None,
) -> Examples:
    """Train probes, and ask that of one class.

    Args:
        model: the host model, with its tokenizer.
        target: the class whose features are ablated.
        layer: the probes read what enters this block.
        data: which texts (`recover.tasks.labeled`).
        file: the user's own, with the columns of `data`.
        n: how many texts of the class to test with; all by default.
        seed: of the draws.
        train: texts of each class to train with, at most.
        tokens: of each text; a delta reaches all but the first.
        l2: penalty on the probes' weights.
        progress: called with ("residuals", texts read, texts).

    Raises:
        InputError: texts that cannot be had, no such class, or a layer that the model does not have.
    """
    material = prepare(
        model, layer=layer, data=data, file=file, seed=seed, train=train, tokens=tokens, l2=l2, progress=progress
    )
    return material.examples(target, n)


def prepare(
    model: Model,
    *,
    layer: int,
    data: Data = "glosses",
    file: Path | str | None = None,
    seed: int = 0,
    train: int = 300,
    tokens: int = 14,
    l2: float = 0.01,
    progress: Callable[[str, int, int], None] | None = None,
) -> Material:
    """Read the texts and train a probe for each class; the arguments are those of `examples`."""
    site = Site(layer)
    model.check_site(site)
    long = _long_enough(model, load(data, file), tokens)
    labels = sorted({row.label for row, _ in long if row.split == "train"})
    if len(labels) < 2:
        raise InputError(
            f"prompts.tokens: texts to train with of {len(labels)} classes have {tokens} tokens; a probe tells a class "
            "from others, so ask for fewer tokens, or give texts of more classes"
        )
    ids = {row.id: tokenized for row, tokenized in long}
    usable = [row for row, _ in long if row.label in labels]
    fitted, held = (
        _texts(model, draw(usable, *asked), ids, labels) for asked in (("train", seed, train), ("test", seed))
    )
    report, n = progress or (lambda *_: None), len(fitted.prompts)
    size = model.batch_size(fitted.prompts)
    mean = pooled_residuals(model, fitted.prompts, site, SKIPPED, size, lambda done: report("residuals", done, n))
    return Material(train_probes(mean, fitted.label, labels, l2), site, fitted, held, mean)


def _long_enough(model: Model, rows: Sequence[Labeled], tokens: int) -> list[tuple[Labeled, list[int]]]:
    """The texts that have so many tokens, and their first ones."""
    if model.tokenizer is None:
        raise InputError("model: it was wrapped without a tokenizer; pass `Model(module, tokenizer)`")
    given = ((row, list(model.tokenizer(row.text)["input_ids"])) for row in rows)
    return [(row, found[:tokens]) for row, found in given if len(found) >= tokens]


def _texts(model: Model, rows: Sequence[Labeled], ids: Mapping[str, list[int]], labels: Sequence[str]) -> Texts:
    width = len(next(iter(ids.values())))
    tokens = torch.tensor([ids[row.id] for row in rows], device=model.device).reshape(len(rows), width)
    number = torch.tensor([labels.index(row.label) for row in rows], device=model.device, dtype=torch.long)
    prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return Texts(tuple(row.id for row in rows), tuple(row.text for row in rows), prompts, number)
