"""Retrieval: rank candidate captions by logit(Yes) - logit(No), NDCG@5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hones_lens.data import Example
from hones_lens.tasks.base import Task, example_error
from hones_lens.tasks.metrics import expected_ndcg, ndcg


class Retrieval(Task):
    """Reads `candidates` and `positive`, the index of the true caption."""

    name = "retrieval"
    metric_name = "NDCG@5"
    ranks = True

    def prompts(self, example: Example) -> list[str]:
        """One prompt per candidate, in order; `positive` is not read."""
        if not example.candidates:
            raise example_error(example, "no candidates")
        if not all(candidate.strip() for candidate in example.candidates):
            raise example_error(example, "an empty candidate")
        instruction = "Does the candidate correctly describe the image?\nAnswer exactly Yes or No."
        return [f"Candidate: {candidate}\n{instruction}" for candidate in example.candidates]

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
            example: The example whose candidates were ranked.

        Raises:
            ValueError: The number of margins is not that of candidates, a margin is NaN, or `positive` is
                not valid.
        """
        margins = np.asarray(prediction, dtype=np.float64)
        if margins.shape != (len(example.candidates),):
            shape = list(margins.shape)
            raise example_error(
                example, f"{len(example.candidates)} candidates, but margins of shape {shape}"
            )
        if np.isnan(margins).any():
            raise example_error(
                example, f"a margin that is NaN (candidate {int(np.isnan(margins).argmax())})"
            )
        return ndcg(margins, _positive(example))

    def chance(self, examples: Sequence[Example]) -> float:
        """NDCG@5 of candidates in random order: each rank of the positive one is as likely as another."""
        return float(np.mean([expected_ndcg(len(example.candidates)) for example in examples]))


def _positive(example: Example) -> int:
    if not example.candidates:
        raise example_error(example, "no candidates")
    if not 0 <= example.positive < len(example.candidates):
        raise example_error(example, f"no candidate at its positive index {example.positive}")
    return example.positive


TASK = Retrieval()
