"""What does a check cost on a device? Memory of attribution against what is counted on, and speed of the searches.

1. *Memory*: what a forward and a backward pass of attribution over a full batch of neutral passages, the widest pass of
   a check, takes beside the model, against what `recover.models.bytes_a_prompt` counts on.
2. *Speed*: `benchmark.py` and `benchmark_refusal.py` on the device, each in a process of its own.

    python analyses/gpu_cost.py [--device cuda] [--out analyses/gpu.md]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import recover as rc
from recover.defenses import attributions
from recover.models import bytes_a_prompt
from recover.report import filled
from recover.tasks import NEUTRAL, AnswerLikelihood

HERE = Path(__file__).parent
BENCHMARKS = {"benchmark.py": "--flips 2", "benchmark_refusal.py": "--flips 1 --steps 25 --n 24"}


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


def benchmark(name: str, device: str, arguments: str = "") -> Any:
    """What a benchmark writes to its `--json`, run on a device in a process of its own, of this checkout."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / name), *(arguments or BENCHMARKS[name]).split()]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        command += ["--device", device, "--json", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        return json.loads(out.read_text(encoding="utf-8"))


def main() -> None:
    """Measure; print the table, and put it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=HERE / "gpu.md", help="a page with marks (default: gpu.md)")
    options = parser.parse_args()
    try:
        filled(options.out.read_text(encoding="utf-8"), "cost", "")
        model = rc.load_model("smollm2", options.device)
    except (rc.InputError, OSError) as error:
        sys.exit(f"gpu_cost: {error}")
    used, counted = memory(model, rc.load_sae("smollm2-l15").to(model.device), model.tokenize(NEUTRAL))
    verdict = "within" if used <= counted else "MORE than counted on"
    lines = ["| what | measured | |", "| --- | --- | --- |"]
    lines += [f"| memory of attribution | {used / 2**20:.0f} MiB, {counted / 2**20:.0f} counted on | {verdict} |"]
    lines += [f"| {name} | `{json.dumps(benchmark(name, options.device))}` | |" for name in BENCHMARKS]
    measured = "\n".join(lines)
    print(measured)
    options.out.write_text(filled(options.out.read_text(encoding="utf-8"), "cost", measured), encoding="utf-8")


if __name__ == "__main__":
    main()
