"""VQA scored by ANLS, as DocVQA is: values worked out by hand."""

from __future__ import annotations

import pytest

from hones_lens.data.examples import Example
from hones_lens.data.shapes import Scene
from hones_lens.tasks.registry import load_task

BLANK = Scene((), "ACE", 0, 2, 0, 110)
TASK = load_task("vqa-anls")


def example(*answers: str) -> Example:
    return Example("a", BLANK, question="what is the value?", answers=answers)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("0.28", 1.0),
        ("  0.28 ", 1.0),
        ("0.29", 0.75),  # one of four characters is another
        ("0.28%", 0.8),  # one of five is too many
        ("0.1", 0.5),  # two edits in four: the threshold itself counts
        ("12.5", 0.0),  # three edits in four: 0.25, below the threshold
        ("the value is 0.28", 0.0),
    ],
)
def test_the_similarity_counts_from_one_half_on(said: str, expected: float) -> None:
    assert TASK.score(said, example("0.28")) == pytest.approx(expected)


def test_the_nearest_of_the_accepted_answers_counts() -> None:
    """DocVQA: sixteen letters, one wrong, against an answer of other words."""
    asked = example("T.F. Riehl", "ITC Limited Ltd.")
    assert TASK.score("itc limited ltd,", asked) == pytest.approx(15 / 16)
    assert TASK.aggregate(["itc limited ltd,", "T.F. Riehl"], [asked, asked]) == pytest.approx(31 / 32)


def test_it_asks_as_vqa_does_and_needs_an_answer() -> None:
    assert TASK.prompt(example("a")) == load_task("vqa").prompt(example("a"))
    assert TASK.target(example("a", "b", "b")) == "b"
    with pytest.raises(ValueError, match="'a' has no answers"):
        TASK.score("a", example(""))
