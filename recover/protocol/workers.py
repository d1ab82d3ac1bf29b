"""Several processes that share one check: who does what, and how each learns what the others found.

Started by `torchrun`, every process runs the same program. What is to be done is dealt out in an order that all agree
on; what one has finished it keeps at once, in the folder that all share, and tells the others when its share is done.
So all end with the same units, and the same verdict follows from them; a process that dies loses what it was at.

Only plain values pass between them, by gloo, which `torch.distributed` sets up beside NCCL where there is CUDA.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from recover.types import InputError

T = TypeVar("T")
PATIENCE = timedelta(days=30)
"""Shares differ in length, and a worker that is done waits; one that is lost is noticed by its closed connection."""


class LostWorkerError(Exception):
    """Another worker has gone, so that this one cannot go on."""


@dataclass(frozen=True)
class Workers:
    """The processes of a run, as one of them sees them."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this worker leads: prints, and writes the files that are written once."""
        return self.rank == 0

    def deal(self, things: Sequence[T]) -> list[T]:
        """Give this worker's share of what all of them hold in the same order."""
        return list(things[self.rank :: self.size])

    def gather(self, value: T) -> list[T]:
        """Gather what each worker gives, by rank. All must call it.

        Raises:
            LostWorkerError: one of them has gone.
        """
        if self.size == 1:
            return [value]
        given: list[T] = [value] * self.size
        try:
            distributed.all_gather_object(given, value)
        except RuntimeError as error:
            raise LostWorkerError(
                "another worker has gone; run the same command again, and it goes on where it stopped"
            ) from error
        return given

    def led(self, value: T | None) -> T:
        """Hand on what the leading worker gives. All must call it."""
        first = self.gather(value)[0]
        assert first is not None
        return first

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let all workers through, or none; one of them says what stopped them.

        Raises:
            InputError: where this one leads.
            SystemExit: where another does.
        """
        refusal: str | None = None
        try:
            yield
        except InputError as error:
            refusal = str(error)
            if self.size == 1:
                raise
        refusals = self.gather(refusal)
        if (first := next((rank for rank, one in enumerate(refusals) if one is not None), None)) is None:
            return
        if not self.leads:
            raise SystemExit(2)
        told = str(refusals[first])
        raise InputError(told if first == 0 else f"worker {first}: {told}")


ALONE = Workers()


@contextlib.contextmanager
def joined() -> Iterator[Workers]:
    """Join the workers that `torchrun` started; a single worker where it did not start this process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group(timeout=PATIENCE)
    try:
        yield Workers(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
