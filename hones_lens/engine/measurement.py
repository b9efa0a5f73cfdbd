"""Every example under every arm's hooks, measured: scores and statistics, or log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from hones_lens.data import Example
from hones_lens.engine.batches import answer_batches, prompt_batches
from hones_lens.engine.full_passes import Prediction
from hones_lens.engine.options import SweepOptions
from hones_lens.engine.sweep import Sweep
from hones_lens.interventions import Hook
from hones_lens.model import HookedVLM, bounded_by, takes_iterables
from hones_lens.tasks import Task

T = TypeVar("T")


@dataclass
class Outcome:
    """Statistics and scores of every example under one arm, in the order of the examples."""

    statistics: list[np.ndarray] = field(default_factory=list[np.ndarray])
    scores: list[float] = field(default_factory=list[float])
    _running: tuple[int, Any] = field(default=(0, 0.0), repr=False, compare=False)

    def metric(self, task: Task, rows: Sequence[int] | None = None) -> float:
        """The metric over all examples, or over some."""
        statistics = np.array(self.statistics)
        return float(task.metric((statistics if rows is None else statistics[list(rows)]).sum(0)))

    def metric_so_far(self, task: Task) -> float:
        """The metric over all examples, from a sum to which only new examples are added."""
        added, total = self._running
        new = self.statistics[added:]
        if new:
            total = total + np.array(new).sum(0)
            self._running = (len(self.statistics), total)
        return float(task.metric(np.asarray(total)))


@takes_iterables
def measure(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    arms: Sequence[Sequence[Hook]],
    options: SweepOptions,
    *,
    label: str = "sweep",
    leaders: Callable[[list[Outcome]], str] | None = None,
) -> list[Outcome]:
    """Run every example under every arm's hooks and score the outputs.

    Args:
        model, task, examples: What to run.
        arms: Hooks of each arm; an empty list is the clean model. Functions that are not marked as
            `interventions.position_wise` see whole passes of the prompts of a batch, which takes longer.
        options: How to run it.
        label: What the progress bar is called, and the batches in the journal.
        leaders: What to show beside the bar, from the outcomes so far.

    Returns:
        An Outcome for each arm.

    Raises:
        FloatingPointError: Logits that are not finite; names arm and examples.
    """
    outcomes = [Outcome() for _ in arms]
    with bounded_by(options.memory_budget), _bar(label, task, examples, arms, options.progress) as bar:
        sweep = Sweep(model, arms, options, bar.update)

        def run(batch_examples: Sequence[Example]) -> list[list[list[float]]]:
            predictions: list[list[Prediction]] = [[] for _ in arms]
            for batch in prompt_batches(model, task, batch_examples, options.batch_size):
                for arm_predictions, batch_predictions in zip(
                    predictions, sweep.predictions(task, batch), strict=True
                ):
                    arm_predictions += batch_predictions
            return _score_answers(task, batch_examples, predictions)

        for saved in _batches(run, examples, options, label, bar):
            for outcome, rows in zip(outcomes, saved, strict=True):
                outcome.scores += [row[0] for row in rows]
                outcome.statistics += [np.array(row[1:]) for row in rows]
            if leaders is not None:
                bar.set_postfix_str(leaders(outcomes))
    return outcomes


@takes_iterables
def measure_log_probs(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    arms: Sequence[Sequence[Hook]],
    options: SweepOptions,
    *,
    label: str = "log-probabilities",
) -> list[list[float]]:
    """Log-probability of every example's right answer under every arm's hooks; as `measure`."""
    log_probs: list[list[float]] = [[] for _ in arms]
    with bounded_by(options.memory_budget), _bar(label, task, examples, arms, options.progress) as bar:
        sweep = Sweep(model, arms, options, bar.update)

        def run(batch_examples: Sequence[Example]) -> list[list[float]]:
            (batch,) = answer_batches(model, task, batch_examples, len(batch_examples))
            return sweep.log_probs(batch)

        for saved in _batches(run, examples, options, label, bar):
            for values, new in zip(log_probs, saved, strict=True):
                values += new
    return log_probs


def _bar(
    label: str, task: Task, examples: Sequence[Example], arms: Sequence[Sequence[Hook]], progress: bool
) -> Any:
    total = len(examples) * len(arms)
    return tqdm(total=total, desc=f"{label} · {task.name}", disable=not progress, unit="cell")


def _batches(
    run: Callable[[Sequence[Example]], list[T]],
    examples: Sequence[Example],
    options: SweepOptions,
    label: str,
    bar: Any,
) -> Iterator[list[T]]:
    """The results of each batch of examples, by arm; read from the journal where the batch has been run."""
    size, journal = options.batch_size, options.journal
    for number, start in enumerate(range(0, len(examples), size)):
        batch_examples = examples[start : start + size]
        key = f"{label}/{number}"
        saved = None if journal is None else journal.get(key)
        if saved is None:
            saved = run(batch_examples)
            if journal is not None:
                journal[key] = saved
        else:
            bar.update(len(batch_examples) * len(saved))
        yield saved


def _score_answers(
    task: Task, examples: Sequence[Example], predictions: Sequence[Sequence[Prediction]]
) -> list[list[list[float]]]:
    """For each arm and example its score, then its statistics; equal answers are scored once."""
    known: dict[tuple[int, str], list[float]] = {}
    scores_by_arm: list[list[list[float]]] = []
    for answers in predictions:
        rows: list[list[float]] = []
        for i, (answer, example) in enumerate(zip(answers, examples, strict=True)):
            key = (i, repr(answer))
            if key not in known:
                known[key] = [task.score(answer, example), *task.statistics(answer, example).tolist()]
            rows.append(known[key])
        scores_by_arm.append(rows)
    return scores_by_arm
