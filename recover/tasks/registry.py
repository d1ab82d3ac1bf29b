"""Tasks by name: where a check's prompts, behaviors and answers come from.

A task is a function `task(model, **options) -> Examples`: one of ours, or `python:module:object`, one of the user's
own. Its options are the `prompts:` section of a configuration: those that the function names, held to its annotations
before anything is loaded.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import ConfigDict, ValidationError, create_model

from recover.models.host import Model
from recover.tasks import choice, cloze, ioi, probe, refusal
from recover.tasks.examples import Examples
from recover.types import InputError, Progress


@runtime_checkable
class Task(Protocol):
    """A function that makes the examples of a check for a model. Any such function is a task: `python:module:function`.

    The options that it names are keys of the section `prompts:`. Most tasks have `n`, the number of examples, `seed`,
    the seed of the draw, and `file`, the user's own prompts. A parameter `progress` is no option: it receives a
    function `progress(phase, done, total)`.
    """

    def __call__(self, model: Model, *args: Any, **options: Any) -> Examples:
        """Make the examples; the same options must give the same examples.

        Raises:
            InputError: one line that says what cannot be used, where, and how to mend it.
        """


TASKS: Mapping[str, Task] = {
    "ioi": ioi.make_examples,
    "choice": choice.make_examples,
    "cloze": cloze.make_examples,
    "probe": probe.make_examples,
    "refusal": refusal.make_examples,
}
OWN = "python:"
HANDED = ("model", "progress")
"""Parameters of a task that are not options."""


def get_task(name: str) -> Task:
    """Look up a task by name.

    Raises:
        InputError: there is no such task, or the module of `python:module:object` cannot be imported.
    """
    if name.startswith(OWN):
        return _own(name)
    if name in TASKS:
        return TASKS[name]
    known = ", ".join((*TASKS, "python:module:object"))
    near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
    raise InputError(f"unknown task {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {known}"))


def read_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Validate the options of a task against its annotations; an option that is None counts as not given.

    Raises:
        InputError: from `get_task`, or an option that the task does not have.
        pydantic.ValidationError: a value that is not of the annotated type.
    """
    parameters = inspect.signature(get_task(name), eval_str=True).parameters
    takes = {key: one for key, one in parameters.items() if key not in HANDED and one.kind is not one.VAR_KEYWORD}
    anything = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    given = {key: value for key, value in options.items() if value is not None}
    if "seed" not in takes and not anything and given.get("seed") == 0:
        del given["seed"]  # what it is where a task draws nothing
    for key in given:
        if key not in takes and (key in HANDED or not anything):
            raise InputError(f"prompts.{key}: the task {name!r} has no such option; it has: {', '.join(takes)}")
    fields: dict[str, Any] = {
        key: (Any if one.annotation is one.empty else one.annotation, ... if one.default is one.empty else one.default)
        for key, one in takes.items()
    }
    held = create_model("options", __config__=ConfigDict(strict=True, arbitrary_types_allowed=True), **fields)
    read = held.model_validate({key: given[key] for key in given if key in takes})
    return {key: getattr(read, key) if key in takes else value for key, value in given.items()}


def load_examples(task: str, model: Model, /, *, progress: Progress | None = None, **options: Any) -> Examples:
    """Ask a task for its examples.

    Args:
        task: the name of a task (`ioi`, `choice`, `cloze`, `probe`, `refusal`), or `python:module:object`.
        model: the host model, which the task tokenizes for and may query.
        progress: called as `progress(phase, done, total)` by tasks that take long.
        options: the task's own options, such as `n` and `seed`; an option that is None counts as not given.

    Raises:
        InputError: the task does not exist, has no such option, or refuses the value of one.

    >>> from recover.models.names import load_model
    >>> toy = load_model("toy-choice", "cpu")
    >>> len(load_examples("choice", toy, forget="toy-forget", retain="toy-retain", n=1).ids)
    24
    """
    function = get_task(task)
    try:
        read = read_options(task, options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"prompts.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    handed = {"progress": progress} if "progress" in inspect.signature(function).parameters else {}
    found = function(model, **read, **handed)
    if not isinstance(found, Examples):
        raise InputError(f"task {task!r} returned {type(found).__name__}; a task must return `recover.Examples`")
    return found


def _own(name: str) -> Task:
    """Import the object that `python:module:object` names, also from the working folder."""
    module, _, attribute = name.removeprefix(OWN).partition(":")
    if not module or not attribute:
        raise InputError(f"task {name!r}: write python:module:object, such as python:my_task:examples")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        task = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module of the user's own raises
        reason = " ".join(str(error).split())
        raise InputError(f"task {name!r}: cannot be imported ({type(error).__name__}: {reason:.120})") from None
    if not callable(task):
        raise InputError(f"task {name!r}: is no function; a task is called as task(model, **options)")
    try:
        inspect.signature(task, eval_str=True)
    except (TypeError, ValueError, NameError) as error:
        raise InputError(f"task {name!r}: its options cannot be read ({error}); mend its annotations") from None
    found: Task = task
    return found
