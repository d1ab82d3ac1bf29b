"""Run some parts of the protocol on a bench by themselves, for an analysis that does not need a whole check."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from recover.protocol import heldout
from recover.protocol.bench import Bench
from recover.protocol.ledger import InMemoryStore
from recover.protocol.phases import PHASES, accounting
from recover.protocol.records import ExampleRecord
from recover.protocol.verdict_model import Transfer
from recover.types import Progress


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


def run_transfer(bench: Bench, store: InMemoryStore, progress: Progress | None = None) -> Transfer:
    """Fit the shared deltas of each fold on one half of the flips, and read them on the other, for a verdict."""
    folds, tell = [], progress or (lambda *_: None)
    for fold in range(bench.plan.transfer.folds):
        fitted = heldout.fit(bench, fold, partial(tell, f"transfer, fold {fold + 1}"))
        store.deltas |= fitted.deltas
        folds.append((dict(fitted.values), heldout.read(bench, fold, store)))
    return heldout.summary(folds, bench.pool.residual_norm)
