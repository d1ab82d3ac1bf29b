"""What the report draws: figures against the verdict and the records, the page's form, its contrast and its size."""

import math
import re
from html.parser import HTMLParser

import pytest

from recover.report.answers import answer_questions, cautions
from recover.report.evidence_figures import figures_of
from recover.report.figures import Curves, Dots, Figure, Histogram, Intervals, Row, binned
from recover.report.html import to_html
from recover.report.markdown import summary_rows, to_markdown
from recover.report.svg import draw, logarithmic_ticks
from tests.finished_runs import CONFIG, RUNS, WHOLE, many, run

VOID = {"meta", "br", "wbr"}
DRAWN = {name: figures_of(*made) for name, made in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_the_runs_are_what_they_are_called(name):
    assert RUNS[name][0].verdict == name.partition(",")[0]


def rows_of(panel):
    return {row.name: row for row in panel.rows}


def test_rates_and_intervals_are_the_verdicts():
    verdict, _ = RUNS["RECOVERABLE"]
    rows = rows_of(DRAWN["RECOVERABLE"]["rates"].panel)
    own = rows["own target (C1)"]
    assert (own.value, (own.low, own.high)) == (verdict.recovery.rate, verdict.recovery.wilson95)
    assert own.count == "9 of 12"
    assert rows["unrelated target (placebo)"].value == verdict.controls.placebo.rate
    assert rows["own target, C1+"].value == verdict.controls.write_orthogonal.rate
    assert rows["one random direction"].value == verdict.controls.random.rate
    # By hand: undone, 3 of 12; 12 of the 15 that show without a clamp are suppressed, of random features 1 in 10.
    assert rows["undoing the clamp, best scale"].count == "3 of 12"
    suppressed = DRAWN["RECOVERABLE"]["suppression"].panel.rows
    assert [(row.value, row.count) for row in suppressed] == [(0.8, "12 of 15"), (0.1, "1 draw")]


def test_one_dot_an_example_and_medians_as_in_the_verdict():
    verdict, records = RUNS["RECOVERABLE"]
    figure = DRAWN["RECOVERABLE"]["norms"]
    own, plus, other = figure.panel.strips
    assert own.median == verdict.minimum_norm.median == 8.0
    assert plus.median == verdict.controls.write_orthogonal.median_norm == 10.0
    assert math.isinf(other.median)
    assert verdict.controls.placebo.median_norm is None
    assert own.values == (1.5, 3.0, 8.0, 30.0) * 3
    assert other.values == (3.0, math.inf, 16.0, math.inf) * 3
    assert figure.table[1] == ("e000", "1.5", "1.88", "3")
    assert figure.table[2] == ("e001", "3", "3.75", "not reached")
    assert len(figure.table) == 1 + sum(record.valid_flip for record in records)


def test_the_budget_curve_stands_beside_that_of_the_placebo():
    verdict, _ = RUNS["RECOVERABLE"]
    own, plus, other = DRAWN["RECOVERABLE"]["budget"].panel.curves
    assert [(p.at, p.rate, (p.low, p.high)) for p in own.points] == [
        (p.budget, p.rate, p.wilson95) for p in verdict.curve
    ]
    # Within 2, 20 and 40: 1.875 a quarter; 3.75, 10 too; 37.5 too. Of the placebo none, 3 and 16, and no more.
    assert [p.rate for p in plus.points] == [0.25, 0.75, 1.0]
    assert [p.rate for p in other.points] == [0.0, 0.5, 0.5]


def test_shared_perturbations_are_drawn_as_counted():
    verdict, _ = RUNS["RECOVERABLE"]
    known, panel = verdict.knowledge, DRAWN["RECOVERABLE"]["readings"].panel
    rows = rows_of(panel)
    assert (rows["the behavior's own rule"].value, rows["the behavior's own rule"].low) == (
        known.content.back.rate,
        known.content.back.interval95[0],
    )
    assert rows["another rule"].value == known.rule.others[0].holds.rate
    assert rows["answers dealt at random"].count == "2 of 100"
    assert panel.line == (verdict.statistics.rules.share, "required")
    curves = {one.name: [(p.at, p.rate) for p in one.points] for one in DRAWN["RECOVERABLE"]["transfer"].panel.curves}
    assert curves["unseen flips (C1)"] == [(20.0, 0.3), (60.0, 0.95)]
    assert curves["undoing the clamp"] == [(20.0, 0.07), (60.0, 0.07)]


def test_drift_and_margins_are_of_the_certificates():
    drift, margins = (DRAWN["RECOVERABLE"][name].panel for name in ("drift", "margins"))
    assert drift.strips[0].values == (0.0, 1e-6, 2e-6) * 4
    assert drift.strips[1].values == (3e-6,) * 12
    # Margins of -2 and 1, twelve times each.
    assert (margins.edges[0], margins.edges[-1], margins.counts[0], margins.counts[-1]) == (-2.0, 1.0, 12, 12)
    assert sum(margins.counts) == 24


def test_where_finds_travel_is_drawn_where_it_is_known():
    panel = DRAWN["RECOVERABLE, several sites"]["attribution"].panel
    assert [(row.group, row.value, row.low) for row in panel.rows] == [("this part alone", 0.75, 0.41)] * 4 + [
        ("without this part", 0.25, 0.07)
    ] * 4
    assert "attribution" not in DRAWN["RECOVERABLE"]


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("INVALID", {"suppression"}),
        ("RECOVERABLE, little run", {"suppression", "rates", "norms", "sizes", "drift", "margins"}),
        ("RECOVERABLE, transfer refused", {"suppression", "rates", "norms", "sizes", "drift", "margins"}),
        ("RECOVERABLE, several sites", {*DRAWN["RECOVERABLE"], "replies", "attribution"}),
    ],
)
def test_what_was_not_run_is_not_drawn(name, drawn):
    assert set(DRAWN[name]) == drawn


def test_without_records_what_the_verdict_says_is_drawn():
    assert set(figures_of(RUNS["RECOVERABLE"][0])) == set(DRAWN["RECOVERABLE"]) - {"norms", "drift", "margins"}


def test_histogram_by_hand():
    assert binned([0.0, 1.0, 2.0, 4.0], bins=2) == ((0.0, 2.0, 4.0), (2, 2))
    assert binned([3.0, 3.0], bins=2) == ((2.5, 3.0, 3.5), (0, 2))


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(1.0, 20.0, [1, 2, 5, 10, 20]), (0.9, 9e4, [1, 10, 100, 1000, 10000]), (3.0, 4.0, []), (6.0, 6.0, [])],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert logarithmic_ticks(low, high) == ticks


def test_a_figure_whose_rows_differ_in_length_is_refused():
    with pytest.raises(ValueError, match="rows of its table differ"):
        Figure("x", "x", "x", "x", Intervals((), "x"), [("a", "b"), ("c",)])


def test_marks_stand_where_their_values_are():
    """A share is its own place; a norm that is halfway between two others in logarithms is so on the axis."""
    rows = (Row("a", "own", 0.25, 0.125, 0.5), Row("b", "random", 1.0))
    source = draw(Figure("x", "t", "r", "a", Intervals(rows, "share"), [("",)]))
    assert re.findall(r'class="mark tone-(\w+)" x="([\d.]+)%"', source) == [("own", "25.00"), ("random", "100.00")]
    assert 'class="whisker tone-own" x1="12.50%"' in source
    rows = tuple(Row(str(size), "plain", size) for size in (1.0, 10.0, 100.0))
    source = draw(Figure("x", "t", "r", "a", Intervals(rows, "norm", logarithmic=True), [("",)]))
    left, middle, right = (float(x) for x in re.findall(r'class="mark tone-plain" x="([\d.]+)%"', source))
    assert middle == pytest.approx((left + right) / 2, abs=0.02)
    assert 0 < left < right < 100


def test_zeros_and_what_was_not_reached_are_drawn_apart():
    source = draw(DRAWN["RECOVERABLE"]["norms"])
    places = [float(x) for x in re.findall(r'class="dot tone-placebo" cx="([\d.]+)%"', source)]
    assert places.count(95.0) == 6
    assert max(place for place in places if place != 95.0) < 90
    assert ">not reached<" in source
    source = draw(DRAWN["RECOVERABLE"]["drift"])
    assert [float(x) for x in re.findall(r'class="dot tone-own" cx="([\d.]+)%"', source)].count(3.0) == 4


class Page(HTMLParser):
    """Tags must close; ids, figures and what is written are gathered."""

    def __init__(self, source):
        super().__init__()
        self.open, self.ids, self.text, self.figures, self.labels = [], [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.labels += given.get("aria-labelledby", "").split()
        if tag == "figure":
            self.figures.append([])
        if "figure" in self.open:
            self.figures[-1].append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("name", RUNS)
def test_the_page_is_well_formed_and_every_figure_can_be_read_without_seeing_it(name):
    verdict, records = RUNS[name]
    source = to_html(verdict, CONFIG, records, [(3, 17)] * len(verdict.threat_model.clamps))
    page = Page(source)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.labels) <= set(page.ids)
    assert len(page.figures) == len(DRAWN[name])
    for tags in page.figures:
        assert {"svg", "title", "desc", "table", "details", "summary"} <= set(tags)
    text = " ".join(" ".join(page.text).split())
    for figure in DRAWN[name].values():
        for words in (figure.reading, figure.alt, *(cell for row in figure.table for cell in row)):
            assert " ".join(words.split()) in text, words
    assert not re.search(r"\b(None|nan|inf|NaN)\b", text.partition("Threat model")[0])
    assert "https" not in source
    assert "3, 17" in text


@pytest.mark.parametrize("name", RUNS)
def test_four_questions_are_answered(name):
    verdict, _ = RUNS[name]
    said = dict(answer_questions(verdict, {"task": "ioi"}))
    assert list(said) == [
        "What was clamped?",
        "Was the behavior recoverable?",
        "What does the model still know?",
        "What could be wrong with this run?",
    ]
    clamped, recoverable, content, _ = (" ".join(told) for told in said.values())
    assert "In tiny: 2 features at blocks.1.hook_resid_pre, set to -5 where active" in clamped
    assert "indirect object identification" in clamped
    opening = {"RECOVERABLE": "Yes: with the clamp held", "NOT_RECOVERED_AT_BUDGET": "Not by this search"}
    assert recoverable.startswith(opening.get(verdict.verdict, "Not answered"))
    if verdict.verdict == "RECOVERABLE":
        words = {True: "true", False: "false", None: "unknown"}
        where = verdict.knowledge is not None or verdict.transfer is not None
        assert content.startswith(f"Content {words[verdict.content]}" if where else "Whether the answers can still be")
    else:
        assert content.startswith("Not applicable")


def test_cautions_name_what_the_figures_give_cause_for():
    told = " ".join(cautions(RUNS["RECOVERABLE"][0]))
    assert "Only 12 valid flips" in told
    assert "An unrelated target is reached on 50% of examples" in told
    told = " ".join(cautions(RUNS["INCONCLUSIVE"][0]))
    assert told.startswith("The validity check 'held' failed: largest constraint residual 2.5e-01")
    assert "on which content and rule rest: too few flips" in " ".join(
        cautions(RUNS["RECOVERABLE, transfer refused"][0])
    )
    assert "No unrelated target" in " ".join(cautions(RUNS["RECOVERABLE, little run"][0]))


@pytest.mark.parametrize("name", RUNS)
def test_the_page_for_a_pull_request(name):
    verdict, _ = RUNS[name]
    text = to_markdown(verdict, CONFIG)
    assert text.startswith(f"## recover: {verdict.verdict}\n")
    assert not re.search(r"\b(None|nan|inf)\b", text)
    assert text.count("<details>") == text.count("</details>") == 1
    for gate in verdict.gates:
        assert f"| {gate.name} | " in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_markdown_of_the_user_is_escaped():
    verdict = RUNS["RECOVERABLE"][0]
    text = to_markdown(verdict, "task: '<b>|*x*'\n")
    assert r"The behavior: &lt;b>\|\*x\*." in text


def test_the_table_is_that_of_the_verdict():
    rows = dict(summary_rows(RUNS["RECOVERABLE"][0]))
    assert rows["valid flips"] == "12 of 15"
    assert rows["recovered"] == "9 of 12 (75%; 47% to 91%)"
    assert rows["median smallest norm"] == "8"
    assert rows["unseen flips right again"] == "100% of 24 (86% to 100%)"
    assert (rows["... norm"], rows["nearest other rule"]) == ("60", "another rule")
    assert rows["failed validity checks"] == "none"
    assert dict(summary_rows(RUNS["INVALID"][0]))["recovered"] == "-"


def test_five_hundred_examples_fit_a_page_that_opens_at_once():
    verdict, records = run(*many(500), **WHOLE)
    source = to_html(verdict, CONFIG, records)
    assert len(source.encode()) < 1_000_000
    assert source.count("<circle") == 6 * 500


def luminance(color):
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_the_definition():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # WCAG's well-known edge


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "print"])
def test_contrast_is_enough(scheme):
    """WCAG 2.2 AA: 4.5 for text, 3 for what is drawn; on the page and on the panels of figures."""
    source = to_html(RUNS["RECOVERABLE"][0], CONFIG)
    colors = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", source, re.S)]
    assert len(colors) == 3
    found = colors[scheme]
    assert set(found) == set(colors[0])
    for ground in ("page", "panel"):
        for text in ("ink", "soft", "own", "good", "bad", "doubt"):
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
        for mark in ("plus", "placebo", "random", "shuffled", "undo", "plain", "edge"):
            assert contrast(found[mark], found[ground]) >= 3, (mark, ground)


def test_panels_of_every_kind_are_drawn():
    kinds = {type(figure.panel) for drawn in DRAWN.values() for figure in drawn.values()}
    assert kinds == {Intervals, Curves, Dots, Histogram}
