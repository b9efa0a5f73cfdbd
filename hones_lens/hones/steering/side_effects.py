"""The effects that scales learned for one task have on every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, ClassVar, Unpack

import numpy as np
import pandas as pd

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.engine import SweepKeywords, SweepOptions
from hones_lens.hones.steering.questions import NEGATIVES, answer_log_probs, log_prob_examples
from hones_lens.hones.steering.scales import NeuronScales
from hones_lens.model import HookedVLM, takes_iterables
from hones_lens.results import (
    Interval,
    Noise,
    Result,
    bootstrap_interval,
    html_table,
    mean_interval,
    metric_interval,
    noise_mark,
    permutation_p,
    two_sided_p,
)


@dataclass(frozen=True)
class SideEffect:
    """One task under the scales of one task: its metric, and the gains of metric and log-probability.

    `p` and `log_prob_p` are of two-sided paired permutation tests of no gain.
    """

    scales_of: str
    task: str
    metric_name: str
    base: Interval
    steered: Interval
    gain: Interval
    log_prob_gain: Interval
    p: float
    log_prob_p: float


@dataclass(frozen=True, repr=False)
class SideEffects(Result):
    """Every task under the scales of every task.

    `plot()` draws bars of every task's gain under every task's scales, with intervals.

    Attributes:
        model_name: Whose.
        cells: One a task and a task's scales.
        noise: By task, what a model in bfloat16 or float16 can't tell; empty in wider types.
    """

    kind: ClassVar[str] = "side effects"

    model_name: str
    cells: tuple[SideEffect, ...]
    noise: dict[str, Noise] = field(default_factory=dict[str, Noise])

    def cell(self, scales_of: str, task: str) -> SideEffect:
        """One task under one task's scales.

        Raises:
            ValueError: No such cell.
        """
        for cell in self.cells:
            if (cell.scales_of, cell.task) == (scales_of, task):
                return cell
        raise ValueError(f"no cell for {task!r} under the scales of {scales_of!r}")

    def to_dataframe(self) -> pd.DataFrame:
        """One row a cell."""
        rows = []
        for cell in self.cells:
            row: dict[str, Any] = {}
            for name, value in vars(cell).items():
                is_interval = isinstance(value, Interval)
                row[name] = value.value if is_interval else value
                row |= {f"{name}_low": value.low, f"{name}_high": value.high} if is_interval else {}
            rows.append({**row, "n": cell.gain.n})
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        lines = [f"{self.model_name}: what scales of one task do to every task"]
        lines += [
            f"  {c.task:<10} under the scales of {c.scales_of:<10} {c.metric_name} {c.base:.3f} → "
            f"{c.steered:.3f}, gain {c.gain}{self.mark(c)}, p = {c.p:.2g}"
            for c in self.cells
        ]
        return "\n".join([*lines, *(f"  {legend}" for legend in self.noise_legends)])

    def mark(self, cell: SideEffect) -> str:
        """What is put behind a gain that is below the noise of the model's type, else nothing."""
        return noise_mark(cell.gain.value, self.noise.get(cell.task))

    @property
    def noise_legends(self) -> list[str]:
        """What the mark says, by task; none where no gain has it."""
        marked = dict.fromkeys(cell.task for cell in self.cells if self.mark(cell))
        return [f"{task}: {self.noise[task].legend('metric')}" for task in marked]

    def _repr_html_(self) -> str:
        frame, marks = self.to_dataframe(), [self.mark(cell) for cell in self.cells]
        if any(marks):
            frame.insert(frame.columns.tolist().index("gain") + 1, "gain below noise", marks)
        return html_table(frame) + "".join(f"<p>{escape(legend)}</p>" for legend in self.noise_legends)


@takes_iterables
def side_effects(
    model: HookedVLM,
    examples_by_task: Mapping[str, Sequence[Example]],
    scales_by_task: Mapping[str, NeuronScales],
    *,
    negatives: int = NEGATIVES,
    seed: int = 0,
    options: SweepOptions | None = None,
    **sweep: Unpack[SweepKeywords],
) -> SideEffects:
    """Measure every task under every task's scales; all scales of a task in one sweep.

    Args:
        model: The model.
        examples_by_task: Held-out examples, by the task's name.
        scales_by_task: Scales by the name of the task that they were learned for.
        negatives: Of a ranking task's log-probability (see `labelled_prompts`).
        seed: Of the bootstrap and the negatives.
        options, sweep: How it runs: `batch_size`, `progress`, `journal`, ... of `SweepOptions`.

    Raises:
        ValueError: No scales, no tasks, an unknown one, or one without examples.
        FloatingPointError: Logits that are not finite; names the examples.
    """
    options = SweepOptions.of(options, sweep)
    if not scales_by_task or not examples_by_task:
        raise ValueError("side effects need scales and examples of at least one task")
    arms = [[], *(scales.hooks() for scales in scales_by_task.values())]
    tasks = {name: engine.as_task(name) for name in examples_by_task}
    cells, noises = [], dict[str, Noise]()
    for name, examples in examples_by_task.items():
        engine.check_examples(tasks[name], examples)
        size = log_prob_examples(tasks[name], options.batch_size, negatives)
        engine.expect(options.journal, _label(name), len(examples), options.batch_size)
        engine.expect(options.journal, f"{_label(name)} log-probabilities", len(examples), size)
    for name, examples in examples_by_task.items():
        task, label = tasks[name], _label(name)
        base, *outcomes = engine.measure(model, task, examples, arms, options, label=label)
        prompt_options = {"negatives": negatives, "seed": seed, "label": f"{label} log-probabilities"}
        all_log_probs = answer_log_probs(model, task, examples, arms, options, **prompt_options)
        noise = engine.type_noise(model, task, examples, base, None, options, label=label)
        noises |= {} if noise is None else {name: noise}
        for scales_of, outcome, log_probs in zip(scales_by_task, outcomes, all_log_probs[1:], strict=True):
            statistics = np.array(outcome.statistics), np.array(base.statistics)
            cell = SideEffect(
                scales_of=scales_of,
                task=name,
                metric_name=task.metric_name,
                base=metric_interval(task, statistics[1], seed=seed),
                steered=metric_interval(task, statistics[0], seed=seed),
                gain=bootstrap_interval(task, *statistics, seed=seed),
                log_prob_gain=mean_interval(log_probs - all_log_probs[0], seed=seed),
                p=permutation_p(task, *statistics, seed=seed),
                log_prob_p=two_sided_p(log_probs - all_log_probs[0], seed=seed),
            )
            cells.append(cell)
    return SideEffects(model.cfg.model_name, tuple(cells), noises)


def _label(task: str) -> str:
    return f"side effects on {task}"
