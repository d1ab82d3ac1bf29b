"""Jinja templates of the reports, in `templates/`, with the number formatters as filters.

1. `render` fills a page. Values are escaped for HTML in `*.html.j2` and for Markdown in `*.md.j2`.
2. `gathered` reads sentences and rows out of a block of a template, in which `{% call row("name") %} ... {% endcall %}`
   gives one of them. Text, HTML and Markdown show the same sentences, and so each is written once.
"""

from __future__ import annotations

import re
import textwrap
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from recover.numerics import formats
from recover.protocol.reasons_knowledge import clustered

WIDTH = 100
"""Columns of the terminal page."""


def render(name: str, **values: Any) -> str:
    """Fill a template with these values; a missing value raises `jinja2.UndefinedError`."""
    page: str = environment(name.split(".")[1]).get_template(name).render(values)
    return page


def gathered(name: str, block: str, **values: Any) -> list[tuple[str, ...]]:
    """The rows of one block of a template: the arguments of each `call row(...)`, and its text on one line."""
    rows: list[tuple[str, ...]] = []

    def row(*labels: str, caller: Any) -> str:
        rows.append((*labels, " ".join(caller().split())))
        return ""

    template = environment("txt").get_template(name)
    for _ in template.blocks[block](template.new_context(values | {"row": row})):
        pass
    return rows


@cache
def environment(kind: str) -> jinja2.Environment:
    """The environment of templates of one kind: `html`, `md` or `txt`."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("recover.report"),
        autoescape=kind == "html",
        finalize=escaped if kind == "md" else None,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=kind == "md",
    )
    made.filters |= {name: getattr(formats, name) for name in formats.__all__ if name != "counted"} | {"wrap": wrap}
    made.filters |= {"misses": misses, "clustered": clustered}
    made.globals["counted"] = formats.counted
    return made


def misses(gap: float | None) -> str:
    """How a linear estimate compares with the effect; `gap` is the share of the effect that the estimate misses."""
    share = formats.percent(gap)
    if gap is None or share == "0%":
        return "matches the effect" if share == "0%" else "cannot be compared with the effect"
    return f"overestimates the effect by {share[1:]}" if gap < 0 else f"underestimates the effect by {share}"


def wrap(text: str, label: str = "") -> str:
    """Lines of `text` after `label`, aligned with where the text begins."""
    return (
        textwrap.fill(text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False)
        or label.rstrip()
    )


def escaped(value: Any) -> Any:
    """Escape everything that Markdown, or HTML within it, would read as markup."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(value.split())).replace("<", "&lt;")
