"""Laws of multiple choice: whatever the order, the letter stands where the right answer does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from property_tests.guards import guards
from recover.tasks.choice import ORDERS, ROTATIONS, order_name, prompt
from recover.tasks.questions import LETTERS, Question

WORDS = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=6)


@st.composite
def questions(draw: st.DrawFn) -> Question:
    first, second, third, fourth = draw(st.lists(WORDS, min_size=4, max_size=4, unique=True))
    return Question("drawn", draw(WORDS) + "?", (first, second, third, fourth), draw(st.integers(0, 3)))


@guards(prompt, "question.choices[place]", "question.choices[order.index(place)]")
@given(questions(), st.sampled_from(ORDERS))
def test_the_letter_follows_the_answer(question: Question, order: tuple[int, ...]) -> None:
    first, *listed, last = prompt(question, order).split("\n")
    assert (first, last) == (question.question, "Answer:")
    letter = LETTERS[order.index(question.answer)]
    assert f"{letter}. {question.choices[question.answer]}" in listed
    assert sorted(line[3:] for line in listed) == sorted(question.choices)
    assert [line[:3] for line in listed] == [f"{letter}. " for letter in LETTERS]


@guards(order_name, "for place in order", "for place in sorted(order)")
@guards("recover.tasks.choice.ROTATIONS", "*range(first)) for", "*reversed(range(first))) for")
@given(questions())
def test_the_24_prompts_are_different_and_balanced(question: Question) -> None:
    assert len({prompt(question, order) for order in ORDERS}) == 24
    assert len({order_name(order) for order in ORDERS}) == 24
    for orders in (ORDERS, ROTATIONS):
        places = [order.index(question.answer) for order in orders]
        assert {places.count(place) for place in range(4)} == {len(orders) // 4}
