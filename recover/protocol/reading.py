"""Which examples show the behavior under shared deltas: by slack, or, where it is a whole answer, by what is said.

A whole answer that is forced shows only where every token of it would be given, which is more than a shared delta can
be asked: a reply in other words is the behavior as well. As elsewhere in a check it is back where the reply, given
freely with the clamps and the delta live, is like the model's own (`refusal.base_like`). So is each control read,
shuffled targets by the answers that were dealt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from recover.defenses.defended import Defended
from recover.evidence.transfer import Pool, derangement
from recover.models.generation import texts
from recover.protocol.bench import Batch, Bench
from recover.search.constraints.pinned import Pinned
from recover.tasks import replies as refusal
from recover.tasks.behaviors import Targeted, known_targets
from recover.tasks.examples import Examples
from recover.types import Bool, Float, Int, Rows, Tensor

Shared = Float[Tensor, "fit pos d_model"]


@dataclass(frozen=True, eq=False)
class Exchanged:
    """Examples of the pool, each asked for what another one is asked: by other targets, or as other examples.

    Attributes:
        texts: of the answers that each is asked for, where the behavior is a whole answer.
    """

    pool: Pool
    targets: Int[Tensor, "batch"] | None
    texts: Sequence[str] | None = None

    def shown(self, bench: Bench, rows: Rows, deltas: Shared) -> Bool[Tensor, "fit batch"]:
        """Which examples show their behavior under each delta; `rows` number them in the bench's pool."""
        if self.texts is None:
            return self.pool.slack(deltas, self.targets) > 0
        return said_like(bench, bench.pool.select(rows), rows, deltas, self.texts)


def parts_of(bench: Bench, rows: Rows) -> Iterator[tuple[Batch, Rows, Examples]]:
    """These rows of the pool (ascending) by batch: the batch, their places among its strict flips, and the examples."""
    start = 0
    for batch in bench.batches:
        here = rows[(rows >= start) & (rows < start + len(batch.strict_flips))] - start
        start += len(batch.strict_flips)
        if len(here):
            yield batch, here, batch.examples.select(batch.strict_flips[here])


def shown(bench: Bench, half: Pool, rows: Rows, deltas: Shared) -> Bool[Tensor, "fit batch"]:
    """Tell which examples show the behavior that transfer is read with, under each shared delta.

    `half` holds the `rows`, ascending, of the bench's pool; pinned deltas come as their free parts.
    """
    dialogues = [part.dialogue for *_, part in parts_of(bench, rows) if part.dialogue is not None]
    if not dialogues:
        return half.slack(deltas) > 0
    return said_like(bench, half, rows, deltas, [text for dialogue in dialogues for text in dialogue.texts])


def shown_as_asked(bench: Bench, rows: Rows, deltas: Shared) -> Bool[Tensor, "fit batch"]:
    """Tell which examples show the behavior by the check's own predicate, where transfer uses a stricter one."""
    places = parts_of(bench, rows)
    asked = (batch.strict_target.select(here).asking(part.behavior) for batch, here, part in places)
    return Pool(tuple(map(bench.objective, asked))).slack(deltas) > 0


def said_like(
    bench: Bench, half: Pool, rows: Rows, deltas: Shared, answers: Sequence[str]
) -> Bool[Tensor, "fit batch"]:
    """Tell where the reply to each request under each shared delta is like the one of `answers` in its place."""
    like, start = torch.zeros(len(deltas), len(half), dtype=torch.bool), 0
    for objective, (*_, part) in zip(half.parts, parts_of(bench, rows), strict=True):
        n = len(objective)
        for chosen in torch.split(torch.arange(len(deltas) * n), bench.batch_size):
            fits, places = chosen // n, chosen % n
            replies = _replies(bench, objective, part, places, deltas[fits])
            for fit, place, reply in zip(fits.tolist(), places.tolist(), replies, strict=True):
                like[fit, start + place] = refusal.base_like(reply, answers[start + place])
        start += n
    return like


def _replies(
    bench: Bench, objective: Defended | Pinned, part: Examples, places: Rows, deltas: Float[Tensor, "batch pos d_model"]
) -> list[str]:
    """Generate the replies of the examples in these places, each with its delta."""
    assert part.dialogue is not None
    some = objective.select(places)
    whole = some.delta(deltas) if isinstance(some, Pinned) else deltas
    return texts(bench.model.tokenizer, bench.said(part.dialogue.select(places.tolist()), whole))


def exchangeable(bench: Bench) -> bool:
    """Whether what examples are asked for can be exchanged among them."""
    return bench.examples.dialogue is not None or bench.pool.targets is not None


def one_for_all(bench: Bench) -> bool:
    """Whether all flips are asked for the same target, which one shared delta can then carry."""
    targets = None if bench.examples.dialogue is not None else bench.pool.targets
    return targets is not None and bool((targets == targets[0]).all())


def exchanged(bench: Bench, half: Pool, rows: Rows, seed: int, draw: int = 0) -> Exchanged:
    """Exchange among these rows of the pool what they are asked for: as few as possible keep their own.

    Where all are asked for one target there is nothing to exchange: all are asked for another one, the same for each
    `draw`, if the behavior knows of others.
    """
    names = [name for batch in bench.batches for name in batch.strict_ids]
    ids, dialogue = [names[row] for row in rows.tolist()], bench.examples.dialogue
    if dialogue is None:
        assert half.targets is not None
        behavior = bench.examples.behavior
        if one_for_all(bench) and isinstance(behavior, Targeted):
            others = sorted({*known_targets(behavior)} - {int(half.targets[0])})
            if others:
                chosen = others[(bench.plan.seed + draw) % len(others)]
                return Exchanged(half, torch.full_like(half.targets, chosen))
        return Exchanged(half, derangement(half.targets, ids, seed))
    order = derangement(torch.arange(len(ids)), ids, seed)
    places = torch.tensor([bench.examples.ids.index(name) for name in ids])
    pairs = zip(torch.split(places, bench.batch_size), torch.split(places[order], bench.batch_size), strict=True)
    parts = [bench.examples.select(own).answered_as(dialogue.select(other.tolist())) for own, other in pairs]
    pool = Pool(tuple(bench.objective(bench.defended(part)) for part in parts))
    return Exchanged(pool, None, [dialogue.texts[place] for place in places[order].tolist()])
