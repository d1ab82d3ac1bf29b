"""Does every law bite? `python property_tests/mutations.py [word]` breaks one line at a time and sees its law fail.

1. Copy the package and its tests to a temporary folder; the working tree is left alone.
2. See the laws hold of the code as it is.
3. For every entry of `mutation_table`: replace one piece of one file, run the law in a fork (the slow imports are done
   once), put the piece back.
4. Print `law | line changed | failed`, and exit with 1 if a law held all the same, or if one has no mutation.

A piece that is no longer in its file is an error: the table has to follow the code.
"""

from __future__ import annotations

import ast
import os
import shutil
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import beartype  # noqa: F401 (before nnsight, as in the root conftest)
import nnsight  # noqa: F401 (imported here so that the forks need not)
import pytest
import sae_lens  # noqa: F401
import torch
import transformers  # noqa: F401

ROOT = Path(__file__).parent.parent
COPIED = ("recover", "tests", "property_tests", "conftest.py", "pyproject.toml", "README.md")
PLUGINS = ("jaxtyping._pytest_plugin", "_hypothesis_pytestplugin")
"""No others: nnsight, imported already, keeps some of them from loading."""
OPTIONS = ["-q", "-x", "--assert=plain", "--tb=no", "--disable-plugin-autoload", *(f"-p{name}" for name in PLUGINS)]


@dataclass(frozen=True)
class Mutation:
    """A law (its file without `test_` and `_laws`, and its function without `test_`), and a way to break it."""

    laws: str
    law: str
    file: str
    old: str
    new: str

    @property
    def test(self) -> str:
        return f"property_tests/test_{self.laws}_laws.py::test_{self.law}"


def _table() -> tuple[Mutation, ...]:
    from property_tests.mutation_table import TABLE

    return tuple(Mutation(laws, *entry) for laws, entries in TABLE.items() for entry in entries)


def held(copy: Path, mutation: Mutation) -> bool:
    """Whether the law holds in spite of the mutation."""
    path = copy / "recover" / mutation.file
    sound = path.read_text(encoding="utf-8")
    if mutation.old not in sound:
        raise SystemExit(f"{mutation.law}: {mutation.old!r} is not in recover/{mutation.file}")
    path.write_text(sound.replace(mutation.old, mutation.new, 1), encoding="utf-8")
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


def laws() -> set[tuple[str, str]]:
    """Every law there is, by file and name."""
    return {
        (path.stem.removeprefix("test_").removesuffix("_laws"), node.name.removeprefix("test_"))
        for path in Path(__file__).parent.glob("test_*_laws.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def main() -> int:
    """Run the mutations whose law or file holds the word given, or all."""
    torch.set_num_threads(1)
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    table = _table()
    missing = sorted(laws() - {(m.laws, m.law) for m in table})
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        chosen = [m for m in table if word in f"{m.laws} {m.law} {m.file}"]
        if not _passes(copy, *sorted({m.test for m in chosen})):
            raise SystemExit("a law fails of the code as it is; mend that first")
        for mutation in chosen:
            survives = held(copy, mutation)
            survived += survives
            changed = f"{mutation.file}: `{mutation.old.strip()}` -> `{mutation.new.strip()}`"
            print(f"{mutation.law} | {changed} | {'HELD' if survives else 'failed'}", flush=True)
    for name in missing:
        print(f"{'_laws: '.join(name)} | no mutation |", flush=True)
    return 1 if survived or missing else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
