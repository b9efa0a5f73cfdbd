"""Visual question answering: a short phrase, VQA accuracy."""

from __future__ import annotations

from hones_lens.data import Example
from hones_lens.tasks.base import Task
from hones_lens.tasks.metrics import vqa_accuracy
from hones_lens.tasks.questions import accepted_answers, most_frequent_answer, question_prompt


class VQA(Task):
    """Reads `question` and `answers` (one, or the ten of the official sets)."""

    name = "vqa"
    metric_name = "accuracy"

    def prompt(self, example: Example) -> str:
        return question_prompt(example)

    def target(self, example: Example) -> str:
        """The most frequent answer; of equally frequent ones the first."""
        return most_frequent_answer(example)

    def score(self, prediction: str, example: Example) -> float:
        """VQA accuracy of one answer, in 0-1."""
        accepted_answers(example)
        return vqa_accuracy(prediction, example.answers)


TASK = VQA()
