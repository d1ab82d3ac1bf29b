"""Reports of finished runs: as text, HTML, Markdown and figures, and runs compared with each other.

>>> from pathlib import Path
>>> from recover.report import read_run, to_text
>>> def show(folder: Path) -> None:
...     run = read_run(folder)  # InputError where the folder holds no finished run
...     print(to_text(run.verdict))

1. *Loading*. `read_run` reads a folder that `recover check --out` wrote, as a `FinishedRun`.
2. *Pages*. `to_text` is the terminal page, `to_html` and `to_markdown` are `report.html` and `report.md`;
   `rebuild_report` writes both again, and `compare` shows several runs side by side.
3. *Sentences*. `answer_questions` answers four questions about a run, `cautions` lists why its figures may mislead.
4. *Figures*. `figures_of` gives the figures of a run as data, `write_figures` draws them for a paper, and figures of
   your own have the same style within `plot_style`.

The prose is in `words.yaml`, the sentences with figures in `templates/`, and the number formats in
`recover.numerics.formats`.
"""

from recover.report.answers import answer_questions, cautions
from recover.report.comparison import compare
from recover.report.evidence_figures import figures_of
from recover.report.figures import Figure
from recover.report.finished import FinishedRun, read_run, rebuild_report
from recover.report.html import to_html
from recover.report.markdown import summary_rows, to_markdown
from recover.report.paper import COLORS, MARKERS, plot_style, write_figures
from recover.report.tables import columns, filled, plot_rates
from recover.report.text import Section, sections, seeds_to_text, to_text

__all__ = [
    "COLORS",
    "MARKERS",
    "Figure",
    "FinishedRun",
    "Section",
    "answer_questions",
    "cautions",
    "columns",
    "compare",
    "figures_of",
    "filled",
    "plot_rates",
    "plot_style",
    "read_run",
    "rebuild_report",
    "sections",
    "seeds_to_text",
    "summary_rows",
    "to_html",
    "to_markdown",
    "to_text",
    "write_figures",
]
