"""Every example under every arm's hooks, measured: scores and statistics, or log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hones_lens.data import Example
from hones_lens.engine.batches import answer_batches, prompt_batches
from hones_lens.engine.full_passes import Prediction
from hones_lens.engine.options import SweepOptions
from hones_lens.engine.sweep import Sweep
from hones_lens.interventions import Hook
from hones_lens.model import HookedVLM
from hones_lens.tasks import Task


@dataclass
class Outcome:
    """What one arm (or the clean model) gave: statistics and score of every example, in order."""

    statistics: list[np.ndarray] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def metric(self, task: Task, rows: Sequence[int] | None = None) -> float:
        """The metric over all examples, or over some."""
        picked = np.array(self.statistics)
        return float(task.metric((picked if rows is None else picked[list(rows)]).sum(0)))


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
    """Run every example under every arm's hooks and score what comes out.

    Args:
        model, task, examples: What to run.
        arms: Hooks of each arm; an empty list is the clean model.
        options: How to run it.
        label: What the progress bar is called, and the batches in the journal.
        leaders: What to show beside the bar, from the outcomes so far.

    Returns:
        An Outcome for each arm.

    Raises:
        FloatingPointError: Logits that are not finite; names arm and examples.
    """
    found = [Outcome() for _ in arms]
    with _bar(label, task, examples, arms, options.progress) as bar:
        sweep = Sweep(model, arms, options, bar.update)

        def run(some: Sequence[Example]) -> list[list[list[float]]]:
            said: list[list[Prediction]] = [[] for _ in arms]
            for batch in prompt_batches(model, task, some, options.batch_size):
                for mine, new in zip(said, sweep.predictions(task, batch), strict=True):
                    mine += new
            return _score_answers(task, some, said)

        for saved in _batches(run, examples, options, label, bar):
            for outcome, rows in zip(found, saved, strict=True):
                outcome.scores += [row[0] for row in rows]
                outcome.statistics += [np.array(row[1:]) for row in rows]
            if leaders is not None:
                bar.set_postfix_str(leaders(found))
    return found


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
    found: list[list[float]] = [[] for _ in arms]
    with _bar(label, task, examples, arms, options.progress) as bar:
        sweep = Sweep(model, arms, options, bar.update)

        def run(some: Sequence[Example]) -> list[list[float]]:
            (batch,) = answer_batches(model, task, some, len(some))
            return sweep.log_probs(batch)

        for saved in _batches(run, examples, options, label, bar):
            for values, new in zip(found, saved, strict=True):
                values += new
    return found


def _bar(label: str, task: Task, examples: Sequence, arms: Sequence, progress: bool) -> Any:
    total = len(examples) * len(arms)
    return tqdm(total=total, desc=f"{label} · {task.name}", disable=not progress, unit="cell")


def _batches(
    run: Callable[[Sequence[Example]], Any],
    examples: Sequence[Example],
    options: SweepOptions,
    label: str,
    bar: Any,
) -> Iterator[list]:
    """What each batch of examples gave, by arm; from the journal where it has been run."""
    size, journal = options.batch_size, options.journal
    for number, start in enumerate(range(0, len(examples), size)):
        some = examples[start : start + size]
        key = f"{label}/{number}"
        saved = None if journal is None else journal.get(key)
        if saved is None:
            saved = run(some)
            if journal is not None:
                journal[key] = saved
        else:
            bar.update(len(some) * len(saved))
        yield saved


def _score_answers(
    task: Task, examples: Sequence[Example], said: Sequence[Sequence[Prediction]]
) -> list[list[list[float]]]:
    """For each arm and example its score, then its statistics; equal answers are scored once."""
    known: dict[tuple[int, str], list[float]] = {}
    out = []
    for answers in said:
        rows = []
        for i, (answer, example) in enumerate(zip(answers, examples, strict=True)):
            key = (i, repr(answer))
            if key not in known:
                known[key] = [task.score(answer, example), *task.statistics(answer, example).tolist()]
            rows.append(known[key])
        out.append(rows)
    return out
