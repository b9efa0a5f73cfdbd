"""The results of steering by several methods."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import ClassVar

import numpy as np
import pandas as pd

from hones_lens.hones.steering.scales import NeuronScales
from hones_lens.results import (
    Interval,
    Noise,
    Result,
    bootstrap_interval,
    html_table,
    metric_interval,
    noise_mark,
    permutation_p,
    two_sided_p,
    with_marks,
)
from hones_lens.tasks import Task, load_task


@dataclass(frozen=True)
class SteeringRow:
    """One method on the test examples.

    Attributes:
        method, draw: Which; of RandNeuron there are several draws.
        chosen: What was chosen on dev: `factor`, or `lr` and `epochs`.
        max_abs: The largest |a|.
        metric, gain, p: The metric, its gain over the base (paired bootstrap), and the two-sided p-value of
            a paired permutation test of no difference.
        log_prob, log_prob_gain: The same of the right answers' mean log-probability, in nats.
        scores, log_probs, statistics: Of each example.
        scales: What was applied; None for the base.
        metric_interval: Of the metric; None in files of before it was kept.
    """

    method: str
    draw: int
    chosen: dict[str, float]
    max_abs: float
    metric: float
    gain: Interval
    p: float
    log_prob: float
    log_prob_gain: Interval
    scores: tuple[float, ...]
    log_probs: tuple[float, ...]
    statistics: tuple[tuple[float, ...], ...]
    scales: NeuronScales | None
    metric_interval: Interval | None = None

    @property
    def settings(self) -> str:
        """What was chosen on dev, in words."""
        return ", ".join(f"{name} {value:g}" for name, value in self.chosen.items())


@dataclass(frozen=True, repr=False)
class SteeringTable(Result):
    """A task without steering and under every method.

    `plot(measures)` draws bars of every method's gains over the base, with intervals; the measures are
    `metric` and `log_prob`, default: both.

    Attributes:
        task, metric_name, model_name: What was measured.
        neuron_method, n_neurons: How the neurons were chosen, and how many there are.
        n_learned, n_chosen: Examples that scales were learned on, and that chose among them.
        example_ids: The test examples, in the order of the rows' values.
        seed, negatives: Of the intervals, and of a ranking task's log-probability (see `labelled_prompts`).
        rows: One a method, one a draw of RandNeuron; the base comes first.
        noise: What a model in bfloat16 or float16 can't tell; None in wider types.
    """

    kind: ClassVar[str] = "steering"

    task: str
    metric_name: str
    model_name: str
    neuron_method: str
    n_neurons: int
    n_learned: int
    n_chosen: int
    example_ids: tuple[str, ...]
    seed: int
    negatives: int
    rows: tuple[SteeringRow, ...]
    noise: Noise | None = None

    def row(self, method: str, draw: int = 0) -> SteeringRow:
        """One row.

        Raises:
            ValueError: It is not in the table; lists what is.
        """
        for row in self.rows:
            if (row.method, row.draw) == (method, draw):
                return row
        known = ", ".join(dict.fromkeys(row.method for row in self.rows))
        raise ValueError(f"no draw {draw} of method {method!r} here; there are: {known}")

    def scales(self, method: str = "HONES", draw: int = 0) -> NeuronScales:
        """What a method applies, with `hooks()`.

        Raises:
            ValueError: It is not in the table, or it is the base.
        """
        scales = self.row(method, draw).scales
        if scales is None:
            raise ValueError(f"{method} scales nothing")
        return scales

    def metric_of(self, row: SteeringRow) -> Interval:
        """A row's metric with its interval."""
        if row.metric_interval is not None:
            return row.metric_interval
        return metric_interval(load_task(self.task), np.array(row.statistics), seed=self.seed)

    def log_prob_p(self, row: SteeringRow) -> float:
        """Two-sided p-value of a paired permutation test of no gain in log-probability."""
        return two_sided_p(np.subtract(row.log_probs, self.row("Base").log_probs), seed=self.seed)

    def difference(
        self, a: str, b: str, draw_a: int = 0, draw_b: int = 0, task: Task | None = None
    ) -> tuple[Interval, float]:
        """Metric of one method minus another's, with its interval, and the permutation p-value.

        Args:
            a, b: The methods.
            draw_a, draw_b: Which draws, of RandNeuron.
            task: The task, where `load_task` does not know its name.
        """
        task = task or load_task(self.task)
        first = np.array(self.row(a, draw_a).statistics)
        second = np.array(self.row(b, draw_b).statistics)
        p = permutation_p(task, first, second, seed=self.seed)
        return bootstrap_interval(task, first, second, seed=self.seed), p

    def to_dataframe(self) -> pd.DataFrame:
        """One row a method or draw: metric, gain, p, log-probability, max |a|, what was chosen."""
        rows = []
        for row in self.rows:
            gain, log_prob_gain = row.gain, row.log_prob_gain
            values = {"method": row.method, "draw": row.draw, "metric": row.metric}
            metric = self.metric_of(row)
            values |= {"metric_low": metric.low, "metric_high": metric.high}
            values |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high, "p": row.p}
            values |= {"log_prob": row.log_prob, "log_prob_gain": log_prob_gain.value}
            values |= {"log_prob_low": log_prob_gain.low, "log_prob_high": log_prob_gain.high}
            values["log_prob_p"] = self.log_prob_p(row)
            rows.append({**values, "max_abs": row.max_abs, "n": gain.n, "chosen": row.settings})
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        lines = [
            f"{self.model_name}, {self.task}: {self.n_neurons} neurons by {self.neuron_method}, learned on "
            f"{self.n_learned}, chosen on {self.n_chosen}, reported on n = {len(self.example_ids)} examples "
            "(95 % intervals)",
            f"  {'method':<17} {self.metric_name:<20}  {'gain':<24} {'p':>6}  "
            f"{'log-probability gain':<24} {'p':>6} {'max |a|':>8}  chosen on dev",
        ]
        draws = [row for row in self.rows if row.method == "RandNeuron"]
        for row in self.rows:
            name = f"RandNeuron {row.draw + 1}" if row in draws else row.method
            metric = f"{self.metric_of(row):.3f}"
            marks = self.marks(row)
            gain, log_prob_gain = f"{row.gain:+.3f}{marks[0]}", f"{row.log_prob_gain:+.3f}{marks[1]}"
            lines.append(
                f"  {name:<17} {metric:<20}  {gain:<24} {row.p:>6.3f}  "
                f"{log_prob_gain:<24} {self.log_prob_p(row):>6.3f} {row.max_abs:>8.3g}  {row.settings}"
            )
        if len(draws) > 1:
            gains = [row.gain.value for row in draws]
            log_prob_gain = np.mean([row.log_prob_gain.value for row in draws])
            lines.append(
                f"  {len(draws)} random sets: mean gain {np.mean(gains):+.3f} (from {min(gains):+.3f} to "
                f"{max(gains):+.3f}), mean log-probability gain {log_prob_gain:+.3f}"
            )
        return "\n".join([*lines, *([f"  {self.noise_legend}"] if self.noise_legend else [])])

    def marks(self, row: SteeringRow) -> tuple[str, str]:
        """What is put behind a row's gains, of metric and log-probability: a mark for those below noise."""
        if row.scales is None:
            return "", ""
        of_log_prob = noise_mark(row.log_prob_gain.value, self.noise, log_prob=True)
        return noise_mark(row.gain.value, self.noise), of_log_prob

    @property
    def noise_legend(self) -> str:
        """What the mark says; empty where no gain has it."""
        marks = [self.marks(row) for row in self.rows]
        marked = [name for i, name in enumerate(("metric", "log_prob")) if any(m[i] for m in marks)]
        return self.noise.legend(*marked) if self.noise is not None and marked else ""

    def _repr_html_(self) -> str:
        frame = with_marks(self.to_dataframe(), "gain", self.noise)
        frame = with_marks(frame, "log_prob_gain", self.noise, log_prob=True)
        legend = f"<p>{escape(self.noise_legend)}</p>" if self.noise_legend else ""
        return html_table(frame) + legend
