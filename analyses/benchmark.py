"""Ours against the published loop, on the same model, SAE, prompts and valid flips, in one run.

The published loop (reference page, "What the published code does"), implemented faithfully: one prompt at a time,
the whole model at every step, the whole SAE encoded and decoded in the hook, the gradient projected and then handed to
Adam, clipping to the budget, always all the steps. Ours: `recover.recover` on all flips at once.

Both get a prompt's tokens and the features, and both are timed from there to the deltas, accounting included in ours.
Every delta of either is measured by the same certificate. Ratios are of seconds per prompt, side by side.

    python analyses/benchmark.py [DEFENSE.yaml] [--flips N] [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import recover as rc
from recover.defenses.defended import Defended
from recover.numerics.statistics import wilson
from recover.run.setting import build_defense, load_setting, select_features
from recover.search.constraints.linear import EncoderOrthogonal
from recover.tasks.behaviors import LogitDifference

STEPS, LEARNING_RATE = 100, 0.1


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    seconds_per_prompt: float
    recovered: int
    flips: int
    norm: float
    drift: float
    residual: float


def published_loop(
    model: rc.Model,
    clamp: rc.Clamp,
    prompts: rc.Prompts,
    behavior: LogitDifference,
    budget: float,
    constraint: EncoderOrthogonal | None,
    skip_first: int,
) -> torch.Tensor:
    """The published search for one prompt; returns delta `[1 1 d_model]`.

    A plain PyTorch hook and the whole model, as published; nothing of ours is used but the projector, which is exact
    here and so flatters the baseline.
    """
    sae, module = clamp.sae, model.module
    block = module.get_submodule(f"{model.blocks_path}.{clamp.site.index}")
    delta = torch.zeros(1, 1, model.d_model, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=LEARNING_RATE)

    def hook(_: torch.nn.Module, arguments: tuple, keywords: dict) -> tuple:
        h = arguments[0] if arguments else keywords["hidden_states"]
        features = sae.encode(h)
        error = h - sae.decode(features)
        edited = features.clone()
        edited[:, skip_first:, clamp.indices] = clamp.features_after(features[:, skip_first:, clamp.indices])
        state = sae.decode(edited) + error
        state = torch.cat([state[:, :-1], state[:, -1:] + delta], dim=1)
        if arguments:
            return (state, *arguments[1:]), keywords
        return arguments, keywords | {"hidden_states": state}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for _ in range(STEPS):
            optimizer.zero_grad()
            logits = module(prompts.ids, attention_mask=prompts.mask.long()).logits[:, -1]
            loss = -(logits[:, behavior.target] - logits[:, behavior.other]).mean()
            loss.backward()
            if constraint is not None:
                delta.grad = constraint.project(delta.grad)
            optimizer.step()
            with torch.no_grad():
                delta.mul_(min(1.0, budget / max(delta.norm().item(), 1e-12)))
    finally:
        handle.remove()
    return delta.detach()


def ours(
    model: rc.Model,
    defense: rc.Defense,
    prompts: rc.Prompts,
    behavior: LogitDifference,
    budget: float,
    constraint: EncoderOrthogonal,
) -> torch.Tensor:
    """All prompts at once, lower layers, prefix and accounting included."""
    target = rc.defend(model, defense, prompts, behavior)
    return rc.find_perturbation(target, target.zero_delta, constraint, budget).delta


def now(device: torch.device) -> float:
    """The time in seconds at which all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def row(name: str, seconds: float, delta: torch.Tensor, certificate: rc.Certificate) -> Row:
    """A line of the table, from the certificate alone."""
    return Row(
        name=name,
        seconds_per_prompt=seconds / len(delta),
        recovered=int(certificate.shows.sum()),
        flips=len(delta),
        norm=certificate.norm.mean().item(),
        drift=certificate.drift.mean().item(),
        residual=certificate.constraint_residual.max().item(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("defense", nargs="?", type=Path, default=here / "ioi_smollm2.yaml")
    parser.add_argument("--flips", type=int, help="only the first N valid flips (default: all)")
    parser.add_argument("--unconstrained", action="store_true", help="also the published loop without projection")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: as the file has it)")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()

    config = rc.load_config(options.defense, {"device": options.device})
    setting = load_setting(config)
    model, budget = setting.model, config.search.budget
    defense = build_defense(setting, select_features(setting, setting.batch_size))
    (clamp,) = defense.clamps
    constraint = EncoderOrthogonal.of(clamp)

    everything: Defended = rc.defend(model, defense, setting.examples.prompts, setting.examples.behavior)
    flips = everything.valid_flips[: options.flips]
    chosen = setting.examples.select(flips)
    prompts, behavior = chosen.prompts, chosen.behavior
    print(f"{len(flips)} valid flips, budget {budget:g}, {torch.get_num_threads()} threads, {model.device}")

    rows = []
    variants = [("published, projected", constraint)] + [("published", None)] * options.unconstrained
    for name, held in variants:
        started = now(model.device)
        deltas = []
        for index in tqdm(range(len(flips)), desc=name):
            one = torch.tensor([index])
            deltas.append(
                published_loop(
                    model, clamp, prompts.select(one), behavior.select(one), budget, held, defense.skip_first
                )
            )
        seconds = now(model.device) - started
        delta = torch.cat(deltas)
        rows.append(row(name, seconds, delta, rc.certify(model, defense, prompts, behavior, delta)))
    started = now(model.device)
    delta = ours(model, defense, prompts, behavior, budget, constraint)
    seconds = now(model.device) - started
    rows.append(row("recover", seconds, delta, rc.certify(model, defense, prompts, behavior, delta)))

    print(f"{'':<22}{'s/prompt':>9}{'recovered':>12}{'95 %':>12}{'norm':>8}{'drift':>10}{'residual':>10}{'ratio':>8}")
    for line in rows:
        low, high = wilson(line.recovered, line.flips)
        ratio = line.seconds_per_prompt / rows[-1].seconds_per_prompt
        print(
            f"{line.name:<22}{line.seconds_per_prompt:>9.3f}{line.recovered:>8}/{line.flips:<3}{low:>7.0%}-{high:<4.0%}"
            f"{line.norm:>8.2f}{line.drift:>10.1e}{line.residual:>10.1e}{ratio:>8.1f}"
        )
    if options.json:
        options.json.write_text(json.dumps([vars(line) for line in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
