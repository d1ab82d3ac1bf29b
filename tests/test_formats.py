"""Number formats and the prose that stands around them."""

import math
from typing import get_args

import pytest

import recover.report
from recover.numerics.formats import counted, norm, number, percent, tiny
from recover.report.evidence_figures import BUILDERS
from recover.report.rendering import environment, misses
from recover.report.words import FigureKey, SectionKey, prose


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [
        (0.4216, 0, "42%"),
        (0.4216, 1, "42.2%"),
        (0.0042, 0, "0.42%"),
        (-0.1, 0, "-10%"),
        (-2e-7, 0, "0%"),
        (-0.0004, 1, "-0.04%"),
        (-0.0, 2, "0%"),
        (0.0, 2, "0%"),
        (None, 0, "not defined"),
        (math.nan, 0, "not defined"),
    ],
)
def test_percentages_and_none_of_minus_zero(share, digits, text):
    assert percent(share, digits) == text


def test_what_is_no_number_is_said_in_words():
    assert (number(None), number(math.nan), number(math.inf)) == ("not defined", "not defined", "not reached")
    assert (norm(None), norm(12.345), tiny(None)) == ("not reached", "12.3", "not defined")
    assert (counted(0, 0), counted(1, 4), counted(1, 4, (0.05, 0.7), "")) == (
        "-",
        "1 of 4 (25%)",
        "1 of 4 (25%; 5% to 70%)",
    )


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (0.1, "underestimates the effect by 10%"),
        (-0.5, "overestimates the effect by 50%"),
        (-2e-7, "matches the effect"),
        (None, "cannot be compared with the effect"),
    ],
)
def test_a_signed_gap_is_told_in_words(gap, words):
    assert misses(gap) == words


def test_every_key_has_its_prose_and_every_template_opens():
    words = prose()
    assert set(words.figures) == set(BUILDERS) == set(get_args(FigureKey))
    assert set(words.sections) == set(get_args(SectionKey))
    assert {key for chapter in words.chapters.values() for key in chapter.figures} == set(words.figures)
    assert {key for chapter in words.chapters.values() for key in chapter.sections} == set(words.sections)
    for name in environment("txt").list_templates(["j2"]):
        environment("txt").get_template(name)


def test_what_is_exported_is_there_and_no_name_is_a_modules():
    modules = {
        "answers",
        "comparison",
        "figures",
        "finished",
        "html",
        "markdown",
        "paper",
        "published",
        "text",
        "words",
    }
    assert not modules & set(recover.report.__all__)
    assert all(hasattr(recover.report, name) for name in recover.report.__all__)
