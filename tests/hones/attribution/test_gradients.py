"""Rankings by gradients against autograd on Hugging Face's model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.hf_task_loops import (
    ALL_TASKS,
    D_MLP,
    N_LAYERS,
    examples_of,
    hf_input_hook,
    hf_inputs,
    hf_layers,
    hf_log_prob,
    pair,
)
from helpers.ranking_scores import SHAPE, looks, score
from torch import Tensor

from hones_lens import engine
from hones_lens.data.examples import Example
from hones_lens.data.pairs import counterfactual_pairs
from hones_lens.engine import full_passes
from hones_lens.engine.forks import layer_steps
from hones_lens.hones.attribution.gradients import CLUSTER_SHARE, integrated_gradients
from hones_lens.model.answers import Answer
from hones_lens.tasks.base import Task
from hones_lens.tasks.registry import load_task


def loop_gradients(example: Example, task: Task) -> tuple[list[Tensor], list[Tensor]]:
    """m and ∂ log P / ∂m of Hugging Face's model, [pos d_mlp] for each layer."""
    hf_model, model = pair()
    found: dict[int, Tensor] = {}
    with looks(hf_model, "down_proj", found):
        log_prob = hf_log_prob(hf_model, model, example, task)
    neurons = [found[layer] for layer in range(N_LAYERS)]
    gradients = torch.autograd.grad(log_prob, neurons)
    return [m[0].detach() for m in neurons], [g[0] for g in gradients]


def last_prompt_position(example: Example, task: Task) -> int:
    return hf_inputs(pair()[1], example.image, task.target_prompt(example))["input_ids"].shape[1] - 1


@pytest.mark.parametrize("name", ALL_TASKS)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_gradient_times_activation(name: str, positions: str) -> None:
    task, examples = load_task(name), examples_of(name)
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for example in examples:
        neurons, gradients = loop_gradients(example, task)
        last = last_prompt_position(example, task)
        for layer in range(N_LAYERS):
            for p in range(len(neurons[layer])):
                if positions == "all" or p == last:
                    expected[layer] += neurons[layer][p] * gradients[layer][p] / len(examples)
    found = score("gradient_times_activation", name, examples, positions=positions)
    assert (found - expected).abs().max() < 1e-4 < 0.01 * found.abs().max()


@pytest.mark.parametrize("name", ALL_TASKS)
def test_attribution_patching(name: str) -> None:
    task, pairs = load_task(name), counterfactual_pairs(name, limit=2)
    hf_model, model = pair()
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for each in pairs:
        neurons, gradients = loop_gradients(each.clean, task)
        corrupted: dict[int, Tensor] = {}
        inputs = hf_inputs(model, each.corrupted.image, task.target_prompt(each.clean), each.answers[0])
        with torch.no_grad(), looks(hf_model, "down_proj", corrupted):
            hf_model(**inputs)
        for layer in range(N_LAYERS):
            change = (neurons[layer] - corrupted[layer][0]) * gradients[layer]
            expected[layer] += change.sum(0) / len(pairs)
    found = score("attribution_patching", name, [], pairs=pairs)
    assert (found - expected).abs().max() < 1e-4 < 0.01 * found.abs().max()


def test_attribution_patching_needs_pairs() -> None:
    with pytest.raises(ValueError, match="needs counterfactual pairs"):
        score("attribution_patching", "vqa", examples_of("vqa", 2))


def one_batch(example: Example, task: Task) -> engine.Batch:
    (batch,) = engine.answer_batches(pair()[1], task, [example], 1)
    return batch


@pytest.mark.parametrize("positions", ["all", "last"])
def test_integrated_gradients_are_the_sum_over_steps(positions: str) -> None:
    hf_model, model = pair()
    task, example, steps = load_task("vqa"), examples_of("vqa")[0], 5
    neurons, _ = loop_gradients(example, task)
    last = last_prompt_position(example, task)
    inputs = one_batch(example, task).inputs
    for step in layer_steps(model, inputs):
        expected = torch.zeros(D_MLP, dtype=torch.float64)
        for k in range(1, steps + 1):
            m = neurons[step.layer].clone()
            where = slice(None) if positions == "all" else slice(last, last + 1)
            m[where] *= k / steps
            m = m[None].requires_grad_()
            with hf_input_hook(hf_layers(hf_model)[step.layer].mlp.down_proj, lambda x, m=m: m):
                probability = hf_log_prob(hf_model, model, example, task).double().exp()
            (gradient,) = torch.autograd.grad(probability, m)
            expected += (neurons[step.layer] * gradient[0])[where].sum(0) / steps
        found = integrated_gradients(model, inputs, step, steps=steps, positions=positions, batch_size=2)
        scale = expected.abs().max()
        assert scale > 0 and (found - expected).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("positions", ["all", "last"])
def test_integrated_gradients_are_complete(positions: str) -> None:
    """The sum over neurons goes to P(m) − P(0) as steps grow."""
    _, model = pair()
    task = load_task("retrieval")
    batch = one_batch(examples_of("retrieval")[0], task)
    clean = float(full_passes.log_probs(model, batch).double().exp())
    for step in layer_steps(model, batch.inputs):

        def silence(m: Tensor, hook: object) -> Tensor:
            if positions == "all":
                return torch.zeros_like(m)
            out = m.clone()
            out[:, int(Answer.of(batch.inputs).positions[0])] = 0
            return out

        hook = (f"blocks.{step.layer}.mlp.hook_post", silence)
        fall = clean - float(full_passes.log_probs(model, batch, [hook]).double().exp())
        options = {"positions": positions, "batch_size": 50}
        sums = [
            float(integrated_gradients(model, batch.inputs, step, steps=n, **options).sum())
            for n in (5, 50, 400)
        ]
        errors = [abs(total - fall) for total in sums]
        assert errors[2] < 0.02 * abs(fall) + 1e-9, (sums, fall)
        assert errors[2] < errors[0]


def test_qrnca_is_attribution_times_inverse_cluster_frequency() -> None:
    _, model = pair()
    first, second, third = examples_of("vqa")
    again = replace(first, id="again", image_source=second.image_source)  # the same query on another picture
    task = load_task("vqa")
    by_query = []
    for instances in ([first, again], [second], [third]):
        total = torch.zeros(SHAPE, dtype=torch.float64)
        for example in instances:
            inputs = one_batch(example, task).inputs
            for step in layer_steps(model, inputs):
                total[step.layer] += integrated_gradients(model, inputs, step, steps=4)
        by_query.append(total)
    clusters = [[bool(v > CLUSTER_SHARE * a.max()) for v in a.flatten()] for a in by_query]
    expected = []
    for k in range(N_LAYERS * D_MLP):
        held = sum(cluster[k] for cluster in clusters)
        value = 0.0
        for attribution, cluster in zip(by_query, clusters, strict=True):
            flat = attribution.flatten().tolist()
            value += flat[k] / sum(v for v, inside in zip(flat, cluster, strict=True) if inside)
        expected.append(value / 3 * math.log(3 / (held + 1)))
    found = score("qrnca", "vqa", [first, second, again, third], steps=4)
    assert torch.allclose(found.flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-4)


def test_gradient_rankings_refuse() -> None:
    examples = examples_of("vqa", 2)
    for name in ("gradient_times_activation", "qrnca"):
        with pytest.raises(ValueError, match="unknown positions 'some'; valid: all, last"):
            score(name, "vqa", examples, positions="some")
    with pytest.raises(ValueError, match="two different prompts"):
        score("qrnca", "vqa", examples[:1])
    with pytest.raises(ValueError, match="at least one step"):
        score("qrnca", "vqa", examples, steps=0)
