"""What every task provides, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from hones_lens.data import Example


class Task(Protocol):
    """A task: how to ask, what is right, and how right an answer is.

    A subclass needs `name`, `metric_name`, `prompt`, `target` and `score`; the rest has defaults, which are
    those of a task that writes text and whose metric is the mean of the examples' scores. Objects of other
    classes with the same attributes are tasks too. Every method raises ValueError with the id of an example
    that lacks a field it reads.

    Attributes:
        name: The name that `load_task` takes.
        metric_name: What `aggregate` returns, for tables and axes.
        is_mean: Whether the metric is the mean of the examples' scores (corpus BLEU is not).
        ranks: True where the model ranks candidates by its Yes-No margin instead of writing text.
        idf: True where attribution weights the target's tokens by inverse document frequency
            (HONES eq. H2).
        examples_of: The name under which data sets have its examples, where that is another task's.
    """

    name: str
    metric_name: str
    is_mean: bool = True
    ranks: bool = False
    idf: bool = False
    examples_of: str = ""

    def prompt(self, example: Example) -> str:
        """What the model is asked; where it ranks candidates, the prompt of the right one."""
        ...

    def prompts(self, example: Example) -> list[str]:
        """Every prompt of the example: one, or one for each candidate to rank."""
        return [self.prompt(example)]

    def target_prompt(self, example: Example) -> str:
        """The prompt at whose last position the target is attributed."""
        return self.prompt(example)

    def target(self, example: Example) -> str:
        """The text whose tokens attribution aims at, without special tokens (y of HONES eq. H2)."""
        ...

    def answer(self, example: Example) -> str:
        """The one right answer to `target_prompt`, whose log-probability is measured."""
        return self.target(example)

    def score(self, prediction: Any, example: Example) -> float:
        """Utility of one prediction in 0-1; a text, or the margins of all candidates."""
        ...

    def statistics(self, prediction: Any, example: Example) -> np.ndarray:
        """Sufficient statistics of one prediction, float64 [n_statistics]; they add up over examples."""
        return mean_statistics(self.score(prediction, example))

    def metric(self, statistics: np.ndarray) -> np.ndarray:
        """The metric in 0-1, [...], of statistics summed over examples, [..., n_statistics]."""
        return mean_metric(statistics)

    def aggregate(self, predictions: Sequence[Any], examples: Sequence[Example]) -> float:
        """The metric over a data set, in 0-1 (P_t of HONES eq. H1)."""
        return summed_metric(self, predictions, examples)


def lacking(example: Example, what: str) -> ValueError:
    """The error for an example that a task can't use: it names the example and what is missing."""
    return ValueError(f"example {example.id!r} has {what}")


def summed_metric(task: Task, predictions: Sequence[Any], examples: Sequence[Example]) -> float:
    """The metric of the statistics summed over examples: `aggregate` of every task.

    Raises:
        ValueError: No examples, or another number of predictions than of examples.
    """
    if len(predictions) != len(examples):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples")
    if not examples:
        raise ValueError(f"no examples to compute {task.metric_name} over")
    each = [task.statistics(p, e) for p, e in zip(predictions, examples, strict=True)]
    return float(task.metric(np.sum(each, axis=0)))


def mean_statistics(score: float) -> np.ndarray:
    """Statistics of a metric that is a mean over examples: (score, 1)."""
    return np.array([score, 1.0])


def mean_metric(statistics: np.ndarray) -> np.ndarray:
    """The mean, [...], of summed `mean_statistics`, [..., 2]."""
    return np.asarray(statistics[..., 0] / statistics[..., 1])
