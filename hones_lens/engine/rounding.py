"""The noise of a model's type, measured: the unchanged model beside the same weights in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from hones_lens.data import Example
from hones_lens.engine.measurement import Outcome, measure, measure_log_probs
from hones_lens.engine.options import SweepOptions
from hones_lens.engine.units import Done, SharedJournal, Unit
from hones_lens.interventions import Hook
from hones_lens.model import HookedVLM, bounded_by, in_float32, takes_iterables
from hones_lens.results import Noise
from hones_lens.tasks import Task

MOST_COMPARED = 64  # examples


class LogProbs(Protocol):
    """A function as `measure_log_probs`; it can be pickled."""

    def __call__(
        self,
        model: HookedVLM,
        task: Task,
        examples: Sequence[Example],
        arms: Sequence[Sequence[Hook]],
        options: SweepOptions,
        /,
    ) -> Any:
        """Log-probabilities of right answers, [arm example]."""
        ...


@dataclass(frozen=True)
class _InFloat32:
    """Work on a model that computes in float32."""

    work: Callable[[HookedVLM], np.ndarray]

    @torch.no_grad()
    def __call__(self, model: HookedVLM) -> Done:
        return Done(self.work(in_float32(model)))


def values_in_float32(
    model: HookedVLM, work: Callable[[HookedVLM], np.ndarray], n: int, options: SweepOptions, label: str
) -> np.ndarray:
    """What work gives of the same weights in float32, [n number]; read from the journal if it is there.

    Args:
        model: A model in fewer bits.
        work: Measures a model; it can be pickled.
        n: Of how many examples it gives numbers.
        options: Of which `journal` and `memory_budget` are read.
        label: What it is called in the journal.
    """
    journal = options.journal
    saved = None if journal is None else journal.get(label)
    if saved is None:
        wide = _InFloat32(work)
        with bounded_by(options.memory_budget):
            if isinstance(journal, SharedJournal):
                (done,) = journal.compute([Unit(label, ("example",), (n,), wide, 0)], lambda cells: None)
            else:
                done = wide(model)
        saved = done.values.tolist()
        if journal is not None:
            journal[label] = saved
    return np.array(saved)


@dataclass(frozen=True)
class _Clean:
    """Measures examples without any intervention: the log-probability, if asked for, then statistics."""

    task: Task
    examples: Sequence[Example]
    options: SweepOptions
    log_probs: LogProbs | None

    def __call__(self, model: HookedVLM) -> np.ndarray:
        (outcome,) = measure(model, self.task, self.examples, [[]], self.options)
        columns = [np.array(outcome.statistics)]
        if self.log_probs is not None:
            (values,) = self.log_probs(model, self.task, self.examples, [[]], self.options)
            columns.insert(0, np.array(values)[:, None])
        return np.concatenate(columns, axis=1)


@takes_iterables
def type_noise(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    clean: Outcome,
    log_probs: Sequence[float] | None,
    options: SweepOptions,
    *,
    label: str,
    measure_log_probs: LogProbs = measure_log_probs,
) -> Noise | None:
    """The noise of a task's metric, and of log-probabilities, in the model's type (see `Noise`).

    The metric's is the sum over examples of how far the metric moves when one example's answer is that of
    float32, which for a mean over examples is the mean distance.

    Args:
        model, task, examples: What was measured; the first 64 examples are compared.
        clean: What came of them without an intervention.
        log_probs: Of the right answers; None where they were not measured.
        options: How it runs.
        label: Of the stage, for the journal.
        measure_log_probs: Measured the log-probabilities.

    Returns:
        None for float32 and wider types, whose noise no table shows.
    """
    if model.cfg.dtype.itemsize > 2:
        return None
    first = examples[:MOST_COMPARED]
    own = SweepOptions(options.batch_size, progress=False, memory_budget=options.memory_budget)
    work = _Clean(task, first, own, None if log_probs is None else measure_log_probs)
    wide = values_in_float32(model, work, len(first), options, f"{label} in float32")
    of_log_prob = None
    if log_probs is not None:
        of_log_prob = 2 * float(np.abs(wide[:, 0] - np.array(log_probs[: len(first)])).mean())
        wide = wide[:, 1:]
    narrow = np.array(clean.statistics[: len(first)])
    moved = task.metric(narrow.sum(0) + wide - narrow) - task.metric(narrow.sum(0))
    return Noise(2 * float(np.abs(moved).sum()), of_log_prob, len(first), dtype_name(model))


def dtype_name(model: HookedVLM) -> str:
    """The name of a model's type, such as `bfloat16`."""
    return str(model.cfg.dtype).removeprefix("torch.")
