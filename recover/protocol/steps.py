"""Run some parts of the protocol on a bench by themselves, for an analysis that does not need a whole check."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from recover.evidence.content import judge_content
from recover.evidence.own_rule import judge_rule
from recover.protocol import heldout, shared_readings
from recover.protocol.bench import Bench
from recover.protocol.knowledge_model import Knowledge, knowledge
from recover.protocol.ledger import InMemoryStore
from recover.protocol.phases import PHASES, accounting
from recover.protocol.records import ExampleRecord
from recover.protocol.verdict_model import Transfer
from recover.types import InputError, Progress


def run_phases(
    bench: Bench, names: Sequence[str], store: InMemoryStore, progress: Progress | None = None
) -> list[ExampleRecord]:
    """Account for every example, and run these phases on every valid flip; gives a record for each example, in order.

    The phases are named as in `PHASES`, such as `("search", "certificates", "placebo")`. Deltas are kept in `store` for
    the phases that read them back; `progress` is called after each batch.
    """
    values: dict[str, dict[str, Any]] = {name: {"id": name} for name in bench.examples.ids}
    for number, batch in enumerate(bench.batches):
        phases = [accounting, *([PHASES[name] for name in names] if len(batch.flips) else [])]
        for phase in phases:
            done = phase(bench, batch, store, lambda *_: None)
            store.deltas |= done.deltas
            for name, part in done.values.items():
                values[name] |= part
        if progress is not None:
            progress("examples", number + 1, len(bench.rows))
    return [ExampleRecord.of(one) for one in values.values()]


def run_transfer(bench: Bench, store: InMemoryStore, progress: Progress | None = None) -> tuple[Transfer, Knowledge]:
    """Fit shared deltas on parts of the prompts, read them on the others, and judge what they show.

    Raises:
        InputError: none can be fitted here.
    """
    draws, tell, begun = [], progress or (lambda *_: None), heldout.begin(bench)
    if begun["refused"] is not None:
        raise InputError(f"transfer: {begun['refused']}")
    for draw in range(heldout.draws(bench)):
        fitted = heldout.fit(bench, draw, partial(tell, f"transfer, fit {draw + 1}"))
        store.deltas |= fitted.deltas
        draws.append((fitted.values, heldout.read(bench, draw, fitted.values, store)))
    table, shared = shared_readings.table(begun, draws), shared_readings.transfer(begun, draws)
    judged = judge_content(table, bench.plan.rules), judge_rule(table, bench.plan.rules)
    return shared, knowledge(table, shared.budget or 0.0, bench.pool.residual_norm, *judged)
