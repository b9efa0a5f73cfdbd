"""Exact ablation against one run for each neuron or head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.hf_task_loops import (
    ALL_TASKS,
    D_MLP,
    N_HEADS,
    N_LAYERS,
    examples_of,
    fresh_pair,
    hf_input_hook,
    hf_layers,
    hf_log_prob,
    other_heads_mean,
    pair,
    plain_examples,
)
from helpers.ranking_scores import score
from torch import Tensor

from hones_lens import engine
from hones_lens.data.examples import Example
from hones_lens.engine import full_passes
from hones_lens.hones.attribution.ablation import exact_ablation, exact_head_ablation
from hones_lens.interventions.hooks import Hook, zero_neurons
from hones_lens.tasks.base import Task
from hones_lens.tasks.registry import load_task


def log_prob(task: Task, examples: Sequence[Example], hooks: Sequence[Hook] = ()) -> float:
    _, model = pair()
    (batch,) = engine.answer_batches(model, task, examples, len(examples))
    return float(full_passes.log_probs(model, batch, hooks).double().mean())


@pytest.mark.parametrize("name", ALL_TASKS)
def test_exact_ablation_equals_one_run_for_each_neuron(name: str) -> None:
    task, examples = load_task(name), plain_examples(name)
    found = score("exact_ablation", name, examples, batch_size=7)
    clean = log_prob(task, examples)
    rounding = 2**-22 * abs(clean)  # of a float32 sum over the tokens of long answers
    for layer in range(N_LAYERS):
        for i in torch.randperm(D_MLP)[:6].tolist():
            fall = clean - log_prob(task, examples, zero_neurons([(layer, i)]))
            assert abs(float(found[layer, i]) - fall) < 5e-5 + rounding
    assert found.abs().max() > 1e-3


def test_exact_ablation_takes_a_task_s_name() -> None:
    examples = plain_examples("ocr")
    found = exact_ablation(pair()[1], "ocr", examples, progress=False)
    assert torch.equal(found, exact_ablation(pair()[1], load_task("ocr"), examples, progress=False))
    with pytest.raises(ValueError, match="no examples"):
        exact_ablation(pair()[1], "ocr", [])


@torch.no_grad()
def test_exact_ablation_equals_hf() -> None:
    hf_model, model = pair()
    task, example = load_task("ocr"), plain_examples("ocr")[0]
    clean = hf_log_prob(hf_model, model, example, task)
    found = score("exact_ablation", "ocr", [example])
    for layer, module in enumerate(hf_layers(hf_model)):
        for i in (0, 7, D_MLP - 1):
            kept = torch.ones(D_MLP)
            kept[i] = 0
            with hf_input_hook(module.mlp.down_proj, lambda x, kept=kept: x * kept):
                under = hf_log_prob(hf_model, model, example, task)
            assert abs(float(clean - under) - float(found[layer, i])) < 5e-5


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ALL_TASKS)
def test_exact_ablation_of_the_metric_equals_one_run_for_each_neuron(name: str) -> None:
    _, model = pair()
    task, examples = load_task(name), examples_of(name, 2)
    found = score("exact_ablation", name, examples, batch_size=8, measure="metric")
    batches = list(engine.prompt_batches(model, task, examples, 2))

    def metric(hooks: list[Hook]) -> float:
        said = [p for batch in batches for p in full_passes.predict(model, task, batch, hooks)]
        return task.aggregate(said, examples)

    clean, differing = metric([]), 0
    for layer in range(N_LAYERS):
        for i in range(0, D_MLP, 2):
            differing += abs(float(found[layer, i]) - (clean - metric(zero_neurons([(layer, i)])))) > 1e-12
    assert differing == 0
    assert found.any(), "no neuron changes an answer: the comparison would be empty"


def test_exact_head_ablation_equals_one_run_for_each_head() -> None:
    hf_model, model = pair()
    task, examples = load_task("ocr"), list(plain_examples("ocr", 2))
    options = {"batch_size": 3, "progress": False}
    found = exact_head_ablation(model, "ocr", examples, **options)
    zeroed = exact_head_ablation(model, task, examples, ablation="zero", **options)
    with torch.no_grad():
        clean = [hf_log_prob(hf_model, model, example, task) for example in examples]
        for layer, module in enumerate(hf_layers(hf_model)):
            for head in range(N_HEADS):
                for scores, change in ((found, other_heads_mean(head)), (zeroed, zero_head(head))):
                    with hf_input_hook(module.self_attn.o_proj, change):
                        under = [hf_log_prob(hf_model, model, example, task) for example in examples]
                    fall = sum(a - b for a, b in zip(clean, under, strict=True)) / len(examples)
                    assert abs(float(fall) - float(scores[layer, head])) < 5e-5
    assert found.shape == (N_LAYERS, N_HEADS) and not torch.allclose(found, zeroed)


def zero_head(head: int) -> Any:
    def change(x: Tensor) -> Tensor:
        out = x.clone()
        d_head = x.shape[-1] // N_HEADS
        out[..., head * d_head : (head + 1) * d_head] = 0
        return out

    return change


def test_ablation_refuses() -> None:
    _, model = pair()
    examples = list(examples_of("vqa", 2))
    with pytest.raises(ValueError, match="unknown measure 'joy'; valid: log_prob, metric"):
        score("exact_ablation", "vqa", examples, measure="joy")
    with pytest.raises(ValueError, match="unknown ablation 'none'; valid: other_heads_mean, zero"):
        exact_head_ablation(model, "vqa", examples, ablation="none")
    with pytest.raises(ValueError, match="no examples"):
        exact_head_ablation(model, "vqa", [])


@pytest.mark.parametrize("name", ["gradient_times_activation", "exact_ablation", "qrnca"])
def test_values_that_are_not_finite_name_the_example(name: str) -> None:
    _, model = fresh_pair()
    model.unembed.linear.weight.data[5] = float("nan")
    examples = examples_of("vqa", 2)
    with pytest.raises(FloatingPointError, match=examples[0].id):
        score(name, "vqa", examples, model)
