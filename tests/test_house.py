"""The house: few folders, each with a stated purpose and a list of public names, none of which is a module's."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

import recover

ROOT = Path(recover.__file__).parent
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("_"))
MODULES = {name.rpartition(".")[2] for _, name, _ in pkgutil.walk_packages([str(ROOT)], "recover.")}


def exported(package: str) -> list[str]:
    return list(importlib.import_module(package).__all__)


def test_a_reader_sees_at_most_sixteen_rooms() -> None:
    entries = {path.name for path in ROOT.iterdir() if not path.name.startswith("_")} - {"py.typed"}
    assert len(entries) <= 16, sorted(entries)


def test_the_top_is_one_short_list() -> None:
    assert 25 <= len(recover.__all__) <= 40


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_lives_there_and_what_is_public(folder: str) -> None:
    package = importlib.import_module(f"recover.{folder}")
    assert package.__doc__ is not None
    assert len(package.__doc__.split()) >= 10
    names = exported(f"recover.{folder}")
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(package, name)] == []


def test_no_exported_name_is_a_modules() -> None:
    names = set(recover.__all__).union(*(exported(f"recover.{folder}") for folder in FOLDERS))
    assert names & MODULES == set()


def test_a_name_means_one_thing_wherever_it_is_exported() -> None:
    meanings: dict[str, dict[int, str]] = {}
    for package in ["recover", *(f"recover.{folder}" for folder in FOLDERS)]:
        for name in exported(package):
            meanings.setdefault(name, {})[id(getattr(importlib.import_module(package), name))] = package
    assert {name: list(places.values()) for name, places in meanings.items() if len(places) > 1} == {}
