"""Correlations of many rows at once, vectorised."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def pearson(x: Float[np.ndarray, "*rows n"], y: Float[np.ndarray, "*rows n"]) -> Float[np.ndarray, "*rows"]:
    """Pearson's correlation over the last axis; NaN where all values of x or of y are equal."""
    x_centred, y_centred = (values - values.mean(-1, keepdims=True) for values in (x, y))
    spread = np.sqrt((x_centred * x_centred).sum(-1) * (y_centred * y_centred).sum(-1))
    return np.divide(
        (x_centred * y_centred).sum(-1), spread, out=np.full_like(spread, np.nan), where=spread > 0
    )


def spearman(x: Float[np.ndarray, "*rows n"], y: Float[np.ndarray, "*rows n"]) -> Float[np.ndarray, "*rows"]:
    """Spearman's rank correlation over the last axis: `pearson` of ranks, ties at their mean rank."""
    return pearson(*(np.apply_along_axis(_ranks, -1, values) for values in (x, y)))


def _ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]
