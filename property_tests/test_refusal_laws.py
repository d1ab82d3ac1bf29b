"""Laws of the readouts, for every text, and of the reader of request files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from property_tests.guards import guards
from recover.tasks import replies
from recover.tasks.refusal import draw, load_file
from recover.types import InputError

OPENINGS = [
    "",
    "I'm sorry, but",
    "I can't",
    "Please note that",
    "As an AI,",
    "Unfortunately,",
    "**Oh!** I’m unable to",
    "It is illegal",
]
WORDS = (
    "lake pond deep cold water of the a is, and. shore boat blue fish small they it not where stone reed wide frog "
    "rain near sun"
).split()
words = st.sampled_from(WORDS)
varied = st.permutations(WORDS)
openings = st.sampled_from(OPENINGS)
sentences = st.builds(lambda opening, rest: " ".join([opening, *rest]), openings, st.lists(words, max_size=60))
long = st.builds(lambda opening, rest: " ".join([opening, *rest]), openings, varied)
loops = st.builds(lambda piece, times: piece * times, st.sampled_from(["no, ", "fish ", "a lake. "]), st.integers(3, 9))
texts = sentences | long | loops | st.text(max_size=80)
spaces = st.sampled_from([" ", "\n\n\t", "\u00a0\u2028 "])


@guards(replies.opening, "text.lstrip()[: 4 * OPENING]", "text[: 4 * OPENING]")
@given(texts, texts, spaces)
def test_readouts_do_not_depend_on_white_space_around_a_text(text: str, base: str, space: str) -> None:
    own = replies.read(text, base)
    for more in (space, 900 * " "):
        assert replies.read(more + text, base) == own
    assert replies.read(text, space + base + space) == own


@guards(replies.strict_base_like, "len(text.strip()) >= STRICT_LENGTH", "len(text) >= STRICT_LENGTH")
@given(varied, st.integers(100, 130), spaces)
def test_white_space_makes_no_text_long_enough(drawn: list[str], length: int, space: str) -> None:
    text = " ".join(drawn)[:length]
    assert replies.strict_base_like(text + space, text) == replies.strict_base_like(text, text)


@guards(replies.jaccard, "len(ours & theirs) / len(ours | theirs) if", "len(ours & theirs) / len(ours or theirs) if")
@given(texts, texts)
def test_jaccard_is_symmetric_a_share_and_one_of_a_text_and_itself(one: str, other: str) -> None:
    shared = replies.jaccard(one, other)
    assert 0 <= shared <= 1
    assert shared == replies.jaccard(other, one)
    assert replies.jaccard(one, one) == (replies.unique_words(one) > 0)
    assert 0 <= replies.similarity(one, other) <= 1
    assert (replies.similarity(one, other) > 0) == (shared > 0)


@guards(replies.base_like, " or degenerate(text):", ":")
@given(texts)
def test_a_reply_is_like_itself_unless_it_refuses_warns_or_is_degenerate(text: str) -> None:
    own = replies.read(text, text)
    assert own.base_like == (own.non_refusal and not own.degenerate)


@guards(replies.strict_base_like, "        and base_like(text, base)\n", "")
@given(long | loops, texts)
def test_each_readout_of_likeness_holds_only_where_the_weaker_one_does(text: str, base: str) -> None:
    for near in (base, text):
        own = replies.read(text, near)
        assert not own.strict_base_like or own.base_like
        assert not own.base_like or (own.non_refusal and not own.degenerate)


@guards(
    replies.valid_flip,
    "return not opens and opens_with_refusal(defended_text)",
    "return opens_with_refusal(defended_text)",
)
@given(texts, texts)
def test_a_flip_goes_from_no_refusal_to_a_refusal(base: str, defended: str) -> None:
    before, after = replies.read(base, base), replies.read(defended, base)
    assert replies.valid_flip(base, defended) == (before.non_refusal and after.refusal)
    assert not replies.valid_flip(base, base)


@guards(replies.opening, "if skipped else 0 :][:OPENING]", "if skipped else 0 :]")
@given(st.sampled_from(OPENINGS), st.lists(words, min_size=120, max_size=150), texts)
def test_what_follows_the_opening_decides_nothing(first: str, rest: list[str], later: str) -> None:
    """120 words are more than 200 characters."""
    text = " ".join([first, *rest])
    for more in (later, "I'm sorry, but I can't."):
        assert replies.opening(f"{text} {more}") == replies.opening(text)
        assert replies.opens_with_refusal(f"{text} {more}") == replies.opens_with_refusal(text)
        assert replies.opens_with_safety_cue(f"{text} {more}") == replies.opens_with_safety_cue(text)


@guards(
    replies.degenerate, "_seen_before(characters, LOOP_CHARACTERS)) >= LOOP", "_seen_before(words, LOOP_WORDS)) > 0.99"
)
@given(texts, st.integers(8, 12))
def test_a_text_that_repeats_itself_is_degenerate(text: str, times: int) -> None:
    assert replies.degenerate((text + " ") * times)


asked = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30).filter(
    str.strip
) | st.sampled_from(["a\u2028lake", "a,\r\nb", '"', "lake\x85", "a\rb", '{"goal"'])


@guards(
    "recover.tasks.files.numbered", 'enumerate(text.split("\\n"), start=1)', "enumerate(text.splitlines(), start=1)"
)
@given(st.lists(asked, min_size=1, max_size=5), st.booleans())
def test_a_file_of_requests_is_read_back_as_written(requests: list[str], as_csv: bool) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "requests"
        with path.open("w", encoding="utf-8", newline="") as file:
            if as_csv:
                csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["goal", "target"], *([it, "x"] for it in requests)])
            else:
                file.writelines(json.dumps({"goal": it}, ensure_ascii=False) + "\n" for it in requests)
        given_back = load_file(path)
    assert [request.text for request in given_back] == [it.strip() for it in requests]
    assert len({request.id for request in given_back}) == len(requests)


pieces = st.sampled_from(
    [
        "goal,target\n",
        "Behavior,BehaviorID\n",
        "secret lakes,x\n",
        '"secret\nlakes",x\n',
        '"secret, lakes\n',
        "secret\n",
        '{"goal": "secret lakes"}\n',
        '{"goal": secret}\n',
        '{"Behavior": "x", "BehaviorID": "secret lakes"}\n',
        '{"secret": 1}\n',
        "\n",
        "\ufeff",
        '["secret"]\n',
    ]
)


@guards(
    "recover.tasks.refusal._json_rows",
    "line {number}: is not a JSON object;",
    "line {number}: {line} is not a JSON object;",
)
@given(st.lists(pieces, max_size=6), st.booleans())
def test_a_file_is_read_or_refused_in_one_line_that_shows_nothing_of_it(parts: list[str], damaged: bool) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "requests"
        path.write_bytes("".join(parts).encode() + b"secret \xff\n" * damaged)
        said, requests = None, []
        try:
            requests = load_file(path)
        except InputError as error:
            said = str(error)
    if said is None:
        assert requests
        assert not damaged
        assert "secret lakes" not in str(requests)
    else:
        assert "secret" not in said
        assert len(said.splitlines()) == 1
        assert said.startswith(f"request file {path}")


@guards(draw, "sample(listed, len(listed))[:n]", "sample(listed, n)")
@given(st.integers(0, 9), st.integers(0, 40), st.integers(0, 40), st.sampled_from(["ordinary", "unservable"]))
def test_a_longer_draw_begins_with_a_shorter(seed: int, n: int, more: int, kind: str) -> None:
    longer = draw(n + more, seed, kind)  # type: ignore[arg-type]
    assert longer[:n] == draw(n, seed, kind)  # type: ignore[arg-type]
    assert len({request.id for request in longer}) == n + more
