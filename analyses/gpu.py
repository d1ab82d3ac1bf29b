"""Does a GPU give what the CPU gives? The four tasks and the probe on both, bfloat16 against float32, memory, speed.

1. *Tasks*: each shipped defense, with few prompts and little of every control (`SMALL`), checked on the CPU and on the
   device. The same code gives the same figures but for rounding: counts may be apart by `COUNTS` examples (one that
   sits on its threshold), norms by the share `NORMS`.
2. *bfloat16*: IOI on the device with a model in bfloat16; SAE, search and certificates are in float32 as always.
   Rounding moves residuals by a percent: counts may be apart by `COUNTS_BF16` of the prompts, norms by `NORMS_BF16`.
3. *Memory*: what a forward and backward pass of attribution over a full batch takes beside the model, against what
   `recover.models.capacity` counts on.
4. *Speed*: `benchmark.py` and `benchmark_refusal.py` on the device.

    python analyses/gpu.py [--device cuda] [--task ioi ...] [--out analyses/gpu.md]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from recover.defenses.selection import attribution_of
from recover.models.capacity import bytes_a_prompt
from recover.models.host import Model, Prompts
from recover.models.names import resolve_device, resolve_model
from recover.protocol.verdict_model import Verdict
from recover.run.config import Config, load_config
from recover.run.runner import run_check
from recover.run.setting import package_versions
from recover.saes.names import load_sae
from recover.saes.sae import SAE
from recover.tasks.behaviors import AnswerLikelihood
from recover.tasks.prose import NEUTRAL
from recover.types import InputError

HERE = Path(__file__).parent
LIGHT = {"controls.random_draws": 10, "controls.placebo_features": 1, "transfer.draws": 5, "transfer.steps": 10}
SMALL: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ioi": ("ioi_smollm2.yaml", {"prompts.n": 24, "transfer.norms": [0.6]}),
    "cloze": ("cloze_smollm2.yaml", {"prompts.n": 12, "transfer.norms": [0.6]}),
    "choice": ("choice_toy.yaml", {"prompts.n": 2}),
    "refusal": ("refusal_smollm2.yaml", {"prompts.n": 24, "prompts.declined": 16, "prompts.reply_tokens": 32}),
    "probe": ("tpp_smollm2.yaml", {"prompts.n": 24, "prompts.train": 100}),
}
"""Of each task its shipped defense, and what is less than there."""
COUNTS, NORMS, COUNTS_BF16, NORMS_BF16 = 1, 0.05, 0.15, 0.25
BENCHMARKS = {"benchmark.py": ["--flips", "2"], "benchmark_refusal.py": ["--flips", "1", "--steps", "25", "--n", "24"]}
BEGIN, END = "<!-- measured -->", "<!-- end -->"


@dataclass(frozen=True)
class Figures:
    """Of a verdict: counts of examples, and norms (None where nothing was found)."""

    n: int
    base: int
    defended: int
    valid_flips: int
    recovered: int
    norm_mean: float | None
    median: float | None
    displacement: float | None

    @classmethod
    def of(cls, verdict: Verdict) -> Figures:
        """Read from a verdict."""
        counts, recovery = verdict.counts, verdict.recovery
        assert verdict.minimum_norm is not None
        return cls(
            counts.n,
            counts.base,
            counts.defended,
            counts.valid_flips,
            recovery.recovered,
            recovery.norm_mean,
            verdict.minimum_norm.median,
            recovery.clamp_displacement_mean,
        )

    def __str__(self) -> str:
        norms = " / ".join("-" if norm is None else f"{norm:.4g}" for norm in (self.norm_mean, self.median))
        return f"{self.recovered} of {self.valid_flips} flips of {self.n}, norms {norms}"


def apart(one: Figures, other: Figures, counts: int = COUNTS, norms: float = NORMS) -> list[str]:
    """Where two runs are farther apart than they may be: nothing, if they agree."""
    said = []
    for name, first in vars(one).items():
        second = getattr(other, name)
        if isinstance(first, int) and isinstance(second, int):
            if abs(first - second) > counts:
                said.append(f"{name}: {first} and {second}, {counts} apart allowed")
        elif first is None or second is None:
            if first is not second:
                said.append(f"{name}: {first} and {second}")
        elif not abs(first - second) <= norms * abs(first):
            said.append(f"{name}: {first:.5g} and {second:.5g}, {norms:.0%} apart allowed")
    return said


def small(task: str, **changes: Any) -> Config:
    """The shipped defense of a task, made small."""
    name, less = SMALL[task]
    return load_config(HERE / name, LIGHT | less | changes)


def measure(config: Config) -> Figures:
    """Check it, and keep its figures alone."""
    with TemporaryDirectory() as folder:
        return Figures.of(run_check(config, Path(folder) / "run"))


def against(config: Config, device: str, dtype: str = "float32") -> tuple[Figures, Figures, list[str]]:
    """The figures of a defense on the CPU in float32 and on a device in some precision, and where they disagree."""
    base = config.model_copy(update={"device": "cpu", "dtype": "float32"})
    ours = measure(base)
    theirs = measure(config.model_copy(update={"device": device, "dtype": dtype}))
    if dtype == "float32":
        return ours, theirs, apart(ours, theirs)
    return ours, theirs, apart(ours, theirs, max(COUNTS, round(COUNTS_BF16 * ours.n)), NORMS_BF16)


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


def memory(model: Model, sae: SAE, prompts: Prompts) -> tuple[int, int]:
    """Bytes that attribution holds, and bytes that `recover.models.capacity` counts on for as many prompts."""
    assert sae.site is not None
    site, behavior = sae.site, AnswerLikelihood(torch.zeros(len(prompts), dtype=torch.long, device=model.device))
    used = held(lambda: attribution_of(model, sae, site, prompts, behavior), model.device)
    sizes = {"n_layers": model.n_layers, "d_model": model.d_model, "d_sae": sae.d_sae, "pos": prompts.ids.shape[1]}
    return used, len(prompts) * bytes_a_prompt(model.module.config, **sizes)


def benchmark(name: str, device: str, arguments: Sequence[str] = ()) -> Any:
    """What a benchmark writes to its `--json`, run on a device in a process of its own."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / name), *(arguments or BENCHMARKS[name])]
        command += ["--device", device, "--json", str(out)]
        # This checkout's own package, whatever else is installed.
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        return json.loads(out.read_text(encoding="utf-8"))


def machine(device: torch.device) -> str:
    """The device and the versions, in a line."""
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return ", ".join([named, *(f"{name} {version}" for name, version in package_versions().items())])


def rows(device: str, tasks: Sequence[str]) -> list[tuple[str, str, str]]:
    """Everything that is measured: what, the figure, and whether it is as it should be."""
    found = []
    pairs = [(task, "float32") for task in tasks] + [("ioi", "bfloat16")] * ("ioi" in tasks)
    for task, dtype in pairs:
        started = time.perf_counter()
        ours, theirs, said = against(small(task), device, dtype)
        seconds = time.perf_counter() - started
        found.append((f"{task}, {dtype}", f"CPU {ours}; device {theirs} ({seconds:.0f} s)", "; ".join(said) or "agree"))
    loaded = resolve_model("smollm2", device)
    model = Model(loaded.module, loaded.tokenizer)
    used, counted = memory(model, load_sae("smollm2-l15").to(model.device), model.tokenize(NEUTRAL))
    verdict = "within" if used <= counted else "MORE than counted on"
    found.append(("memory of attribution", f"{used / 2**20:.0f} MiB, {counted / 2**20:.0f} counted on", verdict))
    for name in BENCHMARKS:
        found.append((name, f"`{json.dumps(benchmark(name, device))}`", ""))
    return found


def table(title: str, found: Sequence[tuple[str, str, str]]) -> str:
    """As Markdown."""
    lines = [title, "", "| what | measured | |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in found)]
    return "\n".join(lines)


def filled(page: str, measured: str) -> str:
    """The page with what was measured between its marks.

    Raises:
        InputError: it has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"--out: the page needs the marks {BEGIN} and {END}, between which the table goes")
    return f"{before}{BEGIN}\n{measured}\n{END}{after}"


def main() -> None:
    """Measure; print the table, and put it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--task", nargs="+", choices=SMALL, default=list(SMALL))
    parser.add_argument("--out", type=Path, help="a page with marks, such as analyses/gpu.md")
    options = parser.parse_args()
    try:
        device = resolve_device(options.device)
        page = None if options.out is None else filled(options.out.read_text(encoding="utf-8"), "")
        measured = table(f"Measured on {machine(device)}.", rows(options.device, options.task))
    except (InputError, OSError) as error:
        sys.exit(f"gpu: {error}")
    print(measured)
    if page is not None:
        options.out.write_text(filled(page, measured), encoding="utf-8")


if __name__ == "__main__":
    main()
