"""Public functions take few arguments, packages export what they say, and copies of a dataclass share no cache."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest

import recover

MOST = 8
SECTIONS = {"prepare_probes"}
"""Functions whose keywords are the keys of a section in DEFENSE.yaml."""
FOUND = [one for one in pkgutil.walk_packages(recover.__path__, "recover.") if not one.name.endswith("__main__")]
PACKAGES = [recover, *(importlib.import_module(one.name) for one in FOUND if one.ispkg)]
PACKAGES = [one for one in PACKAGES if hasattr(one, "__all__")]


def functions(package: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions that a package exports, and methods of its classes that are written by hand."""
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            made = {"__init__"} if dataclasses.is_dataclass(value) else set()
            for method, one in inspect.getmembers(value, inspect.isfunction):
                if one.__module__.startswith("recover") and method not in made and not method.startswith("_"):
                    yield f"{name}.{method}", partial(one, None)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_public_functions_have_at_most_eight_parameters(package: ModuleType) -> None:
    taken = {name: len([*inspect.signature(one).parameters]) for name, one in functions(package)}
    assert {name: n for name, n in taken.items() if n > MOST and name not in SECTIONS} == {}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_package_says_what_lives_in_it_and_exports_what_is_there(package: ModuleType) -> None:
    assert len(package.__doc__ or "") > 40
    assert package.__all__
    for name in package.__all__:
        assert hasattr(package, name), name


def test_no_exported_name_is_that_of_a_package() -> None:
    folders = {package.__name__.rpartition(".")[2] for package in PACKAGES}
    assert folders & {name for package in PACKAGES for name in package.__all__} == set()


def test_a_copy_of_a_dataclass_shares_no_cache() -> None:
    """`dataclasses.replace` hands every argument on: what a dataclass keeps for itself is no argument."""
    modules = [importlib.import_module(one.name) for one in FOUND]
    classes = {one for module in modules for one in vars(module).values() if dataclasses.is_dataclass(one)}
    kept = {
        f"{one.__qualname__}.{field.name}"
        for one in classes
        for field in dataclasses.fields(one)
        if field.init and field.name.startswith("_")
    }
    assert classes
    assert kept == set()
