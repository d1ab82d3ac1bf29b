"""Does a GPU give what the CPU gives? The four tasks and the probe on both, and bfloat16 against float32.

1. *Tasks*: each shipped defense, with few prompts and little of every control (`SMALL`), checked on the CPU and on the
   device. Counts may be apart by `COUNTS` examples (one that sits on its threshold), norms by the share `NORMS`.
2. *bfloat16*: IOI on the device with a model in bfloat16; SAE, search and certificates are in float32 as always.
   Rounding moves residuals by a percent: counts may be apart by `COUNTS_BF16` of the prompts, norms by `NORMS_BF16`.

Memory and speed on a device are those of `gpu_cost.py`.

    python analyses/gpu.py [--device cuda] [--task ioi ...] [--out analyses/gpu.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import recover as rc
from recover.report import filled
from recover.run import Config, load_config, package_versions

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
Figures = Mapping[str, int | float | None]


def figures(verdict: rc.Verdict) -> Figures:
    """Of a verdict: counts of examples, and norms (None where nothing was found)."""
    counts, recovery, minimum = verdict.counts, verdict.recovery, verdict.minimum_norm
    return {
        **{name: getattr(counts, name) for name in ("n", "base", "defended", "valid_flips")},
        "recovered": recovery.recovered,
        "norm_mean": recovery.norm_mean,
        "median": minimum and minimum.median,
        "displacement": recovery.clamp_displacement_mean,
    }


def apart(one: Figures, other: Figures, counts: int = COUNTS, norms: float = NORMS) -> list[str]:
    """Where two runs are farther apart than they may be: nothing, if they agree."""
    said = []
    for name, first in one.items():
        second = other[name]
        if isinstance(first, int) and isinstance(second, int):
            if abs(first - second) > counts:
                said.append(f"{name}: {first} and {second}, {counts} apart allowed")
        elif first is None or second is None:
            if first is not second:
                said.append(f"{name}: {first} and {second}")
        elif not abs(first - second) <= norms * abs(first):
            said.append(f"{name}: {first:.5g} and {second:.5g}, {norms:.0%} apart allowed")
    return said


def small(task: str) -> Config:
    """The shipped defense of a task, made small."""
    name, less = SMALL[task]
    return load_config(HERE / name, LIGHT | less)


def measure(config: Config, **changes: Any) -> Figures:
    """Check a defense on a device, and keep its figures alone."""
    with TemporaryDirectory() as folder:
        return figures(rc.run_check(config.model_copy(update=changes), Path(folder) / "run"))


def against(config: Config, device: str, dtype: str = "float32") -> tuple[Figures, Figures, list[str]]:
    """The figures of a defense on the CPU in float32 and on a device in some precision, and where they disagree."""
    ours, theirs = measure(config, device="cpu", dtype="float32"), measure(config, device=device, dtype=dtype)
    if dtype == "float32":
        return ours, theirs, apart(ours, theirs)
    return ours, theirs, apart(ours, theirs, max(COUNTS, round(COUNTS_BF16 * ours["n"])), NORMS_BF16)


def table(device: str, tasks: Sequence[str]) -> str:
    """The comparison of every task, as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    lines = [f"Measured on {device}, {versions}.", "", "| what | measured | |", "| --- | --- | --- |"]
    for task, dtype in [*((task, "float32") for task in tasks), *[("ioi", "bfloat16")] * ("ioi" in tasks)]:
        ours, theirs, said = against(small(task), device, dtype)
        told = f"CPU {json.dumps(ours)}; device {json.dumps(theirs)}"
        lines.append(f"| {task}, {dtype} | {told} | {'; '.join(said) or 'agree'} |")
    return "\n".join(lines)


def main() -> None:
    """Measure; print the table, and put it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--task", nargs="+", choices=SMALL, default=list(SMALL))
    parser.add_argument("--out", type=Path, default=HERE / "gpu.md", help="a page with marks (default: gpu.md)")
    options = parser.parse_args()
    try:
        filled(options.out.read_text(encoding="utf-8"), "tasks", "")
        measured = table(options.device, options.task)
    except (rc.InputError, OSError) as error:
        sys.exit(f"gpu: {error}")
    print(measured)
    options.out.write_text(filled(options.out.read_text(encoding="utf-8"), "tasks", measured), encoding="utf-8")


if __name__ == "__main__":
    main()
