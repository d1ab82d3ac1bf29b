"""Ours against the published loop for refusal, on the same requests, defense and budget, in one run.

The published loop (reference page, "What the published code does"), one request at a time with plain PyTorch hooks:

1. Every step runs the whole model over request and answer, every SAE encoded and decoded in its hook, and adds a delta
   after each clamped layer at the answer's positions.
2. Objective: for the first 20 steps the log-probability of the answer's first 8 tokens, minus that of opening as a
   refusal does; then that of the whole answer, its first 16 tokens twice. A drift penalty of 200 throughout.
3. The gradient is projected out of 8 random combinations of the monitored features' gradients and the direction of
   drift, and handed to Adam (lr 0.1); clipping to the budget; then 5 steps against drift.
4. It always takes all its steps. The publication does not give their number; 20 + 40 here.

What it leaves open is settled in its favor: openings of refusals are told by the tokens with which the defended model
itself begins, at the cost of no further pass; the graph of the probes ends at the last monitored layer; the best delta
met is kept. Ours: `recover_pinned` on all flips at once, accounting apart in both. Both deltas are certified and read
out alike. Seconds count per *recovered* (base-like) request; ratios are of these, side by side.

    python analyses/benchmark_refusal.py [DEFENSE.yaml] [--flips 3] [--steps 60] [--n 100] [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from refusal import DEFAULT, HEADINGS, Row, flips_of, line, pinned, read_out
from torch import Tensor
from tqdm import tqdm

from recover.protocol.bench import Bench
from recover.run.config import load_config
from recover.run.setting import build_bench, load_setting
from recover.tasks.examples import Examples
from recover.types import InputError

FIRST_STAGE, PREFIX, PROBES, CORRECTIONS, PENALTY, RATE = 20, 8, 8, 5, 200.0, 0.1


class PublishedLoop:
    """One request: the whole model with the clamps in hooks; `delta [site pos d_model]`."""

    def __init__(self, bench: Bench, one: Examples, refusals: Tensor) -> None:
        self.module, self.defense = bench.model.module, bench.defense
        self.blocks: Any = self.module.get_submodule(bench.model.blocks_path)
        self.ids, self.answer = one.prompts.ids, one.behavior.answer[0]
        self.columns, self.refusals = len(self.answer), refusals
        self.reference = None
        with torch.no_grad():
            self.reference = self.run(self.nothing())[1]

    def nothing(self) -> Tensor:
        """No perturbation, where the model is."""
        width = self.defense.clamps[0].sae.d_model
        return torch.zeros(len(self.defense.sites), self.columns, width, device=self.ids.device)

    def run(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at the answer's positions, and all monitored features there, one after another."""
        seen: list[Tensor] = []
        with self._hooked(delta, seen):
            logits = self.module(input_ids=self.ids, use_cache=False).logits[0, -self.columns :]
        return logits, torch.cat([features.flatten() for features in seen])

    @contextmanager
    def _hooked(self, delta: Tensor, seen: list[Tensor]) -> Iterator[None]:
        def hook(number: int) -> Any:
            clamps = self.defense.at(self.defense.sites[number])
            sae = clamps[0].sae

            def before(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
                h = args[0] if args else kwargs["hidden_states"]
                features = sae.encode(h)
                error = h - sae.decode(features)
                edited = features.clone()
                for clamp in clamps:
                    after = clamp.features_after(features[..., clamp.indices])
                    edited[:, self.defense.skip_first :, clamp.indices] = after[:, self.defense.skip_first :]
                state = sae.decode(edited) + error
                state = torch.cat([state[:, : -self.columns], state[:, -self.columns :] + delta[number]], dim=1)
                chosen = torch.cat([clamp.indices for clamp in clamps])
                seen.append(sae.encode(state[:, -self.columns :])[..., chosen])
                return ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})

            return before

        handles = [
            self.blocks[site.layer].register_forward_pre_hook(hook(number), with_kwargs=True)
            for number, site in enumerate(self.defense.sites)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def score(self, logits: Tensor, step: int) -> Tensor:
        """Two stages (2 above)."""
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
            assert self.reference is not None
            drift = (features - self.reference).square().sum()
            probes = torch.randn(PROBES, len(features), generator=generator).to(features)
            rows = [torch.autograd.grad(features, delta, probe, retain_graph=True)[0] for probe in probes]
            rows.append(torch.autograd.grad(drift, delta, retain_graph=True)[0])
            basis = torch.linalg.qr(torch.stack([row.flatten() for row in rows], dim=1))[0]
            loss = -self.score(logits, step) + PENALTY * drift / self.reference.square().sum()
            (gradient,) = torch.autograd.grad(loss, delta)
            flat = gradient.flatten()
            adam.zero_grad()
            delta.grad = (flat - basis @ (basis.mT @ flat)).reshape(delta.shape)
            adam.step()
            self._clip(delta, budget)
            for _ in range(CORRECTIONS):
                _, features = self.run(delta)
                drift = (features - self.reference).square().sum()
                (against,) = torch.autograd.grad(drift, delta)
                length = drift.detach() / against.square().sum().clamp(min=1e-12)
                delta.data -= length * against
                self._clip(delta, budget)
        with torch.no_grad():
            value = float(self.score(self.run(delta)[0], FIRST_STAGE))
        return delta.detach() if value > most else best

    @staticmethod
    def _clip(delta: Tensor, budget: float) -> None:
        delta.data *= min(1.0, budget / float(delta.detach().norm().clamp(min=1e-12)))


def published(bench: Bench, part: Examples, steps: int) -> Row:
    """The loop over these requests, one after another."""
    assert part.dialogue is not None
    under = bench.defended(part).defended_logits[:, 0].argmax(dim=-1)
    generator, deltas, started = torch.Generator().manual_seed(0), [], time.perf_counter()
    for row in tqdm(range(len(part.ids)), desc="published loop", leave=False):
        one = part.select(torch.tensor([row]))
        deltas.append(PublishedLoop(bench, one, under.unique()).search(bench.budget, steps, generator))
    seconds = time.perf_counter() - started
    whole = torch.stack(deltas).flatten(1, 2)
    return read_out("published loop", bench, part, whole, seconds)


def main() -> None:
    """Time both; print both rows and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--flips", type=int, default=3, help="requests that the published loop searches")
    parser.add_argument("--steps", type=int, default=60, help="of the published loop")
    parser.add_argument("--n", type=int, help="ordinary requests (default: as the file has it)")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: as the file has it)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        config = load_config(options.defense, {"prompts.n": options.n, "device": options.device})
        setting = load_setting(config)
        bench = build_bench(setting)
        part = flips_of(bench)
        if part is None or not 1 <= options.flips <= len(part.ids):
            raise InputError(f"--flips {options.flips}: there are {0 if part is None else len(part.ids)} valid flips")
    except InputError as error:
        sys.exit(f"benchmark_refusal: {error}")
    bench.model.module.requires_grad_(False)
    print(HEADINGS, flush=True)
    theirs = published(bench, part.select(torch.arange(options.flips)), options.steps)
    print(line(theirs), flush=True)
    started = time.perf_counter()
    delta = pinned(bench, part, bench.schedule)
    ours = read_out("pinned, all", bench, part, delta, time.perf_counter() - started)
    print(line(ours), flush=True)
    each = [row.seconds * row.n / max(row.base_like, 1) for row in (theirs, ours)]
    print(f"seconds per recovered request: {each[0]:.1f} and {each[1]:.2f}; {each[0] / each[1]:.0f} times")
    if options.json:
        values = {"published": asdict(theirs), "ours": asdict(ours), "ratio": each[0] / each[1]}
        options.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
