"""How a check is run: in which batches, by which processes, with which store for finished work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recover.models.host import Model, Prompts
from recover.protocol.ledger import Store
from recover.protocol.workers import ALONE, Workers
from recover.types import Progress

__all__ = ["Runtime"]


@dataclass(frozen=True, eq=False)
class Runtime:
    """How a check is run.

    Args:
        batch_size: examples at once; by default as many as memory allows.
        store: where finished units are kept; by default in memory.
        exact: the same model in float32 or float64, for certificates; by default the model itself.
        neutral: passages of ordinary text, on which the defense's cost is measured; by default it is not measured.
        provenance: what the verdict says about where it came from.
        progress: called as examples finish.
        workers: the processes that share the check (`joined`). Each calls `check` with the same arguments and a store
            that holds the same finished units, and reaches the same verdict.
    """

    batch_size: int | None = None
    store: Store | None = None
    exact: Model | None = None
    neutral: Prompts | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress | None = None
    workers: Workers = ALONE
