"""Shares, intervals and metrics of patching against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import random_llava
from helpers.activation_patching import (
    DIRECTIONS,
    GROUPS,
    TOLERANCE,
    changes,
    decoder_steps,
    difference,
    twin_and_pairs,
)

from hones_lens.analysis.patching.activation import patch_activations
from hones_lens.analysis.patching.outcome import share_of_gap
from hones_lens.engine import sweep


def test_shares_are_ratios_of_means_with_paired_bootstrap_intervals() -> None:
    rng = np.random.default_rng(1)
    gap = rng.normal(3.0, 1.5, 40)
    change = np.stack([0.5 * gap + rng.normal(0, 0.2, 40), rng.normal(0, 1, 40)])
    found = share_of_gap(torch.from_numpy(change), torch.from_numpy(gap), draws=8000)
    expected = change.mean(1) / gap.mean()
    np.testing.assert_allclose(found["values"], expected, rtol=1e-12)
    for i in range(2):
        draws = [rng.integers(0, 40, 40) for _ in range(8000)]
        ratios = sorted(change[i][d].sum() / gap[d].sum() for d in draws)
        width = ratios[7800] - ratios[200]
        assert float(found["low"][i]) == pytest.approx(ratios[200], abs=0.08 * width)
        assert float(found["high"][i]) == pytest.approx(ratios[7800], abs=0.08 * width)
    narrow = float(found["high"][0] - found["low"][0])
    apart = [[x[rng.integers(0, 40, 40)].mean() for x in (change[0], gap)] for _ in range(4000)]
    low, high = np.quantile([a / b for a, b in apart], (0.025, 0.975))
    assert narrow < 0.5 * (high - low), "pairs are torn apart"
    with pytest.raises(ValueError, match="don't differ by this metric"):
        share_of_gap(torch.ones(1, 4), torch.tensor([1.0, -1, 2, -2]))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_share_raw_and_by_pair_agree_and_baselines_are_noted(direction: str) -> None:
    twin, pairs = twin_and_pairs(random_llava)
    options = {"direction": direction, "progress": False, "layers": [2, 0]}
    each = patch_activations(twin.model, pairs, "attn_out", by_pair=True, **options)
    raw = patch_activations(twin.model, pairs, "attn_out", raw=True, **options)
    share = patch_activations(twin.model, pairs, "attn_out", **options)
    ends = [difference(pairs, twin.logits(inputs)[:, -1]).mean() for inputs in (pairs.clean, pairs.corrupted)]
    gap = (ends[0] - ends[1]) * (1 if direction == "denoise" else -1)
    assert (raw.values - each.values.mean(0)).abs().max() <= 1e-9
    assert (share.values - raw.values / gap).abs().max() <= 1e-4
    assert share.n == 3 and share.labels["layer"] == (2, 0) and share.labels["group"] == GROUPS
    assert bool((share.low <= share.values).all()) and bool((share.values <= share.high).all())
    assert f"clean {ends[0]:.4g}, corrupted {ends[1]:.4g}" in share.notes[0]
    assert ("restored" if direction == "denoise" else "lost") in share.what


def test_metrics_by_name_are_their_formulas() -> None:
    twin, pairs = twin_and_pairs(random_llava)
    steps = decoder_steps(
        twin, twin.seen(pairs.corrupted), 1, "hook_resid_pre", pairs.clean.token_groups["image"], None
    )
    base, patched = (twin.logits(pairs.clean, s)[:, -1].double().log_softmax(-1) for s in ([], steps))
    rows = torch.arange(3)
    likely = patched[rows, pairs.answer] - base[rows, pairs.answer]
    divergence = -(base.exp() * (base - patched)).sum(-1)
    for metric, expected in (("log_prob", likely), ("kl", divergence)):
        found = changes(twin, pairs, "resid_pre", groups=["image"], direction="noise", metric=metric)
        assert (found[1, 0] - expected).abs().max() <= TOLERANCE


def test_a_single_pair_has_no_interval() -> None:
    twin, pairs = twin_and_pairs(random_llava)
    result = patch_activations(twin.model, pairs[:1], "resid_mid", progress=False)
    assert result.low is None and result.n == 1


def test_a_finished_batch_is_taken_from_the_journal(monkeypatch) -> None:
    twin, pairs = twin_and_pairs(random_llava)
    journal: dict = {}
    options = {"batch_size": 2, "progress": False, "by": "all"}
    whole = patch_activations(twin.model, pairs, "z", journal=journal, **options)
    assert list(journal) == ["patch/0", "patch/2"]
    half = {"patch/0": journal["patch/0"]}
    again = patch_activations(twin.model, pairs, "z", journal=half, **options)
    assert torch.equal(again.values, whole.values) and half == journal
    monkeypatch.setattr(sweep, "logits_under", lambda *a, **k: pytest.fail("ran again"))
    again = patch_activations(twin.model, pairs, "z", journal=journal, **options)
    assert torch.equal(again.values, whole.values) and torch.equal(again.low, whole.low)
