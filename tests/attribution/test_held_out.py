"""Selected heads on other examples, against `localize_heads` run there and statistics worked out again."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from attribution.build import N_HEADS, N_LAYERS, examples_of, pair

from hones_lens.attribution.heads import HeadScores, localize_heads, significant_heads
from hones_lens.attribution.held_out import HeldOutHeads, random_head_sets, remeasure_heads
from hones_lens.statistics import benjamini_hochberg


def parts(name: str, family: str = "llava"):
    examples = list(examples_of(name, 6, family=family))
    return examples[:3], examples[3:]


@cache
def localized() -> HeadScores:
    return localize_heads(pair()[1], "vqa", parts("vqa")[0], top_k=3, progress=False)


@pytest.mark.parametrize(("name", "family"), [("vqa", "qwen"), ("caption", "llava")])
def test_drops_are_those_of_a_localization_on_the_held_out_examples(name: str, family: str) -> None:
    model = pair(family)[1]
    discovery, test = parts(name, family)
    heads = localize_heads(model, name, discovery, top_k=5, progress=False)
    there = localize_heads(model, name, test, progress=False)
    found = remeasure_heads(model, name, test, heads, progress=False)
    assert [(h.layer, h.head) for h in found.heads] == [(c.layer, c.index) for c in heads.top()]
    assert there.scores.any(), "no head matters: the comparison would be empty"
    for head, c in zip(found.heads, heads.top(), strict=True):
        assert head.drop.value == pytest.approx(float(there.scores[head.layer, head.head]), abs=1e-12)
        assert head.selected_on == c.score and head.drop.n == 3
        assert head.drop.low <= head.drop.value <= head.drop.high
    assert found.baseline.value == pytest.approx(there.baseline) and found.n_selected_on == 3
    selected = [(h.layer, h.head) for h in found.heads]
    for mean, some in zip(found.random, random_head_sets(selected, N_LAYERS, N_HEADS, 5), strict=True):
        assert mean == pytest.approx(np.mean([float(there.scores[cell]) for cell in some]), abs=1e-12)


def test_verdicts_come_from_both_sides() -> None:
    """A head is significant where it was selected, and holds on the others, each by its own p-values."""
    model = pair()[1]
    every = torch.ones(N_LAYERS, N_HEADS, dtype=torch.float64)
    drops = torch.zeros(N_LAYERS, N_HEADS, 40, dtype=torch.float64)
    drops[1, 2] = 1.0
    ids = tuple(f"d{i}" for i in range(40))
    sure = replace(localized(), scores=every, drops=drops, example_ids=ids, top_k=N_LAYERS * N_HEADS)
    found = remeasure_heads(model, "vqa", parts("vqa")[1], sure, progress=False)
    assert [(c.layer, c.index) for c in significant_heads(sure)] == [(1, 2)]
    assert [h.significant for h in found.heads] == [(h.layer, h.head) == (1, 2) for h in found.heads]
    assert found.random == (), "no head is left to draw"
    assert all(h.drop.value > 0 for h in found.heads)
    assert benjamini_hochberg([h.p for h in found.heads])[0].min() > 0.05, "three examples settle nothing"
    assert not any(h.holds for h in found.heads)
    lax = remeasure_heads(model, "vqa", parts("vqa")[1], sure, q=0.999, progress=False)
    assert all(h.holds for h in lax.heads) and lax.q == 0.999


def test_random_sets_are_matched_and_not_selected() -> None:
    selected = [(0, 1), (0, 3), (2, 2)]
    sets = random_head_sets(selected, 3, 6, 20, seed=1)
    assert len(sets) == 20 and len({tuple(s) for s in sets}) > 5
    for some in sets:
        assert [layer for layer, _ in some] == [0, 0, 2] and len(set(some)) == 3
        assert not set(some) & set(selected)
    few = random_head_sets([(0, 0), (0, 1), (0, 2), (1, 0)], 2, 4, 3)
    assert all(some[0] == (0, 3) and len(some) == 2 for some in few), "all that the layer has left"
    assert random_head_sets([(0, 0), (0, 1)], 1, 2, 3) == []


def test_saves_loads_prints_and_goes_on(tmp_path) -> None:
    model = pair()[1]
    test, heads = parts("vqa")[1], localized()
    journal: dict = {}
    found = remeasure_heads(model, "vqa", test, heads, draws=6, progress=False, journal=journal)
    found.save(tmp_path / "h.json")
    assert HeldOutHeads.load(tmp_path / "h.json") == found and len(found.random) == 6
    assert list(journal) == ["held-out heads/0"]
    assert remeasure_heads(model, "vqa", test, heads, draws=6, progress=False, journal=journal) == found
    frame = found.to_dataframe()
    assert frame["drop"].tolist() == [h.drop.value for h in found.heads] and set(frame["n"]) == {3}
    said = str(found)
    assert all(f"drop {h.drop}" in said for h in found.heads) and "6 random sets of other heads" in said
    assert "selected on 3 examples, measured again on 3 others" in said and f"{found.baseline}" in said


def test_what_is_refused() -> None:
    model = pair()[1]
    discovery, test = parts("vqa")
    heads = localized()

    def fails(message: str, examples=test, task: str = "vqa", **changes: object) -> None:
        given: HeadScores = replace(heads, **changes)
        with pytest.raises(ValueError, match=message):
            remeasure_heads(model, task, examples, given, progress=False)

    fails("1 examples selected the heads, the first is", [*test, discovery[0]])
    fails("the heads are of model 'other', not ", model_name="other")
    fails("the heads are of task 'vqa', not 'ocr'", list(examples_of("ocr", 3)), "ocr")
    fails("the heads are of intervention 'patch'", intervention="patch")
    fails("not found exactly", traded="heads raced")
    fails("no head lowers the metric", scores=torch.zeros_like(heads.scores))
    fails("no examples", [])
