"""Load a finished run of `recover check`: its verdict, its records, its deltas, and the material to go on from.

1. The artifacts are read at once and nothing is written to the folder.
2. The model, the SAEs and the examples are loaded when `bench` is first used. They must be those of the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from einops import repeat
from safetensors import SafetensorError
from safetensors.torch import load_file

from recover.protocol.bench import Bench
from recover.protocol.folder import CONFIG, DELTAS, EXAMPLES, RUN, RunState
from recover.protocol.heldout import C1, split
from recover.protocol.records import ExampleRecord
from recover.protocol.verdict_model import Verdict
from recover.report.finished import read_run
from recover.run.config import load_config
from recover.run.setting import Chosen, build_bench, load_setting
from recover.tasks.examples import Examples
from recover.types import Delta, InputError, Tensor


@dataclass(frozen=True, eq=False)
class SharedDelta:
    """A shared delta within the budget `norm`, of the fit number `fold`.

    `examples` are the flips that it was not fitted to, with the predicate that it is read with; `delta` is repeated for
    each.
    """

    fold: int
    norm: float
    examples: Examples
    delta: Delta


@dataclass(frozen=True, eq=False)
class SavedRun:
    """A finished run in its folder: its verdict, and the records of all examples by id.

    Deltas, `[n_pos d_model]` each, go by example id (the one within the budget), by id and `/smallest` (the smallest
    one), or by `transfer/fold/constraint/budget/draw` (the shared ones).
    """

    path: Path
    verdict: Verdict
    records: Mapping[str, ExampleRecord]
    deltas: Mapping[str, Tensor]

    @property
    def flips(self) -> dict[str, ExampleRecord]:
        """The records of the valid flips that have a certified delta."""
        return {name: r for name, r in self.records.items() if r.certificate is not None and name in self.deltas}

    @property
    def sha256(self) -> str:
        """Hash of what the run fixed at its start and of the deltas that it saved."""
        return hashlib.sha256((self.path / RUN).read_bytes() + (self.path / DELTAS).read_bytes()).hexdigest()

    @cached_property
    def bench(self) -> Bench:
        """The model, the defense and the examples of the run, loaded again.

        Raises:
            InputError: one of them cannot be loaded, or the examples are not those of the run.
        """
        setting = load_setting(load_config(self.path / CONFIG))
        if setting.examples.ids != list(self.records):
            raise InputError(f"{self.path}: its {CONFIG} gives other examples here; run recover check again")
        state = RunState.model_validate_json((self.path / RUN).read_text(encoding="utf-8"))
        return build_bench(setting, Chosen.kept_by(state), state.batch_size)

    def examples(self, ids: Sequence[str]) -> Examples:
        """Select examples by id."""
        return self.bench.examples.select(torch.tensor([self.bench.examples.ids.index(name) for name in ids]))

    def found(self, ids: Sequence[str]) -> Delta:
        """The deltas within the budget of these examples, `[batch n_pos d_model]`."""
        return torch.stack([self.deltas[name] for name in ids]).to(self.bench.model.device)

    def batches(self, most: int | None = None) -> list[tuple[Examples, Delta]]:
        """The valid flips in batches, each with its deltas within the budget; the first `most` of them, or all."""
        ids, size = list(self.flips)[:most], self.bench.batch_size
        some = [ids[start : start + size] for start in range(0, len(ids), size)]
        return [(self.examples(names), self.found(names)) for names in some]

    @property
    def shared(self) -> list[SharedDelta]:
        """The shared C1 delta of largest norm of each fit, on the unseen flips."""
        bench, found = self.bench, []
        names = [name.split("/") for name in self.deltas if name.startswith("transfer/") and name.split("/")[2] == C1]
        for fold in sorted({int(name[1]) for name in names}):
            largest = max((name for name in names if int(name[1]) == fold), key=lambda name: float(name[3]))
            unseen = split(bench, fold)[1]
            part = self.examples([bench.pool_ids[row] for row in unseen[bench.pool_turned[unseen]].tolist()])
            part = part if part.strict is None else replace(part, behavior=part.strict)
            one = self.deltas["/".join(largest)].to(bench.model.device)
            each = repeat(one, "pos d_model -> batch pos d_model", batch=len(part.ids))
            (whole,) = bench.whole(part, bench.objective(bench.defended(part)), each)
            found.append(SharedDelta(fold, float(largest[3]), part, whole))
        return found


def load_run(path: Path | str) -> SavedRun:
    """Load a finished run of `recover check` from its folder.

    Raises:
        InputError: the folder holds no finished run with deltas, or its files are damaged.
    """
    path = Path(path)
    if missing := [name for name in (CONFIG, RUN, DELTAS, EXAMPLES) if not (path / name).is_file()]:
        raise InputError(f"{path}: holds no finished run with deltas ({missing[0]} is not there)")
    run = read_run(path)
    try:
        deltas = load_file(path / DELTAS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: {DELTAS} is damaged ({' '.join(str(error).split()):.100})") from None
    return SavedRun(path, run.verdict, {record.id: record for record in run.records}, deltas)
