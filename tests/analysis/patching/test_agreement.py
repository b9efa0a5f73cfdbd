"""Estimates beside measured effects: both by hand, and their rank correlation by its textbook formula."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.patching_pairs import cached, effect, model_and_pairs, put

from hones_lens.analysis.patching.agreement import Agreement, atp_against_measured
from hones_lens.analysis.patching.gradient import attribute_patching


def without_ties(a: np.ndarray, b: np.ndarray) -> float:
    """1 − 6 Σ d² / (n (n² − 1)), d the differences of ranks."""
    d = a.argsort().argsort() - b.argsort().argsort()
    return 1 - 6 * float((d**2).sum()) / (len(a) * (len(a) ** 2 - 1))


def made_up(n_pairs: int, n: int) -> Agreement:
    generator = torch.Generator().manual_seed(1)
    measured = torch.randn(n_pairs, n, generator=generator, dtype=torch.float64)
    noise = torch.randn(n_pairs, n, generator=generator, dtype=torch.float64)
    return Agreement("made up", tuple((0, i) for i in range(n)), measured + 0.5 * noise, measured)


def test_spearman_is_the_formula_and_its_interval_the_jackknife_over_pairs() -> None:
    both = made_up(6, 20)
    a, b = both.estimated.numpy(), both.measured.numpy()
    left_out = [
        without_ties(np.delete(a, i, axis=0).mean(0), np.delete(b, i, axis=0).mean(0)) for i in range(6)
    ]
    error = np.sqrt(5 / 6 * sum((r - np.mean(left_out)) ** 2 for r in left_out))
    value = without_ties(a.mean(0), b.mean(0))
    found, narrow = both.spearman(), both.spearman(level=0.8)
    assert [found.value, found.low] == pytest.approx([value, value - 1.959964 * error], rel=1e-6)
    assert found.high == pytest.approx(min(1, value + 1.959964 * error), rel=1e-6)
    assert found.value - narrow.low == pytest.approx(1.281552 * error, rel=1e-6) and found.n == 6
    assert both.pearson().value == pytest.approx(np.corrcoef(a.mean(0), b.mean(0))[0, 1])
    assert "20 components: Spearman" in str(both)


def test_the_interval_is_right_about_other_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    means[1] += 1.5 * means[0]
    truth, found = without_ties(*means.numpy()), []
    for _ in range(60):
        shared, own = (torch.randn(2, 25, 30, generator=generator, dtype=torch.float64) for _ in range(2))
        sides = means[:, None] + shared[:1] + 0.5 * own
        found.append(Agreement("drawn", tuple((0, i) for i in range(30)), sides[0], sides[1]).spearman())
    assert sum(one.low <= truth <= one.high for one in found) >= 55
    spread = float(np.std([one.value for one in found]))
    reach = float(np.mean([one.value - one.low for one in found]))
    assert 1 < reach / (1.96 * spread) < 2


def test_ties_share_their_rank() -> None:
    estimated, measured = torch.tensor([1.0, 1, 2, 3]), torch.tensor([5.0, 4, 4, 9])
    rows = (side.double().expand(2, -1) for side in (estimated, measured))
    tied = Agreement("tied", ((0, 0), (0, 1), (1, 0), (1, 1)), *rows)
    expected = np.corrcoef([1.5, 1.5, 3, 4], [3, 1.5, 1.5, 4])[0, 1]
    assert tied.spearman().value == pytest.approx(expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])
@pytest.mark.parametrize("what", ["z", "neurons", "k"])
def test_both_sides_are_of_the_same_components(made: ModuleType, what: str) -> None:
    model, pairs = model_and_pairs(made)
    chosen = [(2, 1), (0, 0), (1, 1), (0, 1)]
    both = atp_against_measured(
        model, pairs, what, components=chosen, direction="noise", batch_size=2, progress=False
    )
    estimated = attribute_patching(model, pairs, what, direction="noise", by_pair=True, progress=False)
    name = {"z": "attn.hook_z", "neurons": "mlp.hook_post", "k": "attn.hook_k"}[what]
    for i, (layer, index) in enumerate(chosen):
        hook = f"blocks.{layer}.{name}"
        theirs = cached(model, pairs.corrupted, hook)
        at = (..., index) if what == "neurons" else (slice(None), slice(None), index)
        real = effect(model, pairs, "noise", [put(hook, theirs, at)])
        assert torch.allclose(both.measured[:, i], real, atol=1e-4, rtol=1e-3)
        close = torch.allclose(both.estimated[:, i], estimated.values[:, layer, index], atol=1e-4, rtol=1e-3)
        assert close
    frame = both.to_dataframe()
    assert list(zip(frame.layer, frame["index"], strict=True)) == chosen
    assert np.allclose(frame.measured, both.measured.mean(0))
    part = both.of([(0, 1), (2, 1)])
    assert torch.equal(part.measured, both.measured[:, [3, 0]])
    assert torch.equal(part.estimated, both.estimated[:, [3, 0]])


def test_all_heads_by_default() -> None:
    model, pairs = model_and_pairs(random_llava)
    both = atp_against_measured(model, pairs, "k", progress=False)
    assert both.components == tuple((layer, head) for layer in range(3) for head in range(2))


def test_it_refuses() -> None:
    model, pairs = model_and_pairs(random_llava)
    with pytest.raises(ValueError, match="resid_pre has no heads or neurons"):
        atp_against_measured(model, pairs, "resid_pre", progress=False)
    with pytest.raises(ValueError, match="head 4 is not in 0 … 3"):
        atp_against_measured(model, pairs, "z", components=[(0, 4)], progress=False)
    both = made_up(3, 5)
    with pytest.raises(ValueError, match=r"\(0, 9\) was not measured"):
        both.of([(0, 9)])
    for small in (made_up(1, 5), made_up(3, 2)):
        with pytest.raises(ValueError, match="a correlation needs two pairs, three components"):
            small.spearman()
    flat = Agreement("flat", both.components, torch.ones(3, 5).double(), both.measured)
    with pytest.raises(ValueError, match="flat: the changes of all components are equal"):
        flat.spearman()
