"""Overlap of planted selections, groups masked against `evaluate_masking`, and the logit lens by hand."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from helpers.hf_task_loops import D_MLP, FAMILIES, N_LAYERS, examples_of, pair

from hones_lens.analysis.lens.difference import LensDifference
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.masking import evaluate_masking, matched_random_sets
from hones_lens.hones.masking_result import load_masking
from hones_lens.hones.overlap.group_masking import GroupMasking, equal_size_groups, mask_groups
from hones_lens.hones.overlap.groups import Overlap, find_overlap
from hones_lens.hones.overlap.lens_delta import lens_delta
from hones_lens.results.statistics import mean_interval
from hones_lens.tasks.registry import load_task

GENERAL = [(0, 1), (2, 7), (2, 8)]
TRIPLE = [(1, 0), (2, 19)]  # not in retrieval
PAIR = [(0, 5)]  # vqa and ocr
ONLY = {
    "vqa": [(0, 0), (1, 11), (2, 2)],
    "ocr": [(1, 12)],
    "caption": [(2, 3), (2, 4)],
    "retrieval": [(0, 9), (0, 10), (1, 13), (1, 14)],
}


def planted() -> dict[str, list[tuple[int, int]]]:
    sets = {task: GENERAL + only for task, only in ONLY.items()}
    for task in ("vqa", "ocr", "caption"):
        sets[task] = TRIPLE + sets[task]
    for task in ("vqa", "ocr"):
        sets[task] = sets[task] + PAIR
    return sets


@cache
def found() -> Overlap:
    return find_overlap(planted(), shape=(N_LAYERS, D_MLP), draws=2000)


def test_planted_groups_are_found() -> None:
    expected = {f"{task} only": tuple(only) for task, only in ONLY.items()}
    expected |= {"pair": tuple(PAIR), "triple": tuple(TRIPLE), "general": tuple(GENERAL)}
    assert found().groups == expected
    assert found().tasks == ("vqa", "ocr", "caption", "retrieval")
    assert found().owners[1, 0] == ("vqa", "ocr", "caption")
    curves = found().per_layer()
    assert curves["general"].tolist() == [1, 0, 2] and curves["retrieval only"].tolist() == [2, 2, 0]
    assert len(curves) == N_LAYERS and curves.to_numpy().sum() == len(found().owners)


def test_comparisons_of_pairs_and_of_all() -> None:
    shared = {each.tasks: each for each in found().shared}
    assert len(shared) == 7 and found().tasks in shared
    sets = {task: set(neurons) for task, neurons in planted().items()}
    for (a, b), each in ((tasks, each) for tasks, each in shared.items() if len(tasks) == 2):
        both, union = len(sets[a] & sets[b]), len(sets[a] | sets[b])
        assert each.count == both and each.jaccard == both / union
        assert each.coefficient == both / min(len(sets[a]), len(sets[b]))
    assert shared[found().tasks].count == len(GENERAL)
    assert shared[found().tasks].p < 0.01, "far more than random sets share"


def test_chance_is_that_of_random_sets_with_the_same_count_in_every_layer() -> None:
    draws = 1500
    shared = {each.tasks: each for each in found().shared}
    random = {
        task: [{(c.layer, c.index) for c in one} for one in matched_random_sets(s, N_LAYERS, D_MLP, draws, i)]
        for i, (task, s) in enumerate(planted().items())
    }
    for tasks, each in shared.items():
        counts = np.array([len(set.intersection(*(random[t][d] for t in tasks))) for d in range(draws)])
        assert each.expected == pytest.approx(counts.mean(), abs=4 * counts.std() / draws**0.5 + 1e-9)
        assert each.p == pytest.approx(np.mean(counts >= each.count), abs=0.05)


def test_selections_that_fill_or_miss_a_layer() -> None:
    whole = [(0, i) for i in range(5)]
    both = find_overlap({"a": whole, "b": whole}, shape=(2, 5), draws=50)
    assert both.groups == {"a only": (), "b only": (), "general": tuple(whole)}
    (shared,) = both.shared
    assert (shared.count, shared.expected, shared.p, shared.jaccard) == (5, 5.0, 1.0, 1.0)
    (apart,) = find_overlap({"a": whole, "b": [(1, 0)]}, shape=(2, 5), draws=50).shared
    assert (apart.count, apart.expected, apart.p) == (0, 0.0, 1.0)


def test_more_than_four_tasks_get_named_groups() -> None:
    sets = {name: [(0, 0)] for name in "abcd"} | {"e": [(0, 1)]}
    groups = find_overlap(sets, shape=(1, 9), draws=10).groups
    assert list(groups)[5:] == ["pair", "triple", "4 tasks", "general"]
    assert groups["4 tasks"] == ((0, 0),) and groups["e only"] == ((0, 1),)


def ranking(task: str, cells: list[tuple[int, int]], model_name: str = "m") -> NeuronScores:
    scores = torch.zeros(N_LAYERS, D_MLP, dtype=torch.float64)
    for rank, cell in enumerate(cells):
        scores[cell] = 50.0 - rank
    ratio = len(cells) / scores.numel()
    return NeuronScores(task, "hones", model_name, scores, ratio=ratio, n_examples=2)


def test_rankings_give_their_top_neurons() -> None:
    by_ranking = find_overlap({task: ranking(task, cells) for task, cells in planted().items()}, draws=2000)
    assert by_ranking == found()


def test_tables_text_and_file(tmp_path) -> None:
    frame = found().to_dataframe()
    assert len(frame) == len(found().owners)
    row = frame[(frame.layer == 0) & (frame.neuron == 5)].iloc[0]
    assert row.group == "pair" and row.n_tasks == 2
    assert row[["vqa", "ocr", "caption", "retrieval"]].tolist() == [True, True, False, False]
    table = found().comparisons()
    assert len(table) == 7 and table.tasks[0] == "vqa & ocr"
    assert "general" in str(found()) and "vqa & ocr: 6 (chance" in str(found())
    assert "<pre>" in found()._repr_html_()
    found().save(tmp_path / "overlap.json")
    assert Overlap.load(tmp_path / "overlap.json") == found()


def test_bad_selections_raise() -> None:
    shape = (N_LAYERS, D_MLP)
    with pytest.raises(ValueError, match="at least two tasks, got 1"):
        find_overlap({"vqa": [(0, 0)]}, shape=shape)
    with pytest.raises(ValueError, match="the selection of 'b' has no neurons"):
        find_overlap({"a": [(0, 0)], "b": []}, shape=shape)
    with pytest.raises(ValueError, match="'a': neuron L3N0 does not exist: 3 layers of 20 neurons"):
        find_overlap({"a": [(3, 0)], "b": [(0, 0)]}, shape=shape)
    with pytest.raises(ValueError, match="'a' has neuron L0N1 2 times"):
        find_overlap({"a": [(0, 1), (0, 1)], "b": [(0, 0)]}, shape=shape)
    with pytest.raises(ValueError, match="give shape="):
        find_overlap({"a": [(0, 1)], "b": [(0, 0)]})
    with pytest.raises(ValueError, match="different models: m, other"):
        find_overlap({"a": ranking("a", [(0, 0)]), "b": ranking("b", [(0, 0)], "other")})
    with pytest.raises(ValueError, match="layers and neurons a layer differ"):
        find_overlap({"a": ranking("a", [(0, 0)]), "b": [(0, 0)]}, shape=(3, 21))
    with pytest.raises(ValueError, match="draws must be at least 1"):
        find_overlap({"a": [(0, 0)], "b": [(0, 0)]}, shape=shape, draws=0)


# -- masking groups ------------------------------------------------------------------------------------


def test_groups_are_masked_at_one_size_on_every_task(tmp_path) -> None:
    _, model = pair()
    examples = {"vqa": list(examples_of("vqa")), "retrieval": list(examples_of("retrieval", 2))}
    options = {"n_controls": 1, "progress": False}
    masked = mask_groups(model, examples, found(), groups=["retrieval only", "general"], **options)
    assert masked.size == 3 and len(masked.results) == 4
    for task, some in examples.items():
        alone = evaluate_masking(model, task, some, GENERAL, **options)  # the whole group
        one = masked.of(task, "general")
        assert np.allclose(one.log_prob_drops, alone.log_prob_drops, atol=1e-5)
        assert one.drops == alone.drops and one.method == "general"
        assert one.metric_interval == alone.metric_interval and len(one.controls) == 1
    frame = masked.to_dataframe()
    assert len(frame) == 4 and set(frame["n_neurons"]) == {3}
    one = masked.of("vqa", "general")
    row = frame[(frame.task == "vqa") & (frame.group == "general")].iloc[0]
    assert row.log_prob_drop == one.log_prob_drop and row.drop_low == one.metric_interval.low
    assert row.random_drop == pytest.approx(one.baseline - np.mean([c.metric for c in one.controls]))
    assert "3 neurons masked of every group" in str(masked)
    masked.save(tmp_path / "groups.json")
    assert GroupMasking.load(tmp_path / "groups.json") == masked
    assert load_masking(tmp_path / "groups.json") == list(masked.results)
    with pytest.raises(KeyError, match="no result for"):
        masked.of("vqa", "pair")


def test_a_part_is_drawn_from_seed_and_name_and_empty_groups_are_left_out() -> None:
    known = found().groups
    parts = equal_size_groups(found(), None, None, seed=0)
    assert list(parts) == list(known) and all(len(part) == 1 for part in parts.values())
    assert all(set(part) <= set(known[name]) for name, part in parts.items())
    assert equal_size_groups(found(), ["vqa only"], 1, seed=0)["vqa only"] == parts["vqa only"]
    drawn = {tuple(equal_size_groups(found(), ["vqa only"], 2, seed)["vqa only"]) for seed in range(20)}
    assert len(drawn) == 3, "all parts of two come up"
    two = find_overlap({"vqa": GENERAL, "ocr": GENERAL + PAIR}, shape=(N_LAYERS, D_MLP), draws=10)
    assert list(equal_size_groups(two, None, None, seed=0)) == ["ocr only", "general"]


def test_journals_take_up_where_a_run_stopped() -> None:
    _, model = pair()
    examples = {"vqa": list(examples_of("vqa", 2))}
    journals: dict[str, dict] = {"vqa": {}}
    options = {"groups": ["general"], "n_controls": 1, "progress": False, "journals": journals}
    first = mask_groups(model, examples, found(), **options)
    assert journals["vqa"]
    assert mask_groups(model, examples, found(), **options) == first


def test_groups_that_cannot_be_masked_raise() -> None:
    _, model = pair()
    examples = {"vqa": list(examples_of("vqa", 2))}
    with pytest.raises(ValueError, match=r"unknown groups \['quad'\]; valid: vqa only, .*, general"):
        mask_groups(model, examples, found(), groups=["quad"])
    with pytest.raises(ValueError, match="can't mask 3 neurons of group 'triple', which has 2"):
        mask_groups(model, examples, found(), groups=["general", "triple"], size=3)
    with pytest.raises(ValueError, match="no groups to mask"):
        mask_groups(model, examples, found(), groups=[])
    with pytest.raises(ValueError, match="n_controls must be at least 1"):
        mask_groups(model, examples, found(), n_controls=0)
    with pytest.raises(ValueError, match="no examples"):
        mask_groups(model, {}, found())
    other = find_overlap({"a": [(0, 0)], "b": [(0, 0)]}, shape=(3, 21), draws=10)
    with pytest.raises(ValueError, match="3 layers of 21 neurons does not fit 3 layers of 20"):
        mask_groups(model, examples, other)


# -- logit lens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["vqa", "retrieval"])
@torch.no_grad()
def test_lens_delta_equals_caches_with_and_without_the_neurons(name: str, family: str) -> None:
    _, model = pair(family)
    task, examples = load_task(name), list(examples_of(name, family=family))
    chosen = [(1, 3), (1, 5), (2, 0)]
    table = lens_delta(model, name, examples, chosen, k=4, batch_size=2, progress=False)

    def silence(post, hook):
        return post * torch.tensor([(int(hook.name.split(".")[1]), i) not in chosen for i in range(D_MLP)])

    expected, each = torch.zeros(N_LAYERS, model.cfg.d_vocab), []
    for example in examples:
        inputs = model.prepare([example.image], [task.target_prompt(example)])
        _, clean = model.run_with_cache(inputs)
        with model.hooks(fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", silence) for layer in range(N_LAYERS)]):
            _, masked = model.run_with_cache(inputs)
        each.append(torch.zeros(N_LAYERS, model.cfg.d_vocab))
        for layer in range(N_LAYERS):
            logits = []
            for cached in (clean, masked):
                x = cached["resid_post", layer][0, -1]
                x = x / (x.pow(2).mean() + model.ln_final.eps).sqrt() * model.ln_final.weight
                logits.append(x @ model.W_U)
            each[-1][layer] = logits[0] - logits[1]
            expected[layer] += (logits[0] - logits[1]) / len(examples)

    assert table.falls[0] == table.rises[0] == (), "nothing changes below the first masked neuron"
    for layer in (1, 2):
        most = expected[layer].sort(descending=True).values
        for tokens, values in ((table.falls[layer], most[:4]), (table.rises[layer], most.flip(0)[:4])):
            assert [t.delta for t in tokens] == pytest.approx(values.tolist(), abs=5e-5)
            assert [expected[layer, t.id].item() for t in tokens] == pytest.approx(
                [t.delta for t in tokens], abs=5e-5
            )
        assert table.falls[layer][0].delta > 1e-3
        for token in (*table.falls[layer], *table.rises[layer]):
            over = mean_interval([float(deltas[layer, token.id]) for deltas in each])
            assert [token.low, token.high] == pytest.approx([over.low, over.high], abs=5e-5)


def test_lens_tables_text_and_file(tmp_path) -> None:
    _, model = pair()
    examples = list(examples_of("vqa", 2))
    table = lens_delta(model, "vqa", examples, ranking("vqa", [(1, 3), (2, 0)]), k=3, progress=False)
    assert (table.n_neurons, table.n_examples, table.task) == (2, 2, "vqa")
    frame = table.to_dataframe()
    assert len(frame) == 2 * 2 * 3 and set(frame.layer) == {1, 2}
    first = frame[(frame.layer == 2) & (frame.direction == "falls") & (frame["rank"] == 1)].iloc[0]
    assert first.id == table.falls[2][0].id and first.delta == table.falls[2][0].delta
    for token in table.falls[2]:
        assert [token.token] == model.to_str_tokens([token.id])
    assert "layer 0 falls: nothing" in str(table) and table.falls[2][0].token in str(table)
    table.save(tmp_path / "lens.json")
    assert LensDifference.load(tmp_path / "lens.json") == table


def test_bad_input_of_the_lens_raises() -> None:
    _, model = pair()
    examples = list(examples_of("vqa", 2))
    with pytest.raises(ValueError, match="the list of neurons to mask has no neurons"):
        lens_delta(model, "vqa", examples, [], progress=False)
    with pytest.raises(ValueError, match="neuron L0N20 does not exist: 3 layers of 20 neurons"):
        lens_delta(model, "vqa", examples, [(0, 20)], progress=False)
    with pytest.raises(ValueError, match="k must be at least 1"):
        lens_delta(model, "vqa", examples, [(0, 0)], k=0, progress=False)
    with pytest.raises(ValueError, match="no examples"):
        lens_delta(model, "vqa", [], [(0, 0)], progress=False)
