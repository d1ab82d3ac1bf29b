"""`check()`: the protocol, from a defense and prompts to a verdict.

1. *Fit*: does each SAE describe its site on these prompts? What does the defense cost on neutral text?
2. *Accounting*: which examples show the behavior without the defense and not with it.
3. *Search*, *certificates* and per-example controls for every valid flip (`phases`).
4. *Controls* over all of them: the clamp undone, random features clamped, the search's own health (`global_controls`).
5. *Transfer*: shared deltas, fitted on one half and read on the other (`heldout`).
6. *Verdict* from the records of all of these (`gates`, `evidence`, `verdict`).

Each phase of each batch is a *unit*: its values are handed to a `Store` as soon as it is finished, its deltas before
that. Values pass through JSON in every store, and batches are fixed, so that a run that was interrupted goes on with
the same arithmetic and reaches the same verdict.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from recover import heldout
from recover.behavior import positions_read
from recover.bench import Bench
from recover.clamp import Defense
from recover.constraint import Budget
from recover.defended import Placement
from recover.examples import Examples
from recover.fit import Fit, measure_fit
from recover.gates import fit_gates
from recover.global_controls import placebo_features, search_health, undo
from recover.model import Model, Prompts
from recover.phases import PHASES, Done, accounting, curve_budgets
from recover.plan import Plan
from recover.records import ExampleRecord, without_nan
from recover.search import Schedule
from recover.types import Tensor
from recover.utility import Utility, measure_utility
from recover.verdict import Evidence, Verdict, decide

__all__ = ["Examples", "Memory", "Store", "check"]

FIT_PROMPTS = 32
Progress = Callable[[str, int, int], None]
"""`progress(phase, done, total)`."""


@runtime_checkable
class Store(Protocol):
    """Where finished units go, and where an interrupted run finds them again."""

    def load(self, unit: str) -> Any | None:
        """The values of a finished unit; None where it is not finished."""

    def keep(self, unit: str, values: Any, deltas: Mapping[str, Tensor]) -> None:
        """Keep a unit's deltas, and then its values: from here on it is finished."""

    def delta(self, name: str) -> Tensor:
        """A saved delta `[n_pos d_model]`, read back."""


class Memory:
    """A store that lasts as long as the object."""

    def __init__(self) -> None:
        self.units: dict[str, str] = {}
        self.deltas: dict[str, Tensor] = {}

    def load(self, unit: str) -> Any | None:
        return json.loads(self.units[unit]) if unit in self.units else None

    def keep(self, unit: str, values: Any, deltas: Mapping[str, Tensor]) -> None:
        self.deltas |= deltas
        self.units[unit] = json.dumps(values, allow_nan=False)

    def delta(self, name: str) -> Tensor:
        return self.deltas[name]


@dataclass(eq=False)
class _Ledger:
    """Runs each unit once, whatever start it was in, and keeps its time."""

    store: Store
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, phase: str, part: int | None, work: Callable[[], Done | Any]) -> Any:
        """The values of a unit: from the store, or from `work`, whose values are then in the store."""
        unit = phase if part is None else f"{phase}/{part}"
        if self.store.load(unit) is None:
            started = time.perf_counter()
            done = work()
            values, deltas = (done.values, done.deltas) if isinstance(done, Done) else (done, {})
            seconds = time.perf_counter() - started
            self.store.keep(unit, {"seconds": seconds, "values": without_nan(values)}, deltas)
        kept: Any = self.store.load(unit)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + kept["seconds"]
        return kept["values"]


def check(
    model: Model,
    defense: Defense,
    examples: Examples,
    *,
    budget: float,
    placement: Placement = "after_clamp",
    every_site: bool = False,
    schedule: Schedule | None = None,
    plan: Plan | None = None,
    neutral: Prompts | None = None,
    batch_size: int | None = None,
    store: Store | None = None,
    exact: Model | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Run the protocol.

    Args:
        model: the host model.
        defense: its clamps.
        examples: prompts and behavior.
        budget: largest Frobenius norm of a delta.
        placement: whether a delta enters after or before the clamp.
        every_site: whether it enters at every clamped site, pinned there, and not at the first alone.
        schedule: how hard to search.
        plan: how much of the protocol to run, with which thresholds and seed.
        neutral: passages of ordinary text, to see what the defense costs; not measured where None.
        batch_size: examples at once; by default as many as memory allows.
        store: where finished units are kept; in memory by default.
        exact: the same model in float32, for certificates; `model` itself by default.
        provenance: what the verdict should say about where it came from.
        progress: called as examples finish.

    Raises:
        InputError: a defense that does not fit the model, or a budget that is no norm.
    """
    Budget(budget)  # refuses what is no norm, also where nothing will be searched
    store, plan, report = store or Memory(), plan or Plan(), progress or (lambda *_: None)
    widest = max(clamp.sae.d_sae for clamp in defense.clamps)
    fitting = model.batch_size(examples.prompts, widest)
    size = fitting if batch_size is None else min(batch_size, fitting if model.recurrent else batch_size)
    read = examples.read_with(model, exact)
    bench = Bench(*read, defense, examples, budget, placement, schedule or Schedule(), plan, size, every_site, model)
    evidence, seconds = _gather(bench, _Ledger(store), neutral, report)
    total = sum(seconds.values())
    spent = {phase: round(took / total, 4) for phase, took in seconds.items()} if total else {}
    told = {**(provenance or {}), "control_seed": plan.seed, "phases": spent, "phase_seconds": round(total, 1)}
    return decide(evidence, plan, budget, str(model.dtype).removeprefix("torch."), threat_model(bench), told)


def _gather(
    bench: Bench, ledger: _Ledger, neutral: Prompts | None, report: Progress
) -> tuple[Evidence, dict[str, float]]:
    """Everything that a verdict is made of, from units that are finished or are run now."""
    fits = [Fit(**_numbers(one)) for one in ledger.run("fit", None, lambda: [vars(f) for f in measure_fits(bench)])]
    utility = None
    if neutral is not None:
        cost = ledger.run("utility", None, lambda: asdict(_utility(bench, neutral)))
        utility = Utility(**_numbers(cost))
    rows, values = bench.rows, {name: {"id": name} for name in bench.examples.ids}

    def by_batch(phase: str, work: Callable[[int], Done], batches: Sequence[int], total: int) -> None:
        done = 0
        for number in batches:
            report(phase, done, total)
            found = ledger.run(phase, number, lambda number=number: work(number))  # type: ignore[misc]
            for name, part in found.items():
                values[name] |= part
            done += len(rows[number]) if phase == "accounting" else flips[number]
            report(phase, done, total)

    flips: dict[int, int] = {}
    by_batch(
        "accounting",
        lambda number: accounting(bench, bench.batch(number), ledger.store, lambda *_: None),
        range(len(rows)),
        len(bench.examples.ids),
    )
    for number, batch in enumerate(rows):
        records = [ExampleRecord.of(values[bench.examples.ids[row]]) for row in batch.tolist()]
        flips[number] = sum(record.valid_flip for record in records)
    some, total = [number for number, count in flips.items() if count], sum(flips.values())
    if not total or not all(gate.passed for gate in fit_gates(fits)):
        return Evidence([ExampleRecord.of(one) for one in values.values()], fits, utility), ledger.seconds
    for name, phase in PHASES.items():

        def work(number: int, name: str = name, phase: Any = phase) -> Done:
            before = sum(flips[earlier] for earlier in some if earlier < number)
            return phase(  # type: ignore[no-any-return]
                bench, bench.batch(number), ledger.store, lambda done, _: report(name, before + done, total)
            )

        by_batch(name, work, some, total)
    evidence = Evidence(
        [ExampleRecord.of(one) for one in values.values()],
        fits,
        utility,
        curve=curve_budgets(bench),
        undo=ledger.run("undo", None, lambda: undo(bench, ledger.store)),
        health=ledger.run("health", None, lambda: search_health(bench)),
        placebo_features=_placebo_features(bench, ledger, report),
        transfer=_transfer(bench, ledger, report),
    )
    return evidence, ledger.seconds


def _placebo_features(bench: Bench, ledger: _Ledger, report: Progress) -> list[dict[str, Any]]:
    """What each draw of random features gives, clamped in the place of the defense's."""
    phase, draws, found = "placebo_features", bench.plan.placebo_features, []
    for draw in range(draws):
        report(phase, draw, draws)
        found.append(ledger.run(phase, draw, lambda draw=draw: placebo_features(bench, draw)))  # type: ignore[misc]
        report(phase, draw + 1, draws)
    return found


def _transfer(bench: Bench, ledger: _Ledger, report: Progress) -> dict[str, Any]:
    """What `heldout` found, or why it was not run."""

    def start() -> dict[str, Any]:
        why = heldout.refused(bench)
        return {"refused": why, "residual_norm": None if why else bench.pool.residual_norm}

    begun = ledger.run("transfer", None, start)
    if begun["refused"] is not None:
        return {"refused": begun["refused"]}
    folds = []
    for fold in range(bench.plan.transfer.folds):
        name = f"transfer, fold {fold + 1} of {bench.plan.transfer.folds}"
        fitted = ledger.run(
            "transfer",
            2 * fold,
            lambda fold=fold, name=name: heldout.fit(  # type: ignore[misc]
                bench, fold, ledger.store, lambda done, steps: report(name, done, steps)
            ),
        )
        read = ledger.run(
            "transfer",
            2 * fold + 1,
            lambda fold=fold: heldout.read(bench, fold, ledger.store, lambda *_: None),  # type: ignore[misc]
        )
        folds.append((fitted, read))
    return heldout.summary(folds, begun["residual_norm"])


def measure_fits(bench: Bench) -> list[Fit]:
    """The fit of each clamp's SAE on the first prompts, once for each site."""
    examples, defense = bench.examples, bench.defense
    some = examples.prompts.select(torch.arange(min(FIT_PROMPTS, len(examples.ids))))
    model = bench.host or bench.model
    return [measure_fit(model, defense.at(site)[0].sae, site, some, bench.batch_size) for site in defense.sites]


def _utility(bench: Bench, neutral: Prompts) -> Utility:
    return measure_utility(
        bench.host or bench.model, bench.defense, neutral, bench.batch_size, bench.plan.max_loss_increase
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """What was not finite is NaN again."""
    return {name: float("nan") if value is None else value for name, value in values.items()}


def threat_model(bench: Bench) -> dict[str, Any]:
    """Who may do what, as recorded in the verdict."""
    defense, several, reads = bench.defense, len(bench.defense.sites) > 1, positions_read(bench.examples.behavior)
    spoken = bench.examples.dialogue
    constraint = "orthogonal to the encoder columns of the clamped features (C1)"
    if bench.every_site:
        constraint += "; at later sites, beside it the smallest correction that pins the clamped pre-activations"
    elif several:
        constraint += "; at later sites, to the first order, nothing that moves a clamped pre-activation"
    return {
        "access": "white-box, one perturbation an example",
        "sites": [site.hook_name for site in defense.sites],
        "positions": "last" if reads == 1 else f"last {reads}" if spoken is None else f"first {reads} of the answer",
        "delta_sites": [site.hook_name for site in (defense.sites if bench.every_site else defense.sites[:1])],
        "placement": bench.placement,
        "constraint": constraint,
        "norm": "Frobenius, over positions and dimensions",
        "budget": bench.budget,
        "clamp": "live",
        "skip_first": defense.skip_first,
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "clamps": [
            {
                "site": clamp.site.hook_name,
                "k": len(clamp.features),
                "mode": type(clamp.mode).__name__.lower(),
                "value": astuple(clamp.mode)[0],
                "only_active": clamp.only_active,
                "positions": clamp.positions,
            }
            for clamp in defense.clamps
        ],
    }
