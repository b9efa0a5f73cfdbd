"""Questions to be answered with yes or no, such as POPE's about objects: accuracy, and POPE's measures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hones_lens.data import Example
from hones_lens.tasks.base import Task, example_error
from hones_lens.tasks.metrics import yes_no_accuracy, yes_no_shares, yes_no_statistics
from hones_lens.tasks.questions import most_frequent_answer, question_prompt


class YesNo(Task):
    """Reads `question` and `answers`, of which the most frequent is yes or no; asks as `vqa` does.

    What the model says is read as POPE's own evaluation reads it (see `yes_no_metrics`): a first sentence
    with the word no or not is a no, and anything else a yes.
    """

    name = "yes-no"
    metric_name = "accuracy"
    examples_of = "vqa"

    def prompt(self, example: Example) -> str:
        return question_prompt(example)

    def target(self, example: Example) -> str:
        """`Yes` or `No`."""
        return _label(example).capitalize()

    def score(self, prediction: str, example: Example) -> float:
        """1 if the model says what is right, else 0."""
        return float(yes_no_accuracy(self.statistics(prediction, example)))

    def statistics(self, prediction: str, example: Example) -> np.ndarray:
        return yes_no_statistics(prediction, _label(example))

    def metric(self, statistics: np.ndarray) -> np.ndarray:
        return yes_no_accuracy(statistics)

    def measures(self, statistics: np.ndarray) -> dict[str, float]:
        """POPE's five measures, by the names of `yes_no_metrics`."""
        return yes_no_shares(statistics)

    def chance(self, examples: Sequence[Example]) -> float:
        """The accuracy of always giving the more frequent answer."""
        share = float(np.mean([_label(example) == "yes" for example in examples]))
        return max(share, 1 - share)


def _label(example: Example) -> str:
    answer = most_frequent_answer(example).lower().removesuffix(".")
    if answer not in ("yes", "no"):
        raise example_error(example, f"the answer {answer!r}, neither yes nor no")
    return answer


TASK = YesNo()
