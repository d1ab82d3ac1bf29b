"""What a law guards: a piece of the package's source, and a replacement that has to make the law fail.

`guards` stands beside the law. `property_tests/mutations.py` collects the guards, checks that each piece is still where
it was, and breaks one at a time.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

Law = TypeVar("Law", bound=Callable[..., Any])


class StaleGuardError(LookupError):
    """A guard whose piece is no longer in the source of its object."""


@dataclass(frozen=True)
class Guard:
    """A piece of the source of one object, and what is put in its place.

    Attributes:
        target: the dotted name of a module, or of a class, function, method or constant in it.
        old: a piece of its source that stands there once.
        new: what replaces it.
    """

    target: str
    old: str
    new: str

    def mutated(self, root: Path) -> tuple[Path, str]:
        """The file that holds the object, below `root`, and its text with the piece replaced.

        Raises:
            StaleGuardError: there is no such object, or the piece does not stand in its source exactly once.
        """
        path, first, last = _located(self.target, root)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        source = "".join(lines[first:last])
        if (count := source.count(self.old)) != 1:
            raise StaleGuardError(f"{self.old!r} stands {count} times in {self.target}, not once")
        return path, "".join([*lines[:first], source.replace(self.old, self.new), *lines[last:]])


def guards(target: object, old: str, new: str) -> Callable[[Law], Law]:
    """Mark a law that fails once `old` is replaced by `new` in the source of `target`; may be stacked.

    Args:
        target: a function, method, property or class that the module of the law imports anyway, so that a rename is
            followed; or the dotted name of any other object (`"recover.search.ascent._ascend"`), which is looked up
            only when the guards are collected.
        old: a piece of the object's source that stands there once.
        new: what replaces it.
    """
    guard = Guard(target if isinstance(target, str) else _dotted(target), old, new)

    def decorate(law: Law) -> Law:
        law.guarded = (guard, *guarded(law))  # type: ignore[attr-defined]
        return law

    return decorate


def guarded(law: Callable[..., Any]) -> tuple[Guard, ...]:
    """The guards of a law, from the top."""
    found: tuple[Guard, ...] = getattr(law, "guarded", ())
    return found


def _dotted(target: Any) -> str:
    if isinstance(target, property):
        target = target.fget
    elif isinstance(target, cached_property):
        target = target.func
    target = inspect.unwrap(target)
    return f"{target.__module__}.{target.__qualname__}"


def _located(target: str, root: Path) -> tuple[Path, int, int]:
    """The file of an object and the lines of its source, decorators included, from `first` up to `last`."""
    parts = target.split(".")
    for n in range(len(parts), 0, -1):
        base = root.joinpath(*parts[:n])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path, *_lines(target, path, parts[n:])
    raise StaleGuardError(f"there is no module of {target}")


def _lines(target: str, path: Path, names: list[str]) -> tuple[int, int]:
    text = path.read_text(encoding="utf-8")
    first, last, body = 0, len(text.splitlines()), ast.parse(text).body
    for name in names:
        for node in body:
            if name in _defines(node):
                decorators: list[ast.expr] = getattr(node, "decorator_list", [])
                first = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
                last, body = node.end_lineno or node.lineno, getattr(node, "body", [])
                break
        else:
            raise StaleGuardError(f"there is no {name} of {target} in {path.name}")
    return first, last


def _defines(node: ast.stmt) -> set[str]:
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
    return set()
