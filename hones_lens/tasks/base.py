"""The `Task` protocol, and functions that all tasks share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from hones_lens.data import Example


class Task(Protocol):
    """A task: its prompts, its targets and its metric.

    A subclass needs `name`, `metric_name`, `prompt`, `target` and `score`; the defaults of the other members
    are those of a task that generates text and whose metric is the mean of the examples' scores. Objects of
    other classes with the same attributes are tasks too; only `measures` and `chance` may be missing. Every
    method raises ValueError with the id of an example that lacks a field it reads.

    Attributes:
        name: The name that `load_task` takes.
        metric_name: Name of the metric that `aggregate` returns, for tables and axes.
        is_mean: Whether the metric is the mean of the examples' scores (corpus BLEU is not).
        ranks: True if the model ranks candidates by its Yes-No margin instead of generating text.
        idf: True if attribution weights the target's tokens by inverse document frequency
            (HONES eq. H2).
        examples_of: The task whose examples it uses, if data sets have none under its own name.
    """

    name: str
    metric_name: str
    is_mean: bool = True
    ranks: bool = False
    idf: bool = False
    examples_of: str = ""

    def prompt(self, example: Example) -> str:
        """The prompt; for a task that ranks candidates, the prompt of the positive one."""
        ...

    def prompts(self, example: Example) -> list[str]:
        """All prompts of the example: one, or one per candidate to rank."""
        return [self.prompt(example)]

    def target_prompt(self, example: Example) -> str:
        """The prompt at whose last position the target is attributed."""
        return self.prompt(example)

    def target(self, example: Example) -> str:
        """The target text of attribution, encoded without special tokens (y of HONES eq. H2)."""
        ...

    def answer(self, example: Example) -> str:
        """The right answer to `target_prompt`, whose log-probability is measured."""
        return self.target(example)

    def score(self, prediction: Any, example: Example) -> float:
        """Score in 0-1 of one prediction: a text, or the margins of all candidates."""
        ...

    def statistics(self, prediction: Any, example: Example) -> np.ndarray:
        """Sufficient statistics of one prediction, float64 [n_statistics]; they add up over examples."""
        return mean_statistics(self.score(prediction, example))

    def metric(self, statistics: np.ndarray) -> np.ndarray:
        """The metric in 0-1, [...], of statistics summed over examples, [..., n_statistics]."""
        return mean_metric(statistics)

    def measures(self, statistics: np.ndarray) -> dict[str, float]:
        """Further measures by name, of statistics summed over examples, [n_statistics]; none by default."""
        return {}

    def chance(self, examples: Sequence[Example]) -> float:
        """The metric of guessing, over these examples; by default 0: whoever says something else is wrong."""
        return 0.0

    def aggregate(self, predictions: Iterable[Any], examples: Iterable[Example]) -> float:
        """The metric over a data set, in 0-1 (P_t of HONES eq. H1)."""
        return summed_metric(self, predictions, examples)


def example_error(example: Example, problem: str) -> ValueError:
    """The error for an example that a task can't use; its message names the example and the problem."""
    return ValueError(f"example {example.id!r} has {problem}")


def summed_metric(task: Task, predictions: Iterable[Any], examples: Iterable[Example]) -> float:
    """The metric of the statistics summed over examples: `aggregate` of every task.

    Raises:
        ValueError: No examples, or numbers of predictions and examples that differ.
    """
    predictions, examples = list(predictions), list(examples)
    if len(predictions) != len(examples):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples")
    if not examples:
        raise ValueError(f"no examples to compute {task.metric_name} over")
    statistics = [task.statistics(p, e) for p, e in zip(predictions, examples, strict=True)]
    return float(task.metric(np.sum(statistics, axis=0)))


def mean_statistics(score: float) -> np.ndarray:
    """Statistics of a metric that is a mean over examples: (score, 1)."""
    return np.array([score, 1.0])


def mean_metric(statistics: np.ndarray) -> np.ndarray:
    """The mean, [...], of summed `mean_statistics`, [..., 2]."""
    return np.asarray(statistics[..., 0] / statistics[..., 1])
