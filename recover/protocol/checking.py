"""`check()`: the protocol, from a defense and prompts to a verdict.

1. *Fit*: does each SAE describe its site on these prompts? What does the defense cost on neutral text?
2. *Accounting*: which examples show the behavior without the defense and not with it.
3. *Search*, *certificates* and per-example controls for every valid flip (`phases`).
4. *Controls* over all of them: the clamp undone, random features clamped, the search's own health (`global_controls`).
5. *Transfer*: shared deltas, fitted on one part of the prompts and read on the other (`heldout`).
6. *Power*, where nothing was found: which planted routes would have been (`power`).
7. *Verdict* from the records of all of these (`gates`, `evidence`, `verdict`).

All of these are units of work that are kept as they are finished, and that several workers can share (`ledger`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace
from functools import partial
from typing import Any

import torch

from recover.defenses.clamps import Defense
from recover.defenses.selection import firing_rates
from recover.defenses.utility import Utility, measure_utility
from recover.evidence.readings import Table
from recover.models.host import Model, Prompts
from recover.protocol import heldout, shared_readings
from recover.protocol.bench import Batch, Bench
from recover.protocol.gates import fit_gates
from recover.protocol.global_controls import placebo_features, search_health, undo
from recover.protocol.ledger import InMemoryStore, Ledger, Part
from recover.protocol.phases import PHASES, BatchProgress, Deltas, Done, Phase, accounting, curve_budgets
from recover.protocol.plan import Plan
from recover.protocol.power import SHARE, power, trials
from recover.protocol.power_model import power_figures
from recover.protocol.records import ExampleRecord
from recover.protocol.runtime import Runtime
from recover.protocol.verdict import Gathered, decide
from recover.protocol.verdict_model import RefusedTransfer, Transfer, Verdict
from recover.saes.fit import Fit, measure_fit
from recover.search.constraints.linear import Budget
from recover.tasks.behaviors import by_chance, positions_read
from recover.tasks.examples import Examples
from recover.types import Progress

__all__ = ["check", "measure_fits", "threat_model"]

FIT_PROMPTS = 32


def check(
    model: Model,
    defense: Defense,
    examples: Examples,
    budget: float,
    *,
    plan: Plan | None = None,
    runtime: Runtime | None = None,
) -> Verdict:
    """Run the whole protocol on a defense.

    Args:
        model: the host model.
        defense: its clamps.
        examples: prompts and behavior.
        budget: largest Frobenius norm of a perturbation, in units of the residual stream.
        plan: what is run: search schedule, surface, controls, transfer, thresholds and seed.
        runtime: how it is run: batch size, store, workers and progress; and the exact model and neutral text, if any.

    Raises:
        InputError: a defense that does not fit the model, or a budget that is not a finite positive number.
        LostWorkerError: another worker has gone.

    >>> from recover.planted import KINDS
    >>> world = KINDS["write_only"](0)
    >>> check(world.model, world.defense, world.examples, world.budget).verdict
    'RECOVERABLE'
    """
    Budget(budget)  # refuses what is no norm, also where nothing will be searched
    plan, runtime = plan or Plan(), runtime or Runtime()
    ledger = Ledger(runtime.store or InMemoryStore(), runtime.workers)
    size = _batch_size(model, defense, examples, runtime)
    bench = Bench(*examples.read_with(model, runtime.exact), defense, examples, budget, plan, size, model)
    evidence = _gather(bench, ledger, runtime.neutral, runtime.progress or (lambda *_: None))
    seconds = ledger.seconds
    total = sum(seconds.values())
    spent = {phase: round(took / total, 4) for phase, took in seconds.items()} if total else {}
    told = {**runtime.provenance, "control_seed": plan.seed, "phases": spent, "phase_seconds": round(total, 1)}
    return decide(evidence, plan, budget, str(model.dtype).removeprefix("torch."), threat_model(bench), told)


def _batch_size(model: Model, defense: Defense, examples: Examples, runtime: Runtime) -> int:
    """Examples at once, the same for all workers."""
    widest = max(clamp.sae.d_sae for clamp in defense.clamps)
    fitting, asked = min(runtime.workers.gather(model.batch_size(examples.prompts, widest))), runtime.batch_size
    if asked is None:
        return fitting
    return min(asked, fitting) if model.recurrent else asked


def _gather(bench: Bench, ledger: Ledger, neutral: Prompts | None, progress: Progress) -> Gathered:
    """Collect everything that a verdict is made of, from units that are finished or are run now."""
    with ledger.shared():
        _account(bench, ledger, neutral, progress)
    fits = [Fit(**_numbers(one)) for one in ledger.values("fit")]
    utility = None if neutral is None else Utility(**_numbers(ledger.values("utility")))
    accounts = _records(bench, ledger, {"accounting": range(len(bench.rows))})
    flips, start = {}, 0
    for number, rows in enumerate(bench.rows):
        if count := sum(record.valid_flip for record in accounts[start : start + len(rows)]):
            flips[number] = count
        start += len(rows)
    if not flips or not all(gate.passed for gate in fit_gates(fits)):
        return Gathered(accounts, fits, utility, chance=by_chance(bench.examples.behavior))
    with ledger.shared():
        _search_and_control(bench, ledger, flips, progress)
    records = _records(bench, ledger, {"accounting": range(len(bench.rows)), **{name: list(flips) for name in PHASES}})
    # What is found is held against the clamp undone, once all of it is there; what is not, against what could be.
    planted = trials(bench, records)
    with ledger.shared():
        if ledger.mine({("undo", 0): ["undo"]}):
            ledger.run("undo", None, lambda: undo(bench, ledger.store))
        at = _plant(bench, ledger, planted, progress)
    transfer, table = _transfer(bench, ledger)
    found = {name: one for number in at for name, one in ledger.values("power", number).items()}
    return Gathered(
        records,
        fits,
        utility,
        curve=curve_budgets(bench),
        undo=ledger.values("undo"),
        health=ledger.values("health"),
        placebo_features=[ledger.values("placebo_features", draw) for draw in range(bench.plan.placebo_features)],
        transfer=transfer,
        table=table,
        chance=by_chance(bench.examples.behavior),
        power=power_figures(found, SHARE) if found else None,
    )


def _account(bench: Bench, ledger: Ledger, neutral: Prompts | None, progress: Progress) -> None:
    """Measure the fit, the cost on neutral text, and which examples show the behavior with the defense and without."""
    sizes = {number: len(rows) for number, rows in enumerate(bench.rows)}
    parts: dict[Part, list[str]] = {("fit", 0): ["fit"]}
    parts |= {("utility", 0): ["utility"]} if neutral is not None else {}
    parts |= {("batch", number): [f"accounting/{number}"] for number in sizes}
    mine = ledger.mine(parts)
    if ("fit", 0) in mine:
        ledger.run("fit", None, lambda: [vars(fit) for fit in measure_fits(bench)])
    if neutral is not None and ("utility", 0) in mine:
        ledger.run("utility", None, lambda: asdict(_utility(bench, neutral)))
    here = _told_of(ledger, parts, mine)
    batches = {number: size for number, size in sizes.items() if ("batch", number) in here}
    _by_batch(bench, ledger, {"accounting": accounting}, batches, progress)


def _search_and_control(bench: Bench, ledger: Ledger, flips: Mapping[int, int], progress: Progress) -> None:
    """Search for each valid flip, and run the controls that do not build on it and transfer."""
    plan = bench.plan
    parts: dict[Part, list[str]] = {("batch", number): [f"{name}/{number}" for name in PHASES] for number in flips}
    parts |= {("health", 0): ["health"]}
    parts |= {("placebo_features", draw): [f"placebo_features/{draw}"] for draw in range(plan.placebo_features)}
    if not (ledger.finished(["transfer"]) and ledger.values("transfer")["refused"]):
        parts |= {("transfer", draw): _units_of(draw) for draw in range(heldout.draws(bench))}
    mine = ledger.mine(parts)
    here = _told_of(ledger, parts, mine)
    _by_batch(bench, ledger, PHASES, {n: count for n, count in flips.items() if ("batch", n) in here}, progress)
    if ("health", 0) in mine:
        ledger.run("health", None, lambda: search_health(bench))
    draws = [number for kind, number in sorted(here) if kind == "placebo_features"]
    for done, draw in enumerate(draws):
        progress("placebo_features", done, len(draws))
        ledger.run("placebo_features", draw, lambda draw=draw: placebo_features(bench, draw))  # type: ignore[misc]
        progress("placebo_features", done + 1, len(draws))
    for kind, draw in sorted(mine):
        if kind == "transfer":
            _draw(bench, ledger, draw, progress)


def _plant(bench: Bench, ledger: Ledger, planted: Mapping[str, int], progress: Progress) -> list[int]:
    """Search for planted routes, by example as many of each kind as given; gives the batches that hold some."""
    counts = {
        number: sum(planted.get(bench.examples.ids[row], 0) for row in rows.tolist())
        for number, rows in enumerate(bench.rows)
    }
    at = {number: count for number, count in counts.items() if count}
    parts: dict[Part, list[str]] = {("batch", number): [f"power/{number}"] for number in at}
    here = _told_of(ledger, parts, ledger.mine(parts))

    def phase(bench: Bench, batch: Batch, _: Deltas, tell: BatchProgress) -> Done:
        return power(bench, batch, planted, tell)

    _by_batch(bench, ledger, {"power": phase}, {n: count for n, count in at.items() if ("batch", n) in here}, progress)
    return list(at)


def _told_of(ledger: Ledger, parts: Mapping[Part, list[str]], mine: set[Part]) -> set[Part]:
    """Give the parts whose progress this worker tells: its own, and those that are finished."""
    return mine | {part for part, units in parts.items() if ledger.finished(units)}


def _by_batch(
    bench: Bench, ledger: Ledger, phases: Mapping[str, Phase], counts: Mapping[int, int], progress: Progress
) -> None:
    """Run phases on batches, one phase after the other."""
    total = sum(counts.values())
    for name, phase in phases.items():
        before = 0
        for number, count in counts.items():

            def work(name: str = name, phase: Phase = phase, number: int = number, before: int = before) -> Done:
                tell = partial(_tell, progress, name, before, total)
                return phase(bench, bench.batch(number), ledger.store, tell)

            progress(name, before, total)
            ledger.run(name, number, work)
            before += count
            progress(name, before, total)


def _tell(progress: Progress, name: str, before: int, total: int, done: int, _: int) -> None:
    progress(name, before + done, total)


def _units_of(draw: int) -> list[str]:
    return [*(["transfer"] if draw == 0 else []), f"transfer/{2 * draw}", f"transfer/{2 * draw + 1}"]


def _draw(bench: Bench, ledger: Ledger, draw: int, progress: Progress) -> None:
    """Fit shared deltas on one part and read them on the other; the first draw says whether there is any to be had."""
    if draw == 0:
        ledger.run("transfer", None, lambda: heldout.begin(bench))
    why = ledger.values("transfer")["refused"] if ledger.finished(["transfer"]) else heldout.refused(bench)
    if why is not None:
        return
    name = f"transfer, fit {draw + 1} of {heldout.draws(bench)}"
    ledger.run("transfer", 2 * draw, lambda: heldout.fit(bench, draw, partial(progress, name)))
    fitted = ledger.values("transfer", 2 * draw)
    ledger.run("transfer", 2 * draw + 1, lambda: heldout.read(bench, draw, fitted, ledger.store))


def _transfer(bench: Bench, ledger: Ledger) -> tuple[Transfer | RefusedTransfer, Table | None]:
    """Sum up what `heldout` found, or say why it was not run."""
    begun = ledger.values("transfer")
    if begun["refused"] is not None:
        return RefusedTransfer(refused=begun["refused"]), None
    draws = [
        (ledger.values("transfer", 2 * draw), ledger.values("transfer", 2 * draw + 1))
        for draw in range(heldout.draws(bench))
    ]
    return shared_readings.transfer(begun, draws), shared_readings.table(begun, draws)


def _records(bench: Bench, ledger: Ledger, phases: Mapping[str, Sequence[int]]) -> list[ExampleRecord]:
    """Collect what finished phases say of each example, in order."""
    values: dict[str, dict[str, Any]] = {name: {"id": name} for name in bench.examples.ids}
    for phase, numbers in phases.items():
        for number in numbers:
            for name, part in ledger.values(phase, number).items():
                values[name] |= part
    return [ExampleRecord.of(one) for one in values.values()]


def measure_fits(bench: Bench) -> list[Fit]:
    """Measure the fit of each clamp's SAE on the first prompts, once for each site."""
    examples, defense = bench.examples, bench.defense
    some = examples.prompts.select(torch.arange(min(FIT_PROMPTS, len(examples.ids))))
    model = bench.host or bench.model
    fits = []
    for site in defense.sites:
        clamps = defense.at(site)
        features = sorted({feature for clamp in clamps for feature in clamp.features})
        rates = firing_rates(model, clamps[0].sae, site, examples.prompts, bench.batch_size)
        fit = measure_fit(model, clamps[0].sae, site, some, bench.batch_size)
        fits.append(replace(fit, clamped=len(features), firing=int((rates[features] > 0).sum())))
    return fits


def _utility(bench: Bench, neutral: Prompts) -> Utility:
    return measure_utility(
        bench.host or bench.model, bench.defense, neutral, bench.batch_size, bench.plan.max_loss_increase
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read null as NaN, but for counts that were not made."""
    counts = ("clamped", "firing")
    return {name: float("nan") if value is None and name not in counts else value for name, value in values.items()}


def threat_model(bench: Bench) -> dict[str, Any]:
    """Describe the threat model: who may do what, as recorded in the verdict."""
    defense, several, reads = bench.defense, len(bench.defense.sites) > 1, positions_read(bench.examples.behavior)
    spoken = bench.examples.dialogue
    constraint = "orthogonal to the encoder columns of the clamped features (C1)"
    if bench.surface.every:
        constraint += "; at later sites, beside it the smallest correction that pins the clamped pre-activations"
    elif several:
        constraint += "; at later sites, to the first order, nothing that moves a clamped pre-activation"
    return {
        "access": "white-box, one perturbation per example",
        "sites": [site.hook_name for site in defense.sites],
        "positions": "last" if reads == 1 else f"last {reads}" if spoken is None else f"first {reads} of the answer",
        "delta_sites": [site.hook_name for site in bench.surface.enters(defense.sites)],
        "placement": bench.surface.placement,
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
