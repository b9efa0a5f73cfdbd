"""Reading text: transcribe what the blue box holds, ANLS."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hones_lens.data import Example
from hones_lens.tasks.base import lacking, mean_metric, mean_statistics, summed_metric
from hones_lens.tasks.metrics import anls


class OCR:
    """Reads `text`; the box is drawn on the image already."""

    name = "ocr"
    metric_name = "ANLS"
    is_mean = True
    ranks = False
    idf = False

    def prompt(self, example: Example) -> str:
        return "Transcribe the text inside the blue box.\nOutput text only."

    def prompts(self, example: Example) -> list[str]:
        return [self.prompt(example)]

    def target_prompt(self, example: Example) -> str:
        return self.prompt(example)

    def target(self, example: Example) -> str:
        if not example.text.strip():
            raise lacking(example, "an empty text")
        return example.text

    def answer(self, example: Example) -> str:
        return self.target(example)

    def score(self, prediction: str, example: Example) -> float:
        """Similarity of one transcription in 0-1, and 0 below one half."""
        return anls(prediction, self.target(example))

    def statistics(self, prediction: str, example: Example) -> np.ndarray:
        return mean_statistics(self.score(prediction, example))

    def metric(self, statistics: np.ndarray) -> np.ndarray:
        return mean_metric(statistics)

    def aggregate(self, predictions: Sequence[str], examples: Sequence[Example]) -> float:
        return summed_metric(self, predictions, examples)


TASK = OCR()
