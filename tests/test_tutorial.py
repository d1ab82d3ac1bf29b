"""`analyses/tutorial.ipynb`, run as a reader runs it: its own assertions hold, and it says what is stored in it.

After a change: `.venv/bin/jupyter execute --inplace analyses/tutorial.ipynb`.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import recover

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed; pip install -e '.[dev]'")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parent.parent
STORED = nbformat.read(ROOT / "analyses" / "tutorial.ipynb", as_version=4)
CODE = [cell.source for cell in STORED.cells if cell.cell_type == "code"]
MOST_LINES = 14
SAME = ("30 blocks", "Yesterday", "without the clamp", "C1 holds", "back with the clamp held", "RECOVERABLE")
"""How lines begin whose figures are the same on any machine."""


def printed(notebook: Any) -> list[str]:
    """All that its cells print, line by line."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream"}
    return "".join(output.text for output in outputs).splitlines()


def worded(lines: list[str]) -> str:
    """What is said, whatever the figures are, and wherever lines break."""
    return re.sub(r"[-+]?\d[\d.e+-]*%?", "#", " ".join(" ".join(lines).split()))


def test_its_cells_are_short_and_use_public_names_alone():
    assert all(len(source.splitlines()) <= MOST_LINES for source in CODE)
    nodes = [node for source in CODE for node in ast.walk(ast.parse(source))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert sorted(modules) == ["recover", "textwrap", "torch", "warnings"]
    packages = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in packages} == {"recover"}
    public = {alias.name: importlib.import_module(f"recover.{alias.name}") for one in packages for alias in one.names}
    public |= {"rc": recover}
    used = {
        (node.value.id, node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in public
    }
    used -= {("evidence", "attribution")}  # a package within; its names are read below
    assert {f"{name}.{attr}" for name, attr in used if attr not in public[name].__all__} == set()
    asked = {node.attr for node in nodes if isinstance(node, ast.Attribute) and _of_attribution(node)}
    assert asked <= set(importlib.import_module("recover.evidence.attribution").__all__)
    everything = {attr for _, attr in used} | asked
    assert {"defend", "find_perturbation", "certify", "fit_shared", "attribute", "check", "attributions"} <= everything


def _of_attribution(node: ast.Attribute) -> bool:
    """Whether it is a name of `evidence.attribution`."""
    return isinstance(node.value, ast.Attribute) and node.value.attr == "attribution"


def test_prose_stands_between_its_cells_and_outputs_are_stored():
    kinds = [cell.cell_type for cell in STORED.cells]
    assert kinds[0] == kinds[-1] == "markdown"
    assert kinds.count("markdown") >= kinds.count("code") - 3
    assert len(printed(STORED)) > 30


@pytest.mark.model
@pytest.mark.slow
def test_it_runs_and_says_what_is_stored():
    fresh = nbformat.from_dict(STORED)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(fresh, timeout=None, kernel_name="python3", resources=where).execute()
    before, after = printed(STORED), printed(fresh)
    assert worded(after) == worded(before)
    stable = [[line for line in lines if line.startswith(SAME)] for lines in (before, after)]
    assert len(stable[0]) == len(SAME)
    assert stable[1] == stable[0]
