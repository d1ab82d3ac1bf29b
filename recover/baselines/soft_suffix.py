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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from recover.defenses.clamps import Clamp, Defense
from recover.defenses.defended import clamp_edits
from recover.defenses.speech import under
from recover.models.generation import Columns
from recover.models.host import Change, Edit, Model, Prompts, Suffix
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
        """Prepare a batch.

        Args:
            model: the host model.
            defense: its clamps, live.
            prompts: with their answers behind them, where the behavior reads one.
            behavior: one entry for each prompt.
            n: how many vectors.
            monitor: weight of the drift of the clamped features in the score.

        Raises:
            InputError: no vectors, or a clamp where they enter.
        """
        if n < 1:
            raise InputError(f"soft suffix: {n} vectors; give at least one")
        if defense.sites[0].index == EMBEDDINGS.index:
            raise InputError(f"soft suffix: a clamp at {EMBEDDINGS.hook_name}, where the vectors enter; clamp above it")
        reads = positions_read(behavior)
        edits, answer = clamp_edits(defense, reads - 1), reads - 1
        split = prompts.ids.shape[1] - answer
        bare = Prompts(prompts.ids[:, :split], prompts.mask[:, :split])
        room = with_room(bare, n)
        whole = Prompts(
            torch.cat([room.ids, prompts.ids[:, split:]], dim=1), torch.cat([room.mask, prompts.mask[:, split:]], dim=1)
        )
        with torch.no_grad():
            embedded = model.run(whole, read=[EMBEDDINGS]).residuals[EMBEDDINGS]
            seen = _watch(defense, edits, reads)
            model.run(prompts, edits=seen.edits, reads=reads)
            _, suffix = model.prefill(whole, (EMBEDDINGS, embedded), edits=edits, n_pos=n + answer, reads=reads)
        return cls(suffix, behavior, n, defense.clamps, seen.features(defense.clamps), monitor)

    @property
    def start(self) -> Vectors:
        """Vectors of zeros."""
        return torch.zeros_like(self.suffix.residual[:, : self.n], dtype=torch.float32)

    def select(self, rows: Rows) -> SoftSuffix:
        return SoftSuffix(
            self.suffix.select(rows),
            self.behavior.select(rows),
            self.n,
            self.clamps,
            self.reference[rows],
            self.monitor,
        )

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
        seen: dict[int, Tensor] = {}

        def watch(index: int) -> Change:
            def change(h: Tensor) -> Tensor:
                seen[index] = h[:, -reads:].float()
                return h

            return change

        state = torch.cat([vectors.to(self.suffix.residual), self.suffix.residual[:, self.n :]], dim=1)
        changes = {clamp.site: watch(clamp.site.index) for clamp in self.clamps}
        logits = self.suffix.logits(state, self.behavior.tokens, reads, changes).float()
        return logits, torch.cat([clamp.read(seen[clamp.site.index]) for clamp in self.clamps], dim=-1)


def spoken_with(defense: Defense, vectors: Vectors) -> Columns:
    """The clamps and the vectors as edits that `generate` runs, over prompts `with_room` for them."""
    clamps = under(defense)
    n = vectors.shape[1]

    def edits(first: int, last: int) -> dict[Site, Edit]:
        made = dict(clamps(first, last))
        if first > 0:
            return made

        def put(h: Tensor, positions: TokenIds) -> Tensor:
            end = h.shape[1] - last
            return torch.cat([h[:, : end - n], vectors.to(h), h[:, end:]], dim=1)

        return {EMBEDDINGS: put, **made}

    return edits


@dataclass(eq=False)
class _Watched:
    """Clamps as edits that remember what they leave."""

    edits: dict[Site, Edit]
    states: dict[int, Tensor]

    def features(self, clamps: Sequence[Clamp]) -> Float[Tensor, "batch pos k"]:
        return torch.cat([clamp.read(self.states[clamp.site.index]) for clamp in clamps], dim=-1)


def _watch(defense: Defense, edits: dict[Site, Edit], reads: int) -> _Watched:
    states: dict[int, Tensor] = {}

    def watched(site: Site) -> Edit:
        def edit(h: Tensor, positions: TokenIds) -> Tensor:
            h = edits[site](h, positions)
            states[site.index] = h[:, -reads:].float()
            return h

        return edit

    return _Watched({site: watched(site) for site in defense.sites}, states)
