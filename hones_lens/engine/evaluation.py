"""A model's metric on a task, with its interval and by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, ClassVar, Unpack

import numpy as np
import pandas as pd

from hones_lens.data import Example
from hones_lens.engine.batches import as_task, chance_of, check_examples
from hones_lens.engine.measurement import measure
from hones_lens.engine.options import SweepKeywords, SweepOptions
from hones_lens.engine.preflight import Fault, usable_examples
from hones_lens.model import HookedVLM, takes_iterables
from hones_lens.results import Interval, Result, metric_interval, not_above_chance
from hones_lens.tasks import Task


@dataclass(frozen=True)
class KindMetric:
    """The metric on one kind of example; `interval` is None where there are fewer than two."""

    value: float
    n: int
    interval: Interval | None

    def __str__(self) -> str:
        return str(self.interval) if self.interval else f"{self.value:.3f} (n = {self.n})"


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """The metric of a task.

    Attributes:
        task, metric_name, model_name: What was measured.
        interval: The metric with its bootstrap interval over examples.
        scores: Each example's own score.
        kinds: The metric by kind.
        example_ids: Which examples, in the order of `scores`.
        measures: The task's further measures by name, over all examples (POPE's five for `yes-no`); None
            for one that is a share of nothing, and for a task without any.
        left_out: The examples that `on_error="skip"` left out, with the reason.
        chance: The metric of guessing.
    """

    kind: ClassVar[str] = "evaluation"

    task: str
    metric_name: str
    model_name: str
    interval: Interval
    scores: tuple[float, ...]
    kinds: dict[str, KindMetric]
    example_ids: tuple[str, ...]
    measures: dict[str, float | None] | None = None
    left_out: tuple[Fault, ...] = ()
    chance: float = 0.0

    @property
    def metric(self) -> float:
        """The metric over all examples."""
        return self.interval.value

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each kind and one for `all`: value, the ends of its interval, n."""
        kind_metrics = {"all": KindMetric(self.metric, self.interval.n, self.interval), **self.kinds}
        rows: list[dict[str, Any]] = []
        for kind, kind_metric in kind_metrics.items():
            interval = kind_metric.interval
            low, high = (None, None) if interval is None else (interval.low, interval.high)
            row = {"kind": kind, self.metric_name: kind_metric.value, "low": low, "high": high}
            rows.append({**row, "n": kind_metric.n})
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        lines = [f"{self.model_name}, {self.task}: {self.metric_name} {self.interval}"]
        if self.measures:
            lines.append("  " + ", ".join(f"{name} {_shown(value)}" for name, value in self.measures.items()))
        if len(self.kinds) > 1:
            width = max(map(len, self.kinds))
            lines += [f"  {kind:<{width}} {metric}" for kind, metric in self.kinds.items()]
        if at_chance := not_above_chance(self.metric_name, self.metric, self.interval, self.chance):
            lines.append(f"  of what is measured on these examples {at_chance}")
        if self.left_out:
            lines.append(f"  left out: {len(self.left_out):,} examples that can't be used")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def _shown(value: float | None) -> str:
    return "of nothing" if value is None else f"{value:.3f}"


@takes_iterables
def evaluate(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    *,
    on_error: str | None = None,
    options: SweepOptions | None = None,
    **sweep: Unpack[SweepKeywords],
) -> Evaluation:
    """Measure a model on a task.

    Args:
        model: The model.
        task: A task or its name.
        examples: What to measure it on.
        on_error: Check every picture and prompt first (see `usable_examples`), and `raise` at one that can't
            be used or `skip` it; None: check none beforehand.
        options, sweep: How it runs: `batch_size`, `progress`, `journal`, ... of `SweepOptions`.

    Raises:
        ValueError: No examples, or one that lacks what the task reads; with `on_error` a faulty one.
        FloatingPointError: Logits that are not finite; names the examples.
    """
    options, task = SweepOptions.of(options, sweep), as_task(task)
    left_out: tuple[Fault, ...] = ()
    if on_error is not None:
        examples, left_out = usable_examples(model, task, examples, on_error, progress=options.progress)
    check_examples(task, examples)
    (arm,) = measure(model, task, examples, [[]], options, label="evaluate")
    statistics = np.array(arm.statistics)
    kinds = dict.fromkeys(example.kind for example in examples)
    rows = {kind: [i for i, e in enumerate(examples) if e.kind == kind] for kind in kinds}
    by_kind = {
        kind: KindMetric(
            arm.metric(task, indices),
            len(indices),
            metric_interval(task, statistics[indices]) if len(indices) > 1 else None,
        )
        for kind, indices in rows.items()
    }
    # A task of a class of its own may have none.
    measures = task.measures(statistics.sum(axis=0)) if hasattr(task, "measures") else {}
    return Evaluation(
        task=task.name,
        metric_name=task.metric_name,
        model_name=model.cfg.model_name,
        interval=metric_interval(task, statistics),
        scores=tuple(arm.scores),
        kinds=by_kind,
        example_ids=tuple(example.id for example in examples),
        measures={name: None if np.isnan(value) else value for name, value in measures.items()} or None,
        left_out=left_out,
        chance=chance_of(task, examples),
    )
