"""The documentation beside what it speaks of: names, commands, keys and gates; and what of a site is refused."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import recover
from recover import cli
from recover.protocol import gates
from recover.protocol.verdict_model import Counts, Gate
from recover.run.config import Config
from recover.saes.fit import Fit
from recover.tasks import TASKS

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "pages"


@pytest.fixture(scope="module")
def hooks() -> Any:
    for package in ("mkdocs", "griffe"):
        pytest.importorskip(package, reason=f"{package} is not installed; pip install -e '.[docs]'")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FOLDERS = [name for _, name, is_folder in pkgutil.iter_modules(recover.__path__) if is_folder]
FOLDERS_BELOW = ("recover.evidence.attribution",)
PACKAGES = ("recover", "recover.types", *(f"recover.{name}" for name in sorted(FOLDERS)), *FOLDERS_BELOW)
API_PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((PAGES / "reference" / "api").glob("*.md"))}


def public_names() -> dict[str, Any]:
    """Each public object by the shortest path to it: a name of the top is not asked of its folder again."""
    paths: dict[tuple[str, int], tuple[str, Any]] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            found = getattr(module, name)
            if package == "recover.types" and getattr(found, "__module__", None) != package:
                continue  # shapes, for annotations
            paths.setdefault((name, id(found)), (f"{package}.{name}", found))
    return dict(paths.values())


PUBLIC = public_names()


def page_of(path: str) -> str:
    folder = path.rpartition(".")[0].removeprefix("recover").removeprefix(".")
    return folder or "index"


def blocks_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", API_PAGES[page], flags=re.MULTILINE | re.DOTALL)


def used_in(code: str) -> set[str]:
    """The names that code uses; importing one is not using it."""
    nodes = list(ast.walk(ast.parse(code)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    return used | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def doctests_of(path: str) -> list[doctest.DocTest]:
    found = PUBLIC[path]
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not found.__module__.startswith("recover"):
        return []
    return [test for test in doctest.DocTestFinder().find(found, path) if test.examples]


def test_every_public_name_is_in_the_reference_once():
    shown = [
        (page, path) for page, text in API_PAGES.items() for path in re.findall(r"^::: (.+)$", text, flags=re.MULTILINE)
    ]
    assert sorted(shown) == sorted((page_of(path), path) for path in PUBLIC)


@pytest.mark.parametrize("page", sorted({page_of(path) for path in PUBLIC}))
def test_every_public_name_has_an_example(page):
    used = set().union(*map(used_in, blocks_of(page)))
    names = {path: path.rpartition(".")[2] for path in PUBLIC if page_of(path) == page}
    in_docstrings = {path: "".join(one.source for test in doctests_of(path) for one in test.examples) for path in names}
    without = [path for path, name in names.items() if name not in used and name not in used_in(in_docstrings[path])]
    assert without == []


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(API_PAGES))
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """One after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": page}
    for number, code in enumerate(blocks_of(page)):
        exec(compile(code, f"{page}.md, block {number}", "exec"), scope)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({page_of(path) for path in PUBLIC}))
def test_the_examples_of_docstrings_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner, told = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), []
    for path in PUBLIC:
        if page_of(path) == page:
            for test in doctests_of(path):
                runner.run(test, out=told.append)
    assert "".join(told) == ""


@pytest.mark.parametrize("page", sorted(PAGES.rglob("*.md")), ids=lambda page: page.relative_to(PAGES).as_posix())
def test_what_a_page_names_is_there(page):
    """Files of the repository, and modules whose docstring a page shows."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:recover|analyses|fixtures|tests|property_tests)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"^<!-- docstring: ([\w.]+) -->$", text, flags=re.MULTILINE):
        assert importlib.import_module(name).__doc__


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_the_page_of_the_command_line_is_its_help(hooks, command, capsys, monkeypatch):
    page = hooks.cli_page()
    monkeypatch.setenv("COLUMNS", hooks.HELP_COLUMNS)
    with pytest.raises(SystemExit):
        cli.main([*([] if command is None else [command]), "--help"])
    assert f"```text\n{capsys.readouterr().out}```" in page
    assert command is None or f"\n## recover {command}\n" in page


def sections(of: Any, found: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """The models that an annotation speaks of, with those that they do."""
    if isinstance(of, type) and issubclass(of, BaseModel):
        if of not in found:
            found.append(of)
            for field in of.model_fields.values():
                sections(field.annotation, found)
    else:
        for inner in typing.get_args(of):
            sections(inner, found)
    return found


def test_the_page_of_defense_yaml_names_every_key(hooks):
    parts = re.split(r"^##+ ", hooks.defense_page(), flags=re.MULTILINE)
    told = [tuple(re.findall(r"^\| `(\w+)` \| [^ |]", part, flags=re.MULTILINE)) for part in parts]
    assert len(sections(Config, [])) >= 8
    for section in sections(Config, []):
        assert tuple(section.model_fields) in told, section
    titles = [part.partition("\n")[0] for part in parts]
    assert {"The file", *Config.model_fields} >= set(titles[1:]) - {
        "clamps: features",
        "published: figures",
        "prompts, task by task",
        *(f"task: {name}" for name in TASKS),
    }
    for name, task in TASKS.items():
        options = [key for key in inspect.signature(task).parameters if key not in ("model", "progress")]
        assert tuple(options) == told[titles.index(f"task: {name}")], name


@pytest.mark.parametrize(
    ("key", "begins", "kind", "default"),
    [
        ("budget", "largest Frobenius norm", "number above 0", "required"),
        ("certificates", "the dtype of the model", "`float32`, `float64`", "`float32`"),
        ("folds", "1 fits on one half", "`1`, `2`", "`2`"),
        ("n", "how many to draw", "whole number", "not given"),
        ("norms", "budgets, as shares of the mean norm", "a list: number above 0", "`[0.2, 0.4, 0.6]`"),
        ("steps", "gradient steps over all examples", "whole number above 0", "`45`"),
        ("alpha", "p-value up to which a simpler rule", "number from 0 to 1", "`0.01`"),
    ],
)
def test_the_keys_of_a_section_are_as_validated(hooks, key, begins, kind, default):
    row = rf"^\| `{key}` \| {begins}.* \| {re.escape(kind)} \| {re.escape(default)} \|$"
    assert re.search(row, hooks.defense_page(), flags=re.MULTILINE)


def test_a_key_that_no_docstring_tells_of_is_refused(hooks):
    class Section(BaseModel):
        """A section."""

        untold: int = 1

    with pytest.raises(hooks.PluginError, match=r"Section: its docstring does not say what untold is"):
        hooks.keys_table(Section)


def test_the_page_of_verdicts_has_every_gate_and_what_it_decides():
    page = (PAGES / "explanation" / "verdicts.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| .+ \| (`?\w+`?) \|$", page, flags=re.MULTILINE))
    fit = Fit("blocks.0.hook_resid_pre", 0.9, 10.0, 1.0, "blocks.0.hook_resid_pre", 0.0, 100)
    made = [
        *gates.fit_gates([fit]),
        gates.flips_gate(Counts(n=1, base=1, defended=0, valid_flips=1, strict_flips=1)),
        gates.utility_gate(None, 1.0),
    ]
    cautions = {"norm_at_budget"}
    made += [Gate(name, None, "", None if name in cautions else "INCONCLUSIVE") for name in gates.SEARCH_GATES]
    assert {gate.name: f"`{gate.decides}`" if gate.decides else "caution" for gate in made} == {
        name: decides for name, decides in table.items() if name in {gate.name for gate in made}
    }


def test_the_page_of_artifacts_has_every_key_of_the_verdict_with_its_meaning(hooks):
    section = {"properties": {"n": {"type": "integer", "description": "how many"}}}
    either = {"anyOf": [{"$ref": "#/$defs/Some"}, {"type": "null"}], "description": "a part"}
    properties = {
        "gates": {"type": "array", "items": {"$ref": "#/$defs/Some"}, "description": "checks"},
        "parts": {"type": "object", "additionalProperties": {"$ref": "#/$defs/Some"}, "description": "by part"},
        "transfer": either,
        "verdict": {"enum": ["A", True], "description": "the answer"},
        "wilson95": {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}], "description": "95%"},
    }
    assert hooks.schema_table({"properties": properties, "$defs": {"Some": section}}).splitlines()[2:] == [
        "| `gates` | list: section | checks |",
        "| `gates[].n` | whole number | how many |",
        "| `parts` | by name: section | by part |",
        "| `parts.*.n` | whole number | how many |",
        "| `transfer` | section or `null` | a part |",
        "| `transfer.n` | whole number | how many |",
        "| `verdict` | `A`, `true` | the answer |",
        "| `wilson95` | two: number | 95% |",
    ]
    assert "<!-- verdict schema -->" in (PAGES / "reference" / "artifacts.md").read_text(encoding="utf-8")
    rows = hooks.schema_table(json.loads(hooks.SCHEMA.read_text(encoding="utf-8"))).splitlines()[2:]
    assert any(row.startswith("| `recovery.rate` | number or `null` | recovered as a share") for row in rows)
    assert not [row for row in rows if row.endswith("|  |")]  # every key says what it means


def test_ruled_tables_become_markdown(hooks, monkeypatch):
    text = """What.

key     what is
======  ===============
`a`     one | two
        and `x | y`
`long_name`  beyond
======  ===============

1. An item:

   ==  ==
   b   c
   ==  ==
"""
    monkeypatch.setattr(hooks.importlib, "import_module", lambda _: type("module", (), {"__doc__": text}))
    assert hooks.docstring("any").splitlines() == [
        "What.",
        "",
        "",
        "| key | what is |",
        "| --- | --- |",
        r"| `a` | one \| two and `x | y` |",
        "| `long_name` | beyond |",
        "",
        "1. An item:",
        "",
        "",
        "    |  |  |",
        "    | --- | --- |",
        "    | b | c |",
    ]


def test_a_notebook_as_a_page(hooks):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": "1 + 1", "outputs": [
            {"output_type": "stream", "text": ["said\n"]},
            {"output_type": "execute_result", "data": {"text/plain": "2"}},
        ]},
        {"cell_type": "code", "source": "x = 1", "outputs": []},
    ]  # fmt: skip
    assert hooks.notebook_page({"cells": cells}) == (
        "# Title\ntext\n\n```python\n1 + 1\n```\n\n"
        '<div class="output" markdown>\n\n```text\nsaid\n2\n```\n\n</div>\n\n```python\nx = 1\n```\n'
    )
    cells[1]["outputs"] = [{"output_type": "error"}]
    with pytest.raises(hooks.PluginError, match="'error'"):
        hooks.notebook_page({"cells": cells})


@pytest.mark.parametrize(
    ("name", "content", "stray"),
    [
        ("a.html", '<script src="https://cdn.example/x.js"></script>', "https://cdn.example/x.js"),
        ("a.html", '<link rel="stylesheet" href="//fonts.example/css">', "//fonts.example/css"),
        ("a.html", '<img srcset="a.png 1x, http://img.example/b.png 2x">', "http://img.example/b.png 2x"),
        ("a.html", '<p style="background: url(https://img.example/c.png)">', "https://img.example/c.png"),
        ("a.html", '<a href="https://arxiv.example">paper</a><img src="data:image/png;base64,xx">', None),
        ("a.html", '<script src="assets/x.js"></script><code>&lt;script src="https://x"&gt;</code>', None),
        ("deep/a.css", "@import 'https://fonts.example/d.css';", "https://fonts.example/d.css"),
        ("deep/a.css", "a { background: url(\"../e.png\") } /* see https://example */", None),
    ],
)  # fmt: skip
def test_what_a_site_may_not_load(hooks, tmp_path, name, content, stray):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    expected = [] if stray is None else [f"{Path(name).name}: {stray}"]
    assert list(hooks.loaded_from_elsewhere(tmp_path)) == expected


@pytest.mark.slow
def test_the_site_builds_without_a_warning(hooks, tmp_path):
    """Every link and anchor resolves, every included section is there, and nothing is loaded from elsewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "first half hour" in (tmp_path / "tutorial.html").read_text(encoding="utf-8")
    assert 'id="recover.check"' in (tmp_path / "reference" / "api" / "index.html").read_text(encoding="utf-8")
