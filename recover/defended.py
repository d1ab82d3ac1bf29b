"""A defense put into a model: the defended state, and the objective that a search raises under it.

1. One pass without the clamp reads the residual at the first clamped site (and the base logits).
2. One prefill from there, with every clamp live, gives the defended logits, the defended residual and the keys and
   values that a suffix-only run needs.
3. A delta enters at the last `n_pos` positions of the first clamped site, after the clamp (`h_def + delta`) or before
   it (`clamp(h + delta)`); under C1 and a pointwise SAE the two are the same state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from recover.behavior import Behavior
from recover.clamp import Defense
from recover.model import Edit, Model, Prompts, Suffix
from recover.types import Float, InputError, Int, PerExample, Residual, Site, Tensor, TokenIds

Placement = Literal["after_clamp", "before_clamp"]
PLACEMENTS: tuple[Placement, ...] = ("after_clamp", "before_clamp")


@dataclass(frozen=True, eq=False)
class Defended:
    """A batch of prompts under a defense.

    Attributes:
        base: the undefended residual at the first clamped site, all positions.
        base_logits: without the defense; of the behavior's tokens only.
        defended_logits: with it.
        suffix: the rest of the model, ready for perturbations; its `state` is the defended residual.
    """

    defense: Defense
    behavior: Behavior
    base: Residual
    base_logits: Float[Tensor, "batch choice"]
    defended_logits: Float[Tensor, "batch choice"]
    suffix: Suffix
    placement: Placement

    @property
    def shown_at_base(self) -> Tensor:
        """Bool `[batch]`: the behavior shows without the defense."""
        return self.behavior.slack(self.base_logits) > 0

    @property
    def shown_when_defended(self) -> Tensor:
        """Bool `[batch]`: the behavior shows in spite of it."""
        return self.behavior.slack(self.defended_logits) > 0

    @property
    def valid_flips(self) -> Int[Tensor, "rows"]:
        """The examples where the behavior shows at base and not when defended: every rate is over these."""
        return (self.shown_at_base & ~self.shown_when_defended).nonzero().flatten()

    @property
    def zero_delta(self) -> Residual:
        """No perturbation, `[batch n_pos d_model]` in float32: where a search starts."""
        return torch.zeros_like(self.suffix.residual, dtype=torch.float32)

    def select(self, rows: Int[Tensor, "rows"]) -> Defended:
        """The same for the examples `rows`."""
        return Defended(
            self.defense,
            self.behavior.select(rows),
            self.base[rows],
            self.base_logits[rows],
            self.defended_logits[rows],
            self.suffix.select(rows),
            self.placement,
        )

    def logits(self, delta: Residual) -> Float[Tensor, "batch choice"]:
        """Logits of the behavior's tokens with `delta [batch n_pos d_model]` added; differentiable."""
        return self.suffix.logits(self._perturbed(delta), self.behavior.tokens)

    def entering(self, delta: Residual) -> dict[Site, Residual]:
        """What comes to each later clamped site with `delta` added, before the clamp there; differentiable.

        `[batch n_pos d_model]`, at the positions that a delta touches, in the order of the sites.
        """
        return self.suffix.entering(self._perturbed(delta), self.defense.sites[1:])

    def _perturbed(self, delta: Residual) -> Residual:
        """The state at the first site, after its clamp, with `delta` added."""
        if self.placement == "after_clamp":
            return self.suffix.residual + delta
        whole = torch.cat([self.base[:, : -self.suffix.n_pos], self.base[:, -self.suffix.n_pos :] + delta], dim=1)
        state = clamp_edits(self.defense)[self.suffix.site](whole, self.suffix.prompts.positions)
        return state[:, -self.suffix.n_pos :]

    def __call__(self, delta: Residual) -> tuple[PerExample, PerExample]:
        """Score and slack of `delta`, as a search asks for them."""
        logits = self.logits(delta).float()
        return self.behavior.score(logits), self.behavior.slack(logits)


def clamp_edits(defense: Defense) -> dict[Site, Edit]:
    """The defense as edits that the engine runs."""

    def at(site: Site) -> Edit:
        def edit(residual: Residual, positions: TokenIds) -> Residual:
            return defense.apply(site, residual, positions >= defense.skip_first)

        return edit

    return {site: at(site) for site in defense.sites}


def defend(
    model: Model,
    defense: Defense,
    prompts: Prompts,
    behavior: Behavior,
    *,
    n_pos: int = 1,
    placement: Placement = "after_clamp",
) -> Defended:
    """Run `prompts` with and without the defense and hold what a search needs.

    Args:
        model: the host model.
        defense: its first clamped site is where a delta enters.
        prompts: any number, as one batch.
        behavior: one entry for each prompt.
        n_pos: how many trailing positions a delta may touch.
        placement: whether a delta enters after or before the clamp of its site.

    Raises:
        InputError: a site that the model does not have, an SAE of another width, or too short a prompt.
    """
    check_fits(model, defense)
    site = defense.sites[0]
    with torch.no_grad():
        undefended = model.run(prompts, read=[site], tokens=behavior.tokens)
        base = undefended.residuals[site]
        run, suffix = model.prefill(
            prompts, (site, base), edits=clamp_edits(defense), n_pos=n_pos, tokens=behavior.tokens
        )
    return Defended(defense, behavior, base, undefended.logits, run.logits, suffix, placement)


def check_fits(model: Model, defense: Defense) -> None:
    """Whether every clamp can be put into this model.

    Raises:
        InputError: a site that the model does not have, an SAE of another width, or positions that no prompt has.
    """
    for clamp in defense.clamps:
        model.check_site(clamp.site)
        if clamp.positions == "answer":
            raise InputError(
                "clamp: positions `answer` has nothing to act on, as next-token behaviors are read before any answer; "
                "use all, last or prompt"
            )
        if clamp.sae.d_model != model.d_model:
            raise InputError(
                f"SAE at {clamp.site.hook_name}: it reads {clamp.sae.d_model} dimensions, the model's residual "
                f"stream has {model.d_model}; use an SAE that was trained on this model"
            )
