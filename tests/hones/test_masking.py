"""Masking against Hugging Face's model with zeroed neurons, and its matched random sets."""

from __future__ import annotations

import copy
import itertools
import json
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import example_results
from helpers.hf_task_loops import (
    ALL_TASKS,
    D_MLP,
    N_LAYERS,
    examples_of,
    hf_input_hook,
    hf_layers,
    hf_log_prob,
    hf_prediction,
    pair,
)
from hypothesis import given, strategies as st

from hones_lens import HookedVLM
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.masking import evaluate_masking, masking_curve, matched_random_sets
from hones_lens.hones.masking_result import (
    MaskingResult,
    load_masking,
    masking_measure,
    measures_legend,
    save_masking,
)
from hones_lens.results import Noise
from hones_lens.tasks.registry import load_task

CHOSEN = [(0, 3), (1, 5), (1, 7), (2, 0), (2, 11), (2, 19)]


def hf_without(neurons: list[tuple[int, int]]) -> ExitStack:
    """Hugging Face's model with what `down_proj` is given zeroed at these neurons."""
    stack = ExitStack()
    for layer, module in enumerate(hf_layers(pair()[0])):
        kept = torch.ones(D_MLP)
        kept[[i for where, i in neurons if where == layer]] = 0
        stack.enter_context(hf_input_hook(module.mlp.down_proj, lambda x, kept=kept: x * kept))
    return stack


@pytest.mark.parametrize("name", ALL_TASKS)
def test_equals_hf_with_zeroed_neurons(name: str) -> None:
    hf_model, model = pair()
    task, examples = load_task(name), list(examples_of(name))
    found = evaluate_masking(model, name, examples, CHOSEN, n_controls=1, batch_size=2, progress=False)

    def arm(neurons: list[tuple[int, int]]) -> tuple[list, list[float]]:
        with hf_without(neurons), torch.no_grad():
            said = [hf_prediction(hf_model, model, example, task) for example in examples]
            return said, [float(hf_log_prob(hf_model, model, example, task)) for example in examples]

    (said, likely), (masked, less_likely) = arm([]), arm(CHOSEN)
    assert found.baseline == task.aggregate(said, examples)
    assert found.masked == task.aggregate(masked, examples)
    falls = [task.score(a, e) - task.score(b, e) for a, b, e in zip(said, masked, examples, strict=True)]
    assert list(found.drops) == falls
    assert np.allclose(found.log_prob_drops, np.subtract(likely, less_likely), atol=1e-4)
    assert abs(found.baseline_log_prob - np.mean(likely)) < 1e-4
    assert abs(found.masked_log_prob - np.mean(less_likely)) < 1e-4
    (control,) = found.controls
    (matched,) = matched_random_sets(CHOSEN, N_LAYERS, D_MLP, 1, seed=0)
    said, likely = arm([(c.layer, c.index) for c in matched])
    assert control.metric == task.aggregate(said, examples)
    assert abs(control.log_prob - np.mean(likely)) < 1e-4
    assert said != masked or name == "retrieval"


@cache
def vqa_result() -> MaskingResult:
    return evaluate_masking(pair()[1], "vqa", list(examples_of("vqa")), CHOSEN, n_controls=3, progress=False)


def test_what_comes_back() -> None:
    found, examples = vqa_result(), examples_of("vqa")
    assert found.n_neurons == len(CHOSEN) and found.ratio == len(CHOSEN) / (N_LAYERS * D_MLP)
    assert found.example_ids == tuple(e.id for e in examples)
    assert found.drop == found.baseline - found.masked
    assert found.log_prob_drop == found.baseline_log_prob - found.masked_log_prob
    assert np.isclose(found.drop, np.mean(found.drops)) and np.isclose(
        found.log_prob_drop, np.mean(found.log_prob_drops)
    )
    assert len(found.controls) == 3
    for interval, value in (
        (found.metric_interval, found.drop),
        (found.log_prob_interval, found.log_prob_drop),
    ):
        assert np.isclose(interval.value, value) and interval.n == len(examples)
        assert (
            interval.low <= value + 1e-12 and interval.high >= value - 1e-12 and interval.low < interval.high
        )
    for interval, value in (
        (found.baseline_interval, found.baseline),
        (found.masked_interval, found.masked),
        (found.baseline_log_prob_interval, found.baseline_log_prob),
        (found.masked_log_prob_interval, found.masked_log_prob),
        (found.relative_interval, found.relative_drop),
    ):
        assert np.isclose(interval.value, value) and interval.n == len(examples)
        assert interval.low <= value + 1e-12 and interval.high >= value - 1e-12
        assert interval.span in str(found) or interval is found.relative_interval
    assert found.masked_log_prob_interval.low < found.masked_log_prob_interval.high
    assert set(found.intervals) == {"accuracy", "log-probability"}
    for p, each in ((found.metric_p, found.drops), (found.log_prob_p, found.log_prob_drops)):
        flips = np.array(list(itertools.product((-1, 1), repeat=len(examples))))
        exact = np.mean(np.abs(flips @ each) >= abs(sum(each)) - 1e-9)
        assert abs(p - exact) < 0.05 and f"p = {p:.3g}" in str(found)
    assert found.beats("log_prob") == sum(c.log_prob > found.masked_log_prob for c in found.controls)
    assert found.beats("metric") == sum(c.metric > found.masked for c in found.controls)
    with pytest.raises(ValueError, match="unknown measure 'accuracy'; valid: metric, log_prob"):
        found.beats("accuracy")
    assert sum(kind.n for kind in found.kinds.values()) == len(examples)
    for kind, drop in found.kinds.items():
        rows = [i for i, e in enumerate(examples) if e.kind == kind]
        if len(rows) > 1:
            flips = np.array(list(itertools.product((-1, 1), repeat=len(rows)))) @ np.array(found.drops)[rows]
            exact = np.mean(np.abs(flips) >= abs(np.array(found.drops)[rows].sum()) - 1e-9)
            assert drop.p is not None and abs(drop.p - exact) < 0.05
        assert np.isclose(drop.baseline - drop.masked, np.mean(np.array(found.drops)[rows]))
        parts = ((drop.interval, drop.baseline - drop.masked), (drop.baseline_interval, drop.baseline))
        for interval, value in (*parts, (drop.masked_interval, drop.masked)):
            assert (interval is None) == (len(rows) < 2) == (drop.p is None)
            if interval is not None:
                assert np.isclose(interval.value, value) and interval.n == len(rows) == drop.n
        assert np.isclose(
            drop.baseline_log_prob - drop.masked_log_prob, np.mean(np.array(found.log_prob_drops)[rows])
        )
    frame = found.to_dataframe()
    assert len(frame) == 4 and np.isclose(frame["drop"][0], found.drop)
    assert "6 neurons" in repr(found) and "<pre>" in found._repr_html_()


def test_relative_drop_is_a_share_of_the_baseline() -> None:
    found = vqa_result()
    assert np.isclose(found.relative_drop, 100 * found.drop / found.baseline)


def test_file_round_trip(tmp_path) -> None:
    save_masking(tmp_path / "masking.json", [vqa_result()])
    assert load_masking(tmp_path / "masking.json") == [vqa_result()]
    (tmp_path / "other.json").write_text(json.dumps({"kind": "heads"}))
    with pytest.raises(ValueError, match=r"other\.json holds 'heads', not 'masking'"):
        load_masking(tmp_path / "other.json")


def test_a_ranking_is_cut_at_its_ratio_or_k() -> None:
    _, model = pair()
    examples = list(examples_of("vqa", 2))
    ranking = torch.zeros(N_LAYERS, D_MLP, dtype=torch.float64)
    for rank, cell in enumerate(CHOSEN):
        ranking[cell] = 10 - rank
    scores = NeuronScores("vqa", "hones", "m", ranking, ratio=0.05, n_examples=2)
    options = {"n_controls": 0, "progress": False}
    by_ratio = evaluate_masking(model, "vqa", examples, scores, **options)
    by_hand = evaluate_masking(model, "vqa", examples, CHOSEN[:3], **options)
    assert by_ratio.n_neurons == 3 and by_ratio.method == "hones" and by_hand.method == "given"
    assert by_ratio.log_prob_drops == by_hand.log_prob_drops
    assert evaluate_masking(model, "vqa", examples, scores, k=6, **options).n_neurons == 6
    curve = masking_curve(model, "vqa", examples, scores, ratios=(0.05, 0.1), **options)
    assert [point.n_neurons for point in curve] == [3, 6]
    assert curve[0].log_prob_drops == pytest.approx(by_hand.log_prob_drops, abs=5e-5)  # other batches


def test_bad_input() -> None:
    _, model = pair()
    examples = list(examples_of("vqa", 2))
    with pytest.raises(ValueError, match="no neurons to mask"):
        evaluate_masking(model, "vqa", examples, [], progress=False)
    for neuron in ((N_LAYERS, 0), (0, D_MLP), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=f"neuron L{neuron[0]}N{neuron[1]} does not exist"):
            evaluate_masking(model, "vqa", examples, [neuron], progress=False)
    with pytest.raises(ValueError, match="no examples"):
        evaluate_masking(model, "vqa", [], CHOSEN, progress=False)
    with pytest.raises(ValueError, match="control sets must not be negative: -1"):
        evaluate_masking(model, "vqa", examples, CHOSEN, n_controls=-1, progress=False)


# -- matched random sets -------------------------------------------------------------------------------

neurons = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=40, unique=True)


@given(neurons, st.integers(0, 4), st.integers(0, 2**31 - 1))
def test_random_sets_match_the_count_in_every_layer(
    chosen: list[tuple[int, int]], draws: int, seed: int
) -> None:
    sets = matched_random_sets(chosen, 4, 10, draws, seed)
    assert len(sets) == draws
    for one in sets:
        assert len({(c.layer, c.index) for c in one}) == len(chosen), "a neuron twice"
        assert all(0 <= c.index < 10 for c in one)
        for layer in range(4):
            assert sum(c.layer == layer for c in one) == sum(where == layer for where, _ in chosen)
    assert matched_random_sets(chosen, 4, 10, draws, seed) == sets
    assert matched_random_sets(chosen, 4, 10, draws + 1, seed)[:draws] == sets


def test_random_sets_reach_every_neuron_evenly() -> None:
    sets = matched_random_sets([(1, 0), (1, 1), (1, 2)], 2, 10, 2000, seed=1)
    counts = np.bincount([c.index for one in sets for c in one], minlength=10)
    assert (abs(counts / 2000 - 0.3) < 0.04).all()


def test_what_a_model_in_few_bits_cannot_tell_is_kept_with_the_result(tmp_path: Path) -> None:
    model = HookedVLM.from_hf(copy.deepcopy(pair()[0]).to(torch.bfloat16), pair()[1].processor)
    examples = list(examples_of("vqa"))
    found = evaluate_masking(model, "vqa", examples, CHOSEN, n_controls=0, batch_size=3, progress=False)
    assert found.noise is not None and found.noise.n == 3 and (found.noise.log_prob or 0) > 0
    save_masking(tmp_path / "masking.json", [found])
    assert load_masking(tmp_path / "masking.json")[0].noise == found.noise
    wide = evaluate_masking(pair()[1], "vqa", examples, CHOSEN, n_controls=0, batch_size=3, progress=False)
    assert wide.noise is None


def test_a_drop_below_noise_is_marked_with_its_value_kept() -> None:
    result = example_results.masking(0.92, -0.25)
    for measure, unit in (("metric", ""), ("log_prob", " nats")):
        drop = masking_measure(result, measure).drop
        for size, marked in ((None, False), (0.99 * abs(drop), False), (1.01 * abs(drop), True)):
            values = {"metric": None, "log_prob": None, measure: size}
            noisy = replace(result, noise=Noise(**values, n=24, dtype="bfloat16"))
            m = masking_measure(noisy, measure)
            assert (m.mark, m.drop) == ("~" if marked else "", drop)
            legend = "~ smaller than the noise of bfloat16: twice the mean distance of 24 unchanged runs"
            assert measures_legend([m]) == (f"{legend} from float32 ({size:.2g}{unit})" if marked else "")
            assert str(noisy).count("~") == 2 * marked
            other = "metric" if unit else "log_prob"
            assert not masking_measure(noisy, other).mark


def test_the_estimate_of_earlier_versions_is_read_and_told_as_what_it_is() -> None:
    result = example_results.masking(0.92, -0.25)
    old = {name: value for name, value in result.to_dict().items() if name != "noise"}
    read = MaskingResult.from_dict({**old, "rounding": 9.0})
    m = masking_measure(read, "log_prob")
    assert m.mark == "~" and measures_legend([m]).endswith("one by one or in batches differ (9 nats)")
    assert not masking_measure(read, "metric").mark
    assert MaskingResult.from_dict(read.to_dict()) == read
