"""A defense put into a model: the defended state, and the objective that a search raises under it.

1. One pass without the clamp reads the residual at the first clamped site (and the base logits).
2. One prefill from there, with every clamp live, gives the defended logits, the defended residual and the keys and
   values that a suffix-only run needs.
3. A delta enters at the last `n_pos` positions of the first clamped site, after the clamp (`h_def + delta`) or before
   it (`clamp(h + delta)`); under C1 and a pointwise SAE the two are the same state. Or it enters at every clamped site,
   after the clamp there: its positions are then those of the first site, of the second, and so on.

A behavior that reads a whole answer is teacher-forced: the prompts hold the answer, and clamps know where it begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat

from recover.defenses.clamps import Defense
from recover.models.components import Component
from recover.models.host import Change, Edit, Model, Prompts, Suffix
from recover.tasks.behaviors import Behavior, positions_read
from recover.types import Delta, Float, InputError, PerExample, Residual, Rows, Site, Surface, Tensor, TokenIds


@dataclass(frozen=True, eq=False)
class Defended:
    """A batch of prompts under a defense.

    Attributes:
        defense: the clamps, live in every run.
        behavior: what is read, one entry for each prompt.
        base: the undefended residual at the first clamped site, all positions.
        base_logits: logits without the defense; of the behavior's tokens only.
        defended_logits: logits with it.
        suffix: the rest of the model, ready for perturbations; its `residual` is the defended state.
        surface: where a perturbation enters.
    """

    defense: Defense
    behavior: Behavior
    base: Residual
    base_logits: Float[Tensor, "batch ..."]
    defended_logits: Float[Tensor, "batch ..."]
    suffix: Suffix
    surface: Surface = Surface()

    def __len__(self) -> int:
        return len(self.base)

    @property
    def delta_sites(self) -> tuple[Site, ...]:
        """The sites that a perturbation enters at: the first clamped one, or all of them."""
        return self.surface.enters(self.defense.sites)

    @property
    def shown_at_base(self) -> Tensor:
        """Bool `[batch]`: the behavior shows without the defense."""
        return self.behavior.slack(self.base_logits) > 0

    @property
    def shown_when_defended(self) -> Tensor:
        """Bool `[batch]`: the behavior shows in spite of it."""
        return self.behavior.slack(self.defended_logits) > 0

    @property
    def valid_flips(self) -> Rows:
        """The examples where the behavior shows at base and not when defended: every rate is over these."""
        return (self.shown_at_base & ~self.shown_when_defended).nonzero().flatten()

    @property
    def zero_delta(self) -> Delta:
        """No perturbation, `[batch (site n_pos) d_model]` in float32: where a search starts."""
        one = torch.zeros_like(self.suffix.residual, dtype=torch.float32)
        return repeat(one, "batch pos d_model -> batch (site pos) d_model", site=len(self.delta_sites))

    def select(self, rows: Rows) -> Defended:
        """Select a subset of the examples."""
        tensors = (self.base[rows], self.base_logits[rows], self.defended_logits[rows])
        return Defended(self.defense, self.behavior.select(rows), *tensors, self.suffix.select(rows), self.surface)

    def asking(self, behavior: Behavior) -> Defended:
        """Ask the same examples for another behavior."""
        return replace(self, behavior=behavior)

    def entered_at(self, surface: Surface) -> Defended:
        """Let perturbations of these examples enter elsewhere."""
        return replace(self, surface=surface)

    def by_site(self, delta: Delta) -> dict[Site, Residual]:
        """The part of a delta that enters at each site, `[batch n_pos d_model]`."""
        parts = rearrange(delta, "batch (site pos) d_model -> site batch pos d_model", site=len(self.delta_sites))
        return dict(zip(self.delta_sites, parts, strict=True))

    def logits(
        self,
        delta: Delta,
        parts: Mapping[Component, Change] | None = None,
        changes: Mapping[Site, Change] | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """Logits of the behavior's tokens with `delta [batch (site n_pos) d_model]` added; differentiable.

        Args:
            delta: what is added.
            parts: changes of what components above the first clamp give, as in `Suffix.logits`.
            changes: at sites above it, after the clamp and the delta there.
        """
        first, *later = self.by_site(delta).items()
        added = {site: adds(part) for site, part in later}
        for site, change in (changes or {}).items():
            place = next((known for known in added if known.index == site.index), site)
            added[place] = _chained(added[place], change) if place in added else change
        return self.changed_logits(self.perturbed(first[1]), added, parts)

    def changed_logits(
        self, state: Residual, changes: Mapping[Site, Change], parts: Mapping[Component, Change] | None = None
    ) -> Float[Tensor, "batch ..."]:
        """Logits of the behavior's tokens with this state after the first clamp and changes after the later ones."""
        return self.suffix.logits(state, self.behavior.tokens, positions_read(self.behavior), changes, parts)

    def states(self) -> dict[Site, Residual]:
        """The defended residual after each clamp, at the positions that a delta touches."""
        seen = {self.suffix.site: self.suffix.residual}

        def watch(site: Site) -> Change:
            def change(h: Tensor) -> Tensor:
                seen[site] = h
                return h

            return change

        with torch.no_grad():
            self.changed_logits(self.suffix.residual, {site: watch(site) for site in self.defense.sites[1:]})
        return seen

    @property
    def residual(self) -> Delta:
        """The defended residual where a delta touches it, site after site, `[batch (site n_pos) d_model]`."""
        states = self.states() if len(self.delta_sites) > 1 else {self.suffix.site: self.suffix.residual}
        return torch.cat([states[site] for site in self.delta_sites], dim=1)

    def entering(self, delta: Delta) -> dict[Site, Residual]:
        """Run to each later clamped site with `delta` added, and read its input before the clamp there; differentiable.

        `[batch n_pos d_model]`, at the positions that a delta touches, in the order of the sites.
        """
        return self.suffix.entering(self.perturbed(delta), self.defense.sites[1:])

    def downstream(self, delta: Delta) -> Float[Tensor, "batch n"]:
        """All that the blocks above make of a perturbed state: the final residual, less `delta`; and every logit.

        What is left where `delta` only passes through is what it is without it.
        """
        (first, part), *later = self.by_site(delta).items()
        state, final = self.perturbed(part), Site(self.suffix.model.n_layers - 1, "post")
        seen, changes = dict[Site, Residual](), {site: adds(one) for site, one in later}

        def watch(h: Residual) -> Residual:
            seen[final] = h
            return h

        if final.index > first.index:
            place = next((known for known in changes if known.index == final.index), final)
            changes[place] = _chained(changes[place], watch) if place in changes else watch
        logits = self.suffix.logits(state, None, positions_read(self.behavior), changes)
        passed = sum((one for _, one in later), state - self.suffix.residual)
        read = [logits, *(h - passed for h in seen.values())]
        return torch.cat([rearrange(one.float(), "batch ... -> batch (...)") for one in read], dim=1)

    def perturbed(self, delta: Residual) -> Residual:
        """The state at the first site, after its clamp, with `delta` added."""
        if self.surface.placement == "after_clamp":
            return self.suffix.residual + delta
        whole = torch.cat([self.base[:, : -self.suffix.n_pos], self.base[:, -self.suffix.n_pos :] + delta], dim=1)
        edits = clamp_edits(self.defense, positions_read(self.behavior) - 1)
        state = edits[self.suffix.site](whole, self.suffix.prompts.positions)
        return state[:, -self.suffix.n_pos :]

    def __call__(self, delta: Delta) -> tuple[PerExample, PerExample]:
        """Score and slack of `delta`, as a search asks for them."""
        logits = self.logits(delta).float()
        return self.behavior.score(logits), self.behavior.slack(logits)


def adds(part: Residual) -> Change:
    """Add a part to what is there."""
    return lambda h: h + part


def _chained(first: Change, then: Change) -> Change:
    return lambda h: then(first(h))


def clamp_edits(defense: Defense, n_answer: int = 0) -> dict[Site, Edit]:
    """The defense as edits that the engine runs, where the last `n_answer` columns follow the prompt."""

    def at(site: Site) -> Edit:
        def edit(residual: Residual, positions: TokenIds) -> Residual:
            return defense.apply(site, residual, positions >= defense.skip_first, n_answer)

        return edit

    return {site: at(site) for site in defense.sites}


def defend(
    model: Model,
    defense: Defense,
    prompts: Prompts,
    behavior: Behavior,
    *,
    n_pos: int | None = None,
    surface: Surface = Surface(),
) -> Defended:
    """Run `prompts` with and without the defense and hold what a search needs.

    Args:
        model: the host model.
        defense: its clamps.
        prompts: any number, as one batch; with its answer (`answered`) where the behavior reads one.
        behavior: one entry for each prompt.
        n_pos: how many trailing positions a delta may touch; by default those that the behavior reads.
        surface: where a perturbation enters; by default at the first clamped site, after the clamp.

    Raises:
        InputError: a site that the model does not have, an SAE of another width, or too short a prompt.
    """
    tokens, reads = behavior.tokens, positions_read(behavior)
    n_pos = reads if n_pos is None else n_pos
    check_fits(model, defense, n_answer=reads - 1)
    defense = defense.to(torch.promote_types(model.dtype, torch.float32))
    site, edits = defense.sites[0], clamp_edits(defense, reads - 1)
    with torch.no_grad():
        undefended = model.run(prompts, read=[site], tokens=tokens, reads=reads)
        base = undefended.residuals[site]
        run, suffix = model.prefill(prompts, (site, base), edits=edits, n_pos=n_pos, tokens=tokens, reads=reads)
    return Defended(defense, behavior, base, undefended.logits, run.logits, suffix, surface)


def displaced(
    model: Model, defense: Defense, prompts: Prompts, reads: int = 1
) -> dict[Site, Float[Tensor, "moved d_model"]]:
    """How far the clamps of each site move the residual, at every position that they move, with those below live.

    `reads` is how many last positions the behavior reads.
    """
    defense = defense.to(torch.promote_types(model.dtype, torch.float32))
    moved: dict[Site, Tensor] = {}

    def watching(site: Site, edit: Edit) -> Edit:
        def watched(residual: Residual, positions: TokenIds) -> Residual:
            after = edit(residual, positions)
            moved[site] = rearrange((after - residual).float(), "batch pos d_model -> (batch pos) d_model")
            return after

        return watched

    edits = {site: watching(site, edit) for site, edit in clamp_edits(defense, reads - 1).items()}
    with torch.no_grad():
        model.run(prompts, edits=edits)
    return {site: rows[rows.any(dim=1)] for site, rows in moved.items()}


def check_fits(model: Model, defense: Defense, n_answer: int = 0) -> None:
    """Refuse a defense that cannot be put into this model, for a behavior that reads `n_answer` tokens of an answer.

    Raises:
        InputError: a site that the model does not have, an SAE of another width, or positions that no prompt has.
    """
    for clamp in defense.clamps:
        model.check_site(clamp.site)
        if clamp.positions == "answer" and n_answer == 0:
            raise InputError(
                "clamp: positions `answer` has nothing to act on, as next-token behaviors are read before any answer; "
                "use all, last or prompt"
            )
        if clamp.sae.d_model != model.d_model:
            raise InputError(
                f"SAE at {clamp.site.hook_name}: it reads {clamp.sae.d_model} dimensions, the model's residual "
                f"stream has {model.d_model}; use an SAE that was trained on this model"
            )
