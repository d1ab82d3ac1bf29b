"""Near-duplicates: prompts that ask the same thing in nearly the same words, which no split may part.

A perturbation that is fitted to one and read on the other shows nothing that was not told. Two prompts are
near-duplicates where they have the same target, or neither has one, and

1. *their words are the same*: the texts, where they are given, are equal but for case, punctuation and white space; or
2. *their tokens are nearly the same*: `weight(shared) >= SHARED * max(weight(one), weight(other))`, over tokens with
   their repeats, in any order. A token that `m` of `n` prompts have weighs `log(n / m)`, so that a chat template, or
   examples that stand before every question, weigh nothing;
3. *and nothing that answers is exchanged* (of 2 alone): each token that is a target, or competes with one, in any
   example, is in both or in neither. Two IOI prompts that differ in a name are different questions;
4. *and no question with another target is as near* (of 2 alone, unless the tokens are all the same): what fills a
   place in a long template makes the question, however much is shared.

So an IOI prompt with the same names is the same question where only the place or the object differs in a wording that
is rare, and another one in another wording. Clusters join: groups as given, and all groups that near-duplicates link.
They depend on no order. What is paraphrased in other words is not found: give those a group.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from recover.models.host import Prompts
from recover.tasks.behaviors import Behavior, Targeted, known_targets
from recover.types import Bool, Float, Int, Tensor

SHARED = 0.85
"""Share of the weight of two prompts that near-duplicates have in common."""
UNIT = 1024
"""Weights are whole numbers of this part of a nat, so that no sum depends on the order of its terms."""


@runtime_checkable
class Grouped(Protocol):
    """What is asked of examples here (`recover.tasks.Examples`)."""

    @property
    def ids(self) -> Sequence[str]:
        """A name for each example."""

    @property
    def prompts(self) -> Prompts:
        """Their prompts."""

    @property
    def behavior(self) -> Behavior:
        """The behavior of each."""

    @property
    def strict(self) -> Behavior | None:
        """A stricter predicate of the same kind."""

    @property
    def texts(self) -> Sequence[str] | None:
        """The prompts as text."""

    @property
    def groups(self) -> Sequence[str] | None:
        """A name for each, the same for those that ask the same thing."""

    @property
    def readout(self) -> object | None:
        """What the behavior is read with, where its targets are not tokens."""


def grouped(examples: Grouped) -> list[str]:
    """Name the cluster of each example: its group, joined with those that it has near-duplicates in.

    A cluster has the first of its groups' names, in the order of the alphabet; without groups, of its ids.
    """
    names = list(examples.groups or examples.ids)
    order = sorted(set(names))
    place = {name: number for number, name in enumerate(order)}
    at = torch.tensor([place[name] for name in names])
    cluster = _components(at[near_duplicates(examples)], len(order))
    return [order[number] for number in cluster[at].tolist()]


def near_duplicates(examples: Grouped) -> Int[Tensor, "pair 2"]:
    """List all pairs of examples that are near-duplicates, the smaller row first."""
    behavior, n = examples.behavior, len(examples.ids)
    target = behavior.target.cpu() if isinstance(behavior, Targeted) else torch.zeros(n, dtype=torch.long)
    same = target[:, None] == target
    rows = [
        ids[mask].tolist() for ids, mask in zip(examples.prompts.ids.cpu(), examples.prompts.mask.cpu(), strict=True)
    ]
    near = same & _alike(rows, same, _answers(examples))
    if examples.texts is not None:
        plain: dict[str, int] = {}
        words = torch.tensor([plain.setdefault(_plain(text), len(plain)) for text in examples.texts])
        near |= same & (words[:, None] == words)
    return near.triu(diagonal=1).nonzero()


def _alike(
    rows: Sequence[Sequence[int]], same: Bool[Tensor, "batch batch"], answers: set[int]
) -> Bool[Tensor, "batch batch"]:
    """Conditions 2 to 4, where `same` says which prompts have the same target."""
    repeats = [_numbered(row) for row in rows]
    held = Counter(one for row in repeats for one in row)
    weight = {one: round(UNIT * math.log(len(rows) / times)) for one, times in held.items()}
    shared, total = _overlap(repeats, weight)
    heavier = torch.maximum(total[:, None], total)
    likeness = torch.where(heavier > 0, shared / heavier, 1.0)
    other = likeness.masked_fill(same, -1.0).amax(dim=1)
    nearest = (likeness > torch.maximum(other[:, None], other)) | (likeness == 1)
    both, each = _overlap(repeats, {one: int(one[0] in answers and one[1] == 0) for one in held})
    return (likeness >= SHARED) & nearest & (both == each[:, None]) & (both == each)


def _numbered(row: Sequence[int]) -> list[tuple[int, int]]:
    """Each token with the number of its earlier occurrences, so that a set of them counts repeats."""
    seen: Counter[int] = Counter()
    found = []
    for token in row:
        found.append((token, seen[token]))
        seen[token] += 1
    return found


def _overlap(
    repeats: Sequence[Sequence[tuple[int, int]]], weight: dict[tuple[int, int], int]
) -> tuple[Float[Tensor, "batch batch"], Float[Tensor, "batch"]]:
    """The weight of what each pair of rows shares, and of each row."""
    n, held = len(repeats), Counter(one for row in repeats for one in row)
    total = torch.tensor([float(sum(weight[one] for one in row)) for row in repeats], dtype=torch.float64)
    columns = {one: number for number, one in enumerate(k for k, times in held.items() if times > 1 and weight[k])}
    if not columns:
        return torch.diag(total), total
    cells = [(row, columns[one], weight[one]) for row, some in enumerate(repeats) for one in some if one in columns]
    where = torch.tensor([cell[:2] for cell in cells]).T
    weighed = torch.tensor([cell[2] for cell in cells], dtype=torch.float64)
    there = torch.zeros(len(columns), n, dtype=torch.float64)
    there[where[1], where[0]] = 1.0
    shared = torch.sparse_coo_tensor(where, weighed, (n, len(columns)), check_invariants=True) @ there
    shared.fill_diagonal_(0.0)
    return shared + torch.diag(total), total


def _answers(examples: Grouped) -> set[int]:
    """Tokens that are a target of any example, or compete with one."""
    if examples.readout is not None:
        return set()
    found: set[int] = set()
    for behavior in (examples.behavior, examples.strict):
        if isinstance(behavior, Targeted):
            found |= {*known_targets(behavior), *behavior.target.tolist(), *behavior.rivals.flatten().tolist()}
    return found


def _plain(text: str) -> str:
    """The letters and digits of a text, in one case; the text itself where there are none."""
    return "".join(one for one in text.casefold() if one.isalnum()) or text


def _components(links: Int[Tensor, "link 2"], n: int) -> Int[Tensor, "node"]:
    """The smallest node that each of `n` nodes is linked to, over any number of links."""
    label = torch.arange(n)
    both = torch.cat([links, links.flip(1)])
    while True:
        least = label.scatter_reduce(0, both[:, 0], label[both[:, 1]], "amin")
        least = least[least]
        if torch.equal(least, label):
            return label
        label = least
