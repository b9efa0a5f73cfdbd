"""Selected heads on other examples, against `localize_heads` run there and statistics worked out again."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from helpers.hf_task_loops import N_HEADS, N_LAYERS, examples_of, pair

from hones_lens.hones.attribution.head_scores import HeadScores, significant_heads
from hones_lens.hones.attribution.heads import localize_heads
from hones_lens.hones.attribution.held_out import HeldOutHeads, random_head_sets, remeasure_heads
from hones_lens.results.statistics import benjamini_hochberg


def parts(name: str, family: str = "llava"):
    examples = list(examples_of(name, 6, family=family))
    return examples[:3], examples[3:]


@cache
def localized() -> HeadScores:
    return localize_heads(pair()[1], "vqa", parts("vqa")[0], top_k=3, progress=False)


@pytest.mark.exhaustive
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
        assert head.score == c.score and head.drop.n == 3
        assert head.selected_on == heads.interval(c.layer, c.index)
        assert head.drop.low <= head.drop.value <= head.drop.high
    mean = np.mean([head.drop.value for head in found.heads])
    assert found.mean_drop.value == pytest.approx(mean) and f"mean drop {found.mean_drop}" in str(found)
    assert found.baseline.value == pytest.approx(there.baseline) and found.n_selected_on == 3
    selected = [(h.layer, h.head) for h in found.heads]
    for mean, some in zip(found.random, random_head_sets(selected, N_LAYERS, N_HEADS, 5), strict=True):
        assert mean == pytest.approx(np.mean([float(there.scores[cell]) for cell in some]), abs=1e-12)


@pytest.mark.exhaustive
def test_verdicts_come_from_both_sides() -> None:
    """A head is significant where it was selected, and holds on the others, each by its own p-values."""
    model = pair()[1]
    every = torch.ones(N_LAYERS, N_HEADS, dtype=torch.float64)
    drops = torch.zeros(N_LAYERS, N_HEADS, 40, dtype=torch.float64)
    drops[1, 2] = 1.0
    ids = tuple(f"d{i}" for i in range(40))
    sure = replace(localized(), scores=every, drops=drops, example_ids=ids, top_k=N_LAYERS * N_HEADS)
    assert sure.discoveries == {(1, 2)}
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


def test_random_sets_differ_where_a_layer_has_few_heads_left() -> None:
    """Of a layer's three others one is drawn, the rest from everywhere; sizes stay those of the selection."""
    selected = [(0, head) for head in range(5)]
    sets = random_head_sets(selected, 4, 8, 5)
    assert len({tuple(some) for some in sets}) == 5
    for some in sets:
        assert len(set(some)) == 5 and not set(some) & set(selected)
        assert sum(layer == 0 for layer, _ in some) >= 1
    few = random_head_sets([(0, 0), (0, 1), (0, 2), (1, 0)], 2, 4, 3)
    assert all(len(set(some)) == 4 for some in few)
    assert random_head_sets([(0, 0)], 1, 2, 3) == [[(0, 1)]] * 3, "all that is left"
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


def test_heads_of_a_race_are_measured_again_without_a_verdict_on_all_heads() -> None:
    model, heads = pair()[1], localized()
    drops = heads.drops.clone()
    drops[0, 0, 0] = torch.nan
    raced = replace(heads, drops=drops, traded="heads raced")
    assert raced.discoveries is None
    found = remeasure_heads(model, "vqa", parts("vqa")[1], raced, progress=False)
    exact = remeasure_heads(model, "vqa", parts("vqa")[1], heads, progress=False)
    assert {h.significant for h in found.heads} == {None}
    assert [h.drop for h in found.heads] == [h.drop for h in exact.heads]


@pytest.mark.exhaustive
def test_heads_are_replaced_where_they_were_when_they_were_selected() -> None:
    model = pair()[1]
    discovery, test = parts("ocr")
    last = localize_heads(model, "ocr", discovery, top_k=5, positions="last", progress=False)
    there = localize_heads(model, "ocr", test, positions="last", progress=False)
    everywhere = localize_heads(model, "ocr", test, progress=False)
    assert not torch.equal(there.scores, everywhere.scores), "the two interventions must differ here"
    every = replace(last, scores=torch.ones_like(last.scores))
    found = remeasure_heads(model, "ocr", test, every, k=99, progress=False)
    assert last.positions == "last" and len(found.heads) == N_LAYERS * N_HEADS
    for head in found.heads:
        assert head.drop.value == pytest.approx(float(there.scores[head.layer, head.head]), abs=1e-12)


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
    fails("no head lowers the metric", scores=torch.zeros_like(heads.scores))
    fails("no examples", [])
