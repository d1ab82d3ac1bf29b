"""A finished run of `recover check`, read back: its material, its flips and what it saved."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from points import Points
from safetensors import SafetensorError
from safetensors.torch import load_file

from recover.defenses.defended import Defended
from recover.evidence.attribution.linear_error import LinearError, error_activations, fit_linear_error
from recover.evidence.attribution.parts import entering
from recover.protocol.bench import Bench
from recover.protocol.folder import CONFIG, DELTAS, EXAMPLES, RUN, RunState
from recover.protocol.records import ExampleRecord
from recover.report.finished import read_records
from recover.run.config import load_config
from recover.run.setting import Chosen, build_bench, load_setting
from recover.tasks.examples import Examples
from recover.tasks.prose import NEUTRAL
from recover.types import Delta, InputError, Site


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its material, the records of its valid flips, the deltas that it saved; and where units go."""

    bench: Bench
    records: Mapping[str, ExampleRecord]
    deltas: Mapping[str, torch.Tensor]
    linear: Mapping[Site, LinearError]
    points: Points
    top_k: int
    n_points: int
    stretch: float = 1.0

    def examples(self, ids: Sequence[str]) -> Examples:
        """These examples, without padding that only others needed."""
        return self.bench.examples.select(torch.tensor([self.bench.examples.ids.index(name) for name in ids]))

    def saved(self, ids: Sequence[str]) -> Delta:
        """The deltas of these examples within the budget, made longer by as much as is asked."""
        return self.stretch * torch.stack([self.deltas[name] for name in ids]).to(self.bench.model.device)

    def exactly(self, part: Examples, delta: Delta) -> tuple[Defended, Delta]:
        """In the model of the certificates: the examples, and the deltas as they enter after the clamp."""
        exact = self.bench.exact
        return entering(self.bench.defended(part, exact), delta.to(torch.promote_types(exact.dtype, torch.float32)))


def open_run(folder: Path, points: Points, top_k: int, n_points: int, stretch: float = 1.0) -> Run:
    """Read a run of `recover check`; nothing is written there.

    Args:
        folder: of the run.
        points: where what is made of it goes.
        top_k: as of `attribute`.
        n_points: of integrals.
        stretch: how many times as long as found the deltas are looked at.

    Raises:
        InputError: a stretch of pinned deltas; or the run is not finished, damaged, or of other files than are here.
    """
    check_finished(folder)
    try:
        state = RunState.model_validate_json((folder / RUN).read_text(encoding="utf-8"))
        records = read_records(folder)
        deltas = load_file(folder / DELTAS)
    except (ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: is damaged ({' '.join(str(error).split()):.100}); run recover check") from None
    setting = load_setting(load_config(folder / CONFIG))
    if setting.examples.ids != [record.id for record in records]:
        raise InputError(f"{folder}: its examples are not those that its {CONFIG} gives here; run recover check again")
    bench = build_bench(setting, Chosen.kept_by(state), state.batch_size)
    if bench.surface.every and stretch != 1:
        raise InputError("--stretch: a pinned delta that is made longer is not pinned; leave it out")
    flips = {record.id: record for record in records if record.certificate is not None and record.id in deltas}
    if not flips:
        raise InputError(f"{folder}: no valid flip has a saved delta; nothing was suppressed, or nothing was searched")
    return Run(bench, flips, deltas, linear_errors(bench), points, top_k, n_points, stretch)


def linear_errors(bench: Bench) -> dict[Site, LinearError]:
    """For each site where a delta enters, fitted on neutral text under the defense."""
    sites = bench.surface.enters(bench.defense.sites)
    prompts = bench.exact.tokenize(NEUTRAL)
    states = error_activations(bench.exact, bench.defense, prompts, sites, bench.batch_size)
    return {site: fit_linear_error(bench.defense.at(site)[0].sae, states[site], bench.plan.seed) for site in sites}


def digest(folder: Path) -> str:
    """SHA-256 of what the run fixed and of the deltas that it saved.

    Raises:
        InputError: it is not finished.
    """
    check_finished(folder)
    return hashlib.sha256((folder / RUN).read_bytes() + (folder / DELTAS).read_bytes()).hexdigest()


def check_finished(folder: Path) -> None:
    """Raises:
    InputError: a file is not there that every finished run with deltas has.
    """
    if missing := [name for name in (CONFIG, RUN, DELTAS, EXAMPLES) if not (folder / name).is_file()]:
        raise InputError(f"{folder}: holds no finished run with deltas ({missing[0]} is not there)")
