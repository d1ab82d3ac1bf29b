"""Several runs side by side: the figures of each, and in what the runs differ, so that like is held against like.

A row is a figure, a column a run; where the columns are too wide for a terminal, they go on below.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recover.finished import FinishedRun, read_run
from recover.report_html import rows_of
from recover.report_markdown import summary_rows
from recover.types import InputError

__all__ = ["compare", "differences"]

WIDTH, GAP = 120, 2


def compare(folders: Sequence[Path]) -> str:
    """The table, and below it what must be known to read it.

    Raises:
        InputError: fewer than two folders, one given twice, or one that holds no finished run.
    """
    if len(folders) < 2:
        raise InputError("recover compare: one folder has nothing to stand beside; give two or more")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("recover compare: a folder is given twice; give each once")
    runs = [read_run(folder) for folder in folders]
    names = _names(folders)
    tables = [dict(summary_rows(run.verdict)) for run in runs]
    rows = [("", *names), *((row, *(table[row] for table in tables)) for row in tables[0])]
    lines = _laid_out(rows)
    differing = differences(runs)
    if differing:
        lines += ["", "They differ in", *(f"  {name}: {' | '.join(values)}" for name, values in differing)]
    beside = {run.verdict["verdict"] for run in runs} & {"INVALID", "INCONCLUSIVE"}
    if beside:
        lines += ["", f"The figures of what is {' or '.join(sorted(beside))} are not to be compared."]
    return "\n".join(lines)


def differences(runs: Sequence[FinishedRun]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs, each with its value in every one."""
    settings = [_settings(run) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    valued = [(name, [one.get(name, "-") for one in settings]) for name in names]
    return [(name, values) for name, values in valued if len(set(values)) > 1]


def _settings(run: FinishedRun) -> dict[str, str]:
    """What a figure depends on: model, task, prompts, clamps, threat model, seeds and rules."""
    try:
        config = yaml.safe_load(run.config)
    except yaml.YAMLError:
        config = None
    asked: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
    provenance, threat = run.verdict["provenance"], run.verdict["threat_model"]
    told = {"model": provenance["model"], "SAE": provenance["sae_sha256"], "dtype": provenance["dtype"]}
    told |= {key: asked[key] for key in ("task", "prompts", "skip_first") if key in asked}
    for number, clamp in enumerate(threat["clamps"], start=1):
        told[f"clamp {number}"] = clamp
    told |= {key: threat[key] for key in ("constraint", "placement", "positions", "delta_sites", "budget")}
    told |= {"control seed": provenance["control_seed"], "rules": run.verdict["statistics"]["rules"]}
    for number, features in enumerate(run.features, start=1):
        told[f"features {number}"] = _shortened(sorted(features))
    return dict(rows_of(told))


def _shortened(features: Sequence[int]) -> str:
    shown = ", ".join(map(str, features[:4]))
    return f"{len(features)}: {shown}{', ...' if len(features) > 4 else ''} (sum {sum(features)})"


def _names(folders: Sequence[Path]) -> list[str]:
    """As short as tells them apart: their last part, or without what they all begin with."""
    last = [folder.resolve().name for folder in folders]
    if len(set(last)) == len(last):
        return last
    parts = [str(folder.resolve()) for folder in folders]
    shared = os.path.commonpath(parts)
    return [os.path.relpath(part, shared) for part in parts]


def _laid_out(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns that begin where their names do, in as many blocks as the width asks for."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    blocks: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        used = widths[0] + sum(widths[one] + GAP for one in [*blocks[-1], column])
        if blocks[-1] and used > WIDTH:
            blocks.append([])
        blocks[-1].append(column)
    lines = []
    for block in blocks:
        lines += [""] * bool(lines)
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(row[column].ljust(widths[column]) for column in block)]
            lines.append((" " * GAP).join(cells).rstrip())
    return lines
