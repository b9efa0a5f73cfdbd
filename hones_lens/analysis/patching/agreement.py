"""Agreement of attribution patching with measured effects: how well the estimates rank components."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, Unpack

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.analysis.patching.activation import patch_activations
from hones_lens.analysis.patching.gradient import STEPS, attribute_patching
from hones_lens.analysis.patching.metrics import Metric
from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.analysis.patching.sites import as_patch_site
from hones_lens.engine import BatchKeywords, SweepOptions
from hones_lens.model import HookedVLM, takes_iterables
from hones_lens.results import Interval, Result, pearson, spearman


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Result):
    """Estimated and measured changes of the metric, of the same components in the same pairs.

    Attributes:
        what: Description of what was patched and how it was estimated.
        components: (layer, index) of each component.
        estimated, measured: Patched minus base, [pair component], float64 on the CPU.
    """

    kind: ClassVar[str] = "agreement"

    what: str
    components: tuple[tuple[int, int], ...]
    estimated: Float[Tensor, "pair component"]
    measured: Float[Tensor, "pair component"]

    def spearman(self, level: float = 0.95) -> Interval:
        """Rank correlation, over components, of the mean changes, signs included; ties share their rank.

        The interval is that of other pairs for these components: the value ± normal quantile × standard error
        of the jackknife over pairs (one left out at a time), within −1 … 1. A bootstrap would not do: means
        over resampled pairs have more noise, which both sides share, and correlate more than they should.

        Raises:
            ValueError: Fewer than two pairs or three components, or changes that are all equal.
        """
        return self._correlation(spearman, level)

    def pearson(self, level: float = 0.95) -> Interval:
        """Correlation of the mean changes themselves; as `spearman`."""
        return self._correlation(pearson, level)

    def _correlation(
        self, correlate: Callable[[np.ndarray, np.ndarray], np.ndarray], level: float
    ) -> Interval:
        n, k = self.measured.shape
        if n < 2 or k < 3:
            raise ValueError(f"{n} pairs and {k} components: a correlation needs two pairs, three components")
        shares = np.concatenate((np.ones((1, n)) / n, (1 - np.eye(n)) / (n - 1)))
        correlations = correlate(*(shares @ side.numpy() for side in (self.estimated, self.measured)))
        if np.isnan(correlations).any():
            raise ValueError(f"{self.what}: the changes of all components are equal, they have no order")
        value, *others = correlations
        error = np.sqrt((n - 1) * np.var(others))
        half_width = NormalDist().inv_cdf((1 + level) / 2) * error
        return Interval(
            float(value), max(-1.0, float(value - half_width)), min(1.0, float(value + half_width)), level, n
        )

    def of(self, components: Iterable[tuple[int, int]]) -> Agreement:
        """The agreement restricted to some components.

        Raises:
            ValueError: One that was not measured.
        """
        components = list(components)
        missing = set(components) - set(self.components)
        if missing:
            raise ValueError(f"{self.what}: {sorted(missing)[0]} was not measured")
        columns = [self.components.index(component) for component in components]
        return Agreement(self.what, tuple(components), self.estimated[:, columns], self.measured[:, columns])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per component: layer, index, and the mean changes, estimated and measured."""
        layers, index = zip(*self.components, strict=True)
        means = {"estimated": self.estimated.mean(0).numpy(), "measured": self.measured.mean(0).numpy()}
        return pd.DataFrame({"layer": layers, "index": index, **means})

    def __str__(self) -> str:
        return f"{self.what}, {len(self.components)} components: Spearman {self.spearman()}"


@takes_iterables
def atp_against_measured(
    model: HookedVLM,
    pairs: PatchPairs,
    what: str = "z",
    *,
    components: Sequence[tuple[int, int]] | None = None,
    direction: str = "denoise",
    metric: str | Metric = "logit_diff",
    method: str = "atp*",
    steps: int = STEPS,
    options: SweepOptions | None = None,
    **batches: Unpack[BatchKeywords],
) -> Agreement:
    """Patch components one at a time, at all positions, and estimate the same by attribution patching.

    Args:
        model, pairs, what, direction, metric, method, steps: As `attribute_patching`; of what has heads or
            neurons.
        components: (layer, index) of those to measure; default: all.
        options, batches: How both run: `batch_size` and `progress` of `SweepOptions`.

    Raises:
        ValueError: An activation without heads or neurons, or a component that is not there or given twice;
            else as `attribute_patching`.
    """
    options = SweepOptions.of_batches(options, batches)
    settings: dict[str, Any] = {"direction": direction, "metric": metric, "by_pair": True, "options": options}
    estimated = attribute_patching(model, pairs, what, method=method, steps=steps, **settings)
    if estimated.values.ndim != 3:
        raise ValueError(f"{as_patch_site(what).what} has no heads or neurons to compare")
    n_layers, width = estimated.shape[1:]
    chosen = [(layer, i) for layer in range(n_layers) for i in range(width)]
    chosen = chosen if components is None else [(int(layer), int(i)) for layer, i in components]
    measured = patch_activations(model, pairs, what, "all", units=chosen, **settings)
    layers, index = torch.tensor(chosen).T
    description = f"{what} by {method}, {direction}"
    return Agreement(description, tuple(chosen), estimated.values[:, layers, index], measured.values)
