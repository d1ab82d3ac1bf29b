"""The published search loops, one example at a time with plain PyTorch hooks (reference: What the published code does).

*Next-token behaviors* (`published_loop`). Every step runs the whole model and the whole SAE in a hook; the gradient is
projected and handed to Adam, and the delta clipped to the budget. It always takes all its steps.

*Whole answers* (`PublishedAnswerLoop`), with a delta after each clamped layer at the answer's positions:

1. Objective: for the first 20 steps the log-probability of the answer's first 8 tokens, minus that of opening as a
   refusal does; then that of the whole answer, its first 16 tokens counted twice. A drift penalty of 200 throughout.
2. The gradient is projected out of 8 random combinations of the monitored features' gradients and out of the direction
   of drift, and handed to Adam (learning rate 0.1); clipping to the budget; then 5 steps against drift.

What the publication leaves open is settled in its favor: a refusal's opening is told by the tokens with which the
defended model itself begins, the graph of the probes ends at the last monitored layer, the best delta met is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from recover.defenses.clamps import Clamp, Defense
from recover.models.host import Model, Prompts
from recover.search.ascent import Feasible
from recover.tasks.behaviors import ForcedAnswer, LogitDifference
from recover.types import Int, Residual, Tensor

FIRST_STAGE, PREFIX, PROBES, CORRECTIONS, PENALTY, RATE = 20, 8, 8, 5, 200.0, 0.1


def published_loop(
    model: Model,
    defense: Defense,
    prompts: Prompts,
    behavior: LogitDifference,
    budget: float,
    feasible: Feasible | None = None,
    steps: int = 100,
) -> Residual:
    """Run the published search for a delta `[1 1 d_model]`: one prompt of a next-token behavior, one clamp.

    `feasible` projects the gradient of each step of Adam; it is exact here, which flatters the baseline.
    """
    (clamp,) = defense.clamps
    delta = torch.zeros(1, 1, model.d_model, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=RATE)
    with _hooked(model, clamp.site.index, lambda h: _added(_clamped(h, (clamp,), defense.skip_first), delta)):
        for _ in range(steps):
            optimizer.zero_grad()
            logits = model.module(prompts.ids, attention_mask=prompts.mask.long()).logits[:, -1]
            loss = -(logits[:, behavior.target] - logits[:, behavior.other]).mean()
            loss.backward()
            if feasible is not None and delta.grad is not None:
                delta.grad = feasible.project(delta.grad)
            optimizer.step()
            _clip(delta, budget)
    return delta.detach()


class PublishedAnswerLoop:
    """The published search for one request: the model with its clamps in hooks, `delta [site pos d_model]`.

    The prompt is one row, with its answer; `refusals` are the tokens with which defended replies begin.
    """

    def __init__(
        self, model: Model, defense: Defense, prompts: Prompts, behavior: ForcedAnswer, refusals: Int[Tensor, "tokens"]
    ) -> None:
        self.model, self.defense, self.refusals = model, defense, refusals
        self.ids, self.answer, self.columns = prompts.ids, behavior.answer[0], behavior.answer.shape[1]
        with torch.no_grad():
            self.reference = self.run(self.nothing())[1]

    def nothing(self) -> Tensor:
        """No perturbation, on the model's device."""
        return torch.zeros(len(self.defense.sites), self.columns, self.model.d_model, device=self.ids.device)

    def run(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at the answer's positions, and all monitored features there, one after another."""
        seen: list[Tensor] = []
        with ExitStack() as hooks:
            for site, part in zip(self.defense.sites, delta, strict=True):
                hooks.enter_context(_hooked(self.model, site.layer, self._step(self.defense.at(site), part, seen)))
            logits = self.model.module(input_ids=self.ids, use_cache=False).logits[0, -self.columns :]
        return logits, torch.cat([features.flatten() for features in seen])

    def _step(self, clamps: Sequence[Clamp], part: Tensor, seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def change(h: Tensor) -> Tensor:
            state = _added(_clamped(h, clamps, self.defense.skip_first), part)
            chosen = torch.cat([clamp.indices for clamp in clamps])
            seen.append(clamps[0].sae.encode(state[:, -self.columns :])[..., chosen])
            return state

        return change

    def score(self, logits: Tensor, step: int) -> Tensor:
        """The objective at this step."""
        likely = logits.log_softmax(dim=-1)
        own = likely.gather(1, self.answer.clamp(min=0)[:, None])[:, 0] * (self.answer >= 0)
        if step < FIRST_STAGE:
            return own[:PREFIX].mean() - likely[0, self.refusals].logsumexp(dim=0)
        weights = torch.ones_like(own)
        weights[:16] = 2.0
        return (weights * own).sum() / weights.sum()

    def search(self, budget: float, steps: int, generator: torch.Generator) -> Tensor:
        """The best delta met, by the log-probability of the whole answer."""
        delta = self.nothing().requires_grad_(True)
        best, most = delta.detach().clone(), -float("inf")
        adam = torch.optim.Adam([delta], lr=RATE)
        for step in range(steps):
            logits, features = self.run(delta)
            value = float(self.score(logits.detach(), FIRST_STAGE))
            if value > most:
                best, most = delta.detach().clone(), value
            drift = (features - self.reference).square().sum()
            probes = torch.randn(PROBES, len(features), generator=generator).to(features)
            rows = [torch.autograd.grad(features, delta, probe, retain_graph=True)[0] for probe in probes]
            rows.append(torch.autograd.grad(drift, delta, retain_graph=True)[0])
            basis = torch.linalg.qr(torch.stack([row.flatten() for row in rows], dim=1))[0]
            loss = -self.score(logits, step) + PENALTY * drift / self.reference.square().sum()
            (gradient,) = torch.autograd.grad(loss, delta)
            flat = gradient.flatten()
            delta.grad = (flat - basis @ (basis.mT @ flat)).reshape(delta.shape)
            adam.step()
            _clip(delta, budget)
            for _ in range(CORRECTIONS):
                _, features = self.run(delta)
                drift = (features - self.reference).square().sum()
                (against,) = torch.autograd.grad(drift, delta)
                length = drift.detach() / against.square().sum().clamp(min=1e-12)
                delta.data -= length * against
                _clip(delta, budget)
        with torch.no_grad():
            value = float(self.score(self.run(delta)[0], FIRST_STAGE))
        return delta.detach() if value > most else best


def _clamped(h: Tensor, clamps: Sequence[Clamp], skip_first: int) -> Tensor:
    """Encode everything, clamp, decode, add the error."""
    sae = clamps[0].sae
    features = sae.encode(h)
    error = h - sae.decode(features)
    edited = features.clone()
    for clamp in clamps:
        edited[:, skip_first:, clamp.indices] = clamp.features_after(features[:, skip_first:, clamp.indices])
    return sae.decode(edited) + error


def _added(state: Tensor, delta: Tensor) -> Tensor:
    """The state with a delta at its last positions."""
    n_pos = delta.shape[-2]
    return torch.cat([state[:, :-n_pos], state[:, -n_pos:] + delta], dim=1)


def _clip(delta: Tensor, budget: float) -> None:
    delta.data *= min(1.0, budget / float(delta.detach().norm().clamp(min=1e-12)))


@contextmanager
def _hooked(model: Model, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what goes into a block of the model."""

    def before(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        state = change(args[0] if args else kwargs["hidden_states"])
        return ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})

    block = model.module.get_submodule(f"{model.blocks_path}.{layer}")
    handle = block.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
