"""Runs side by side, the report rebuilt from a folder, and figures for a paper, through the command line."""

import csv
import json
import zlib
from itertools import pairwise

import pytest

from recover.cli import main
from recover.report.evidence_figures import figures_of
from recover.report.paper import COLORS, rendered
from tests.finished_runs import CONFIG, RUNS, changed, folder


@pytest.fixture
def runs(tmp_path):
    names = {"strong": "RECOVERABLE", "none": "NOT_RECOVERED_AT_BUDGET", "broken": "INCONCLUSIVE"}
    return {name: folder(tmp_path / name, RUNS[kind]) for name, kind in names.items()}


def call(capsys, *arguments):
    status = main([str(one) for one in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def table_in(path):
    with path.open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)]


def cells(text, row, column_heads):
    """The cells of a row, cut where the names of the columns stand."""
    lines = text.splitlines()
    at = [*(lines[0].index(name) for name in column_heads), None]
    line = next(line for line in lines if line.startswith(row))
    return [line[start:end].strip() for start, end in pairwise(at)]


def test_runs_stand_side_by_side(runs, capsys):
    status, text, error = call(capsys, "compare", runs["strong"], runs["none"])
    assert (status, error) == (0, "")
    heads = ("strong", "none")
    assert cells(text, "verdict", heads) == ["RECOVERABLE", "NOT_RECOVERED_AT_BUDGET"]
    assert cells(text, "content", heads) == cells(text, "rule", heads) == ["true", "-"]
    assert cells(text, "valid flips", heads) == ["12 of 15", "8 of 11"]
    assert cells(text, "recovered", heads) == ["9 of 12 (75%; 47% to 91%)", "0 of 8 (0%; 0% to 32%)"]
    assert cells(text, "median smallest norm", heads) == ["8", "30"]
    assert cells(text, "largest drift", heads) == ["2.0e-06", "2.0e-06"]
    assert cells(text, "loss on neutral text", heads) == ["3.00 to 3.25"] * 2
    assert "Settings that differ" not in text
    assert "Do not compare" not in text


def test_what_differs_is_told(tmp_path, runs, capsys):
    verdict, records = RUNS["RECOVERABLE"]
    clamp = verdict.to_dict()["threat_model"]["clamps"][0] | {"value": -1.0}
    verdict = changed(verdict, threat_model={"clamps": [clamp]}, provenance={"sae_sha256": {"x": "1" * 64}})
    config, features = CONFIG.replace("n: 64", "n: 32"), ([*range(9)],)
    other = folder(tmp_path / "deep" / "strong", (verdict, records), config, features)
    status, text, _ = call(capsys, "compare", runs["strong"], other, runs["broken"])
    told = text.partition("Settings that differ\n")[2]
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert (status, lines[:4]) == (
        0,
        [
            "sae sha256 x 000000000000 | 111111111111 | 000000000000",
            "prompts n 64 | 32 | 64",
            "clamp 1 value -5 | -1 | -5",
            "features 1 3, 17 | 0, 1, 2, 3, 4, 5, ... (9) | 3, 17",
        ],
    )
    # Two folders have the same name: each has as much of its path as tells them apart.
    assert text.splitlines()[0].split() == ["strong", "deep/strong", "broken"]
    assert text.endswith("Do not compare the figures of INCONCLUSIVE runs.\n")


def test_columns_that_are_too_many_go_on_below(tmp_path, capsys):
    paths = [folder(tmp_path / f"run-{number}", RUNS["RECOVERABLE"]) for number in range(7)]
    _, text, _ = call(capsys, "compare", *paths)
    assert max(map(len, text.splitlines())) <= 120
    assert sum(line.startswith("verdict") for line in text.splitlines()) > 1
    assert all(f"run-{number}" in text for number in range(7))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("strong",), "compare: at least two folders are needed"),
        (("strong", "strong"), "compare: the same folder is given twice"),
        (("strong", "nowhere"), "nowhere: holds no finished run (verdict.json is not there)"),
        (("strong", "damaged"), "damaged: verdict.json is damaged"),
        (("strong", "records"), "records: examples.jsonl is damaged"),
    ],
)
def test_bad_folders_are_refused_in_one_line(tmp_path, runs, capsys, arguments, words):
    damaged, records = (folder(tmp_path / name, RUNS["RECOVERABLE"]) for name in ("damaged", "records"))
    (damaged / "verdict.json").write_text(json.dumps(RUNS["INVALID"][0].to_dict() | {"gates": 3}))
    (records / "examples.jsonl").write_text('{"id": "a"}\n')
    status, out, error = call(capsys, "compare", *(tmp_path / name for name in arguments))
    assert (status, out) == (2, "")
    assert words in error
    assert error.count("\n") == 1


def test_reports_are_rebuilt_with_what_the_folder_holds(runs, capsys):
    status, out, _ = call(capsys, "report", runs["strong"])
    page = runs["strong"] / "report.html"
    assert (status, out) == (0, f"{page}\n")
    source = page.read_text()
    assert source.count("<figure ") == len(figures_of(*RUNS["RECOVERABLE"]))
    assert "<p>3, 17</p>" in source
    assert (runs["strong"] / "report.md").read_text().startswith("## recover: RECOVERABLE\n")
    for name in ("examples.jsonl", "run.json"):  # an old copy may lack them: its report has less
        (runs["strong"] / name).unlink()
    assert call(capsys, "report", runs["strong"])[0] == 0
    assert 'id="norms"' not in page.read_text()


def test_figures_for_a_paper(runs, tmp_path, capsys):
    out = tmp_path / "figures" / "paper"
    status, said, _ = call(capsys, "report", runs["strong"], "--figures", out)
    assert (status, said.splitlines()[1]) == (0, str(out))
    drawn = figures_of(*RUNS["RECOVERABLE"])
    files = {f"{name}.{suffix}" for name in drawn for suffix in ("pdf", "png", "csv")} | {"summary.csv"}
    assert {path.name for path in out.iterdir()} == files
    for name, figure in drawn.items():
        assert table_in(out / f"{name}.csv") == [tuple(row) for row in figure.table]
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert dict(table_in(out / "summary.csv"))["recovered"] == "9 of 12 (75%; 47% to 91%)"


@pytest.mark.parametrize("name", ["rates", "norms", "budget", "margins"])
def test_text_in_a_figure_stays_text_and_the_file_is_the_same_every_time(name):
    """Fonts are embedded as TrueType (fonttype 42), whose letters can be searched and edited; Type 3 draws them."""
    figure = figures_of(*RUNS["RECOVERABLE"])[name]
    page = rendered(figure)["pdf"]
    assert b"/TrueType" in page or b"/CIDFontType2" in page
    assert b"/Type3" not in page
    assert rendered(figure)["pdf"] == page
    assert len(zlib.compress(page)) < 100_000


def test_colors_differ_for_the_color_blind():
    """Without red-green sight (Vienot's projection of deuteranopes) no two colors of curves drawn together meet."""

    def seen(color):
        red, green, blue = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
        both = 0.29275 * red + 0.70725 * green
        return both, -0.02234 * red + 0.02234 * green + blue

    together = ("own", "plus", "placebo", "random", "shuffled", "plain")
    places = [seen(COLORS[tone]) for tone in together]
    for row, one in enumerate(places):
        for other in places[row + 1 :]:
            assert abs(one[0] - other[0]) + abs(one[1] - other[1]) > 0.1


def test_figures_where_nothing_can_be_written(runs, capsys):
    status, _, error = call(capsys, "report", runs["strong"], "--figures", runs["none"] / "verdict.json")
    assert status == 2
    assert error.count("\n") == 1
    assert "cannot be written" in error
