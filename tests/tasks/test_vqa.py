from __future__ import annotations

import pytest

from hones_lens.data.examples import Example
from hones_lens.data.shapes import Scene
from hones_lens.tasks.vqa import TASK

BLANK = Scene((), "ACE", 0, 2, 0, 110)


def example(question: str = "what color?", answers: tuple[str, ...] = ("red",)) -> Example:
    return Example("gqa/7", BLANK, question=question, answers=answers)


def test_prompt():
    expected = "Question: what color?\nAnswer the question with a short phrase."
    assert TASK.prompt(example()) == TASK.target_prompt(example()) == expected
    assert TASK.prompts(example()) == [expected]


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_raises_with_the_id(question):
    with pytest.raises(ValueError, match="'gqa/7' has an empty question"):
        TASK.prompts(example(question))


@pytest.mark.parametrize("answers", [(), ("", " ")])
def test_no_answers_raises_with_the_id(answers):
    for read in (TASK.target, lambda e: TASK.score("red", e), lambda e: TASK.statistics("red", e)):
        with pytest.raises(ValueError, match="'gqa/7' has no answers"):
            read(example(answers=answers))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (("red",), "red"),
        (("loafer", "sneakers", "dress shoes", "leather", "sneakers"), "sneakers"),
        (("b", "a", "a", "b"), "b"),
        (("", "", "dark red "), "dark red"),
    ],
)
def test_the_target_is_the_most_frequent_answer(answers, expected):
    assert TASK.target(example(answers=answers)) == expected


def test_a_substring_is_no_match():
    assert TASK.score("red", example(answers=("red and blue",))) == 0.0
    assert TASK.score("It is red", example()) == 0.0
    assert TASK.score("Red.", example()) == 1.0


def test_all_ten_answers_are_read():
    answers = ("red",) * 2 + ("blue",) * 8
    assert TASK.score("red", example(answers=answers)) == pytest.approx(0.6)
    both = TASK.aggregate(["red", "blue"], [example(answers=answers)] * 2)
    assert both == pytest.approx((0.6 + 1.0) / 2)
