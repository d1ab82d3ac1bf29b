"""What a person reads: verdicts of every kind, as text and as a page, without the JSON in hand."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources

import jsonschema
import pytest

from recover.defenses.utility import Utility
from recover.protocol.plan import Plan
from recover.protocol.verdict import Gathered, decide
from recover.report.html import to_html
from recover.report.rendering import WIDTH
from recover.report.text import seeds_to_text, to_text
from recover.report.words import prose
from recover.saes.fit import Fit
from tests.finished_runs import changed
from tests.hand_made import KNOWN, SHOWS_THROUGHOUT, at_smallest, certified, flip, missed, placebo

SCHEMA = json.loads(resources.files("recover.protocol").joinpath("verdict.schema.json").read_text())
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
    "delta_sites": ["blocks.15.hook_resid_pre"],
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
    "control_seed": 5,
    "device": "cpu",
    "dtype": "float32",
    "sae_sha256": {"tiny": "0" * 64},
    "model": "tiny (folder, sha256:00)",
    "phases": {"search": 0.75},
    "phase_seconds": 10.0,
    "seconds": 12.5,
}
HELD = {
    "score": 0.5,
    "norm": 12.0,
    "relative_norm": 0.0625,
    "displacement": 475.0,
    "constraint_residual": 2e-8,
    "preactivation_shift": (3e-6, 1e-6),
    "threshold_margin": (-4.0, -6.0),
    "drift": 0.0,
    "relative_drift": 0.0,
    "decode_drift": 0.0,
    "clamp_floor_violation": 0.0,
    "rounding": 1e-3,
    "dormant": 2.0,
    "reactivated": 0.0,
}
MEASURED = sorted({"slack", *HELD} - {"dormant", "reactivated"})
"""What may not be finite."""


def records(recovered=3, flips=4, n=10, **changes):
    """`flips` valid flips of `n` examples, of which `recovered` came back."""
    rows = [(flip if row < recovered else missed)(str(row), **HELD | changes) for row in range(flips)]
    rows = [at_smallest(row, displacement=475.0) for row in rows]
    return rows + [replace(SHOWS_THROUGHOUT, id=str(row)) for row in range(flips, n)]


def make(rows=None, explained=0.875, better_by=0.0, evidence=None, **changes):
    fit = Fit("blocks.4.hook_resid_pre", explained, 31.5, 0.95, "blocks.4.hook_resid_pre", better_by, 512)
    gathered = Gathered(records() if rows is None else rows, [fit], **{"utility": None} | (evidence or {}))
    verdict = decide(gathered, Plan(), 20.0, "float32", THREAT, PROVENANCE)
    jsonschema.validate(verdict.to_dict(), SCHEMA, cls=jsonschema.Draft202012Validator)
    return verdict.model_copy(update=changes)


FULL = {
    "utility": Utility(3.0, 3.25, 0.25, 100, False),
    "curve": (5.0, 20.0, 40.0),
    "undo": {
        "rate": 0.125,
        "cosine": 0.25,
        "scales": [{"scale": 1.0, "rate": 0.125, "averaged_rate": 0.0, "norm_mean": 3.5}],
    },
    "health": {"n": 4, "finite_differences": 4, "error_channel": 4},
    "placebo_features": [{"suppressed": 1, "base": 10, "recovered": 1}, {"suppressed": 4, "base": 10, "recovered": 0}],
    **KNOWN,
}
"""Evidence of the whole protocol."""


def controlled():
    """Of the four flips two have a placebo, one of which is not reached, and so it is under C1+."""
    first, second, *rest = records()
    return [
        replace(first, placebo=placebo(10.0), write_orthogonal=placebo(4.0)),
        replace(second, placebo=placebo(math.inf), write_orthogonal=placebo(math.inf)),
        *rest,
    ]


VERDICTS = {
    "RECOVERABLE": make(),
    "NOT_RECOVERED_AT_BUDGET": make(records(recovered=0)),
    "INCONCLUSIVE": make(records(constraint_residual=0.25)),
    "INVALID": make(explained=0.25),
    "RECOVERABLE, all run": make(controlled(), evidence=FULL),
    "NOT_RECOVERED_AT_BUDGET, all run": make(records(recovered=0), evidence=FULL),
    "RECOVERABLE, transfer refused": make(evidence={"transfer": {"refused": "several sites are clamped"}}),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_page_of_text_opens_with_the_verdict_and_its_meaning(name):
    text, verdict = to_text(VERDICTS[name]), name.partition(",")[0]
    assert text.startswith(f"{verdict}: {prose().meanings[verdict][:40]}")
    assert max(map(len, text.splitlines())) <= WIDTH
    assert not re.search(r"None|nan|\{|\}|\[|\]", text)
    assert text.isascii()


def flat(text):
    return " ".join(text.split())


def test_its_figures_are_those_of_the_records():
    text = flat(to_text(VERDICTS["RECOVERABLE"]))
    for words in (
        "64 features at blocks.4.hook_resid_pre, set to -5 where active, at all positions",
        "explained variance 0.875, loss recovered 0.95, 31.5 features active per token",
        "without the clamp 10 of 10 examples show the behavior",
        "with the clamp 6 of 10 examples show the behavior",
        "valid flips 4 (shown without the clamp, suppressed with it); all rates below are over these",
        # Wilson's interval of 3 in 4.
        "recovered 3 of 4 (75%; 95% interval 30% to 95%)",
        "norm at most 20, at the last position, after the clamp, orthogonal to the encoder columns",
        "mean norm 12, 6.2% of the residual norm; the clamp itself displaces the residual by 475",
        "clamped features drifted by at most 0.0e+00, their pre-activations by at most 3.0e-06",
        # Zero drift is true of any delta here, and the reader is told so.
        "100% of them are below their threshold (median margin -5.00)",
        "whether the answers can still be read from the defended state is unknown",
        # Of 3, 3, 3 and 30, and the residual's norm is 20.
        "smallest norm median 3, quartiles 3 and 30; median ratio to the residual norm 15.0%",
        "found by smallest_norm 4",
        "not run 3: utility, finite_differences, error_channel",
    ):
        assert words in text, words
    assert "rate by budget" not in text


def test_the_whole_protocol_is_in_the_page():
    text = flat(to_text(VERDICTS["RECOVERABLE, all run"]))
    for words in (
        "RECOVERABLE: the behavior can be recovered with the clamp held; the answers can still be read from",
        "neutral text loss 3.00 nats per token without the defense, 3.25 with it",
        "rate by budget 5: 75%, 20: 75%, 40: 100%",
        "an unrelated target is reached on 50% of 2 examples (median smallest norm not reached), the own target on "
        "100% (3)",
        "0% of random perturbations with the budget's norm recover the behavior; on 0 of 4 examples at least one does",
        "suppresses the behavior on 25% of examples (0% to 100% over draws); 20% of these are recovered",
        "reversing the admissible part of the clamp's displacement recovers at most 12%; its cosine with the "
        "perturbations found is 0.25",
        "C1+ also orthogonal to the directions along which the clamp writes: 50% recovered, median smallest norm not "
        "reached",
        "with the clamp off, the search recovers 100%; with the clamp on and no budget, 100%",
        "norm 60 60% of the residual norm: 95% of unseen flips right again; random directions 1%, undoing the clamp 7%",
        "content read: flips right again 100% of 24 (86% to 100%), still right 100% of 6 (61% to 100%); answers dealt "
        "at random show 2.0%; under C1+ 98% right again, fitted to other answers 5%",
        "rule easier: own rule at a median norm of 1; another rule at 2 (holds on 100% of 24 (86% to 100%))",
        "not run none",
    ):
        assert words in text, words


def test_controls_that_were_not_run_are_left_out():
    text = flat(to_text(VERDICTS["RECOVERABLE"]))
    for name in ("placebo target", "random features", "undoing the clamp", "C1+", "neutral text"):
        assert name not in text, name
    assert "positive controls with the clamp off, the search recovers 100%" in text
    assert "not run there was nothing to run it on" in text
    assert "not run several sites are clamped" in flat(to_text(VERDICTS["RECOVERABLE, transfer refused"]))


def test_seeds_are_counted_and_stand_in_a_table():
    """Two that say the same come first; what was not run is a dash, what was not reached says so."""
    content, again = (make(controlled(), evidence=FULL) for _ in range(2))
    again = changed(again, provenance={"control_seed": 6})
    failing = make(records(constraint_residual=0.25))
    refused = VERDICTS["RECOVERABLE, transfer refused"]
    lines = seeds_to_text([failing, content, refused, again]).splitlines()
    known, unknown = (f"RECOVERABLE, content {word}, rule {word}" for word in ("true", "unknown"))
    assert lines[0] == f"2 of 4 seeds: {known}"
    assert set(lines[1:3]) == {"1 of 4 seeds: INCONCLUSIVE", f"1 of 4 seeds: {unknown}"}
    assert [re.split(r"  +", line.strip()) for line in lines[4:]] == [
        ["seed", "recovered", "unseen", "placebo norm / own", "verdict"],
        ["5", "3 of 4", "-", "-", "INCONCLUSIVE"],
        ["5", "3 of 4", "100%", "not reached / 3", known],
        ["5", "3 of 4", "-", "-", unknown],
        ["6", "3 of 4", "100%", "not reached / 3", known],
    ]
    # The columns begin where their names do.
    columns = [lines[4].index(name) for name in ("recovered", "unseen", "placebo", "verdict")]
    for line in lines[5:]:
        assert all(line[at - 1] == " " and line[at] != " " for at in columns)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("INVALID", "fit: the SAE explains 0.250 of the variance at blocks.4.hook_resid_pre; at least 0.5 is required"),
        ("INVALID", "FAILED 2: fit, suppression"),
        ("INCONCLUSIVE", "held: largest constraint residual 2.5e-01 (tolerance 1e-05)"),
        ("INCONCLUSIVE", "FAILED 2: suppression, held"),
        ("NOT_RECOVERED_AT_BUDGET", "a larger budget or another search may find one"),
        ("NOT_RECOVERED_AT_BUDGET", "recovered 0 of 4"),
        ("RECOVERABLE", "FAILED 1: suppression"),
    ],
)
def test_the_reason_is_named(name, words):
    assert words in flat(to_text(VERDICTS[name]))


@pytest.mark.parametrize("name", VERDICTS)
def test_never_robust_or_safe(name):
    for page in (to_text(VERDICTS[name]), to_html(VERDICTS[name], "")):
        assert not re.search(r"\b(robust|safe|secure)\b", page, re.IGNORECASE)


def test_nothing_to_search_is_said():
    text = flat(to_text(make([SHOWS_THROUGHOUT])))
    assert text.startswith("INVALID")
    assert "valid_flips: 0 of 1 examples show the behavior without the defense and lose it with it" in text
    assert "Search not run" in text


@pytest.mark.parametrize("missing", MEASURED)
def test_numbers_that_were_not_finite_are_not_shown_as_numbers(missing):
    """One example of four overflowed: whatever is missing, there is a page, and no figure is made up."""
    rows = records()
    gone = {missing: (None, None) if isinstance(getattr(rows[1].certificate, missing), tuple) else None}
    rows[1] = certified(rows[1], **gone)
    if hasattr(rows[1].smallest, missing):
        rows[1] = at_smallest(rows[1], **gone)
    verdict = make(rows, evidence=FULL)
    text = to_text(verdict)
    to_html(verdict, "")
    assert not re.search(r"\b(None|nan)\b", text)
    inconclusive = missing in ("slack", "norm", "constraint_residual", "drift", "preactivation_shift")
    assert verdict.verdict == ("INCONCLUSIVE" if inconclusive else "RECOVERABLE")
    if missing in ("drift", "preactivation_shift"):
        assert "not defined" in text


def test_a_fit_that_is_not_a_number_is_invalid():
    verdict = make(explained=float("nan"))
    assert verdict.verdict == "INVALID"
    assert verdict.fit.explained_variance is None
    assert "explained variance not defined" in to_text(verdict)


@pytest.mark.parametrize(
    ("content", "rule", "words"),
    [
        (True, False, "the answers can still be read from the defended state; other rules are imposed as easily"),
        (
            False,
            None,
            "the answers cannot be read from the defended state; whether the behavior's own rule survived is",
        ),
        (None, True, "is unknown; the behavior's own rule comes back more easily than other rules"),
    ],
)
def test_what_is_known_is_said(content, rule, words):
    assert words in flat(to_text(make(content=content, rule=rule)))


@pytest.mark.parametrize(
    ("mode", "value", "words"),
    [("set", 0.0, "set to 0"), ("scale", 0.5, "scaled by 0.5"), ("floor", 3.0, "kept at 3 or more")],
)
def test_clamps_in_words(mode, value, words):
    clamp = THREAT["clamps"][0] | {"mode": mode, "value": value, "only_active": False}
    verdict = changed(make(), threat_model={"clamps": [clamp]})
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
    assert f"<h1>{name.partition(',')[0]}</h1>" in source
    for reason in VERDICTS[name].reasons:
        assert reason in text
    for gate in VERDICTS[name].gates:
        assert gate.name in text
    for fact in ("recover 0.1.0, torch 2.9.0", "tiny (folder, sha256:00)", "model: tiny"):
        assert fact in text


def test_what_the_user_named_is_escaped():
    source = to_html(make(), "model: <script>alert(1)</script> & more")
    assert "<script>" not in source
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in source


def test_both_pages_have_the_same_figures():
    text = flat(to_text(make()))
    page = flat(" ".join(Page(to_html(make(), "")).text))
    for figure in ("3 of 4 (75%; 95% interval 30% to 95%)", "explained variance 0.875", "mean norm 12"):
        assert figure in text
        assert figure in page
    whole = make(controlled(), evidence=FULL)
    page = flat(" ".join(Page(to_html(whole, "")).text))
    for figure in (
        "5: 75%, 20: 75%, 40: 100%",
        "reached on 50% of 2",
        "on 25% of examples",
        "95% of unseen flips right again",
    ):
        assert figure in flat(to_text(whole))
        assert figure in page
