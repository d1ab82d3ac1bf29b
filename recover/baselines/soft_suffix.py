"""The soft-suffix baseline: vectors appended to the prompt in place of tokens, the clamps on (reference: Baseline).

1. *Place*. `n` stand-in tokens follow the prompt, before the answer; at the first site of the model (the embeddings)
   the vectors take their place. Everything before them is computed once.
2. *Objective*. Score and slack of the behavior as for a delta; what a search varies are the vectors,
   `[batch n d_model]`, and their Frobenius norm is what a budget bounds.
3. *Monitor*, where one is asked for: the score loses `monitor` times the relative drift of the clamped features over
   the answer's columns, from what they are under the clamps without a suffix.

A suffix is another text, so that clamped features are free to move: it is a baseline, not an admissible perturbation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from recover.defenses.clamps import Clamp, Defense
from recover.defenses.defended import clamp_edits
from recover.defenses.speech import under
from recover.models.generation import Columns
from recover.models.host import Edit, Model, Prompts, Suffix
from recover.numerics.metrics import relative_drift
from recover.tasks.behaviors import Behavior, positions_read
from recover.types import Float, InputError, PerExample, Rows, Site, Tensor, TokenIds

EMBEDDINGS = Site(0)
Vectors = Float[Tensor, "batch n d_model"]


def with_room(prompts: Prompts, n: int) -> Prompts:
    """The prompts with `n` stand-in tokens behind them."""
    return Prompts(pad(prompts.ids, (0, n)), pad(prompts.mask, (0, n), value=True))


@dataclass(frozen=True, eq=False)
class SoftSuffix:
    """An objective: score and slack of suffix vectors under the clamps.

    Attributes:
        suffix: the columns of the stand-ins and of the answer.
        n: how many vectors.
        clamps: those whose features are monitored.
        reference: their features over the answer's columns without a suffix, one clamp after another.
        monitor: weight of the drift.
    """

    suffix: Suffix
    behavior: Behavior
    n: int
    clamps: tuple[Clamp, ...]
    reference: Float[Tensor, "batch pos k"]
    monitor: float | int

    @classmethod
    def of(
        cls, model: Model, defense: Defense, prompts: Prompts, behavior: Behavior, *, n: int = 16, monitor: float = 0.0
    ) -> SoftSuffix:
        """Prepare a batch, its answers behind the prompts where the behavior reads one.

        Raises:
            InputError: no vectors, or a clamp where they enter.
        """
        if n < 1:
            raise InputError(f"soft suffix: {n} vectors; give at least one")
        if defense.sites[0].index == EMBEDDINGS.index:
            raise InputError(f"soft suffix: a clamp at {EMBEDDINGS.hook_name}, where the vectors enter; clamp above it")
        reads = positions_read(behavior)
        answer = reads - 1
        edits = clamp_edits(defense, answer)
        split = prompts.ids.shape[1] - answer
        room = with_room(Prompts(prompts.ids[:, :split], prompts.mask[:, :split]), n)
        pairs = ((room.ids, prompts.ids), (room.mask, prompts.mask))
        whole = Prompts(*(torch.cat([before, after[:, split:]], dim=1) for before, after in pairs))
        with torch.no_grad():
            embedded = model.run(whole, read=[EMBEDDINGS]).residuals[EMBEDDINGS]
            seen, states = _watched(edits, reads)
            model.run(prompts, edits=seen, reads=reads)
            _, suffix = model.prefill(whole, (EMBEDDINGS, embedded), edits=edits, n_pos=n + answer, reads=reads)
        return cls(suffix, behavior, n, defense.clamps, _features(defense.clamps, states), monitor)

    @property
    def start(self) -> Vectors:
        """Vectors of zeros."""
        return torch.zeros_like(self.suffix.residual[:, : self.n], dtype=torch.float32)

    def select(self, rows: Rows) -> SoftSuffix:
        parts = {name: getattr(self, name).select(rows) for name in ("suffix", "behavior")}
        return replace(self, reference=self.reference[rows], **parts)

    def __call__(self, delta: Vectors) -> tuple[PerExample, PerExample]:
        """Score and slack of these vectors."""
        logits, features = self._run(delta)
        score = self.behavior.score(logits)
        if self.monitor:
            score = score - self.monitor * relative_drift(features, self.reference)
        return score, self.behavior.slack(logits)

    def drift(self, vectors: Vectors) -> PerExample:
        """The relative drift of the clamped features over the answer's columns."""
        with torch.no_grad():
            return relative_drift(self._run(vectors)[1], self.reference)

    def _run(self, vectors: Vectors) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch pos k"]]:
        reads = positions_read(self.behavior)
        changes, states = _watched({clamp.site: lambda h: h for clamp in self.clamps}, reads)
        state = torch.cat([vectors.to(self.suffix.residual), self.suffix.residual[:, self.n :]], dim=1)
        logits = self.suffix.logits(state, self.behavior.tokens, reads, changes).float()
        return logits, _features(self.clamps, states)


def spoken_with(defense: Defense, vectors: Vectors) -> Columns:
    """The clamps and the vectors as edits that `generate` runs, over prompts `with_room` for them."""
    clamps, n = under(defense), vectors.shape[1]

    def edits(first: int, last: int) -> dict[Site, Edit]:
        made = dict(clamps(first, last))
        if first > 0:
            return made

        def put(h: Tensor, positions: TokenIds) -> Tensor:
            end = h.shape[1] - last
            return torch.cat([h[:, : end - n], vectors.to(h), h[:, end:]], dim=1)

        return {EMBEDDINGS: put, **made}

    return edits


def _watched(
    changes: Mapping[Site, Callable[..., Tensor]], reads: int
) -> tuple[dict[Site, Callable[..., Tensor]], dict[Site, Tensor]]:
    """Edits or changes that remember what they leave in the answer's columns, and where they keep that."""
    states: dict[Site, Tensor] = {}

    def watched(site: Site) -> Callable[..., Tensor]:
        def change(h: Tensor, *positions: TokenIds) -> Tensor:
            h = changes[site](h, *positions)
            states[site] = h[:, -reads:].float()
            return h

        return change

    return {site: watched(site) for site in changes}, states


def _features(clamps: Sequence[Clamp], states: Mapping[Site, Tensor]) -> Float[Tensor, "batch pos k"]:
    return torch.cat([clamp.read(states[clamp.site]) for clamp in clamps], dim=-1)
