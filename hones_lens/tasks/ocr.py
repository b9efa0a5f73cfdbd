"""Reading text: transcribe what the blue box holds, ANLS."""

from __future__ import annotations

from hones_lens.data import Example
from hones_lens.tasks.base import Task, lacking
from hones_lens.tasks.metrics import anls


class OCR(Task):
    """Reads `text`; the box is drawn on the image already."""

    name = "ocr"
    metric_name = "ANLS"

    def prompt(self, example: Example) -> str:
        return "Transcribe the text inside the blue box.\nOutput text only."

    def target(self, example: Example) -> str:
        if not example.text.strip():
            raise lacking(example, "an empty text")
        return example.text

    def score(self, prediction: str, example: Example) -> float:
        """Similarity of one transcription in 0-1, and 0 below one half."""
        return anls(prediction, self.target(example))


TASK = OCR()
