"""The scores of every neuron that an attribution returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from hones_lens.interventions import join_numbers
from hones_lens.results import Component, Interval, Result, html_table, ranked, to_json


@dataclass(frozen=True, eq=False, repr=False)
class NeuronScores(Result):
    """A ranking of all decoder neurons for a task.

    `plot()` draws how many task neurons lie in each layer.

    Attributes:
        task: What was asked.
        method: How neurons were scored: `hones`, or a ranking's name.
        model_name: Whose neurons.
        scores: Higher is more important, [layer d_mlp]; minus infinity where it is not known.
        ratio: Share of all neurons that are task neurons by default.
        n_examples: How many examples it rests on.
        errors: Standard error of each score over examples, [layer d_mlp] (jackknife); None where it is not
            known: other rankings than `hones`, a file of HONES's, one example.
        layers: The layers that were asked for; None for all. Scores of the others are NaN, their neurons are
            never selected, and `ratio` is a share of the neurons of these layers.
    """

    kind: ClassVar[str] = "neurons"

    task: str
    method: str
    model_name: str
    scores: Tensor
    ratio: float
    n_examples: int
    errors: Tensor | None = None
    layers: tuple[int, ...] | None = None

    @property
    def n_asked(self) -> int:
        """How many neurons were asked for: those of `layers`, or all."""
        n_layers, d_mlp = self.scores.shape
        return d_mlp * (n_layers if self.layers is None else len(self.layers))

    def count(self, ratio: float | None = None) -> int:
        """How many neurons a share of all is, to the nearest and at least one (LLaVA-1.5-7B, 1 %: 3,523).

        Where layers were asked for, all are the neurons of these.
        """
        share = self.ratio if ratio is None else ratio
        if not 0 < share <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, not {share}")
        return max(1, round(share * self.n_asked))

    def top(self, k: int | None = None) -> list[Component]:
        """The k best neurons as (layer, index, score); default: the share `ratio`.

        Raises:
            ValueError: More than were asked for.
        """
        k = self.count() if k is None else k
        if self.layers is None:
            return ranked(self.scores, k)
        if k > self.n_asked:
            raise ValueError(f"{k} neurons asked for, but {self.n_asked} were scored: {self.limits}")
        return ranked(self._where_asked(), k)

    def _where_asked(self) -> Tensor:
        """The scores, minus infinity in layers that were not asked for."""
        return self.scores if self.layers is None else self.scores.nan_to_num(nan=-torch.inf)

    @property
    def limits(self) -> str:
        """Which layers were asked for, in words; empty where all were."""
        if self.layers is None:
            return ""
        chosen, total = join_numbers(self.layers), len(self.scores)
        return f"{len(self.layers)} of {total} layers ({chosen}) were asked for; the others are not measured"

    def per_layer(self, k: int | None = None) -> list[int]:
        """How many of the top k lie in each layer."""
        counts = Counter(c.layer for c in self.top(k))
        return [counts[layer] for layer in range(len(self.scores))]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a neuron that was asked for: layer, neuron, score and its standard error, best first."""
        best = ranked(self._where_asked(), self.n_asked)
        frame = pd.DataFrame(best, columns=["layer", "neuron", "score"])
        if self.errors is not None:
            frame["standard_error"] = self.errors[frame["layer"].tolist(), frame["neuron"].tolist()].tolist()
        return frame

    def interval(self, layer: int, neuron: int) -> Interval | None:
        """A score with its interval of 95 %, plus and minus 1.96 standard errors; None where not known."""
        if self.errors is None:
            return None
        score, half = float(self.scores[layer, neuron]), 1.96 * float(self.errors[layer, neuron])
        return Interval(score, score - half, score + half, 0.95, self.n_examples)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as the values that JSON holds, with the task neurons as (layer, neuron, score)."""
        scores = to_json(self.scores.where(self.scores.isfinite(), torch.nan))
        return {**super().to_dict(), "top": [list(c) for c in self.top()], "scores": scores}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NeuronScores:
        """From what `to_dict` gave, also through JSON.

        Raises:
            ValueError: A field is missing.
        """
        result = super().from_dict(data)
        scores = result.scores.nan_to_num(nan=-torch.inf)
        if result.layers is not None:
            asked = torch.zeros(len(scores), 1, dtype=torch.bool)
            asked[list(result.layers)] = True
            scores = scores.where(asked, torch.nan)
        return replace(result, scores=scores)

    def __str__(self) -> str:
        best = self.top()
        lines = [
            f"{self.model_name}, {self.task}: {len(best)} task neurons by {self.method}, "
            f"by layer {self.per_layer()}; scores over n = {self.n_examples} examples"
        ]
        lines += [self.limits] if self.limits else []
        lines += [f"  L{c.layer}N{c.index:<5} {self._told(c)}" for c in best[:20]]
        return "\n".join([*lines, "  …"] if len(best) > 20 else lines)

    def _told(self, c: Component) -> str:
        interval = self.interval(c.layer, c.index)
        return f"{interval:+.4g} (95 %)" if interval else f"{c.score:+.4g}"

    def _repr_html_(self) -> str:
        return html_table(self.to_dataframe(), self.count())
