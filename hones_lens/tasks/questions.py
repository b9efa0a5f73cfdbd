"""What the tasks that ask a question share."""

from __future__ import annotations

from collections import Counter

from hones_lens.data import Example
from hones_lens.tasks.base import example_error


def question_prompt(example: Example) -> str:
    """The paper's prompt of VQA.

    Raises:
        ValueError: An empty question; names the example.
    """
    if not example.question.strip():
        raise example_error(example, "an empty question")
    return f"Question: {example.question}\nAnswer the question with a short phrase."


def accepted_answers(example: Example) -> list[str]:
    """The answers that are not empty; raises ValueError, naming the example, if there is none."""
    answers = [answer.strip() for answer in example.answers if answer.strip()]
    if not answers:
        raise example_error(example, "no answers")
    return answers


def most_frequent_answer(example: Example) -> str:
    """The most frequent answer; of equally frequent ones the first."""
    return Counter(accepted_answers(example)).most_common(1)[0][0]
