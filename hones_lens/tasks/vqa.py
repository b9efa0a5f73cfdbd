"""Visual question answering: a short phrase, VQA accuracy."""

from __future__ import annotations

from collections import Counter

from hones_lens.data import Example
from hones_lens.tasks.base import Task, example_error
from hones_lens.tasks.metrics import vqa_accuracy


class VQA(Task):
    """Reads `question` and `answers` (one, or the ten of the official sets)."""

    name = "vqa"
    metric_name = "accuracy"

    def prompt(self, example: Example) -> str:
        if not example.question.strip():
            raise example_error(example, "an empty question")
        return f"Question: {example.question}\nAnswer the question with a short phrase."

    def target(self, example: Example) -> str:
        """The most frequent answer; of equally frequent ones the first."""
        return Counter(_answers(example)).most_common(1)[0][0]

    def score(self, prediction: str, example: Example) -> float:
        """VQA accuracy of one answer, in 0-1."""
        _answers(example)
        return vqa_accuracy(prediction, example.answers)


def _answers(example: Example) -> list[str]:
    answers = [answer.strip() for answer in example.answers if answer.strip()]
    if not answers:
        raise example_error(example, "no answers")
    return answers


TASK = VQA()
