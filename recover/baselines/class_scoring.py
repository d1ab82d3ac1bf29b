"""SAEBench's targeted probe perturbation over all classes of a probe task: features, and the score by their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from recover.baselines.tpp import Score, ablated, effect, score
from recover.defenses.selection import largest, mean_activations
from recover.models.host import Model, Prompts
from recover.saes.sae import SAE
from recover.tasks.probe import SKIPPED, Material, Texts
from recover.types import Float, Tensor


@dataclass(frozen=True)
class ClassScores:
    """What ablating each class's features does to the probes.

    Attributes:
        labels: the classes.
        accuracy, train_accuracy: of each class's probe, on texts to test with and on those to train with.
        features: of each class, those of largest effect on its probe first.
        scores: SAEBench's score by the number of ablated features.
    """

    labels: tuple[str, ...]
    accuracy: list[float]
    train_accuracy: list[float]
    features: tuple[tuple[int, ...], ...]
    scores: Mapping[int, Score]


def class_scores(model: Model, sae: SAE, material: Material, counts: Sequence[int]) -> ClassScores:
    """Select each class's features on texts to train with, and score their ablation on texts to test with.

    The material is that of `prepare_probes`, the SAE that of its site; `counts` are numbers of ablated features.
    """
    head, probes, train, test = material.head(model), material.probes, material.train, material.test
    reads = test.prompts.ids.shape[1] - SKIPPED
    before, after = (_activations(head, sae, material, texts) for texts in (train, test))
    with torch.no_grad():
        clean = torch.cat([head.run(part, reads=reads).logits.mean(dim=1) for part in _batches(head, sae, test)])
    ranked = []
    for number in range(len(material.labels)):
        found = effect(before, train.label == number, sae.W_dec, probes.weight[number])
        ranked.append(largest(found, min(max(counts), int((found > 0).sum()))))
    by_count = {}
    for count in sorted(set(counts)):
        under = [ablated(clean, after, features[:count], sae.W_dec, probes.weight) for features in ranked]
        by_count[count] = score(probes, clean, under, test.label)
    return ClassScores(
        labels=material.labels,
        accuracy=probes.accuracy(clean, test.label).tolist(),
        train_accuracy=probes.accuracy(probes.logits(material.mean), train.label).tolist(),
        features=tuple(ranked),
        scores=by_count,
    )


def _batches(model: Model, sae: SAE, texts: Texts) -> list[Prompts]:
    rows = torch.split(torch.arange(len(texts.ids)), model.batch_size(texts.prompts, sae.d_sae))
    return [texts.prompts.select(some) for some in rows]


def _activations(model: Model, sae: SAE, material: Material, texts: Texts) -> Float[Tensor, "batch d_sae"]:
    """The mean activation of each feature over each text."""
    return torch.cat([mean_activations(model, sae, material.site, part) for part in _batches(model, sae, texts)])
