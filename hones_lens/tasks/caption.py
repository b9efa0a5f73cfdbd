"""Captioning: one sentence, corpus BLEU-4."""

from __future__ import annotations

import numpy as np

from hones_lens.data import Example
from hones_lens.tasks.base import Task, example_error
from hones_lens.tasks.metrics import bleu_statistics, corpus_bleu, sentence_bleu

_N_TARGET_REFERENCES = 5


class Caption(Task):
    """Reads `references`."""

    name = "caption"
    metric_name = "BLEU-4"
    is_mean = False
    idf = True

    def prompt(self, example: Example) -> str:
        return "Describe the image in one sentence."

    def target(self, example: Example) -> str:
        """Up to five references, joined by a space (HONES eq. H2)."""
        return " ".join(_references(example)[:_N_TARGET_REFERENCES])

    def answer(self, example: Example) -> str:
        """The first reference."""
        return _references(example)[0]

    def score(self, prediction: str, example: Example) -> float:
        """Smoothed sentence BLEU of one caption, in 0-1; `aggregate` is corpus BLEU instead."""
        return sentence_bleu(prediction, _references(example))

    def statistics(self, prediction: str, example: Example) -> np.ndarray:
        return bleu_statistics(prediction, _references(example))

    def metric(self, statistics: np.ndarray) -> np.ndarray:
        return corpus_bleu(statistics)


def _references(example: Example) -> list[str]:
    references = [reference.strip() for reference in example.references]
    if not references or not all(references):
        raise example_error(example, "no references" if not references else "an empty reference")
    return references


TASK = Caption()
