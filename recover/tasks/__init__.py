"""Tasks by name: where a check's prompts and names come from.

A task turns the `prompts:` section of a configuration into examples for the tokenizer in use.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from recover.behavior import Behavior
from recover.tasks import ioi
from recover.types import InputError

__all__ = ["TASKS", "Task", "get_task"]


@runtime_checkable
class Task(Protocol):
    """Gives the examples of a task and their behavior; a module with these three functions is one."""

    def load(
        self,
        tokenizer: Any,
        *,
        n: int | None = None,
        seed: int = 0,
        templates: Sequence[ioi.Template] = ioi.TEMPLATES,
        file: Path | str | None = None,
    ) -> list[ioi.IOIExample]:
        """Give the examples, drawn or read from a file."""
        ...

    def behavior(
        self, tokenizer: Any, examples: Sequence[ioi.IOIExample], device: torch.device | str = "cpu"
    ) -> Behavior:
        """What is asked of the model at the end of each prompt."""
        ...

    def strict(
        self,
        tokenizer: Any,
        examples: Sequence[ioi.IOIExample],
        device: torch.device | str = "cpu",
        candidates: int | None = None,
    ) -> Behavior | None:
        """The same with a low rate of chance, to read transfer with; None where `behavior` has one already."""
        ...


TASKS: Mapping[str, Task] = {"ioi": ioi}
NOT_YET = ("cloze", "choice", "probe", "refusal", "python")
"""Kinds of task that the design has and this version does not."""


def get_task(name: str) -> Task:
    """Give the task of this name.

    Raises:
        InputError: there is none, in this version or at all.
    """
    if name in TASKS:
        return TASKS[name]
    known = ", ".join(TASKS)
    if name.split(":")[0] in NOT_YET:
        raise InputError(f"task {name!r} is not in this version of recover; it has: {known}")
    near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
    raise InputError(f"unknown task {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {known}"))
