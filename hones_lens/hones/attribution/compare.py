"""Do two rankings of heads agree? Rank correlation over all heads, and overlap of the best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.results import Labelled, Result, ranked, spearman

Ranking = HeadScores | Labelled | Tensor
_AXES = (("layer", "head"), ("layer", "kv_head"), ("layer", "neuron"))


@dataclass(frozen=True, eq=False, repr=False)
class RankingComparison(Result):
    """How far two rankings of the same heads (or neurons) agree.

    Attributes:
        names: What the two are called.
        scores: Of the two, [2 layer head]; NaN where one was not measured.
        spearman: Rank correlation over what both measured; ties share their mean rank.
        low, high: Ends of its 95 % bootstrap interval over heads.
        n: How many heads both measured.
        k: How many of the best are compared.
        shared: Those among the k best of both, as (layer, head).
        expected: How many would be shared by chance, `k² / n`.
        p: Probability that chance shares as many or more (hypergeometric).
    """

    kind: ClassVar[str] = "ranking-comparison"

    names: tuple[str, str]
    scores: Tensor
    spearman: float
    low: float
    high: float
    n: int
    k: int
    shared: tuple[tuple[int, int], ...]
    expected: float
    p: float

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head: layer, head, and the score of either ranking."""
        layers, heads = np.indices(self.scores.shape[1:]).reshape(2, -1)
        first, second = (scores.flatten().numpy() for scores in self.scores)
        return pd.DataFrame({"layer": layers, "head": heads, self.names[0]: first, self.names[1]: second})

    def __str__(self) -> str:
        shared = ", ".join(f"L{layer}H{head}" for layer, head in self.shared)
        return (
            f"{self.names[0]} and {self.names[1]}, {self.n} heads: Spearman {self.spearman:.2f} "
            f"[{self.low:.2f}, {self.high:.2f}] (95 %); of the best {self.k} they share {len(self.shared)}"
            f"{f' ({shared})' if shared else ''}, by chance {self.expected:.1f} (p = {self.p:.2g})"
        )

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>"


def compare_rankings(
    a: Ranking,
    b: Ranking,
    k: int | None = None,
    *,
    names: tuple[str, str] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> RankingComparison:
    """Compare two rankings of heads, e.g. by mean replacement and by activation patching.

    The interval says how far the correlation depends on which heads there are: heads are drawn with
    replacement, and their scores are taken as they are.

    Args:
        a, b: HeadScores, results on the axes layer and head (or neuron), or scores [layer head]; higher is
            more important in both.
        k: How many of the best to compare; default: the smaller top_k of the two, or 10 % of the heads.
        names: What they are called; default: what was done to the heads.
        draws, seed: Of the bootstrap.

    Raises:
        ValueError: Other axes, different numbers of layers or heads, fewer than three heads that both
            measured, all alike in one ranking, or a k outside of 1 … n.
    """
    scores = torch.stack(_same_shape(_scores(a), _scores(b)))
    in_both = ~scores.isnan().any(0)
    x, y = scores[:, in_both].numpy()
    n = len(x)
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError(f"{n} heads have scores in both rankings: three are needed, and not all alike")
    if k is None:
        top_ks = [r.top_k for r in (a, b) if isinstance(r, HeadScores)]
        k = min([*top_ks, n]) if top_ks else max(1, round(0.1 * n))
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1 … {n}, not {k}")
    rng = np.random.default_rng(seed)
    correlations = [
        spearman(x[sample], y[sample]) for sample in (rng.integers(0, n, n) for _ in range(draws))
    ]
    low, high = np.nanquantile(correlations, (0.025, 0.975))
    common_scores = scores.where(in_both, -torch.inf)
    best = [{(c.layer, c.index) for c in ranked(each, k)} for each in common_scores]
    shared = tuple(sorted(best[0] & best[1]))
    n_ways = [math.comb(k, i) * math.comb(n - k, k - i) for i in range(len(shared), k + 1)]
    return RankingComparison(
        names=names or _names(a, b),
        scores=scores,
        spearman=float(spearman(x, y)),
        low=float(low),
        high=float(high),
        n=n,
        k=k,
        shared=shared,
        expected=k * k / n,
        p=sum(n_ways) / math.comb(n, k),
    )


def _scores(ranking: Ranking) -> Tensor:
    if isinstance(ranking, HeadScores):
        return ranking.scores.double()
    if isinstance(ranking, Labelled):
        if ranking.axes not in _AXES:
            raise ValueError(f"{ranking.what}: axes {ranking.axes} are no ranking by layer and head")
        return ranking.values.double()
    if ranking.ndim != 2:
        raise ValueError(f"scores of shape {tuple(ranking.shape)}; a ranking is [layer head]")
    return ranking.detach().cpu().double()


def _same_shape(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape:
        raise ValueError(f"rankings of {tuple(a.shape)} and {tuple(b.shape)} layers and heads")
    return a, b


def _names(a: Ranking, b: Ranking) -> tuple[str, str]:
    first, second = (
        r.intervention if isinstance(r, HeadScores) else r.what if isinstance(r, Labelled) else "scores"
        for r in (a, b)
    )
    return (first, second) if first != second else (f"{first} (1)", f"{second} (2)")
