"""How much memory does attribution hold beside the model, against what `recover.models` counts on?

A forward and a backward pass of attribution over a full batch of neutral passages, the widest pass of a check.

    python analyses/gpu_memory.py [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import recover as rc
from recover.defenses import attributions
from recover.models import bytes_a_prompt
from recover.tasks import NEUTRAL, AnswerLikelihood


def held(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that a piece of work holds at most beside what was there; on the CPU, what its graph keeps for backward."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.grad_fn is not None:  # what has no history is a weight or an input, and there already
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(kept.values())


def memory(model: rc.Model, sae: rc.SAE, prompts: rc.Prompts) -> tuple[int, int]:
    """Bytes that attribution holds, and bytes that are counted on for as many prompts."""
    site, behavior = sae.site, AnswerLikelihood(torch.zeros(len(prompts), dtype=torch.long, device=model.device))
    examples = rc.Examples([str(row) for row in range(len(prompts))], prompts, behavior)
    used = held(lambda: attributions(model, sae, site, examples), model.device)
    sizes = {"n_layers": model.n_layers, "d_model": model.d_model, "d_sae": sae.d_sae, "pos": prompts.ids.shape[1]}
    return used, len(prompts) * bytes_a_prompt(model.module.config, **sizes)


def main() -> None:
    """Measure; print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        model = rc.load_model("smollm2", options.device)
    except rc.InputError as error:
        sys.exit(f"gpu_memory: {error}")
    used, counted = memory(model, rc.load_sae("smollm2-l15").to(model.device), model.tokenize(NEUTRAL))
    verdict = "within" if used <= counted else "MORE than counted on"
    print(f"{used / 2**20:.0f} MiB, {counted / 2**20:.0f} counted on: {verdict}")
    if options.json:
        options.json.write_text(json.dumps({"used": used, "counted": counted}) + "\n")


if __name__ == "__main__":
    main()
