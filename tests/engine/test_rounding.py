"""The noise of a model's type: its distance from float32, and what is said of effects below it."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest
import torch
from helpers.hf_task_loops import examples_of, hf_log_prob, hf_prediction, pair

from hones_lens import HookedVLM, load_examples
from hones_lens.engine import SweepOptions, measure, measure_log_probs, type_noise
from hones_lens.hones import matched_random_sets
from hones_lens.interventions import replace_with_other_heads_mean, zero_neurons
from hones_lens.tasks import load_task

QUIET = SweepOptions(progress=False, batch_size=3)


def narrow(dtype: torch.dtype) -> HookedVLM:
    return HookedVLM.from_hf(copy.deepcopy(pair()[0]).to(dtype), pair()[1].processor)


@pytest.mark.exhaustive
@pytest.mark.parametrize("task_name", ["vqa", "caption", "retrieval"])
def test_it_is_twice_the_mean_distance_from_hugging_face_in_float32(task_name: str) -> None:
    model, task, examples = narrow(torch.bfloat16), load_task(task_name), list(examples_of(task_name))
    hf = copy.deepcopy(pair()[0])
    for parameter in hf.parameters():  # and no buffer, such as the rotation's frequencies
        parameter.data = parameter.data.to(torch.bfloat16).float()
    (clean,) = measure(model, task, examples, [[]], QUIET)
    (log_probs,) = measure_log_probs(model, task, examples, [[]], QUIET)
    journal = {}
    options = SweepOptions(progress=False, batch_size=3, journal=journal)
    noise = type_noise(model, task, examples, clean, log_probs, options, label="masking")
    assert noise is not None and (noise.n, noise.dtype, noise.against) == (3, "bfloat16", "float32")
    with torch.no_grad():
        wide = [float(hf_log_prob(hf, pair()[1], example, task)) for example in examples]
        said = [hf_prediction(hf, pair()[1], example, task) for example in examples]
    assert noise.log_prob == pytest.approx(2 * np.abs(np.subtract(wide, log_probs)).mean(), abs=5e-5)
    assert noise.log_prob > 1e-3
    statistics = [task.statistics(*each) for each in zip(said, examples, strict=True)]
    before = np.array(clean.statistics)
    changed = [before.sum(0) - old + new for old, new in zip(before, statistics, strict=True)]
    moved = [abs(float(task.metric(each)) - clean.metric(task)) for each in changed]
    assert noise.metric == pytest.approx(2 * sum(moved), abs=1e-9)
    model.embed = None  # a journal that has it needs no model
    assert type_noise(model, task, examples, clean, log_probs, options, label="masking") == noise


def test_there_is_none_in_float32() -> None:
    (clean,) = measure(pair()[1], load_task("vqa"), examples_of("vqa"), [[]], QUIET)
    assert type_noise(pair()[1], load_task("vqa"), examples_of("vqa"), clean, None, QUIET, label="a") is None


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.by_hand)], ids=str
)
def test_unmarked_effects_keep_their_sign_in_float32_on_the_shipped_models(
    name: str, dtype: torch.dtype
) -> None:
    """Drops of log-probability of every head, and of random sets of neurons, under the same weights."""
    model = HookedVLM.from_pretrained(name, dtype=dtype)
    wide = HookedVLM.from_pretrained(name, dtype=dtype).to(torch.float32)
    cfg, options = model.cfg, SweepOptions(progress=False, batch_size=8)
    heads = product(range(cfg.n_layers), range(cfg.n_heads))
    arms = [[], *([replace_with_other_heads_mean(*cell)] for cell in heads)]
    for k in (1, 8):
        chosen = [(layer, i) for layer in range(cfg.n_layers) for i in range(k)]
        sets = matched_random_sets(chosen, cfg.n_layers, cfg.d_mlp, 2)
        arms += [zero_neurons((c[0], c[1]) for c in one) for one in sets]
    for task_name in ("vqa", "caption"):
        task, examples = load_task(task_name), load_examples("shapes", task_name, "test", limit=8)
        (clean,) = measure(model, task, examples, [[]], options)
        ours, true = (np.array(measure_log_probs(m, task, examples, arms, options)) for m in (model, wide))
        noise = type_noise(model, task, examples, clean, ours[0].tolist(), options, label="x")
        assert noise is not None and noise.log_prob is not None
        assert abs((ours[0] - true[0]).mean()) <= noise.log_prob
        drops, true_drops = (ours[0] - ours[1:]).mean(1), (true[0] - true[1:]).mean(1)
        unmarked = np.abs(drops) >= noise.log_prob
        assert unmarked.any() and (np.sign(drops) == np.sign(true_drops))[unmarked].all()
        small = np.abs(true_drops) < noise.log_prob
        assert np.abs(drops - true_drops)[small].max(initial=0) <= noise.log_prob
