"""Correlations against numpy's, and ranks counted one by one."""

from __future__ import annotations

import numpy as np
import pytest

from hones_lens.results.correlation import pearson, spearman


def ranks(values: list[float]) -> list[float]:
    """Mean ranks, counted one by one."""
    return [sum(w < v for w in values) + (1 + sum(w == v for w in values)) / 2 for v in values]


def test_each_row_has_its_own_correlation() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 3, 4, 9))
    actual = pearson(x, y)
    assert actual.shape == (3, 4)
    for row in np.ndindex(3, 4):
        assert actual[row] == pytest.approx(np.corrcoef(x[row], y[row])[0, 1])
        assert spearman(x[row], y[row]) == pytest.approx(spearman(x, y)[row])


def test_spearman_shares_the_ranks_of_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 5, 12).astype(float), rng.integers(0, 5, 12).astype(float)
        expected = np.corrcoef(ranks(x.tolist()), ranks(y.tolist()))[0, 1]
        assert spearman(x, y) == pytest.approx(expected)
    assert spearman(np.arange(5.0), np.exp(np.arange(5.0))) == pytest.approx(1)


@pytest.mark.parametrize("correlate", [pearson, spearman])
def test_what_has_no_order_has_no_correlation(correlate) -> None:
    assert np.isnan(correlate(np.ones(4), np.arange(4.0)))
    actual = correlate(np.array([[1.0, 1, 1], [1, 2, 3]]), np.array([[1.0, 2, 3], [3, 2, 1]]))
    assert np.isnan(actual[0]) and actual[1] == pytest.approx(-1)
