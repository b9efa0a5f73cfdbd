"""Effects that a model's type may have made by rounding: how large these are, and how tables mark them."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

BELOW_NOISE = "~"  # behind an effect that the model's type may have made


@dataclass(frozen=True)
class Noise:
    """How far rounding to a model's type may move a difference of two of its measurements.

    It is twice the mean distance of the unchanged model's values, one an example, from those of the same
    weights computing in float32: once for each of the two measurements. The weights' own rounding is no part
    of it, since they are the model.

    Attributes:
        metric: In the unit of what is measured; None where it is not known.
        log_prob: In nats of an answer's log-probability; None where it is not known.
        n: How many examples or pairs were compared; 0 where it is not known.
        dtype: The model's type.
        against: `float32`; in files of earlier versions `batches`, since these compared answers that ran one
            by one and in batches, once.
    """

    metric: float | None
    log_prob: float | None
    n: int
    dtype: str
    against: str = "float32"

    @classmethod
    def of_batches(cls, log_prob: float) -> Noise:
        """The noise as earlier versions estimated it."""
        return cls(None, log_prob, 0, "the model's type", "batches")

    def of(self, measure: str) -> float | None:
        """That of a measure, `metric` or `log_prob`."""
        return self.log_prob if measure == "log_prob" else self.metric

    def legend(self, *measures: str) -> str:
        """What the mark says, of these measures."""
        if self.against == "batches":
            return (
                f"{BELOW_NOISE} smaller than rounding, by which answers run one by one or in batches differ "
                f"({self.log_prob:.2g} nats)"
            )
        known = [(measure, self.of(measure)) for measure in measures]
        texts = [
            f"{value:.2g}{' nats' if measure == 'log_prob' else ''}"
            for measure, value in known
            if value is not None
        ]
        return (
            f"{BELOW_NOISE} smaller than the noise of {self.dtype}: twice the mean distance of {self.n:,} "
            f"unchanged runs from float32 ({', '.join(texts)})"
        )


def is_below(effect: float, noise: Noise | None, log_prob: bool = False) -> bool:
    """Whether an effect on the metric, or on the log-probability, is below a noise that is known."""
    size = None if noise is None else noise.log_prob if log_prob else noise.metric
    return size is not None and abs(effect) < size


def noise_mark(effect: float, noise: Noise | None, log_prob: bool = False) -> str:
    """What is put behind an effect that is below noise, else nothing."""
    return BELOW_NOISE if is_below(effect, noise, log_prob) else ""


def noise_legend(noise: Noise | None, *effects: float) -> str:
    """What the mark behind effects on the metric says, where some effect has it, else nothing."""
    marked = noise is not None and any(is_below(effect, noise) for effect in effects)
    return noise.legend("metric") if noise is not None and marked else ""


def with_marks(frame: pd.DataFrame, column: str, noise: Noise | None, log_prob: bool = False) -> pd.DataFrame:
    """A table with a column of marks behind one of effects, where some effect is below noise."""
    marks = [noise_mark(float(effect), noise, log_prob) for effect in frame[column]]
    if not any(marks):
        return frame
    marked = frame.copy()
    marked.insert(int(frame.columns.tolist().index(column)) + 1, f"{column} below noise", marks)
    return marked
