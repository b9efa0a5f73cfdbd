"""Every ranking against its formula in plain loops, most of them on Hugging Face's own model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.hf_task_loops import (
    ALL_TASKS,
    D_MLP,
    N_LAYERS,
    examples_of,
    fresh_pair,
    hf_inputs,
    hf_layers,
    pair,
)
from helpers.ranking_scores import SHAPE, looks, score
from torch import Tensor

from hones_lens import engine
from hones_lens.data.examples import Example
from hones_lens.data.pairs import counterfactual_pairs
from hones_lens.hones.attribution.attribute import RANKINGS, attribute_neurons
from hones_lens.hones.attribution.rankings import _activations_at_last
from hones_lens.tasks.base import Task
from hones_lens.tasks.registry import load_task

NAMES = (
    "activation_probability",
    "mean_activation",
    "activation_entropy",
    "direct",
    "qrnca",
    "gradient_times_activation",
    "attribution_patching",
    "exact_ablation",
    "random",
)


def options_of(name: str) -> dict[str, Any]:
    if name == "activation_entropy":
        return {"other_tasks": {"ocr": examples_of("ocr")}}
    return {"pairs": counterfactual_pairs("vqa", limit=2)} if name == "attribution_patching" else {}


# -- what all have in common ---------------------------------------------------------------------------


def test_every_name_of_the_method_is_there() -> None:
    assert tuple(RANKINGS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_finite_on_the_cpu_and_the_same_again(name: str) -> None:
    model, examples = pair()[1], list(examples_of("vqa", 2))
    find = lambda: attribute_neurons(model, "vqa", examples, method=name, progress=False, **options_of(name))  # noqa: E731
    found = find()
    assert found.method == name and found.n_examples == 2
    assert found.scores.shape == SHAPE and found.scores.isfinite().all() and found.scores.unique().numel() > 1
    assert not found.scores.requires_grad and found.scores.device.type == "cpu"
    assert torch.equal(find().scores, found.scores)


@pytest.mark.parametrize("name", ["mean_activation", "gradient_times_activation", "exact_ablation", "qrnca"])
def test_batches_and_padding_change_nothing(name: str) -> None:
    examples = examples_of("vqa")
    apart, together = (score(name, "vqa", examples, batch_size=size) for size in (1, 3))
    assert (apart - together).abs().max() < 5e-5
    with torch.no_grad():
        assert torch.equal(score(name, "vqa", examples, batch_size=3), together)


@pytest.mark.parametrize("name", ["gradient_times_activation", "qrnca"])
def test_frozen_weights_give_the_same_gradients(name: str) -> None:
    _, model = fresh_pair()
    model.requires_grad_(False)
    examples = examples_of("vqa", 2)
    assert torch.equal(score(name, "vqa", examples, model), score(name, "vqa", examples))


def test_a_function_of_one_s_own_is_a_ranking() -> None:
    model, examples = pair()[1], list(examples_of("vqa", 2))
    expected, seen = torch.arange(N_LAYERS * D_MLP).view(SHAPE).float(), {}

    def mine(*args: Any, **options: Any) -> Tensor:
        seen.update(args=args, options=options)
        return expected.requires_grad_()

    found = attribute_neurons(
        model, "vqa", examples, method=mine, batch_size=5, progress=False, strength=3, ratio=0.05
    )
    assert seen["args"] == (model, load_task("vqa"), examples)
    assert seen["options"] == {"batch_size": 5, "progress": False, "strength": 3}
    assert found.method == "mine" and found.scores.tolist() == expected.double().tolist()
    assert [(c.layer, c.index) for c in found.top()] == [(N_LAYERS - 1, D_MLP - 1 - i) for i in range(3)]
    assert not found.scores.requires_grad


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (torch.zeros(N_LAYERS, D_MLP + 1), rf"it gave \[{N_LAYERS}, {D_MLP + 1}\], of which 0 NaN"),
        (torch.full(SHAPE, torch.nan), rf"of which {N_LAYERS * D_MLP} NaN"),
    ],
)
def test_scores_that_are_no_ranking_are_refused(scores: Tensor, says: str) -> None:
    examples = list(examples_of("vqa", 2))
    with pytest.raises(ValueError, match=rf"ranking '<lambda>' must give a number for each.*{says}"):
        attribute_neurons(pair()[1], "vqa", examples, method=lambda *_, **__: scores, progress=False)


# -- activations ---------------------------------------------------------------------------------------


@torch.no_grad()
def loop_last(part: str, task: Task, examples: Sequence[Example]) -> Tensor:
    """What a part of Hugging Face's networks is given at the last prompt position, [example layer ...]."""
    hf_model, model = pair()
    rows = []
    for example in examples:
        found: dict[int, Tensor] = {}
        with looks(hf_model, part, found):
            hf_model(**hf_inputs(model, example.image, task.target_prompt(example)))
        rows.append(torch.stack([found[layer][0, -1] for layer in range(N_LAYERS)]))
    return torch.stack(rows)


@torch.no_grad()
def loop_activation_probability(name: str) -> list[list[float]]:
    hf_model, _ = pair()
    given = loop_last("gate_proj", load_task(name), examples_of(name))
    out = [[0.0] * D_MLP for _ in range(N_LAYERS)]
    for layer, module in enumerate(hf_layers(hf_model)):
        for i in range(D_MLP):
            gates = [float(x[layer] @ module.mlp.gate_proj.weight[i]) for x in given]
            out[layer][i] = sum(g / (1 + math.exp(-g)) > 0 for g in gates) / len(gates)
    return out


@pytest.mark.parametrize("name", ALL_TASKS)
def test_activation_probability(name: str) -> None:
    found = score("activation_probability", name, examples_of(name))
    assert torch.equal(found, torch.tensor(loop_activation_probability(name), dtype=torch.float64))


def test_mean_activation() -> None:
    m = loop_last("down_proj", load_task("vqa"), examples_of("vqa")).double()
    for signed in (False, True):
        found = score("mean_activation", "vqa", examples_of("vqa"), signed=signed)
        for layer in range(N_LAYERS):
            for i in range(D_MLP):
                values = [float(row[layer, i]) for row in m]
                mean = sum(v if signed else abs(v) for v in values) / len(values)
                assert abs(float(found[layer, i]) - mean) < 5e-5


def test_activation_entropy() -> None:
    others = ("ocr", "caption", "retrieval")
    found = score(
        "activation_entropy", "vqa", examples_of("vqa"), other_tasks={o: examples_of(o) for o in others}
    )
    by_task = [loop_activation_probability(name) for name in ("vqa", *others)]
    every = sorted(p for table in by_task for row in table for p in row)
    bar = every[round(0.95 * len(every)) - 1]
    n_kept, lowest_kept, highest_other = 0, math.inf, -math.inf
    for layer in range(N_LAYERS):
        for i in range(D_MLP):
            own = by_task[0][layer][i]
            total = sum(table[layer][i] for table in by_task)
            shares = [table[layer][i] / total for table in by_task] if total else []
            value = float(found[layer, i])
            if own >= bar and own > 0:
                assert math.isclose(value, sum(p * math.log(p) for p in shares if p), abs_tol=1e-12)
                n_kept, lowest_kept = n_kept + 1, min(lowest_kept, value)
            else:
                assert math.isclose(value, own - math.log(4) - 2)
                highest_other = max(highest_other, value)
    assert 0 < n_kept < N_LAYERS * D_MLP
    assert lowest_kept > highest_other


def test_activation_entropy_refuses() -> None:
    examples = examples_of("vqa", 2)
    for given in ({}, {"other_tasks": {}}, {"other_tasks": None}):
        with pytest.raises(ValueError, match="give other_tasks"):
            score("activation_entropy", "vqa", examples, **given)
    with pytest.raises(ValueError, match="'vqa', which is the task itself"):
        score("activation_entropy", "vqa", examples, other_tasks={"vqa": examples})
    with pytest.raises(ValueError, match="unknown task 'sing'"):
        score("activation_entropy", "vqa", examples, other_tasks={"sing": examples})
    with pytest.raises(ValueError, match="no examples"):
        score("activation_entropy", "vqa", examples, other_tasks={"ocr": []})


# -- random --------------------------------------------------------------------------------------------


def test_random() -> None:
    found = score("random", "vqa", [])
    assert torch.equal(found, score("random", "vqa", [], seed=0))
    assert not torch.equal(found, score("random", "vqa", [], seed=1))
    other = torch.randn(SHAPE, dtype=torch.float64)
    matched = score("random", "vqa", [], like=other)
    assert not torch.equal(matched, other)
    for k in range(1, N_LAYERS * D_MLP + 1):
        tops = [x.flatten().topk(k).indices // D_MLP for x in (other, matched)]
        assert torch.equal(*(top.bincount(minlength=N_LAYERS) for top in tops))
    with pytest.raises(ValueError, match=r"scores to match are \[2, 5\]"):
        score("random", "vqa", [], like=torch.zeros(2, 5))


# -- ground truth --------------------------------------------------------------------------------------


def test_a_planted_neuron_comes_first() -> None:
    """One neuron is made to write "red", all others to write little: the rankings must find it."""
    hf_model, model = fresh_pair(seed=1)
    layer, neuron = 1, 13
    task = load_task("vqa")
    examples = [replace(example, answers=("red",)) for example in examples_of("vqa", 3)]
    (batch,) = engine.answer_batches(model, task, examples, 3, answers=False)
    name = f"blocks.{layer}.ln2.hook_normalized"
    _, cache = model.run_with_cache(batch.inputs, names_filter=name)
    seen = (cache[name][:, -1] * model.blocks[layer].ln2.weight).mean(0).detach()
    mlp, token = hf_layers(hf_model)[layer].mlp, model.to_single_token("red")
    with torch.no_grad():
        for module in hf_layers(hf_model):
            module.mlp.down_proj.weight.mul_(0.05)
        mlp.gate_proj.weight[neuron] = mlp.up_proj.weight[neuron] = 2 * seen / (seen @ seen)
        towards = hf_model.lm_head.weight[token]
        mlp.down_proj.weight[:, neuron] = 1.5 * towards / towards.norm()
    for method in ("exact_ablation", "direct", "gradient_times_activation"):
        (best,) = attribute_neurons(model, task, examples, method=method, progress=False).top(1)
        assert (best.layer, best.index) == (layer, neuron), method
        assert best.score > 0


def test_activations_of_one_position_do_not_keep_the_others_in_memory() -> None:
    model, examples = pair()[1], examples_of("vqa", 2)
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(N_LAYERS)]
    (batch,) = engine.answer_batches(model, load_task("vqa"), examples, 2, answers=False)
    kept = _activations_at_last(model, batch, names)
    assert [x.untyped_storage().nbytes() for x in kept] == [2 * D_MLP * 4] * N_LAYERS
