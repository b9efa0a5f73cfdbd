"""Races on numbers whose means are known."""

from __future__ import annotations

import numpy as np
import pytest

from hones_lens.results.racing import ConfidenceSequences, Race, Racing, replay


def drops(rng: np.random.Generator, means: np.ndarray, n: int) -> np.ndarray:
    """Sparse values in {−1, 0, 1} with about these means, as drops of an exact match are: [arm example]."""
    lost = rng.random((len(means), n)) < np.abs(means)[:, None]
    return np.sign(means)[:, None] * lost


def test_bounds_hold_at_all_times_and_close_at_the_end() -> None:
    rng = np.random.default_rng(0)
    n, alpha, trials = 120, 0.2, 400
    values = drops(rng, np.full(trials, 0.1), n) + 0.3 * drops(rng, np.full(trials, -0.2), n)
    values = values.clip(-1, 1)
    means, outside = values.mean(1), np.zeros(trials, dtype=bool)
    confidence = ConfidenceSequences(trials, n, alpha)
    for start in range(0, n, 5):
        order = values[:, start : start + 5]  # exchangeable: drawn independently of the position
        confidence.add(np.arange(trials), order)
        low, high = confidence.bounds()
        outside |= (means < low - 1e-9) | (means > high + 1e-9)
    assert outside.mean() <= alpha
    assert np.allclose(low, means) and np.allclose(high, means)
    assert np.allclose(confidence.mean, means)


def test_bounds_tighten_where_values_are_rare() -> None:
    rng = np.random.default_rng(1)
    confidence = ConfidenceSequences(2, 5000, 0.01)
    confidence.add(np.arange(2), drops(rng, np.array([0.01, 0.4]), 500))
    low, high = confidence.bounds()
    assert low[0] < 0.01 < high[0] and low[1] < 0.4 < high[1]
    assert high[0] - low[0] < 0.1 < high[1] - low[1] < 0.4


@pytest.mark.exhaustive
@pytest.mark.parametrize("epsilon", [0.0, 0.05])
def test_the_k_best_win(epsilon: float) -> None:
    """In at least 1 − δ of 250 shuffles no winner is worse than the K-th best by more than epsilon."""
    rng = np.random.default_rng(2)
    k, delta = 4, 0.1
    means = np.concatenate((np.linspace(0.5, 0.2, 6), np.linspace(0.1, -0.05, 14)))
    values = drops(rng, means, 96)
    kth = np.sort(values.mean(1))[-k]
    wrong, measured = 0, 0
    for seed in range(250):
        result = replay(values, k, Racing(delta, epsilon, round_size=24, seed=seed))
        assert len(result.winners) == k
        wrong += any(values[i].mean() < kth - epsilon - 1e-12 for i in result.winners)
        measured += sum(result.examples)
    assert wrong <= delta * 250
    assert measured < 250 * values.size * 0.9, "nothing left the race early"


def test_ties_are_settled_by_running_to_the_end() -> None:
    values = np.tile(np.array([1.0, 0.0] * 20), (4, 1))
    late = replay(values, 2, Racing(0.05, 0.0, round_size=8))
    assert late.winners == (0, 1) and late.examples == (40,) * 4
    early = replay(np.tile(np.zeros(400), (4, 1)), 2, Racing(0.05, 0.2, round_size=40))
    assert max(early.examples) < 400


def test_races_refuse() -> None:
    for bad in ({"delta": 0.0}, {"delta": 1.0}, {"epsilon": -0.1}, {"round_size": 0}):
        with pytest.raises(ValueError, match="racing needs"):
            Racing(**bad)
    with pytest.raises(ValueError, match="k must be between 1 and 3, not 4"):
        Race(3, 10, 4, Racing())
    race = Race(3, 10, 1, Racing())
    with pytest.raises(ValueError, match="values between -1"):
        race.add(np.full((3, 1), 1.5))
    with pytest.raises(ValueError, match="more values than the 10 examples"):
        race.add(np.zeros((3, 11)))
    with pytest.raises(ValueError, match="3 arms are still running"):
        race.result()
