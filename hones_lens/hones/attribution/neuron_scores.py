"""What an attribution says of every neuron."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hones_lens.results import Component, Interval, nan_to_none, none_to_nan, ranked, read_json, write_json


@dataclass(frozen=True, eq=False)
class NeuronScores:
    """A ranking of all decoder neurons for a task.

    Attributes:
        task: What was asked.
        method: How neurons were scored: `hones`, or a ranking's name.
        model_name: Whose neurons.
        scores: Higher is more important, [layer d_mlp]; minus infinity where it is not known.
        ratio: Share of all neurons that are task neurons by default.
        n_examples: How many examples it rests on.
        errors: Standard error of each score over examples, [layer d_mlp] (jackknife); None where it is not
            known: other rankings than `hones`, a file of HONES's, one example.
    """

    task: str
    method: str
    model_name: str
    scores: Tensor
    ratio: float
    n_examples: int
    errors: Tensor | None = None

    def count(self, ratio: float | None = None) -> int:
        """How many neurons a share of all is, to the nearest and at least one (LLaVA-1.5-7B, 1 %: 3,523)."""
        share = self.ratio if ratio is None else ratio
        if not 0 < share <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, not {share}")
        return max(1, round(share * self.scores.numel()))

    def top(self, k: int | None = None) -> list[Component]:
        """The k best neurons as (layer, index, score); default: the share `ratio`."""
        return ranked(self.scores, self.count() if k is None else k)

    def per_layer(self, k: int | None = None) -> list[int]:
        """How many of the top k lie in each layer."""
        counts = Counter(c.layer for c in self.top(k))
        return [counts[layer] for layer in range(len(self.scores))]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a neuron: layer, neuron, score and its standard error, best first."""
        frame = pd.DataFrame(ranked(self.scores, self.scores.numel()), columns=["layer", "neuron", "score"])
        if self.errors is not None:
            frame["standard_error"] = self.errors[frame["layer"].tolist(), frame["neuron"].tolist()].tolist()
        return frame

    def interval(self, layer: int, neuron: int) -> Interval | None:
        """A score with its interval of 95 %, plus and minus 1.96 standard errors; None where not known."""
        if self.errors is None:
            return None
        score, half = float(self.scores[layer, neuron]), 1.96 * float(self.errors[layer, neuron])
        return Interval(score, score - half, score + half, 0.95, self.n_examples)

    def save(self, file: str | Path) -> None:
        """Write everything to JSON, with the task neurons as a list of (layer, neuron, score)."""
        data = {name: value for name, value in vars(self).items() if name != "scores"}
        data["errors"] = None if self.errors is None else self.errors.tolist()
        top = [list(c) for c in self.top()]
        scores = nan_to_none(self.scores.where(self.scores.isfinite(), torch.nan).tolist())
        write_json(file, {"kind": "neurons", **data, "top": top, "scores": scores})

    @classmethod
    def load(cls, file: str | Path) -> NeuronScores:
        """Read what `save` wrote.

        Raises:
            ValueError: Another kind of file.
        """
        data = read_json(file, "neurons")
        scores = torch.tensor(none_to_nan(data["scores"]), dtype=torch.float64)
        data["scores"] = scores.nan_to_num(nan=-torch.inf)
        if data.get("errors") is not None:
            data["errors"] = torch.tensor(data["errors"], dtype=torch.float64)
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})

    def __str__(self) -> str:
        best = self.top()
        lines = [
            f"{self.model_name}, {self.task}: {len(best)} task neurons by {self.method}, "
            f"by layer {self.per_layer()}; scores over n = {self.n_examples} examples"
        ]
        lines += [f"  L{c.layer}N{c.index:<5} {c.score:+.4g}{self._ends(c)}" for c in best[:20]]
        return "\n".join([*lines, "  …"] if len(best) > 20 else lines)

    __repr__ = __str__

    def _ends(self, c: Component) -> str:
        interval = self.interval(c.layer, c.index)
        return f" [{interval.low:+.4g}, {interval.high:+.4g}] (95 %)" if interval else ""

    def _repr_html_(self) -> str:
        return self.to_dataframe().head(self.count()).to_html(index=False)

    def plot(self) -> Any:
        """Task neurons per layer (a matplotlib figure)."""
        from hones_lens.viz import neurons_per_layer

        return neurons_per_layer([self])
