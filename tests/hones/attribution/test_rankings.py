"""Every ranking against its formula in plain loops, most of them on Hugging Face's own model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from hones.attribution.build import (
    ALL_TASKS,
    D_MLP,
    N_HEADS,
    N_LAYERS,
    examples_of,
    fresh_pair,
    hf_input_hook,
    hf_inputs,
    hf_layers,
    hf_log_prob,
    other_heads_mean,
    pair,
    plain_examples,
)
from torch import Tensor

from hones_lens import HookedVLM
from hones_lens.data.examples import Example
from hones_lens.data.pairs import counterfactual_pairs
from hones_lens.engine import sweep
from hones_lens.engine.forks import steps_of
from hones_lens.hones.attribution.ablation import exact_ablation, exact_head_ablation
from hones_lens.hones.attribution.attribute import RANKINGS, attribute_neurons, load_ranking
from hones_lens.hones.attribution.gradients import CLUSTER_SHARE, integrated_gradients
from hones_lens.interventions.hooks import Hook, zero_neurons
from hones_lens.model.answers import Answer
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
SHAPE = (N_LAYERS, D_MLP)


def score(
    name: str, task: str, examples: Sequence[Example], model: HookedVLM | None = None, **options: Any
) -> Tensor:
    options = {"batch_size": 2, "progress": False, **options}
    return load_ranking(name)(model or pair()[1], load_task(task), list(examples), **options)


def options_of(name: str) -> dict[str, Any]:
    if name == "activation_entropy":
        return {"other_tasks": {"ocr": examples_of("ocr")}}
    return {"pairs": counterfactual_pairs("vqa", limit=2)} if name == "attribution_patching" else {}


def looks(hf_model: Any, part: str, found: dict[int, Tensor]) -> ExitStack:
    """Keep what a part of every layer's network is given (`down_proj`: the neurons)."""
    stack = ExitStack()
    for layer, module in enumerate(hf_layers(hf_model)):

        def look(x: Tensor, layer: int = layer) -> None:
            found[layer] = x

        stack.enter_context(hf_input_hook(getattr(module.mlp, part), look))
    return stack


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
    assert (apart - together).abs().max() < 1e-5
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
                assert abs(float(found[layer, i]) - mean) < 1e-5


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


# -- gradients -----------------------------------------------------------------------------------------


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
    assert (found - expected).abs().max() < 1e-5
    assert found.abs().max() > 1e-3


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
    assert (found - expected).abs().max() < 1e-5
    assert found.abs().max() > 1e-3


def test_attribution_patching_needs_pairs() -> None:
    with pytest.raises(ValueError, match="needs counterfactual pairs"):
        score("attribution_patching", "vqa", examples_of("vqa", 2))


def one_batch(example: Example, task: Task) -> sweep.Batch:
    (batch,) = sweep.answer_batches(pair()[1], task, [example], 1)
    return batch


@pytest.mark.parametrize("positions", ["all", "last"])
def test_integrated_gradients_are_the_sum_over_steps(positions: str) -> None:
    hf_model, model = pair()
    task, example, steps = load_task("vqa"), examples_of("vqa")[0], 5
    neurons, _ = loop_gradients(example, task)
    last = last_prompt_position(example, task)
    inputs = one_batch(example, task).inputs
    for step in steps_of(model, inputs):
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
    clean = float(sweep.log_probs(model, batch).double().exp())
    for step in steps_of(model, batch.inputs):

        def silence(m: Tensor, hook: object) -> Tensor:
            if positions == "all":
                return torch.zeros_like(m)
            out = m.clone()
            out[:, int(Answer.of(batch.inputs).positions[0])] = 0
            return out

        hook = (f"blocks.{step.layer}.mlp.hook_post", silence)
        fall = clean - float(sweep.log_probs(model, batch, [hook]).double().exp())
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
            for step in steps_of(model, inputs):
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


# -- ablation ------------------------------------------------------------------------------------------


def log_prob(task: Task, examples: Sequence[Example], hooks: Sequence[Hook] = ()) -> float:
    _, model = pair()
    (batch,) = sweep.answer_batches(model, task, examples, len(examples))
    return float(sweep.log_probs(model, batch, hooks).double().mean())


@pytest.mark.parametrize("name", ALL_TASKS)
def test_exact_ablation_equals_one_run_for_each_neuron(name: str) -> None:
    task, examples = load_task(name), plain_examples(name)
    found = score("exact_ablation", name, examples, batch_size=7)
    clean = log_prob(task, examples)
    rounding = 2**-22 * abs(clean)  # of a float32 sum over the tokens of long answers
    for layer in range(N_LAYERS):
        for i in torch.randperm(D_MLP)[:6].tolist():
            fall = clean - log_prob(task, examples, zero_neurons([(layer, i)]))
            assert abs(float(found[layer, i]) - fall) < 1e-5 + rounding
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
            assert abs(float(clean - under) - float(found[layer, i])) < 1e-5


@pytest.mark.parametrize("name", ALL_TASKS)
def test_exact_ablation_of_the_metric_equals_one_run_for_each_neuron(name: str) -> None:
    _, model = pair()
    task, examples = load_task(name), examples_of(name, 2)
    found = score("exact_ablation", name, examples, batch_size=8, measure="metric")
    batches = list(sweep.prompt_batches(model, task, examples, 2))

    def metric(hooks: list[Hook]) -> float:
        said = [p for batch in batches for p in sweep.predict(model, task, batch, hooks)]
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
                    assert abs(float(fall) - float(scores[layer, head])) < 1e-5
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
    (batch,) = sweep.answer_batches(model, task, examples, 3, answers=False)
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
