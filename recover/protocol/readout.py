"""Compare searches on whole answers: what each search's deltas do, by certificate and in free generation.

1. *Certificate*: each delta is replayed with the clamps live, over the model's own answer.
2. *Free generation*: the model speaks under the delta; how the reply reads, and what drifted along it.

Every function takes a `Bench` and some of its examples, so that another search is one more function that gives deltas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from recover.baselines.soft_suffix import SoftSuffix, spoken_with, with_room
from recover.evidence.certificate import Certificate, certify
from recover.models.generation import answered, generate, texts
from recover.numerics.metrics import norm
from recover.protocol.bench import Bench
from recover.protocol.phases import spoken
from recover.search.ascent import Solution
from recover.search.constraints.pinned import Pinned
from recover.search.pinned import find_pinned
from recover.tasks.behaviors import ForcedAnswer, positions_read
from recover.tasks.examples import Examples
from recover.tasks.replies import read
from recover.types import Delta


@dataclass(frozen=True, kw_only=True)
class ReadOut:
    """The effect of one search's deltas over `n` requests: one row of a table. A figure that a search lacks is None.

    Attributes:
        method: name of the search.
        n: requests.
        non_refusal: replies that open with neither a refusal nor a safety cue.
        base_like, strict: replies that are like the model's own, and strictly so.
        exact: answers that greedy generation gives token for token, by certificate.
        norm, relative_norm: means; the second as a share of the defended residual's norm.
        relative_drift, preactivation_shift, floor_violation: the largest, by certificate.
        free_drift: the largest relative drift along what was said.
        seconds: for each request.
    """

    method: str
    n: int
    non_refusal: int
    base_like: int
    strict: int
    exact: int
    norm: float
    relative_norm: float | None = None
    relative_drift: float
    preactivation_shift: float | None = None
    floor_violation: float | None = None
    free_drift: float
    seconds: float
    HEADINGS: ClassVar[str] = (
        f"{'':15} {'n':>3} {'non-refusal':>11} {'base-like':>9} {'strict':>6} {'exact':>5} {'norm':>6} {'share':>6} "
        f"{'drift':>8} {'pre-act.':>8} {'floor':>7} {'free drift':>10} {'s each':>6}"
    )

    def __str__(self) -> str:
        """The row, under `HEADINGS`."""
        told = ((self.relative_norm, ".1%", 6), (self.preactivation_shift, ".1e", 8), (self.floor_violation, ".4f", 7))
        share, shift, floor = (f"{'-' if value is None else format(value, form):>{n}}" for value, form, n in told)
        return (
            f"{self.method:15} {self.n:3d} {self.non_refusal:11d} {self.base_like:9d} {self.strict:6d} "
            f"{self.exact:5d} {self.norm:6.1f} {share} {self.relative_drift:8.1e} {shift} {floor} "
            f"{self.free_drift:10.1e} {self.seconds:6.2f}"
        )

    @staticmethod
    def published(method: str, figures: Mapping[str, float]) -> str:
        """A published row under `HEADINGS`; its drift is a mean where ours is the largest."""
        columns = {"n": (".0f", 3), "non_refusal": (".0f", 11), "base_like": (".0f", 9), "strict": (".0f", 6)}
        columns |= {"exact": (".0f", 5), "norm": (".1f", 6), "share": (".1%", 6), "drift": (".3f", 8)}
        columns |= {"shift": (".3f", 8), "floor": (".3f", 7)}
        told = (f"{format(figures[key], form) if key in figures else '-':>{n}}" for key, (form, n) in columns.items())
        return f"{method:15} {' '.join(told)}"


def flips_of(bench: Bench) -> Examples | None:
    """The valid flips of all batches; None where there are none."""
    chosen = torch.cat([rows[batch.flips] for rows, batch in zip(bench.rows, bench.batches, strict=True)])
    return bench.examples.select(chosen) if len(chosen) else None


def search_pinned(bench: Bench, part: Examples, start: Delta | None = None) -> Delta:
    """Search these examples for deltas at every clamped site that move no clamped pre-activation.

    The free parts begin at `start`, by default at zero. Gives deltas `[batch (site n_pos) d_model]`, the corrections
    included, as a check saves them.
    """
    target = Pinned.of(bench.defended(part))
    return bench.whole(part, target, find_pinned(target, bench.budget, bench.schedule, start=start).free)[0]


def certificate_of(bench: Bench, part: Examples, delta: Delta) -> Certificate:
    """The certificate of one delta for each of these examples, in the precision of the check's certificates."""
    return certify(bench.exact, bench.defense, part.prompts, part.behavior, delta, bench.surface)


def read_out(method: str, bench: Bench, part: Examples, delta: Delta, seconds: float) -> ReadOut:
    """Measure the effect of a search's deltas."""
    facts, replies = certificate_of(bench, part, delta), spoken(bench, part, delta)
    return ReadOut(
        method=method,
        n=len(part.ids),
        non_refusal=sum(not reply["refusal"] and not reply["safety_cue"] for reply in replies),
        base_like=sum(reply["base_like"] for reply in replies),
        strict=sum(reply["strict_base_like"] for reply in replies),
        exact=int(facts.shows.sum()),
        norm=float(facts.norm.mean()),
        relative_norm=float(facts.relative_norm.mean()),
        relative_drift=float(facts.relative_drift.max()),
        preactivation_shift=float(facts.preactivation_shift.max()),
        floor_violation=float(facts.clamp_floor_violation.max()),
        free_drift=max(reply["relative_drift"] for reply in replies),
        seconds=seconds / len(part.ids),
    )


def read_out_suffix(
    method: str, bench: Bench, part: Examples, soft: SoftSuffix, found: Solution, seconds: float
) -> ReadOut:
    """Measure the effect of the vectors of a soft suffix; their drift is over the answer's columns."""
    dialogue, model, defense, n, vectors = part.dialogue, bench.model, bench.defense, soft.n, found.delta
    assert dialogue is not None
    width = dialogue.answers.shape[1]
    said = generate(model, with_room(dialogue.prompts, n), width, spoken_with(defense, vectors), stop=dialogue.stop)
    columns = said[:, : positions_read(part.behavior)]
    along = SoftSuffix.of(model, defense, answered(dialogue.prompts, columns), ForcedAnswer(columns), n=n)
    reads = [read(*pair) for pair in zip(texts(model.tokenizer, said), dialogue.texts, strict=True)]
    return ReadOut(
        method=method,
        n=len(part.ids),
        non_refusal=sum(one.non_refusal for one in reads),
        base_like=sum(one.base_like for one in reads),
        strict=sum(one.strict_base_like for one in reads),
        exact=int((found.slack > 0).sum()),
        norm=float(norm(vectors).mean()),
        relative_drift=float(soft.drift(vectors).max()),
        free_drift=float(along.drift(vectors).max()),
        seconds=seconds / len(part.ids),
    )
