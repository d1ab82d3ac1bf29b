"""Does every law fail once the line that it guards is broken?

    python property_tests/mutations.py                  run every mutation
    python property_tests/mutations.py WORD             those whose law or guarded object contains WORD
    python property_tests/mutations.py --sample 6       six drawn by --seed (by default, the number of commits)
    python property_tests/mutations.py --check          run none; only look for stale guards and unguarded laws

1. Collect the guards of all laws (`property_tests.guards`). A stale guard or a law without one is an error.
2. Copy the package and its tests to a temporary folder; the working tree is left alone.
3. Confirm that the chosen laws hold for the code as it is.
4. For each guard: replace its piece, run its law in a fork (what collecting imported from other packages is
   not imported again) and restore the file.
5. Print `law | object: change | failed`. Exit with 1 if a law held all the same.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import beartype  # noqa: F401 (before nnsight, as in the root conftest)
import pytest
import torch

if TYPE_CHECKING:
    from property_tests.guards import Guard

ROOT = Path(__file__).parent.parent
COPIED = ("recover", "tests", "property_tests", "conftest.py", "pyproject.toml", "README.md")
PLUGINS = ("jaxtyping._pytest_plugin", "_hypothesis_pytestplugin")
"""No others: nnsight, imported already, keeps some of them from loading."""
OPTIONS = ["-q", "-x", "--assert=plain", "--tb=no", "--disable-plugin-autoload", *(f"-p{name}" for name in PLUGINS)]


@dataclass(frozen=True)
class Mutation:
    """A law, by the file that holds it and its function, and one of its guards."""

    file: str
    law: str
    guard: Guard

    @property
    def test(self) -> str:
        return f"property_tests/{self.file}.py::{self.law}"

    def __str__(self) -> str:
        change = f"`{self.guard.old.strip()}` -> `{self.guard.new.strip()}`"
        return f"{self.law.removeprefix('test_')} | {self.guard.target}: {change}"


def laws() -> Iterator[tuple[str, str, tuple[Guard, ...]]]:
    """The file, name and guards of every law."""
    from property_tests.guards import guarded

    for path in sorted(Path(__file__).parent.glob("test_*_laws.py")):
        for name, law in vars(importlib.import_module(f"property_tests.{path.stem}")).items():
            if name.startswith("test_"):
                yield path.stem, name, guarded(law)


def collected() -> tuple[list[Mutation], list[str]]:
    """Every mutation, and what is wrong with the guards, one line each."""
    from property_tests.guards import StaleGuardError

    found, wrong = [], []
    for file, law, guarded in laws():
        if not guarded:
            wrong.append(f"{file}.py::{law}: guards no line")
        for guard in guarded:
            try:
                guard.mutated(ROOT)
            except StaleGuardError as error:
                wrong.append(f"{file}.py::{law}: {error}")
            found.append(Mutation(file, law, guard))
    return found, wrong


def holds(copy: Path, mutation: Mutation) -> bool:
    """Whether the law holds in spite of the mutation."""
    path, broken = mutation.guard.mutated(copy)
    sound = path.read_text(encoding="utf-8")
    path.write_text(broken, encoding="utf-8")
    try:
        return _passes(copy, mutation.test)
    finally:
        path.write_text(sound, encoding="utf-8")


def _passes(copy: Path, *tests: str) -> bool:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.chdir(copy)
            sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
            for name in [name for name in sys.modules if name.split(".")[0] in ("recover", "tests", "property_tests")]:
                del sys.modules[name]
            sys.dont_write_bytecode = True
            os.environ["HYPOTHESIS_PROFILE"] = "bite"
            with Path(os.devnull).open("w") as null:
                os.dup2(null.fileno(), 1)
                code = int(pytest.main([*OPTIONS, *tests]))
        except BaseException:
            traceback.print_exc()
        finally:
            # Not by an exception: the temporary folder is the parent's to remove.
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1):
        raise SystemExit(f"{tests}: pytest ended with {code}")
    return code == 0


def _commits() -> int:
    """The number of commits, so that each draws another sample; 0 outside a repository."""
    done = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def run(chosen: list[Mutation]) -> int:
    """Break each line that is guarded; returns how many laws held all the same."""
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        if not _passes(copy, *sorted({mutation.test for mutation in chosen})):
            raise SystemExit("a law fails for the code as it is; mend that first")
        for mutation in chosen:
            survives = holds(copy, mutation)
            survived += survives
            print(f"{mutation} | {'HELD' if survives else 'failed'}", flush=True)
    return survived


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the lines that the laws guard, and see the laws fail.")
    parser.add_argument("word", nargs="?", default="", help="only mutations whose law or object contains it")
    parser.add_argument("--sample", type=int, metavar="N", help="only N of them, drawn at random")
    parser.add_argument("--seed", type=int, help="of the sample (default: the number of commits)")
    parser.add_argument("--check", action="store_true", help="run nothing; only look for stale guards")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    every, wrong = collected()
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if asked.check or wrong:
        print(f"{len(every)} guards of {len({m.test for m in every})} laws; {len(wrong)} to mend")
        return 1 if wrong else 0
    chosen = [mutation for mutation in every if asked.word in f"{mutation.test} {mutation.guard.target}"]
    if not chosen:
        parser.error(f"no law and no guarded object contains {asked.word!r}")
    if asked.sample is not None:
        seed = _commits() if asked.seed is None else asked.seed
        chosen = random.Random(seed).sample(chosen, min(asked.sample, len(chosen)))
        print(f"a sample of {len(chosen)} of {len(every)} mutations, seed {seed}", flush=True)
    return 1 if run(chosen) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
