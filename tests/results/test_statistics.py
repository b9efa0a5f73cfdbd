"""Intervals and tests against naive resampling, exact enumeration and normal theory."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import sacrebleu

from hones_lens.results import statistics
from hones_lens.results.statistics import (
    Interval,
    benjamini_hochberg,
    bootstrap_ends,
    bootstrap_interval,
    bootstrap_intervals,
    mean_difference_interval,
    mean_interval,
    metric_interval,
    permutation_p,
    relative_interval,
    sign_flip_p,
)
from hones_lens.tasks.metrics import bleu_statistics
from hones_lens.tasks.registry import load_task

VQA, CAPTION = load_task("vqa"), load_task("caption")


def means(values: np.ndarray) -> np.ndarray:
    """Statistics of a task whose metric is a mean."""
    return np.stack([values, np.ones(len(values))], axis=1)


def test_interval_of_a_mean_agrees_with_normal_theory():
    values = np.random.default_rng(3).normal(0.4, 2.0, size=500)
    interval = mean_interval(values, draws=4000)
    half = 1.96 * values.std() / math.sqrt(500)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (interval.level, interval.n) == (0.95, 500)


@pytest.mark.parametrize(("level", "low", "high"), [(0.9, 0.84, 0.95), (0.5, 0.41, 0.57)])
def test_intervals_cover_the_truth_as_often_as_they_say(level, low, high):
    rng = np.random.default_rng(0)
    samples = (rng.normal(1.0, 1.0, size=40) for _ in range(300))
    intervals = [mean_interval(s, draws=300, level=level, seed=i) for i, s in enumerate(samples)]
    assert low < np.mean([i.low <= 1.0 <= i.high for i in intervals]) < high


def test_the_bootstrap_is_paired():
    base = np.random.default_rng(1).uniform(size=50)
    interval = bootstrap_interval(VQA, means(base), means(base - 0.125))
    assert [interval.value, interval.low, interval.high] == pytest.approx([0.125] * 3)
    unpaired = bootstrap_interval(VQA, means(base), means(np.sort(base) - 0.125))
    assert unpaired.value == pytest.approx(0.125) and unpaired.high - unpaired.low > 0.1


def test_a_difference_of_means_is_the_mean_of_the_differences():
    rng = np.random.default_rng(2)
    base, other = rng.uniform(size=(2, 30))
    by_metric = bootstrap_interval(VQA, means(base), means(other), draws=500, seed=4)
    by_mean = mean_interval(base - other, draws=500, seed=4)
    np.testing.assert_allclose(
        [by_metric.value, by_metric.low, by_metric.high], [by_mean.value, by_mean.low, by_mean.high]
    )
    swapped = bootstrap_interval(VQA, means(other), means(base), draws=500, seed=4)
    np.testing.assert_allclose(
        [swapped.value, swapped.low, swapped.high], [-by_mean.value, -by_mean.high, -by_mean.low]
    )


def test_many_intervals_are_those_of_each_alone():
    rng = np.random.default_rng(6)
    base, others = means(rng.uniform(size=25)), [means(rng.uniform(size=25)) for _ in range(3)]
    for actual, other in zip(bootstrap_intervals(VQA, base, others, seed=2), others, strict=True):
        alone = bootstrap_interval(VQA, base, other, seed=2)
        assert actual.value == alone.value and actual.n == 25
        np.testing.assert_allclose([actual.low, actual.high], [alone.low, alone.high])
    assert bootstrap_intervals(VQA, base, []) == []


def test_a_mean_over_arms_is_resampled_as_one():
    rng = np.random.default_rng(4)
    base, others = rng.uniform(size=25), rng.uniform(size=(3, 25))
    actual = mean_difference_interval(VQA, means(base), [means(other) for other in others], seed=1)
    alone = mean_interval(base - others.mean(0), seed=1)
    np.testing.assert_allclose([actual.value, actual.low, actual.high], [alone.value, alone.low, alone.high])
    with pytest.raises(ValueError, match="needs at least one"):
        mean_difference_interval(VQA, means(base), [])


def test_a_relative_interval_resamples_the_base_too():
    rng = np.random.default_rng(8)
    base, other = rng.uniform(0.2, 1, size=30), rng.uniform(size=30)
    actual = relative_interval(VQA, means(base), means(other), draws=400, seed=3)
    counts = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), 400)
    shares = [100 * (1 - (row @ other) / (row @ base)) for row in counts]
    assert actual.value == pytest.approx(100 * (1 - other.sum() / base.sum()))
    assert [actual.low, actual.high] == pytest.approx(list(np.quantile(shares, [0.025, 0.975])))
    fixed = bootstrap_interval(VQA, means(base), means(other), draws=400, seed=3)
    assert actual.high != pytest.approx(100 * fixed.high / base.mean(), rel=1e-3)


def test_there_is_nothing_to_lose_of_a_base_of_zero():
    nothing = np.zeros(6)
    actual = relative_interval(VQA, means(nothing), means(nothing))
    assert (actual.value, actual.low, actual.high) == (0, 0, 0)


def captions(seed: int) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    words = "a red blue circle square at the top left".split()
    truths = [" ".join(rng.choices(words, k=8)) for _ in range(7)]
    return [" ".join(w if rng.random() < 0.8 else "cat" for w in t.split()) for t in truths], truths


def test_columns_share_the_resamples_of_a_single_interval(monkeypatch):
    values = np.random.default_rng(8).normal(size=(12, 7))

    def root(counts: np.ndarray, part: np.ndarray) -> np.ndarray:
        return np.sqrt(counts @ part**2 / 12)

    actual = bootstrap_ends(root, values, 500, 0.9, seed=3)
    rng = np.random.default_rng(3)
    rows = [np.repeat(np.arange(12), rng.multinomial(12, np.full(12, 1 / 12))) for _ in range(500)]
    drawn = np.array([[math.sqrt((values[chosen, i] ** 2).mean()) for i in range(7)] for chosen in rows])
    np.testing.assert_allclose(actual, np.quantile(drawn, (0.05, 0.95), axis=0))
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 1000)  # two columns, 83 draws at once
    np.testing.assert_allclose(bootstrap_ends(root, values, 500, 0.9, seed=3), actual)


def test_corpus_bleu_is_resampled_as_a_corpus():
    said, truths = captions(0)
    each = np.stack([bleu_statistics(s, [t]) for s, t in zip(said, truths, strict=True)])
    counts = np.random.default_rng(9).multinomial(7, np.full(7, 1 / 7), 25)
    bleus = []
    for row in counts:
        chosen = np.repeat(np.arange(7), row)
        again = sacrebleu.corpus_bleu([said[i] for i in chosen], [[truths[i] for i in chosen]])
        bleus.append(again.score / 100)
    interval = metric_interval(CAPTION, each, draws=25, level=0.8, seed=9)
    assert interval.value == pytest.approx(sacrebleu.corpus_bleu(said, [truths]).score / 100)
    assert [interval.low, interval.high] == pytest.approx(list(np.quantile(bleus, [0.1, 0.9])))
    assert interval.value != pytest.approx(np.mean([CAPTION.metric(row) for row in each]), abs=1e-3)


def exact_p(a: np.ndarray, b: np.ndarray) -> float:
    """Share of all 2^n swaps whose difference of means is at least as large as the one observed."""
    gap = a - b
    sums = np.array([abs(np.dot(signs, gap)) for signs in itertools.product((1, -1), repeat=len(gap))])
    return float(np.mean(sums >= abs(gap.sum()) - 1e-12))


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.8])
def test_permutation_p_agrees_with_all_permutations(shift):
    rng = np.random.default_rng(7)
    a, b = rng.normal(shift, 1.0, size=9), rng.normal(0.0, 1.0, size=9)
    p = permutation_p(VQA, means(a), means(b), draws=20_000)
    assert p == pytest.approx(exact_p(a, b), abs=0.015)
    assert p == permutation_p(VQA, means(b), means(a), draws=20_000)


def test_permutation_p_at_its_ends():
    scores = np.random.default_rng(0).uniform(size=40)
    assert permutation_p(VQA, means(scores), means(scores), draws=200) == 1.0
    assert permutation_p(VQA, means(scores + 1), means(scores), draws=199) == 1 / 200


def test_permutation_p_of_corpus_bleu():
    said, truths = captions(1)
    good = np.stack([bleu_statistics(t, [t]) for t in truths])
    poor = np.stack([bleu_statistics(s, [t]) for s, t in zip(said, truths, strict=True)])
    swaps = itertools.product((False, True), repeat=7)
    differences = []
    for swap in swaps:
        a, b = np.where(np.array(swap)[:, None], (poor, good), (good, poor))
        differences.append(abs(CAPTION.metric(a.sum(0)) - CAPTION.metric(b.sum(0))))
    exact = np.mean(np.array(differences) >= differences[0] - 1e-12)
    assert permutation_p(CAPTION, good, poor, draws=8000) == pytest.approx(exact, abs=0.015)


def test_the_same_seed_gives_the_same_numbers_in_chunks_of_any_size(monkeypatch):
    rng = np.random.default_rng(5)
    a, b = means(rng.uniform(size=20)), means(rng.uniform(size=20))
    whole = bootstrap_interval(VQA, a, b, draws=100), permutation_p(VQA, a, b, draws=100)
    assert bootstrap_interval(VQA, a, b, draws=100, seed=1) != whole[0]
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 7 * 20)
    pieces = bootstrap_interval(VQA, a, b, draws=100), permutation_p(VQA, a, b, draws=100)
    assert pieces[1] == whole[1]
    np.testing.assert_allclose([pieces[0].low, pieces[0].high], [whole[0].low, whole[0].high])


def test_an_interval_prints_its_numbers():
    interval = Interval(value=0.1234, low=-0.05, high=0.3, level=0.95, n=64)
    assert str(interval) == f"{interval}" == "0.123 [-0.050, 0.300] (95 %, n = 64)"
    assert f"{interval:+.2f}" == "+0.12 [-0.05, +0.30]" and f"{interval:.2g}" == "0.12 [-0.05, 0.3]"


@pytest.mark.parametrize(
    "resample",
    [
        lambda each: bootstrap_interval(VQA, each, each),
        lambda each: metric_interval(VQA, each),
        lambda each: permutation_p(VQA, each, each),
        lambda each: mean_interval(each[:, 0]),
    ],
)
def test_too_few_examples_and_values_that_are_not_finite_raise(resample):
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        resample(means(np.ones(1)))
    with pytest.raises(ValueError, match="at least two examples, got 0"):
        resample(means(np.ones(0)))
    with pytest.raises(ValueError, match="1 of the values are not finite"):
        resample(means(np.array([0.5, math.nan, 1.0])))


def test_bad_arguments_raise():
    each = means(np.ones(3))
    with pytest.raises(ValueError, match=r"different shapes, \(3, 2\) and \(2, 2\)"):
        bootstrap_interval(VQA, each, each[:2])
    with pytest.raises(ValueError, match=r"2 dimensions, got shape \(3,\)"):
        metric_interval(VQA, np.ones(3))
    with pytest.raises(ValueError, match="level must lie between 0 and 1, not 95"):
        mean_interval(np.ones(3), level=95)
    with pytest.raises(ValueError, match="draws must be at least 1, not 0"):
        permutation_p(VQA, each, each, draws=0)


# -- many tests at once --------------------------------------------------------------------------------


def exact_sign_flip_p(gap: np.ndarray, alternative: str) -> float:
    """Share of all 2^n sign flips whose mean is at least as large as the one observed."""
    means = np.array([np.dot(signs, gap) for signs in itertools.product((1, -1), repeat=len(gap))])
    observed = gap.sum()
    if alternative == "two-sided":
        means, observed = np.abs(means), abs(observed)
    return float(np.mean(means >= observed - 1e-12))


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_sign_flip_p_of_many_arms_agrees_with_all_flips(alternative):
    rng = np.random.default_rng(6)
    gaps = rng.normal([[-0.5], [0.0], [0.4], [1.5]], 1.0, size=(4, 9))
    gaps = np.vstack([gaps, rng.integers(-1, 2, size=(2, 9))])  # of right and wrong answers: with ties
    exact = [exact_sign_flip_p(gap, alternative) for gap in gaps]
    assert sign_flip_p(gaps, alternative=alternative, draws=20_000) == pytest.approx(exact, abs=0.015)


def test_sign_flip_p_at_its_ends_and_by_seed(monkeypatch):
    gaps = np.stack([np.ones(40), np.zeros(40), -np.ones(40)])
    assert sign_flip_p(gaps, draws=199).tolist() == [1 / 200, 1.0, 1.0]
    assert sign_flip_p(gaps, draws=199, alternative="two-sided").tolist() == [1 / 200, 1.0, 1 / 200]
    noise = np.random.default_rng(1).normal(size=(5, 30))
    whole = sign_flip_p(noise, draws=300)
    assert (sign_flip_p(noise, draws=300) == whole).all()
    assert (sign_flip_p(noise, draws=300, seed=1) != whole).any()
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 7 * 30)
    assert (sign_flip_p(noise, draws=300) == whole).all()


def test_sign_flip_p_is_uniform_where_there_is_no_difference():
    p = sign_flip_p(np.random.default_rng(2).normal(size=(800, 25)), draws=999)
    for level in (0.05, 0.25, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 800))


def step_up(p: np.ndarray, q: float, factor: float) -> np.ndarray:
    """The rule itself: the largest k with p_(k) ≤ k q / n, and all tests up to it."""
    n = len(p)
    passing = [k for k in range(1, n + 1) if sorted(p)[k - 1] <= k * q / (n * factor)]
    return p <= (sorted(p)[max(passing) - 1] if passing else -1.0)


@pytest.mark.parametrize("dependent", [False, True])
def test_discoveries_are_those_of_the_step_up_rule(dependent):
    rng = np.random.default_rng(8)
    for n in (1, 2, 7, 40):
        factor = sum(1 / i for i in range(1, n + 1)) if dependent else 1.0
        for _ in range(20):
            p = np.where(rng.random(n) < 0.4, rng.random(n) * 0.02, rng.random(n)).round(3)
            adjusted, actual = benjamini_hochberg(p, 0.1, dependent=dependent)
            assert (actual == step_up(p, 0.1, factor)).all()
            by_hand = [min(1.0, *(b * n * factor / (p <= b).sum() for b in p[p >= a]), 1.0) for a in p]
            assert adjusted == pytest.approx(by_hand)


def test_a_worked_example_of_false_discovery_rates():
    p = [0.01, 0.04, 0.03, 0.005, 0.5]
    adjusted, actual = benjamini_hochberg(p, q=0.051)
    assert adjusted == pytest.approx([0.025, 0.05, 0.05, 0.025, 0.5])
    assert actual.tolist() == [True, True, True, True, False]
    by, none = benjamini_hochberg(p, dependent=True)
    assert by == pytest.approx(np.minimum(adjusted * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5), 1))
    assert not none.any()


@pytest.mark.parametrize("bad", [[0.5, -0.1], [0.5, 1.5], [0.5, math.nan]])
def test_values_that_are_no_p_values_raise(bad):
    with pytest.raises(ValueError, match=r"1 of the p-values do not lie in 0 … 1"):
        benjamini_hochberg(bad)


def test_bad_arguments_of_many_tests_raise():
    with pytest.raises(ValueError, match=r"one p-value for each test, got shape \(0,\)"):
        benjamini_hochberg([])
    with pytest.raises(ValueError, match="q must lie between 0 and 1, not 5"):
        benjamini_hochberg([0.5], q=5)
    with pytest.raises(ValueError, match=r"\[n_arms, n_examples\], got shape \(3,\)"):
        sign_flip_p(np.ones(3))
    with pytest.raises(ValueError, match="unknown alternative 'less'; valid: greater, two-sided"):
        sign_flip_p(np.ones((2, 3)), alternative="less")
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        sign_flip_p(np.ones((2, 1)))
    with pytest.raises(ValueError, match="1 of the values are not finite"):
        sign_flip_p([[1.0, math.nan]])
    with pytest.raises(ValueError, match="draws must be at least 1, not 0"):
        sign_flip_p(np.ones((2, 3)), draws=0)
