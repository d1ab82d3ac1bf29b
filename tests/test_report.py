"""What a person reads: verdicts of every kind, as text and as a page, without the JSON in hand."""

import copy
import json
import re
from html.parser import HTMLParser
from importlib import resources

import jsonschema
import pytest

from recover.fit import Fit
from recover.records import ExampleRecord, SearchRecord
from recover.report import MEANINGS, WIDTH, to_html, to_text
from recover.search import Status
from recover.verdict import NOT_RUN, decide

SCHEMA = json.loads(resources.files("recover").joinpath("schemas/verdict.schema.json").read_text())
THREAT = {
    "access": "white-box, one perturbation an example",
    "sites": ["blocks.4.hook_resid_pre"],
    "positions": "last",
    "placement": "after_clamp",
    "constraint": "orthogonal to the encoder columns of the clamped features (C1)",
    "norm": "Frobenius, over positions and dimensions",
    "budget": 20.0,
    "clamp": "live",
    "skip_first": 0,
    "dtype": "float32",
    "clamps": [
        {
            "site": "blocks.4.hook_resid_pre",
            "k": 64,
            "mode": "set",
            "value": -5.0,
            "only_active": True,
            "positions": "all",
        }
    ],
}
PROVENANCE = {
    "versions": {"recover": "0.1.0", "torch": "2.9.0"},
    "seed": 0,
    "device": "cpu",
    "dtype": "float32",
    "sae_sha256": {"tiny": "0" * 64},
    "model": "tiny (folder, sha256:00)",
    "seconds": 12.5,
}
HELD = {
    "shows": True,
    "score": 0.5,
    "slack": 0.5,
    "defended_slack": -1.0,
    "norm": 12.0,
    "relative_norm": 0.0625,
    "displacement": 475.0,
    "constraint_residual": 2e-8,
    "preactivation_shift": [3e-6, 1e-6],
    "threshold_margin": [-4.0, -6.0],
    "drift": 0.0,
    "relative_drift": 0.0,
    "decode_drift": 0.0,
    "clamp_floor_violation": 0.0,
    "rounding": 1e-3,
    "held": True,
    "dormant": 2.0,
    "reactivated": 0.0,
}


NEVER_MISSING = ("shows", "held", "dormant", "reactivated", "defended_slack")


def records(recovered=3, flips=4, n=10, **changes):
    """`flips` valid flips of `n` examples, of which `recovered` came back."""
    rows = [
        ExampleRecord(
            str(i),
            1.0,
            -1.0,
            SearchRecord(Status.RECOVERED.name, 3, 0.5, 0.5),
            HELD | {"shows": i < recovered} | changes,
        )
        for i in range(flips)
    ]
    return rows + [ExampleRecord(str(i), 1.0, 1.0) for i in range(flips, n)]


def make(rows=None, explained=0.875, better_by=0.0, **changes):
    fit = Fit("blocks.4.hook_resid_pre", explained, 31.5, 0.95, "blocks.4.hook_resid_pre", better_by, 512)
    verdict = decide(records() if rows is None else rows, [fit], 20.0, "float32", THREAT, PROVENANCE).to_dict()
    jsonschema.validate(verdict, SCHEMA)
    return verdict | changes


VERDICTS = {
    "RECOVERABLE": make(),
    "NOT_RECOVERED_AT_BUDGET": make(records(recovered=0)),
    "INCONCLUSIVE": make(records(constraint_residual=0.25)),
    "INVALID": make(explained=0.25),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_page_of_text_opens_with_the_verdict_and_its_meaning(name):
    text = to_text(VERDICTS[name])
    assert text.startswith(f"{name}: {MEANINGS[name][:40]}")
    assert max(map(len, text.splitlines())) <= WIDTH
    assert not re.search(r"None|nan|\{|\}|\[|\]", text)
    assert text.isascii()


def flat(text):
    return " ".join(text.split())


def test_its_figures_are_those_of_the_records():
    text = flat(to_text(VERDICTS["RECOVERABLE"]))
    for words in (
        "64 features at blocks.4.hook_resid_pre, set to -5 where active, at all positions",
        "explained variance 0.875, loss recovered 0.95, 31.5 features active on a token",
        "without the clamp 10 of 10 examples show the behavior",
        "with the clamp 6 of 10",
        "valid flips 4 show it without the clamp and not with it",
        # Wilson's interval of 3 in 4.
        "brought back 3 of 4 (75%; 95% interval 30% to 95%)",
        "norm at most 20, at the last position, after the clamp, orthogonal to the encoder columns",
        "norm 12 on average, 6.2% of the residual's; the clamp itself moves the residual by 475",
        "clamped features moved by at most 0.0e+00, their pre-activations by at most 3.0e-06",
        # Zero drift is true of any delta here, and the reader is told so.
        "100% of them sit below their threshold (median margin -5.00)",
        "whether this is specific to the behavior is unknown",
        f"not run {len(NOT_RUN)}: {NOT_RUN[0]}",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("INVALID", "fit: the SAE explains 0.250 of the variance at blocks.4.hook_resid_pre; at least 0.5 is asked"),
        ("INVALID", "FAILED 1: fit"),
        ("INCONCLUSIVE", "held: largest constraint residual 2.5e-01 (1e-05 allowed)"),
        ("INCONCLUSIVE", "FAILED 1: held"),
        ("NOT_RECOVERED_AT_BUDGET", "a larger budget or another search may"),
        ("NOT_RECOVERED_AT_BUDGET", "brought back 0 of 4"),
        ("RECOVERABLE", "FAILED none"),
    ],
)
def test_the_reason_is_named(name, words):
    assert words in flat(to_text(VERDICTS[name]))


@pytest.mark.parametrize("name", VERDICTS)
def test_never_robust_or_safe(name):
    for page in (to_text(VERDICTS[name]), to_html(VERDICTS[name], "")):
        assert not re.search(r"\b(robust|safe|secure)\b", page, re.IGNORECASE)


def test_nothing_to_search_is_said():
    text = flat(to_text(make([ExampleRecord("a", 1.0, 1.0)])))
    assert text.startswith("INVALID")
    assert "valid_flips: 0 of 1 examples show the behavior without the defense and not with it" in text
    assert "Search not run" in text


@pytest.mark.parametrize("missing", [name for name in HELD if name not in NEVER_MISSING])
def test_numbers_that_were_not_finite_are_not_shown_as_numbers(missing):
    """One example of four overflowed: whatever is missing, there is a page, and no figure is made up."""
    rows = records()
    gone = [None, None] if isinstance(HELD[missing], list) else None
    rows[1] = ExampleRecord("1", 1.0, -1.0, rows[1].search, rows[1].certificate | {missing: gone})
    verdict = make(rows)
    text = to_text(verdict)
    to_html(verdict, "")
    assert not re.search(r"\b(None|nan)\b", text)
    inconclusive = missing in ("slack", "norm", "constraint_residual", "drift", "preactivation_shift")
    assert verdict["verdict"] == ("INCONCLUSIVE" if inconclusive else "RECOVERABLE")
    if missing in ("drift", "preactivation_shift"):
        assert "not defined" in text


def test_a_fit_that_is_not_a_number_is_invalid():
    verdict = make(explained=float("nan"))
    assert verdict["verdict"] == "INVALID"
    assert verdict["fit"]["explained_variance"] is None
    assert "explained variance not defined" in to_text(verdict)


@pytest.mark.parametrize(("specific", "words"), [(True, "and that is specific"), (False, "but that is not specific")])
def test_specific_is_said_where_it_is_known(specific, words):
    assert words in flat(to_text(make(specific=specific)))


@pytest.mark.parametrize(
    ("mode", "value", "words"),
    [("set", 0.0, "set to 0"), ("scale", 0.5, "scaled by 0.5"), ("floor", 3.0, "kept at 3 or more")],
)
def test_clamps_in_words(mode, value, words):
    verdict = copy.deepcopy(make())
    clamp = verdict["threat_model"]["clamps"][0] | {"mode": mode, "value": value, "only_active": False}
    verdict["threat_model"]["clamps"] = [clamp]
    assert f"{words}, at all positions" in flat(to_text(verdict))


class Page(HTMLParser):
    """Checks that tags close, and gathers what is written and what would be fetched."""

    def __init__(self, source):
        super().__init__()
        self.open, self.text, self.tags, self.attributes = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("name", VERDICTS)
def test_the_page_is_whole_and_fetches_nothing(name):
    source = to_html(VERDICTS[name], "model: tiny\n")
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onload", "style"} & set(page.attributes)
    assert not re.search(r"https?:|url\(|@import", source)
    text = flat(" ".join(page.text))
    assert f"<h1>{name}</h1>" in source
    for reason in VERDICTS[name]["reasons"]:
        assert reason in text
    for gate in VERDICTS[name]["gates"]:
        assert gate["name"] in text
    for fact in ("recover 0.1.0, torch 2.9.0", "tiny (folder, sha256:00)", "model: tiny"):
        assert fact in text


def test_what_the_user_named_is_escaped():
    source = to_html(make(), "model: <script>alert(1)</script> & more")
    assert "<script>" not in source
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in source


def test_both_pages_have_the_same_figures():
    text = flat(to_text(make()))
    page = flat(" ".join(Page(to_html(make(), "")).text))
    for figure in ("3 of 4 (75%; 95% interval 30% to 95%)", "explained variance 0.875", "norm 12 on average"):
        assert figure in text
        assert figure in page
