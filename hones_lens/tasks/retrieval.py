"""Retrieval: rank candidate captions by logit(Yes) - logit(No), NDCG@5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hones_lens.data import Example
from hones_lens.tasks.base import Task, lacking
from hones_lens.tasks.metrics import ndcg


class Retrieval(Task):
    """Reads `candidates` and `positive`, the index of the one that is true."""

    name = "retrieval"
    metric_name = "NDCG@5"
    ranks = True

    def prompts(self, example: Example) -> list[str]:
        """One prompt for each candidate, in their order; `positive` is not read."""
        if not example.candidates:
            raise lacking(example, "no candidates")
        if not all(candidate.strip() for candidate in example.candidates):
            raise lacking(example, "an empty candidate")
        ask = "Does the candidate correctly describe the image?\nAnswer exactly Yes or No."
        return [f"Candidate: {candidate}\n{ask}" for candidate in example.candidates]

    def prompt(self, example: Example) -> str:
        """The prompt of the positive candidate."""
        return self.prompts(example)[_positive(example)]

    def target(self, example: Example) -> str:
        """Yes, the right answer to `prompt`."""
        _positive(example)
        return "Yes"

    def score(self, prediction: Sequence[float] | np.ndarray, example: Example) -> float:
        """NDCG@5 of the candidates ranked by their margins; equal margins rank before the positive.

        Args:
            prediction: logit(Yes) - logit(No) of every candidate, [n_candidates].
            example: What was ranked.

        Raises:
            ValueError: Another number of margins than of candidates, a NaN, or no valid positive.
        """
        margins = np.asarray(prediction, dtype=np.float64)
        if margins.shape != (len(example.candidates),):
            shape = list(margins.shape)
            raise lacking(example, f"{len(example.candidates)} candidates, but margins of shape {shape}")
        if np.isnan(margins).any():
            raise lacking(example, f"a margin that is NaN (candidate {int(np.isnan(margins).argmax())})")
        return ndcg(margins, _positive(example))


def _positive(example: Example) -> int:
    if not example.candidates:
        raise lacking(example, "no candidates")
    if not 0 <= example.positive < len(example.candidates):
        raise lacking(example, f"no candidate at its positive index {example.positive}")
    return example.positive


TASK = Retrieval()
