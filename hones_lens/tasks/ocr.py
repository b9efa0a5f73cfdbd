"""OCR: transcribe the text inside the blue box, ANLS."""

from __future__ import annotations

from hones_lens.data import Example
from hones_lens.tasks.base import Task, example_error
from hones_lens.tasks.metrics import anls


class OCR(Task):
    """Reads `text`; the image of the example already shows the box."""

    name = "ocr"
    metric_name = "ANLS"

    def prompt(self, example: Example) -> str:
        return "Transcribe the text inside the blue box.\nOutput text only."

    def target(self, example: Example) -> str:
        if not example.text.strip():
            raise example_error(example, "an empty text")
        return example.text

    def score(self, prediction: str, example: Example) -> float:
        """ANLS of one transcription: its similarity in 0-1, or 0 if below one half."""
        return anls(prediction, self.target(example))


TASK = OCR()
