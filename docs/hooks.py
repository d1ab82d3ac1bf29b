"""What the site is made of beside its pages, and what is asked of it when it is built.

1. *Pages* that say what code says are made of the code: the command line of its `--help`, the keys of DEFENSE.yaml of
   the models that validate them, the verdict's of its schema, the tutorial of the notebook as it was run. A line
   `<!-- docstring: MODULE -->` in a page stands for that module's docstring.
2. *Built*, no page may load anything from elsewhere: one that does fails the build.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from griffe import Docstring, Parser
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pydantic import BaseModel, TypeAdapter

from recover import cli
from recover.evidence import transfer
from recover.evidence.rules import Rules
from recover.protocol import plan
from recover.run import config
from recover.search import ascent
from recover.tasks import ioi
from recover.tasks.registry import HANDED, TASKS

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "analyses" / "tutorial.ipynb"
SCHEMA = ROOT / "recover" / "protocol" / "verdict.schema.json"
HELP_COLUMNS = "100"
INCLUDED = re.compile(r"^<!-- docstring: ([\w.]+) -->$", flags=re.MULTILINE)
SECTIONS: Mapping[type[BaseModel], tuple[type, ...]] = {
    config.Config: (),
    config.ClampConfig: (),
    config.Selection: (),
    config.PromptConfig: (),
    config.SearchConfig: (ascent.Schedule, plan.Plan),
    config.ControlConfig: (plan.Plan,),
    config.TransferConfig: (plan.TransferPlan, transfer.FitSchedule),
    config.RuleConfig: (Rules,),
    config.PublishedConfig: (),
    config.FigureConfig: (),
}
"""The sections of DEFENSE.yaml, and where it is said what their keys are beside their own docstrings."""
TOLD_BESIDE = {"ioi": (ioi.load, ioi.strict)}
HEADS = ("key", "what it is", "may be", "by default")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    made = {
        "tutorial.md": notebook_page(json.loads(NOTEBOOK.read_text(encoding="utf-8"))),
        "reference/cli.md": cli_page(),
        "reference/defense.md": defense_page(),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    files.append(File.generated(config, NOTEBOOK.name, content=NOTEBOOK.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put docstrings and the schema where a page names them."""
    markdown = INCLUDED.sub(lambda found: docstring(found[1]), markdown)
    return markdown.replace("<!-- verdict schema -->", schema_table(json.loads(SCHEMA.read_text(encoding="utf-8"))))


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that would load something from elsewhere."""
    if strays := list(loaded_from_elsewhere(Path(config.site_dir))):
        raise PluginError(f"the site must work without network; it would load: {'; '.join(strays[:5])}")


def notebook_page(notebook: Mapping[str, Any]) -> str:
    """A notebook as Markdown: prose, code, and below each cell what it printed."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        if said := "".join(map(_printed, cell["outputs"])).rstrip():
            parts.append(f'<div class="output" markdown>\n\n```text\n{said}\n```\n\n</div>')
    return "\n\n".join(parts) + "\n"


def _printed(output: Mapping[str, Any]) -> str:
    if output["output_type"] == "stream":
        return "".join(output["text"])
    if output["output_type"] == "execute_result":
        return "".join(output["data"]["text/plain"]) + "\n"
    raise PluginError(f"{NOTEBOOK.name}: an output of the kind {output['output_type']!r}; print text instead")


def cli_page() -> str:
    """The help of every command, as it prints it."""
    top = cli.parser()
    (commands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Command line", cli.__doc__.partition("\n\n")[2].strip(), _help(top)]
    parts += [f"## recover {name}\n\n{_help(command)}" for name, command in commands.choices.items()]
    return "\n\n".join(parts) + "\n"


def _help(parser: argparse.ArgumentParser) -> str:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = HELP_COLUMNS
    try:
        return f"```text\n{parser.format_help()}```"
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)


def defense_page() -> str:
    """Every key of DEFENSE.yaml: what it is, what it may be, and what it is where it is not given."""
    parts = [
        "# DEFENSE.yaml",
        "Every key is here. `recover check` validates a file against these before anything is loaded; an unknown key "
        "is refused with the nearest known one. `config.yaml` in a run's folder has all of them as resolved, and can "
        "be given to `recover check` again.",
        f"```yaml\n{(ROOT / 'analyses' / 'ioi_smollm2.yaml').read_text(encoding='utf-8')}```",
    ]
    for section, beside in SECTIONS.items():
        parts += [f"## {_place(section)}", inspect.getdoc(section).partition("\n\n")[0], keys_table(section, beside)]
    parts.append("## prompts, task by task")
    for name, task in TASKS.items():
        parts += [f"### task: {name}", options_table(task, TOLD_BESIDE.get(name, ()))]
    return "\n\n".join(parts) + "\n"


def _place(section: type[BaseModel]) -> str:
    places = {
        config.Config: "The file",
        config.ClampConfig: "clamps",
        config.Selection: "clamps: features",
        config.PublishedConfig: "published",
        config.FigureConfig: "published: figures",
    }
    keys = {field.annotation: key for key, field in config.Config.model_fields.items()}
    return places.get(section) or keys[section]


def keys_table(section: type[BaseModel], beside: tuple[type, ...] = ()) -> str:
    """The keys of a section; what they are is said by its docstring, or by those of the classes that they go into."""
    schema = section.model_json_schema()
    told = {}
    for source in (*reversed(beside), section):
        told |= described(source)
    rows = []
    for key, field in section.model_fields.items():
        what = schema["properties"][key]
        default = "required" if field.is_required() else _default(what.get("default"))
        rows.append((f"`{key}`", _said(told, key, section), _kind(what, schema.get("$defs", {})), default))
    return table(HEADS, rows)


def options_table(task: Any, beside: tuple[Any, ...] = ()) -> str:
    """The options that a task's function names; what they are is said by its docstring, or by what it calls."""
    told, rows = {}, []
    for source in (*beside, task):
        told |= described(source)
    for name, one in inspect.signature(task, eval_str=True).parameters.items():
        if name not in HANDED:
            default = "required" if one.default is one.empty else _default(one.default)
            rows.append(
                (f"`{name}`", _said(told, name, task), _kind(TypeAdapter(one.annotation).json_schema(), {}), default)
            )
    return table(HEADS, rows)


def _said(told: Mapping[str, str], key: str, of: Any) -> str:
    if key not in told:
        raise PluginError(f"{of.__module__}.{of.__name__}: its docstring does not say what {key} is; add it there")
    return told[key]


def described(of: Any) -> dict[str, str]:
    """What a docstring says of each attribute or argument."""
    sections = Docstring(inspect.getdoc(of) or "", lineno=1).parse(Parser.google, warnings=False)
    listed = [section.value for section in sections if section.kind.value in ("attributes", "parameters")]
    return {name: " ".join(one.description.split()) for some in listed for one in some for name in one.name.split(", ")}


def _kind(what: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    if "$ref" in what:
        return "a section of its own"
    for union in ("anyOf", "oneOf"):
        if union in what:
            kinds = [_kind(one, known) for one in what[union] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "enum" in what:
        return ", ".join(f"`{one}`" for one in what["enum"])
    if "const" in what:
        return f"`{what['const']}`"
    if "type" not in what:
        return "as said"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    if what["type"] == "array":
        return f"a list: {_kind(what['items'], known)}"
    if what["type"] == "object":
        return f"by name: {_kind(what['additionalProperties'], known)}"
    bounds = [
        words.format(what[key])
        for key, words in {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}"}.items()
        if key in what
    ]
    return " ".join([names[what["type"]], *bounds])


def _default(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, dict) or dataclasses.is_dataclass(value):
        return "as below"
    shown = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return f"`{shown}`"


def schema_table(schema: Mapping[str, Any]) -> str:
    """Every key of `verdict.json` by its path, with what it holds, as the models of the verdict describe them."""
    return table(("key", "kind", "meaning"), list(_keys(schema, schema.get("$defs", {}), "")))


def _keys(what: Mapping[str, Any], sections: Mapping[str, Any], path: str) -> Iterator[tuple[str, ...]]:
    for name, part in what.get("properties", {}).items():
        here = f"{path}.{name}".lstrip(".")
        yield f"`{here}`", _form(part, sections), part.get("description", "")
        for inner, many in _sections(part, sections):
            yield from _keys(inner, sections, f"{here}{many}")


def _sections(
    part: Mapping[str, Any], sections: Mapping[str, Any], many: str = ""
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The sections that a value may be or hold, with `[]` where it is a list of them and `.*` where they have names."""
    if "$ref" in part:
        yield sections[part["$ref"].rpartition("/")[2]], many
    for one in part.get("anyOf", ()):
        yield from _sections(one, sections, many)
    if isinstance(part.get("items"), dict):
        yield from _sections(part["items"], sections, f"{many}[]")
    if isinstance(part.get("additionalProperties"), dict):
        yield from _sections(part["additionalProperties"], sections, f"{many}.*")


def _form(part: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    """What kind of value it is, in words; sections follow below their own key."""
    if "$ref" in part:
        inner = sections[part["$ref"].rpartition("/")[2]]
        return _form(inner, sections) if "enum" in inner else "section"
    if "anyOf" in part:
        kinds = dict.fromkeys(_form(one, sections) for one in part["anyOf"])
        return " or ".join(kinds)
    values = [part["const"]] if "const" in part else part.get("enum")
    if values is not None:
        return ", ".join(f"`{one if isinstance(one, str) else json.dumps(one)}`" for one in values)
    if part.get("type") == "array":
        items = part.get("prefixItems") or [part["items"]]
        return f"{'two' if 'prefixItems' in part else 'list'}: {_form(items[0], sections)}"
    if part.get("type") == "object" and isinstance(part.get("additionalProperties"), dict):
        return f"by name: {_form(part['additionalProperties'], sections)}"
    names = {"integer": "whole number", "string": "text", "boolean": "true or false", "null": "`null`"}
    return names.get(part.get("type", ""), part.get("type", "section"))


def docstring(module: str) -> str:
    """A module's docstring, its ruled tables as Markdown's."""
    text = inspect.getdoc(importlib.import_module(module))
    text = RULED.sub(lambda found: _ruled(**found.groupdict()), text)
    return re.sub(r"^   (?=\S)", "    ", text, flags=re.MULTILINE)  # what goes on within an item of a list


RULED = re.compile(
    r"(?P<head>^[^\n]+\n)?(?P<rule>^(?P<indent> *)=+(?: +=+)+)\n(?P<body>(?:.+\n)+?)(?P=rule)$", flags=re.MULTILINE
)


def _ruled(head: str | None, rule: str, indent: str, body: str) -> str:
    starts, rows = [at.start() for at in re.finditer("=+", rule)], []
    for line in body.splitlines():
        begins = len(line) - len(line.lstrip())
        if begins == len(indent):
            rows.append(re.split(r" {2,}", line.strip(), maxsplit=len(starts) - 1))
        else:  # what did not fit into a cell of the row above
            column = min(range(len(starts)), key=lambda place: abs(starts[place] - begins))
            rows[-1][column] += f" {line.strip()}"
    heads = re.split(r" {2,}", head.strip()) if head else [""] * len(starts)
    made = table(tuple(heads), [tuple(row) for row in rows])
    return "\n".join(["", *(indent + line for line in made.splitlines())])


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Markdown's own bars are escaped; those in code are not taken for it."""
    return "".join(part if part[:1] == "`" else part.replace("|", r"\|") for part in re.split(r"(`[^`]*`)", text))


class _Loads(HTMLParser):
    """Collects what a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag != "a":
            loads = [given.get("src"), given.get("href"), given.get("data"), *(given.get("srcset") or "").split(",")]
            self.found += [one.strip() for one in loads if one]
        self.found += re.findall(r"url\(['\"]?([^'\")]+)", given.get("style") or "")


def loaded_from_elsewhere(site: Path) -> Iterator[str]:
    """What the pages and style sheets of a built site would load that is not in it."""
    for path in sorted(site.rglob("*.html")):
        page = _Loads()
        page.feed(path.read_text(encoding="utf-8"))
        yield from (f"{path.name}: {url}" for url in page.found if _elsewhere(url))
    for path in sorted(site.rglob("*.css")):
        urls = re.findall(r"(?:url\(|@import )['\"]?([^'\")]+)", path.read_text(encoding="utf-8"))
        yield from (f"{path.name}: {url}" for url in urls if _elsewhere(url))


def _elsewhere(url: str) -> bool:
    return re.match(r"(?:\w+:)?//", url) is not None
