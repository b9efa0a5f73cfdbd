"""Visual question answering as DocVQA is scored: a short phrase, ANLS."""

from __future__ import annotations

from hones_lens.data import Example
from hones_lens.tasks.base import Task
from hones_lens.tasks.metrics import anls
from hones_lens.tasks.questions import accepted_answers, most_frequent_answer, question_prompt


class VQAByANLS(Task):
    """Reads `question` and `answers`; asks as `vqa` does.

    DocVQA and other sets of texts in pictures are scored so (Biten et al. 2019, Mathew et al. 2021): an
    answer counts by its similarity to the nearest of the accepted ones.
    """

    name = "vqa-anls"
    metric_name = "ANLS"
    examples_of = "vqa"

    def prompt(self, example: Example) -> str:
        return question_prompt(example)

    def target(self, example: Example) -> str:
        """The most frequent answer; of equally frequent ones the first."""
        return most_frequent_answer(example)

    def score(self, prediction: str, example: Example) -> float:
        """ANLS of one answer: the largest similarity to an accepted one in 0-1, or 0 if below one half."""
        return max(anls(prediction, answer) for answer in accepted_answers(example))


TASK = VQAByANLS()
