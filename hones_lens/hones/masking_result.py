"""Results of masking a set of neurons, their files, and each of their two measures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from hones_lens.model import did_you_mean, require_choice, takes_iterables
from hones_lens.results import (
    Interval,
    Noise,
    Result,
    load_json,
    noise_mark,
    not_above_chance,
    save_json,
    to_json,
)

MEASURES = ("metric", "log_prob")


@dataclass(frozen=True)
class Control:
    """Metric and log-probability under one matched random set of neurons."""

    metric: float
    log_prob: float
    kinds: dict[str, float] = field(default_factory=dict)
    kinds_log_prob: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class KindDrop:
    """One kind of question: how often it was asked, and the metric and log-probability by arm.

    `interval` is that of the metric's drop, the next two are those of the metric without and with masking,
    and `p` is that of a two-sided paired permutation test of no drop; None where the kind has fewer than two
    examples.
    """

    n: int
    baseline: float
    masked: float
    baseline_log_prob: float
    masked_log_prob: float
    interval: Interval | None = None
    baseline_interval: Interval | None = None
    masked_interval: Interval | None = None
    p: float | None = None


@dataclass(frozen=True, repr=False)
class MaskingResult(Result):
    """A task with and without a set of neurons, beside matched random sets of the same size.

    `plot(measures)` draws bars of both arms against the random sets; the measures are `metric` and
    `log_prob`, default: both.

    Attributes:
        task, metric_name, method, model_name: What was measured, and how neurons were chosen.
        n_neurons, ratio: Size of the set, and its share of all decoder neurons.
        baseline, masked: The metric.
        baseline_log_prob, masked_log_prob: Mean log-probability of the right answer, in nats.
        drops: Baseline minus masked score of each example.
        log_prob_drops: Baseline minus masked log-probability of each example.
        metric_interval, log_prob_interval: Of the drop, paired bootstrap over examples.
        relative_interval: Of the drop in per cent of the baseline, which is resampled with it.
        baseline_interval, masked_interval: Of the metric.
        baseline_log_prob_interval, masked_log_prob_interval: Of the log-probability.
        controls: The random sets, matched in their number per layer.
        kinds: The same by kind of question.
        example_ids: Which examples, in the order of `drops`.
        metric_p, log_prob_p: Of no drop: two-sided paired permutation tests; None where not tested.
        noise: What a model in bfloat16 or float16 can't tell; None in wider types.
        chance: The metric of guessing.
    """

    kind: ClassVar[str] = "masking-result"

    task: str
    metric_name: str
    method: str
    model_name: str
    n_neurons: int
    ratio: float
    baseline: float
    masked: float
    baseline_log_prob: float
    masked_log_prob: float
    drops: tuple[float, ...]
    log_prob_drops: tuple[float, ...]
    metric_interval: Interval
    log_prob_interval: Interval
    relative_interval: Interval
    baseline_interval: Interval
    masked_interval: Interval
    baseline_log_prob_interval: Interval
    masked_log_prob_interval: Interval
    controls: tuple[Control, ...]
    kinds: dict[str, KindDrop]
    example_ids: tuple[str, ...]
    metric_p: float | None = None
    log_prob_p: float | None = None
    noise: Noise | None = None
    chance: float = 0.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MaskingResult:
        """From what `to_dict` gave, also through JSON; of earlier versions, too.

        Raises:
            ValueError: A field is missing.
        """
        result, rounding = super().from_dict(data), data.get("rounding")
        return result if rounding is None else replace(result, noise=Noise.of_batches(rounding))

    @property
    def problem(self) -> str:
        """Why nothing can be concluded from the metric's drop, in words; empty where something can."""
        return not_above_chance(self.metric_name, self.baseline, self.baseline_interval, self.chance)

    @property
    def drop(self) -> float:
        """Baseline minus masked metric."""
        return self.baseline - self.masked

    @property
    def relative_drop(self) -> float:
        """The drop in per cent of the baseline (0 for a baseline of 0)."""
        return 100 * self.drop / self.baseline if self.baseline else 0.0

    @property
    def log_prob_drop(self) -> float:
        """Baseline minus masked log-probability, in nats."""
        return self.baseline_log_prob - self.masked_log_prob

    @property
    def intervals(self) -> dict[str, Interval]:
        """The intervals of both drops, by what they measure."""
        return {self.metric_name: self.metric_interval, "log-probability": self.log_prob_interval}

    def beats(self, what: str = "log_prob", kind: str | None = None) -> int:
        """How many of the random sets lose strictly less than the selected neurons do.

        Args:
            what: `metric` or `log_prob`.
            kind: Count only this kind of question (in the metric).

        Raises:
            ValueError: `what` is neither.
        """
        require_choice("measure", what, MEASURES)
        if kind is not None:
            return sum(c.kinds[kind] > self.kinds[kind].masked for c in self.controls)
        masked = self.masked if what == "metric" else self.masked_log_prob
        return sum(getattr(control, what) > masked for control in self.controls)

    def to_dataframe(self) -> pd.DataFrame:
        """One row each for the selected neurons and for every random set."""
        rows = [{"set": self.method, "metric": self.masked, "log_prob": self.masked_log_prob}]
        rows += [
            {"set": f"random {i}", "metric": c.metric, "log_prob": c.log_prob}
            for i, c in enumerate(self.controls)
        ]
        frame = pd.DataFrame(rows)
        frame["drop"] = self.baseline - frame["metric"]
        frame["log_prob_drop"] = self.baseline_log_prob - frame["log_prob"]
        return frame

    def __str__(self) -> str:
        count, measures = len(self.controls), {name: masking_measure(self, name) for name in MEASURES}
        lines = [
            f"{self.model_name}, {self.task}: {self.n_neurons} neurons ({100 * self.ratio:.2g} %) "
            f"by {self.method}, {len(self.example_ids)} examples",
            *([f"  of the metric {self.problem}"] if self.problem else []),
            f"  {self.metric_name}: {self.baseline_interval:.3f} → {self.masked_interval:.3f}, drop "
            f"{self.metric_interval}{measures['metric'].mark}{_tested(self.metric_p)}",
            f"  log-probability of the answer: {self.baseline_log_prob_interval:.3f} → "
            f"{self.masked_log_prob_interval:.3f}, drop {self.log_prob_interval}"
            f"{measures['log_prob'].mark}{_tested(self.log_prob_p)}",
        ]
        if count:
            drops = [self.baseline - c.metric for c in self.controls]
            log_prob_drops = [self.baseline_log_prob - c.log_prob for c in self.controls]
            lines.append(
                f"  {count} random sets: drop {_range(drops)}, of log-probability {_range(log_prob_drops)}"
            )
            lines.append(
                f"  larger drop than {self.beats('metric')} (metric) and {self.beats()} (log-probability)"
            )
        if legend := measures_legend(measures.values()):
            lines.append(f"  {legend}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


@takes_iterables
def measures_legend(measures: Iterable[MaskingMeasure]) -> str:
    """What the mark behind a drop says, if some drop has it, else nothing; of each measure, the largest."""
    largest: dict[tuple[str, bool], tuple[float, str]] = {}
    for m in measures:
        if m.noise is not None and m.mark:
            key, value = (m.measure, m.noise.against == "float32"), m.noise.of(m.measure) or 0.0
            largest[key] = max(largest.get(key, (0.0, "")), (value, m.noise.legend(m.measure)))
    return "; ".join(text for _, text in largest.values())


def _range(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} on average ({min(values):.3f} to {max(values):.3f})"


def _tested(p: float | None) -> str:
    return "" if p is None else f", p = {p:.3g}"


@takes_iterables
def save_masking(file: str | Path, results: Sequence[MaskingResult]) -> None:
    """Write results to a JSON file, and large arrays to safetensors beside it."""
    save_json(file, lambda: {"kind": "masking", "results": [to_json(result) for result in results]})


def load_masking(file: str | Path) -> list[MaskingResult]:
    """Read what `save_masking` wrote.

    Raises:
        FileNotFoundError: The file, or the one beside it with its arrays.
        ValueError: Another kind of file, or arrays of another file.
    """
    return [MaskingResult.from_dict(data) for data in load_json(file, "masking")["results"]]


@dataclass(frozen=True)
class MaskingMeasure:
    """One of a masking result's two measures.

    Attributes:
        name: The metric's name, or `log-probability of the right answer`.
        short: The same for headings.
        unit: ` nats` for log-probabilities, else empty.
        baseline, masked: Without and with the selected neurons masked.
        interval, before, after: Of the drop, and of both arms.
        controls: The measure under each random set.
        beaten: How many random sets lose strictly less than the selected neurons.
        p: Of no drop; None where it was not tested.
        noise: Of the model's type; None where it is not known.
    """

    name: str
    short: str
    unit: str
    baseline: float
    masked: float
    interval: Interval
    before: Interval
    after: Interval
    controls: tuple[float, ...]
    beaten: int
    p: float | None = None
    noise: Noise | None = None

    @property
    def drop(self) -> float:
        """Baseline minus masked."""
        return self.baseline - self.masked

    @property
    def measure(self) -> str:
        """Its name in `MEASURES`."""
        return "log_prob" if self.unit else "metric"

    @property
    def mark(self) -> str:
        """What is put behind a drop that is below the noise of the model's type, else nothing."""
        return noise_mark(self.drop, self.noise, bool(self.unit))

    @property
    def random_mean(self) -> float:
        """Mean over the random sets; NaN without any."""
        return math.fsum(self.controls) / len(self.controls) if self.controls else math.nan

    @property
    def random_worst(self) -> float:
        """The random set that loses most; NaN without any."""
        return min(self.controls, default=math.nan)

    @property
    def exceeds(self) -> bool:
        """A drop, larger than with every random set."""
        return self.drop > 0 and 0 < len(self.controls) == self.beaten

    @property
    def clear(self) -> bool:
        """It exceeds, and the interval of the drop lies above 0."""
        return self.exceeds and self.interval.low > 0


def masking_measure(result: MaskingResult, measure: str = "metric") -> MaskingMeasure:
    """One measure of a result.

    Raises:
        ValueError: `measure` is neither `metric` nor `log_prob`.
    """
    if measure == "metric":
        controls, beaten = tuple(c.metric for c in result.controls), result.beats("metric")
        arms = (result.baseline, result.masked, result.metric_interval)
        arms += (result.baseline_interval, result.masked_interval)
        return MaskingMeasure(
            result.metric_name, result.metric_name, "", *arms, controls, beaten, result.metric_p, result.noise
        )
    if measure == "log_prob":
        controls, beaten = tuple(c.log_prob for c in result.controls), result.beats("log_prob")
        arms = (result.baseline_log_prob, result.masked_log_prob, result.log_prob_interval)
        arms += (result.baseline_log_prob_interval, result.masked_log_prob_interval)
        name = "log-probability"
        long_name = f"{name} of the right answer"
        given = (*arms, controls, beaten, result.log_prob_p, result.noise)
        return MaskingMeasure(long_name, name, " nats", *given)
    raise ValueError(
        f"unknown measure {measure!r}; valid: {', '.join(MEASURES)}{did_you_mean(measure, MEASURES)}"
    )
