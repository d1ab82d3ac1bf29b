"""Tasks by name: where a check's prompts, behaviors and answers come from.

A task is a function `task(model, **options) -> Examples`. The options are the `prompts:` section of a configuration:
those that the function names, and no others.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from recover.examples import Examples
from recover.model import Model
from recover.tasks import ioi, refusal
from recover.types import InputError

__all__ = ["TASKS", "Task", "ask_task", "get_task"]


Task = Callable[..., Examples]
"""`task(model, **options) -> Examples`; `n`, `seed` and `file` are options that most tasks have."""
TASKS: Mapping[str, Task] = {"ioi": ioi.examples, "refusal": refusal.examples}
NOT_YET = ("cloze", "choice", "probe", "python")
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


def ask_task(name: str, model: Model, options: Mapping[str, Any], **beside: Any) -> Examples:
    """The examples of a task.

    Args:
        name: of the task.
        model: what they are asked of.
        options: of the `prompts:` section; those that are None were not given.
        beside: what is handed over where the task takes it.

    Raises:
        InputError: an option that this task does not have; and whatever the task refuses.
    """
    make = get_task(name)
    takes = [known for known in inspect.signature(make).parameters if known != "model"]
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in takes:
            has = ", ".join(known for known in takes if known not in beside)
            raise InputError(f"prompts.{option}: the task {name!r} has no such option; it has: {has}")
    return make(model, **given, **{option: value for option, value in beside.items() if option in takes})
