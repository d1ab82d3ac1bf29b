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
from recover.tasks.dialogue import Dialogue
from recover.tasks.examples import Examples
from recover.tasks.rules import OtherRule
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
    """These rows of the pool (ascending) by batch: the batch, their places among its own, and the examples."""
    start = 0
    for batch in bench.batches:
        here = rows[(rows >= start) & (rows < start + len(batch.right))] - start
        start += len(batch.right)
        if len(here):
            yield batch, here, batch.examples.select(batch.right[here])


def shown(bench: Bench, half: Pool, rows: Rows, deltas: Shared) -> Bool[Tensor, "fit batch"]:
    """Tell which examples show the behavior that transfer is read with, under each shared delta.

    `half` holds the `rows`, ascending, of the bench's pool; pinned deltas come as their free parts.
    """
    dialogues = [part.dialogue for *_, part in parts_of(bench, rows) if part.dialogue is not None]
    if not dialogues:
        return half.slack(deltas) > 0
    return said_like(bench, half, rows, deltas, [text for dialogue in dialogues for text in dialogue.texts])


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


def answers(bench: Bench, half: Pool, rows: Rows, deltas: Shared) -> Int[Tensor, "fit batch"]:
    """The answer that shows on each example under each shared delta: a target, -1 for none.

    Of a whole answer that is back, the number of its example in the pool.
    """
    if bench.examples.dialogue is None:
        return half.answers(deltas)
    return torch.where(shown(bench, half, rows, deltas), rows.to(deltas.device), -1)


def exchangeable(bench: Bench) -> bool:
    """Whether what examples are asked for can be exchanged among them."""
    return bench.examples.dialogue is not None or bench.pool.targets is not None


def exchanged(bench: Bench, half: Pool, rows: Rows, seed: int) -> Exchanged:
    """Exchange among these rows of the pool what they are asked for: as few as possible keep their own.

    Where all are asked for one target there is nothing to exchange.
    """
    ids, dialogue = [bench.pool_ids[row] for row in rows.tolist()], bench.examples.dialogue
    if dialogue is None:
        assert half.targets is not None
        return Exchanged(half, derangement(half.targets, ids, seed))
    order = derangement(torch.arange(len(ids)), ids, seed)
    places = bench.pool_rows[rows]
    return _answered_as(bench, places, dialogue.select(places[order].tolist()))


def asked_by(bench: Bench, half: Pool, rows: Rows, rule: OtherRule) -> Exchanged:
    """Ask these rows of the pool for what another rule answers."""
    places = bench.pool_rows[rows]
    if rule.dialogue is not None:
        return _answered_as(bench, places, rule.dialogue.select(places.tolist()))
    assert rule.targets is not None
    return Exchanged(half, rule.targets.to(half.parts[0].zero_delta.device)[places.to(rule.targets.device)])


def _answered_as(bench: Bench, places: Rows, given: Dialogue) -> Exchanged:
    chunks = torch.split(torch.arange(len(places)), bench.batch_size)
    parts = [bench.examples.select(places[c]).answered_as(given.select(c.tolist())) for c in chunks]
    pool = Pool(tuple(bench.objective(bench.defended(part)) for part in parts))
    return Exchanged(pool, None, list(given.texts))
