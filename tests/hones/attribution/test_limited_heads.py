"""Localization of some heads or layers: the numbers of all, restricted, and nothing in the others' place."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from helpers.hf_task_loops import examples_of, pair

import hones_lens as hl
from hones_lens.hones import HeadScores, localize_heads, significant_heads
from hones_lens.results import Component, Racing, benjamini_hochberg, sign_flip_p

FAMILIES = pytest.mark.parametrize("family", ["llava", "qwen"])
QUIET: dict[str, Any] = {"progress": False, "batch_size": 3}


@cache
def scores(family: str, *, how: str = "", **limits: Any) -> HeadScores:
    options: dict[str, Any] = {
        "prefilter": {"prefilter": 2},
        "racing": {"racing": Racing(round_size=2, epsilon=0.0)},
    }.get(how, {})
    model = pair(family)[1]
    return localize_heads(model, "vqa", examples_of("vqa", 5, family=family), 2, **options, **limits, **QUIET)


def places(found: HeadScores) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in found.measured.nonzero().tolist()]


@pytest.mark.exhaustive
@FAMILIES
@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ({"heads": ("L1H0", "L0H1", "1.1")}, [(0, 1), (1, 0), (1, 1)]),
        ({"heads": "L0H1, L1H0"}, [(0, 1), (1, 0)]),
        ({"heads": (Component(1, 1, 0.5), (0, 0))}, [(0, 0), (1, 1)]),
        ({"layers": 1}, None),
        ({"layers": range(1, 2)}, None),
        ({"layers": "1-1"}, None),
        ({"layers": (1,), "heads": "L1H1"}, [(1, 1)]),
    ],
    ids=str,
)
def test_some_heads_are_the_full_run_restricted(
    family: str, limits: dict[str, Any], wanted: list[tuple[int, int]] | None
) -> None:
    full, some = scores(family), scores(family, **limits)
    wanted = [(1, head) for head in range(full.scores.shape[1])] if wanted is None else wanted
    assert places(some) == wanted and some.chosen == tuple(wanted)
    asked = some.asked
    assert torch.equal(some.scores[asked], full.scores[asked])
    assert torch.equal(some.drops[asked], full.drops[asked])
    assert some.score_ends is not None and full.score_ends is not None
    assert torch.equal(some.score_ends[asked], full.score_ends[asked])
    assert bool(some.scores[~asked].isnan().all()) and bool(some.drops[~asked].isnan().all())
    assert torch.equal(some.base_scores, full.base_scores) and some.baseline == full.baseline
    assert {(c.layer, c.index) for c in some.top(99)} <= set(wanted)


@FAMILIES
def test_tests_count_only_what_was_asked_for(family: str, tmp_path: Any) -> None:
    some = scores(family, layers=1)
    n = int(some.asked.sum())
    p = sign_flip_p(some.drops[1].numpy(), draws=10_000)
    assert some.p_values is not None
    assert some.p_values[1].tolist() == p.tolist() and bool(some.p_values[[0, 2]].isnan().all())
    rejected = benjamini_hochberg(p, 0.05)[1]
    assert some.discoveries == {(1, int(h)) for h in rejected.nonzero()[0]}
    assert len(significant_heads(some, q=0.999)) == int(benjamini_hochberg(p, 0.999)[1].sum())
    assert f"{n} of {some.scores.numel()} heads were asked for" in str(some)
    frame = some.to_dataframe()
    assert frame[frame.layer != 1][["score", "low", "high", "p", "mean_drop"]].isna().to_numpy().all()
    assert frame[frame.layer != 1].stands.isna().all() and frame[frame.layer == 1].stands.notna().all()
    some.save(tmp_path / "heads.json")
    again = HeadScores.load(tmp_path / "heads.json")
    assert again.chosen == some.chosen and torch.equal(again.asked, some.asked)


@pytest.mark.exhaustive
@FAMILIES
@pytest.mark.parametrize("how", ["prefilter", "racing"])
def test_shortcuts_stay_within_the_limits(family: str, how: str) -> None:
    full, some = scores(family), scores(family, how=how, layers=1)
    assert all(layer == 1 for layer, _ in places(some))
    assert some.p_values is None or how == "racing"
    assert all(c.layer == 1 for c in some.top())
    known = some.drops.isfinite()
    assert bool(known.any()) and torch.equal(some.drops[known], full.drops[known])
    if how == "racing":  # the best of the layer, as the full run has them
        best = {c.index for c in full.top(99) if c.layer == 1}
        assert {c.index for c in some.top()} <= best


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"heads": "L9H0"}, "head L9H0 does not exist: 3 layers of 4 heads, L0H0 to L2H3"),
        ({"heads": [(0, 99)]}, "head L0H99 does not exist"),
        ({"heads": [(0, -1)]}, "head L0H-1 does not exist"),
        ({"heads": "L1N0"}, "'L1N0' is no name of a head"),
        ({"heads": "nonsense"}, "'nonsense' is no name of a head"),
        ({"heads": []}, "no heads"),
        ({"heads": ["L0H1", (0, 1)]}, "L0H1 is given twice"),
        ({"layers": "1-9"}, "layer 3 is not in 0 … 2"),
        ({"layers": -1}, "layer -1 is not in 0 … 2"),
        ({"layers": "1-0"}, "'1-0' is no layer or range"),
        ({"layers": [1, "1"]}, "each once"),
        ({"layers": []}, "at least one"),
        ({"layers": 0, "heads": "L1H0"}, "head L1H0 is not in the layers 0"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused_by_name(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        localize_heads(pair("llava")[1], "vqa", examples_of("vqa", 2), **limits, **QUIET)


def test_patching_of_some_heads_is_the_full_run_restricted() -> None:
    model = hl.HookedVLM.from_pretrained("tiny-llava")
    pairs = hl.counterfactual(model, hl.counterfactual_pairs("vqa", limit=3), "vqa")
    patch: dict[str, Any] = {"intervention": "patch", "pairs": pairs, "progress": False}
    full = localize_heads(model, "vqa", **patch)
    some = localize_heads(model, "vqa", **patch, heads="L2H1,L0H3")
    assert some.chosen == ((0, 3), (2, 1))
    assert torch.allclose(some.scores[some.asked], full.scores[some.asked], atol=5e-5)
    assert bool(some.scores[~some.asked].isnan().all()) and int(some.measured.sum()) == 2
