"""What a model still knows of the facts or questions that it knew before something was done to it.

For the tasks `cloze` and `choice`. An item is *known* where the model is right in every wording (every paraphrase, or
every order of the answers); each known item is then asked again in all of them, with edits of the residual stream live.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

from recover.models.host import Edit, Model
from recover.tasks import choice, cloze, questions
from recover.tasks.registry import get_task, read_options
from recover.types import InputError, Site


@dataclass(frozen=True)
class StillRight:
    """Count what the model still gets right under the edits.

    Attributes:
        asked: items.
        known: for each item that the model knows without the edits, whether each of its wordings is right with them.
    """

    asked: int
    known: tuple[tuple[bool, ...], ...]

    @property
    def wordings(self) -> list[bool]:
        """All wordings of all known items."""
        return [right for item in self.known for right in item]

    def __str__(self) -> str:
        if not self.known:
            return "the model knows none of these items, so nothing can be said"
        right, n, whole = sum(self.wordings), len(self.wordings), sum(map(all, self.known))
        return (
            f"{right} of {n} wordings ({right / n:.1%}) still right; "
            f"{whole} of {len(self.known)} items ({whole / len(self.known):.1%}) right in every wording"
        )


def still_right(
    task: str,
    model: Model,
    options: Mapping[str, Any],
    edits: Mapping[Site, Edit],
    kind: Literal["forget", "retain"] = "retain",
) -> StillRight:
    """Ask what is to be forgotten, or what is to be kept, with edits live.

    Args:
        task: `cloze` or `choice`.
        model: the host model.
        options: of the task.
        edits: such as `clamp_edits(defense)`.
        kind: for `cloze`, `retain` is every other domain.

    Raises:
        InputError: another task, or options that it does not take.
    """
    if task not in ("cloze", "choice"):
        raise InputError(f"task {task!r}: has no items that it asks in several wordings; give cloze or choice")
    defaults = {name: one.default for name, one in signature(get_task(task)).parameters.items()}
    given = defaults | read_options(task, options)
    if task == "cloze":
        facts = cloze.shipped() if given["file"] is None else cloze.load_file(given["file"])
        every = cloze.known(model, facts)
        wanted = [(fact.domain == given["forget"]) == (kind == "forget") for fact in every.facts]
        known = every.select([row for row, one in enumerate(wanted) if one])
        asked = sum((fact.domain == given["forget"]) == (kind == "forget") for fact in facts)
        return StillRight(asked, tuple(cloze.right(model, known, edits)) if known.facts else ())
    drawn = choice.draw(questions.load(given[kind]), given["n"], given["seed"])
    every_order = [(question, order) for question in choice.kept(model, drawn) for order in choice.ORDERS]
    right = choice.right(model, every_order, edits).tolist() if every_order else []
    n = len(choice.ORDERS)
    return StillRight(len(drawn), tuple(tuple(right[at : at + n]) for at in range(0, len(right), n)))
