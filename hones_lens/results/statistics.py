"""Intervals and tests over examples: paired bootstrap, paired permutation, many tests at once.

A task's statistics add up over examples, and its metric is a function of their sum, so that a metric
which is no mean (corpus BLEU) is resampled exactly as one that is (METHOD, Faithfulness).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.model import did_you_mean

DRAWS = 2000  # resamples of a bootstrap
_CHUNK_ELEMENTS = 4_000_000
_ROUNDING = 1e-12


class SummedMetric(Protocol):
    """An object with a metric of statistics that are summed over examples, such as a task."""

    def metric(self, statistics: np.ndarray) -> np.ndarray:
        """The metric of summed statistics [..., n_statistics], [...]."""
        ...


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval.

    Attributes:
        value: The value on all examples.
        low, high: Ends of the percentile interval.
        level: Its coverage, e.g. 0.95.
        n: Number of examples.
    """

    value: float
    low: float
    high: float
    level: float
    n: int

    def __str__(self) -> str:
        return f"{self:.3f} ({100 * self.level:g} %, n = {self.n})"

    def __format__(self, spec: str) -> str:
        """Value and ends by a specification for numbers: `f"{interval:+.2f}"` is `+0.12 [-0.03, +0.27]`."""
        if not spec:
            return str(self)
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    @property
    def span(self) -> str:
        """The interval alone, e.g. `[0.123, 0.456]`."""
        return f"[{self.low:.3f}, {self.high:.3f}]"


def bootstrap_interval(
    task: SummedMetric,
    statistics_base: np.ndarray,
    statistics_other: np.ndarray,
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Paired bootstrap over examples of metric(base) - metric(other).

    Args:
        task: Whose metric.
        statistics_base, statistics_other: `task.statistics` of the same examples, in the same order,
            in either arm, [n_examples, n_statistics].
        draws: How many resamples.
        level: Coverage of the percentile interval.
        seed: Same seed, same interval.

    Raises:
        ValueError: Fewer than two examples, arms of different shape, values that are not finite, or a
            `level` or `draws` out of range.
    """
    return bootstrap_intervals(
        task, statistics_base, [statistics_other], draws=draws, level=level, seed=seed
    )[0]


def bootstrap_intervals(
    task: SummedMetric,
    statistics_base: np.ndarray,
    statistics_others: Sequence[np.ndarray],
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> list[Interval]:
    """`bootstrap_interval` of metric(base) - metric(other) for each of many arms, on the same resamples."""
    pairs = [_check_paired_arms(statistics_base, other) for other in statistics_others]
    if not pairs:
        return []
    base = pairs[0][0]

    def differences(counts: np.ndarray) -> np.ndarray:
        clean = task.metric(counts @ base)
        return np.stack([clean - task.metric(counts @ other) for _, other in pairs])

    return _bootstrap_intervals(differences, len(base), draws, level, seed)


def mean_difference_interval(
    task: SummedMetric,
    statistics_base: np.ndarray,
    statistics_others: Sequence[np.ndarray],
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """As `bootstrap_interval`, of the mean over several arms of metric(base) - metric(arm).

    Raises:
        ValueError: No arms, and as there.
    """
    pairs = [_check_paired_arms(statistics_base, other) for other in statistics_others]
    if not pairs:
        raise ValueError("a mean over arms needs at least one")
    base = pairs[0][0]

    def mean(counts: np.ndarray) -> np.ndarray:
        clean = task.metric(counts @ base)
        return np.mean([clean - task.metric(counts @ other) for _, other in pairs], axis=0)

    return _bootstrap_interval(mean, len(base), draws, level, seed)


def relative_interval(
    task: SummedMetric,
    statistics_base: np.ndarray,
    statistics_other: np.ndarray,
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """As `bootstrap_interval`, of the difference in per cent of metric(base).

    Each resample is divided by its own metric(base), so that the interval includes the uncertainty of the
    base. Where the base is 0, the relative difference is 0.
    """
    base, other = _check_paired_arms(statistics_base, statistics_other)

    def share(counts: np.ndarray) -> np.ndarray:
        clean = np.asarray(task.metric(counts @ base), dtype=np.float64)
        drops = 100 * (clean - task.metric(counts @ other))
        return np.divide(drops, clean, out=np.zeros_like(drops), where=clean != 0)

    return _bootstrap_interval(share, len(base), draws, level, seed)


def metric_interval(
    task: SummedMetric, statistics: np.ndarray, *, draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> Interval:
    """Bootstrap over examples of one arm's metric; arguments as in `bootstrap_interval`."""
    arm = _check_array(statistics, 2)
    return _bootstrap_interval(lambda counts: task.metric(counts @ arm), len(arm), draws, level, seed)


def mean_interval(
    values: Sequence[float] | np.ndarray, *, draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> Interval:
    """Bootstrap of the mean of one number per example, [n_examples], e.g. a log-probability.

    For a paired difference give the differences. Raises as `bootstrap_interval` does.
    """
    numbers = _check_array(values, 1)
    n = len(numbers)
    return _bootstrap_interval(lambda counts: counts @ numbers / n, n, draws, level, seed)


def permutation_p(
    task: SummedMetric, a: np.ndarray, b: np.ndarray, draws: int = DRAWS, seed: int = 0
) -> float:
    """Two-sided p-value of a paired permutation test of metric(a) = metric(b).

    Each draw swaps the two arms of every example with probability one half; p = (1 + number of draws
    whose difference is at least as large in size as the one observed) / (1 + draws).

    Args:
        task: Whose metric.
        a, b: `task.statistics` of the same examples in either arm, [n_examples, n_statistics].
        draws: How many permutations.
        seed: Same seed, same p.

    Raises:
        ValueError: As `bootstrap_interval`.
    """
    a, b = _check_paired_arms(a, b)
    _check_draws(draws)
    rng = np.random.default_rng(seed)
    sum_a, sum_b, arm_gaps = a.sum(axis=0), b.sum(axis=0), b - a
    observed = abs(float(task.metric(sum_a) - task.metric(sum_b)))
    as_large = 0
    for size in _chunks(draws, len(a)):
        swapped_gap = (rng.random((size, len(a))) < 0.5).astype(np.float64) @ arm_gaps
        differences = task.metric(sum_a + swapped_gap) - task.metric(sum_b - swapped_gap)
        as_large += int((np.abs(differences) >= observed - _ROUNDING).sum())
    return (1 + as_large) / (1 + draws)


def sign_flip_p(
    differences: Sequence[Sequence[float]] | np.ndarray,
    *,
    alternative: str = "greater",
    draws: int = 10_000,
    seed: int = 0,
) -> np.ndarray:
    """P-values of paired permutation tests of mean difference = 0, one for each arm, [n_arms].

    Each draw swaps the two conditions of every example with probability one half, which flips the
    signs of its differences, in all arms alike; p = (1 + number of draws whose mean is at least as
    large as the one observed) / (1 + draws).

    Args:
        differences: One number for each arm and example, e.g. drops, [n_arms, n_examples].
        alternative: `greater` (the mean is above zero) or `two-sided` (sizes of means are compared).
        draws: How many permutations.
        seed: Same seed, same p-values.

    Raises:
        ValueError: No arms, fewer than two examples, values that are not finite, another alternative,
            or `draws` out of range.
    """
    arms = _as_array(differences)
    if arms.ndim != 2 or not len(arms):
        raise ValueError(f"expected differences of shape [n_arms, n_examples], got shape {arms.shape}")
    if alternative not in ("greater", "two-sided"):
        raise ValueError(
            f"unknown alternative {alternative!r}; valid: greater, two-sided"
            f"{did_you_mean(alternative, ('greater', 'two-sided'))}"
        )
    _check_draws(draws)
    by_example = _check_array(arms.T, 2)
    n_examples, n_arms = by_example.shape
    magnitude = np.abs if alternative == "two-sided" else np.asarray
    observed = magnitude(by_example.mean(axis=0))
    rng = np.random.default_rng(seed)
    as_large = np.zeros(n_arms, dtype=np.int64)
    for size in _chunks(draws, max(n_examples, n_arms)):
        signs = np.where(rng.random((size, n_examples)) < 0.5, -1.0, 1.0)
        means = signs @ by_example / n_examples
        as_large += (magnitude(means) >= observed - _ROUNDING).sum(axis=0)
    return (1 + as_large) / (1 + draws)


def two_sided_p(differences: Sequence[float] | np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> float:
    """`sign_flip_p` of one arm's paired differences, [n_examples], two-sided."""
    rows = _as_array(differences)[None]
    return float(sign_flip_p(rows, alternative="two-sided", draws=draws, seed=seed)[0])


def benjamini_hochberg(
    p_values: Sequence[float] | np.ndarray, q: float = 0.05, *, dependent: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Control the false discovery rate over many tests.

    The i-th smallest of n p-values is adjusted to the smallest of `p_(j) n / j` over j ≥ i, at most 1.
    Source: Benjamini and Hochberg, J. R. Stat. Soc. B 57 (1995); for `dependent`, Benjamini and
    Yekutieli, Ann. Stat. 29 (2001), with a factor of `Σ 1 / i` for i = 1 … n.

    Args:
        p_values: One for each test, [n].
        q: The false discovery rate to keep to.
        dependent: Hold for tests that depend on each other in any way.

    Returns:
        Adjusted p-values [n], and whether each test is a discovery [n] (adjusted p ≤ q), in the order given.

    Raises:
        ValueError: No p-values, one outside 0 … 1 or NaN, or q not between 0 and 1.
    """
    p = _as_array(p_values)
    if p.ndim != 1 or not len(p):
        raise ValueError(f"expected one p-value for each test, got shape {p.shape}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"{int((~((p >= 0) & (p <= 1))).sum())} of the p-values do not lie in 0 … 1")
    if not 0 < q < 1:
        raise ValueError(f"q must lie between 0 and 1, not {q}")
    ranks = np.arange(1, len(p) + 1)
    correction = (1 / ranks).sum() if dependent else 1.0
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) * correction / ranks
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted, adjusted <= q


def _bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, draws: int, level: float, seed: int
) -> Interval:
    """Percentile interval of a statistic of the counts [draws, n] with which examples are drawn."""
    return _bootstrap_intervals(lambda counts: statistic(counts)[None], n, draws, level, seed)[0]


def _bootstrap_intervals(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, draws: int, level: float, seed: int
) -> list[Interval]:
    """As `_bootstrap_interval`, for a statistic of several values, [value, draws]."""
    _check_draws(draws)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    bounds = _percentile_ends(statistic, n, draws, level, seed)
    values = statistic(np.ones((1, n)))[:, 0]
    return [
        Interval(float(value), float(low), float(high), level, n)
        for value, low, high in zip(values, *bounds, strict=True)
    ]


def _percentile_ends(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, draws: int, level: float, seed: int
) -> Float[np.ndarray, "2 value"]:
    """Ends of the percentile intervals."""
    rng = np.random.default_rng(seed)
    uniform = np.full(n, 1 / n)
    chunks = [statistic(rng.multinomial(n, uniform, size).astype(np.float64)) for size in _chunks(draws, n)]
    return np.quantile(np.concatenate(chunks, axis=-1), [(1 - level) / 2, (1 + level) / 2], axis=-1)


def _chunks(draws: int, n: int) -> Iterator[int]:
    """Sizes that add up to `draws`, so that one chunk of draws x n numbers stays small."""
    size = max(1, _CHUNK_ELEMENTS // n)
    for start in range(0, draws, size):
        yield min(size, draws - start)


def _check_draws(draws: int) -> None:
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")


def _check_paired_arms(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = _check_array(a, 2), _check_array(b, 2)
    if first.shape != second.shape:
        raise ValueError(f"the two arms have different shapes, {first.shape} and {second.shape}")
    return first, second


def _as_array(values: Iterable[Any] | np.ndarray) -> np.ndarray:
    """The numbers as float64, of any iterable."""
    return np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64)


def _check_array(values: Sequence[float] | np.ndarray, ndim: int) -> np.ndarray:
    array = _as_array(values)
    if array.ndim != ndim:
        raise ValueError(f"expected an array of {ndim} dimensions, got shape {array.shape}")
    if len(array) < 2:
        raise ValueError(f"resampling needs at least two examples, got {len(array)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of the values are not finite")
    return array


def mean_over_pairs(
    values: Float[Tensor, "pair *rest"], draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Mean over pairs with bootstrap intervals, as arguments of `Labelled`: values, n, low, high.

    Pairs are drawn with replacement, the same for all entries (percentile intervals). With a single pair or
    no draws, there is no interval.

    Raises:
        ValueError: `draws` below 0.
    """
    if draws < 0:
        raise ValueError(f"draws must not be negative: {draws}")
    n, shape = values.shape[0], values.shape[1:]
    fields: dict[str, Any] = {"values": values.double().mean(0), "n": n}
    if n < 2 or not draws:
        return fields
    flattened = values.detach().cpu().double().reshape(n, -1).numpy()
    low, high = bootstrap_ends(lambda counts, columns: counts / n @ columns, flattened, draws, level, seed)
    fields["low"], fields["high"] = (torch.as_tensor(bound).reshape(shape) for bound in (low, high))
    return fields


def bootstrap_ends(
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    values: Float[np.ndarray, "n column"],
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> Float[np.ndarray, "2 column"]:
    """Ends of the percentile intervals of a statistic of many columns, on the same resamples.

    Args:
        statistic: From counts [draws, n], how often each row is drawn, and some of the columns [n, some] to
            the statistic of each draw, [draws, some]; draws on which it is not defined may be left out.
        values: One row per example.
        draws, level, seed: As in `bootstrap_interval`.
    """
    width = max(1, _CHUNK_ELEMENTS // draws)
    column_chunks = [values[:, start : start + width] for start in range(0, values.shape[1], width)]
    return np.concatenate(
        [
            _percentile_ends(lambda counts, p=chunk: statistic(counts, p).T, len(values), draws, level, seed)
            for chunk in column_chunks
        ],
        axis=1,
    )
