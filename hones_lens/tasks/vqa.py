"""Visual question answering: a short phrase, VQA accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from hones_lens.data import Example
from hones_lens.tasks.base import lacking, mean_metric, mean_statistics, summed_metric
from hones_lens.tasks.metrics import vqa_accuracy


class VQA:
    """Reads `question` and `answers` (one, or the ten of the official sets)."""

    name = "vqa"
    metric_name = "accuracy"
    is_mean = True
    ranks = False
    idf = False

    def prompt(self, example: Example) -> str:
        if not example.question.strip():
            raise lacking(example, "an empty question")
        return f"Question: {example.question}\nAnswer the question with a short phrase."

    def prompts(self, example: Example) -> list[str]:
        return [self.prompt(example)]

    def target_prompt(self, example: Example) -> str:
        return self.prompt(example)

    def target(self, example: Example) -> str:
        """The most frequent answer; the first of those that are equally frequent."""
        return Counter(_answers(example)).most_common(1)[0][0]

    def answer(self, example: Example) -> str:
        return self.target(example)

    def score(self, prediction: str, example: Example) -> float:
        """VQA accuracy of one answer, in 0-1."""
        _answers(example)
        return vqa_accuracy(prediction, example.answers)

    def statistics(self, prediction: str, example: Example) -> np.ndarray:
        return mean_statistics(self.score(prediction, example))

    def metric(self, statistics: np.ndarray) -> np.ndarray:
        return mean_metric(statistics)

    def aggregate(self, predictions: Sequence[str], examples: Sequence[Example]) -> float:
        return summed_metric(self, predictions, examples)


def _answers(example: Example) -> list[str]:
    answers = [answer.strip() for answer in example.answers if answer.strip()]
    if not answers:
        raise lacking(example, "no answers")
    return answers


TASK = VQA()
