"""Runs side by side: the figures of each, and the settings in which they differ.

A row is a figure and a column is a run. Columns that do not fit into a terminal continue below.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recover.report.answers import parsed
from recover.report.finished import FinishedRun, read_run
from recover.report.markdown import summary_rows
from recover.types import InputError

__all__ = ["compare", "differences"]

WIDTH, GAP, SHOWN = 120, 2, 6
HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")

ELSEWHERE = ("model", "clamps", "rules", "dtype", "device", "batch_size")
"""Keys of a configuration that the verdict holds more exactly, or that change no figure."""


def compare(folders: Sequence[Path]) -> str:
    """The table of figures, and below it the settings that differ.

    Raises:
        InputError: there are fewer than two folders, one is given twice, or one holds no finished run.
    """
    if len(folders) < 2:
        raise InputError("compare: at least two folders are needed")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("compare: the same folder is given twice")
    runs = [read_run(folder) for folder in folders]
    names = _names(folders)
    tables = [dict(summary_rows(run.verdict)) for run in runs]
    rows = [("", *names), *((row, *(table[row] for table in tables)) for row in tables[0])]
    lines = _laid_out(rows)
    if differing := differences(runs):
        lines += ["", "Settings that differ"]
        width = max(len(name) for name, _ in differing)
        for name, values in differing:
            lines += _told(name.ljust(width), dict(zip(names, values, strict=True)))
    beside = {run.verdict.verdict for run in runs} & {"INVALID", "INCONCLUSIVE"}
    if beside:
        lines += ["", f"Do not compare the figures of {' and '.join(sorted(beside))} runs."]
    return "\n".join(lines)


def differences(runs: Sequence[FinishedRun]) -> list[tuple[str, list[Any]]]:
    """The settings that differ between runs, each with its value in every run."""
    settings = [dict(_leaves(_settings(run))) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    valued = [(name, [one.get(name) for one in settings]) for name in names]
    return [(name, values) for name, values in valued if any(value != values[0] for value in values)]


def _settings(run: FinishedRun) -> dict[str, Any]:
    """The settings that figures depend on: model, task, prompts, clamps, search, threat model, controls and rules."""
    config = parsed(run.config)
    asked: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
    values = run.verdict.to_dict()
    provenance, threat, rules = values["provenance"], values["threat_model"], values["statistics"]["rules"]
    told = {key: provenance[key] for key in ("model", "sae_sha256", "dtype")}
    told |= {key: value for key, value in asked.items() if key not in ELSEWHERE}
    told |= {f"clamp {number}": clamp for number, clamp in enumerate(threat["clamps"], start=1)}
    told |= {f"features {number}": sorted(features) for number, features in enumerate(run.features, start=1)}
    told |= {key: threat[key] for key in ("constraint", "placement", "positions", "delta_sites", "budget")}
    return told | {"control seed": provenance["control_seed"], "rules": rules}


def _leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{above} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        else:
            yield name, value


def _told(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    """One line if all values fit; otherwise a line for each value, with the runs that have it."""
    shown = {run: _shortened(value) for run, value in values.items()}
    if (line := f"  {name}  {' | '.join(shown.values())}") and len(line) <= WIDTH:
        yield line
        return
    yield f"  {name}".rstrip()
    for value in dict.fromkeys(shown.values()):
        yield f"      {', '.join(run for run, one in shown.items() if one == value)}: {value}"


def _shortened(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        more = f", ... ({len(value)})" if len(value) > SHOWN else ""
        return ", ".join(map(_shortened, value[:SHOWN])) + more or "none"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return HASH.sub(r"\1", text)


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest names that tell the folders apart: the last part, or the path without the common beginning."""
    last = [folder.resolve().name for folder in folders]
    if len(set(last)) == len(last):
        return last
    parts = [str(folder.resolve()) for folder in folders]
    shared = os.path.commonpath(parts)
    return [os.path.relpath(part, shared) for part in parts]


def _laid_out(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, in as many blocks as the width requires."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    blocks: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        used = widths[0] + sum(widths[one] + GAP for one in [*blocks[-1], column])
        if blocks[-1] and used > WIDTH:
            blocks.append([])
        blocks[-1].append(column)
    lines: list[str] = []
    for block in blocks:
        lines += [""] * bool(lines)
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(row[column].ljust(widths[column]) for column in block)]
            lines.append((" " * GAP).join(cells).rstrip())
    return lines
