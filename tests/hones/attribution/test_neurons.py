"""HONES eqs. H2 and H3 against loops over Hugging Face's model, written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from helpers import random_llava
from helpers.allocations import Allocations
from helpers.hf_task_loops import (
    ALL_TASKS,
    D_MLP,
    FAMILIES,
    N_LAYERS,
    WEIGHTS,
    critical_heads,
    examples_of,
    fresh_pair,
    hf_input_hook,
    hf_inputs,
    hf_layers,
    other_heads_mean,
    pair,
)

from hones_lens import engine
from hones_lens.data.examples import Example
from hones_lens.hones.attribution import neurons
from hones_lens.hones.attribution.attribute import attribute_neurons
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.attribution.neurons import target_directions, write_in
from hones_lens.interventions import replace_with_other_heads_mean
from hones_lens.results import Component
from hones_lens.tasks.registry import load_task


def loop_direction(
    name: str, examples: Sequence[Example], example: Example, family: str = "llava"
) -> torch.Tensor:
    """u_y token by token, from `lm_head` and the references."""
    hf_model, model = pair(family)
    tokenizer = model.processor.tokenizer

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if name != "caption":
        text = {"vqa": lambda e: e.answers[0], "ocr": lambda e: e.text, "retrieval": lambda e: "Yes"}[name](
            example
        )
        weights = {token: 1.0 for token in encode(text)}
    else:
        text = " ".join(example.references[:5])
        references = [reference for e in examples for reference in e.references]
        weights = {}
        for token in encode(text):
            df = sum(token in encode(reference) for reference in references)
            weights[token] = math.log((len(references) + 1) / (df + 1)) + 1
    u = torch.zeros(model.cfg.d_model)
    for token in encode(text):
        u = u + weights[token] * hf_model.lm_head.weight[token].detach()
    return u / u.norm()


@torch.no_grad()
def loop_write_in(
    example: Example, prompt: str, u: torch.Tensor, head: tuple[int, int] | None, family: str = "llava"
) -> torch.Tensor:
    """c(l, i) neuron by neuron, from what `down_proj` is given at the last position."""
    hf_model, model = pair(family)
    layers = hf_layers(hf_model)
    seen: dict[int, torch.Tensor] = {}
    with ExitStack() as stack:
        for layer in range(N_LAYERS):

            def look(x: torch.Tensor, layer: int = layer) -> None:
                seen[layer] = x[0, -1].clone()

            stack.enter_context(hf_input_hook(layers[layer].mlp.down_proj, look))
        if head is not None:
            stack.enter_context(hf_input_hook(layers[head[0]].self_attn.o_proj, other_heads_mean(head[1])))
        hf_model(**hf_inputs(model, example.image, prompt))
    out = torch.zeros(N_LAYERS, D_MLP, dtype=torch.float64)
    for layer in range(N_LAYERS):
        for i in range(D_MLP):
            out[layer, i] = seen[layer][i] * (layers[layer].mlp.down_proj.weight[:, i] @ u)
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ALL_TASKS)
def test_h3_equals_a_naive_loop_on_hf(name: str, family: str) -> None:
    _, model = pair(family)
    task, examples = load_task(name), list(examples_of(name, family=family))
    heads = critical_heads(name, family=family)
    found = attribute_neurons(model, name, examples, heads, batch_size=2, progress=False)

    directions = [loop_direction(name, examples, example, family) for example in examples]
    prompts = [task.target_prompt(example) for example in examples]
    assert torch.allclose(target_directions(model, task, examples), torch.stack(directions), atol=1e-5)

    def mean_write_in(head: tuple[int, int] | None) -> torch.Tensor:
        each = [loop_write_in(*one, head, family) for one in zip(examples, prompts, directions, strict=True)]
        return sum(each[1:], each[0]) / len(each)

    clean = mean_write_in(None)
    expected, weights = torch.zeros_like(clean), 0.0
    for head, weight in WEIGHTS.items():
        if weight > 0:
            expected += weight * (clean - mean_write_in(head)).clamp(min=0)
            weights += weight
    difference = (found.scores - expected / weights).abs().max()
    assert difference < 1e-5 < 0.01 * found.scores.max(), difference
    assert found.scores.shape == (N_LAYERS, D_MLP) and (found.scores >= 0).all() and found.scores.any()
    assert not found.scores.requires_grad and found.scores.device.type == "cpu"

    ranking = attribute_neurons(model, name, examples, method="direct", progress=False)
    assert (ranking.scores - clean).abs().max() < 2e-5


@pytest.mark.parametrize("parts", [20, 2])
def test_standard_errors_leave_one_part_out_at_a_time(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole attribution, run anew without each part of the examples."""
    _, model = pair()
    examples, heads = list(examples_of("vqa", 5)), critical_heads()
    monkeypatch.setattr(neurons, "_PARTS", parts)
    found = attribute_neurons(model, "vqa", examples, heads, batch_size=2, progress=False)
    count = min(parts, 5)
    without = []
    for part in range(count):
        kept = [example for i, example in enumerate(examples) if i % count != part]
        without.append(attribute_neurons(model, "vqa", kept, heads, progress=False).scores)
    each = torch.stack(without)
    expected = ((count - 1) / count * (each - each.mean(0)).square().sum(0)).sqrt()
    assert found.errors is not None and expected.max() > 1e-4
    assert torch.allclose(found.errors, expected, atol=1e-6)
    best = found.top(1)[0]
    interval = found.interval(best.layer, best.index)
    assert interval is not None and interval.n == 5 and interval.value == best.score
    half = 1.96 * expected[best.layer, best.index].item()
    assert interval.high - interval.low == pytest.approx(2 * half, abs=2e-5)
    assert f"{best.score:+.4g} [{interval.low:+.4g}, {interval.high:+.4g}]" in str(found)
    assert found.to_dataframe()["standard_error"][0] == found.errors[best.layer, best.index]


@pytest.mark.parametrize("table_bytes", [1, 2.5 * 5 * N_LAYERS * D_MLP * 8, neurons._TABLE_BYTES])
def test_scores_and_errors_are_those_of_the_whole_table(
    table_bytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jackknife written out over [part head layer neuron], however many heads are summed at a time."""
    monkeypatch.setattr(neurons, "_TABLE_BYTES", table_bytes)
    _, model = pair()
    task, examples = load_task("vqa"), list(examples_of("vqa", 5))
    cells = [(layer, head) for layer in range(N_LAYERS) for head in range(2)]
    heads = [Component(*cell, 0.1 + i) for i, cell in enumerate(cells)]
    directions = target_directions(model, task, examples)
    (batch,) = engine.answer_batches(model, task, examples, 5, answers=False)
    clean = neurons.write_in(model, batch, directions).double()
    table = []
    for head in heads:
        hook = replace_with_other_heads_mean(head.layer, head.index)
        table.append(clean - neurons.write_in(model, batch, directions, [hook]).double())
    drops = torch.stack(table, dim=1)  # every example is a part
    weights = torch.tensor([head.score for head in heads], dtype=torch.float64)

    def importance(rows: torch.Tensor) -> torch.Tensor:
        return torch.einsum("h,hln->ln", weights, rows.mean(0).clamp(min=0)) / weights.sum()

    without = torch.stack([importance(drops[[j for j in range(5) if j != i]]) for i in range(5)])
    expected = (4 / 5 * (without - without.mean(0)).square().sum(0)).sqrt()
    options = {"batch_size": 5, "progress": False}
    scores, errors = neurons.head_conditioned_importance(model, task, examples, heads, **options)
    assert errors is not None and errors.max() > 1e-4 and len(heads) > 3
    torch.testing.assert_close(scores, importance(drops), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(errors, expected, atol=1e-9, rtol=1e-7)
    found_weights, by_head = neurons.write_in_drops_by_head(model, task, examples, heads, **options)
    assert torch.equal(found_weights, weights)
    torch.testing.assert_close(by_head, drops.mean(0).clamp(min=0), atol=1e-12, rtol=1e-10)


def test_nothing_below_a_replaced_head_runs_again() -> None:
    _, model = pair()
    runs, handles = [0] * N_LAYERS, []
    for layer, block in enumerate(model.blocks):
        handles.append(
            block.register_forward_pre_hook(lambda *_, layer=layer: runs.__setitem__(layer, runs[layer] + 1))
        )
    heads = [
        Component(N_LAYERS - 1, 0, 1.0),
        Component(N_LAYERS - 2, 1, 0.5),
        Component(N_LAYERS - 1, 1, 0.1),
    ]
    examples = list(examples_of("vqa", 3))
    try:
        neurons.head_conditioned_importance(model, load_task("vqa"), examples, heads, progress=False)
    finally:
        for handle in handles:
            handle.remove()
    # on the way up to the lower head, without edits, with its edit; then up to the others, with their edits
    assert runs == [1] * (N_LAYERS - 2) + [1 + 1 + 1, 1 + 1 + 2]


@pytest.mark.exhaustive
def test_more_heads_take_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = random_llava.make_config(text={"intermediate_size": 4096})
    _, model = random_llava.make_pair(config, seed=3)
    task, examples = load_task("vqa"), list(examples_of("vqa", 6))
    every = [Component(layer, head, 1.0) for layer in range(3) for head in range(4)]
    table = 6 * 3 * 4096 * 8
    monkeypatch.setattr(neurons, "_TABLE_BYTES", 2 * table)
    peaks = []
    for heads in (every[:2], every):
        with Allocations() as allocated:
            neurons.head_conditioned_importance(model, task, examples, heads, batch_size=1, progress=False)
        peaks.append(allocated.peak)
    assert table < peaks[0] and peaks[1] < peaks[0] + 0.5 * table


def test_errors_are_kept_in_files_and_not_claimed_where_they_are_not_known(tmp_path) -> None:
    _, model = pair()
    examples, heads = list(examples_of("vqa")), critical_heads()
    found = attribute_neurons(model, "vqa", examples, heads, progress=False)
    found.save(tmp_path / "n.json")
    again = NeuronScores.load(tmp_path / "n.json")
    assert again.errors is not None and torch.equal(again.errors, found.errors) and str(again) == str(found)
    for other in (
        attribute_neurons(model, "vqa", examples[:1], heads, progress=False),
        attribute_neurons(model, "vqa", examples, method="direct", progress=False),
    ):
        assert other.errors is None and other.interval(0, 0) is None and "[" not in str(other).split("\n")[1]
        assert f"n = {other.n_examples} examples" in str(other)
        other.save(tmp_path / "o.json")
        assert NeuronScores.load(tmp_path / "o.json").errors is None


def test_a_head_leaves_the_layers_below_it_alone() -> None:
    _, model = pair()
    only_top = replace(critical_heads(), scores=critical_heads().scores.clamp(max=0))
    only_top.scores[2, 0] = 0.4
    found = attribute_neurons(model, "vqa", list(examples_of("vqa")), only_top, progress=False)
    assert (found.scores[:2] == 0).all()
    assert found.scores[2].any()


def test_the_clamp_comes_after_the_mean() -> None:
    _, model = pair()
    examples = list(examples_of("vqa"))
    one_head = replace(critical_heads(), top_k=1)
    together = attribute_neurons(model, "vqa", examples, one_head, progress=False).scores
    each = [
        attribute_neurons(model, "vqa", [example], one_head, progress=False).scores for example in examples
    ]
    clamped_first = sum(each[1:], each[0]) / len(each)
    assert (clamped_first >= together - 1e-5).all()
    assert (clamped_first - together).max() > 1e-4


def test_only_the_stored_top_k_with_positive_weight_count() -> None:
    _, model = pair()
    examples = list(examples_of("vqa", 2))

    def find(heads):
        return attribute_neurons(model, "vqa", examples, heads, progress=False).scores

    assert torch.equal(find(critical_heads(top_k=3)), find(critical_heads(top_k=12)))
    assert not torch.equal(find(critical_heads(top_k=3)), find(critical_heads(top_k=2)))
    for scores in (-critical_heads().scores.abs(), torch.zeros_like(critical_heads().scores)):
        with pytest.raises(ValueError, match="no critical head has w > 0"):
            find(replace(critical_heads(), scores=scores))


@torch.no_grad()
def test_all_components_add_up_to_the_logit() -> None:
    _, model = pair()
    example = replace(examples_of("vqa")[-1], answers=("circle",))
    task = load_task("vqa")
    token = model.to_single_token("circle")
    (batch,) = engine.answer_batches(model, task, [example], 1, answers=False)
    (u,) = directions = target_directions(model, task, [example], normalize=False, apply_ln=True)
    neurons = write_in(model, batch, directions, apply_ln=True)

    names = ["hook_embed", "ln_final.hook_scale"]
    names += [f"blocks.{layer}.attn.hook_result" for layer in range(N_LAYERS)]
    logits, cache_ = model.run_with_cache(batch.inputs, names_filter=names)
    scale = cache_["ln_final.hook_scale"][0, -1]
    parts = [neurons.sum(), cache_["hook_embed"][0, -1] @ u / scale]
    for layer in range(N_LAYERS):
        for head in range(model.cfg.n_heads):
            parts.append(cache_[f"blocks.{layer}.attn.hook_result"][0, -1, head] @ u / scale)
    assert abs(float(sum(parts)) - float(logits[0, -1, token])) < 1e-4


def test_foils_subtract_the_wrong_answer() -> None:
    hf_model, model = pair()
    task, (example, *_) = load_task("vqa"), examples_of("vqa")
    example = replace(example, answers=("red",))
    (found,) = target_directions(model, task, [example], normalize=False, foils=["blue"])
    ids = [model.to_single_token(word) for word in ("red", "blue")]
    weight = hf_model.lm_head.weight
    assert torch.allclose(found, weight[ids[0]] - weight[ids[1]], atol=1e-5)
    with pytest.raises(ValueError, match="2 foils for 1 examples"):
        target_directions(model, task, [example], foils=["blue", "green"])


def test_bad_input() -> None:
    _, model = pair()
    examples = list(examples_of("vqa", 2))
    with pytest.raises(ValueError, match="needs heads"):
        attribute_neurons(model, "vqa", examples, progress=False)
    with pytest.raises(ValueError, match=r"unknown method 'guess'; valid: hones, .*exact_ablation"):
        attribute_neurons(model, "vqa", examples, method="guess", progress=False)
    with pytest.raises(ValueError, match="no examples"):
        attribute_neurons(model, "vqa", [], method="direct", progress=False)
    with pytest.raises(ValueError, match="occurs twice"):
        attribute_neurons(model, "vqa", [examples[0], examples[0]], method="direct", progress=False)


def test_the_model_is_not_changed() -> None:
    _, model = fresh_pair()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    examples = list(examples_of("vqa", 2))
    attribute_neurons(model, "vqa", examples, critical_heads(), progress=False)
    for method in ("gradient_times_activation", "exact_ablation"):
        attribute_neurons(model, "vqa", examples, method=method, progress=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None, name


# -- NeuronScores --------------------------------------------------------------------------------------


def _neuron_scores(n_layers: int, d_mlp: int, ratio: float = 0.01, **other) -> NeuronScores:
    scores = other.pop("scores", torch.zeros(n_layers, d_mlp, dtype=torch.float64))
    return NeuronScores(task="vqa", method="hones", model_name="m", scores=scores, ratio=ratio, n_examples=1)


@pytest.mark.parametrize(("n_layers", "d_mlp", "published"), [(32, 11008, 3523), (28, 18944, 5304)])
def test_one_per_cent_is_the_papers_count(n_layers: int, d_mlp: int, published: int) -> None:
    assert _neuron_scores(n_layers, d_mlp).count() == published


def test_counts_and_layers() -> None:
    scores = torch.arange(40, dtype=torch.float64).view(2, 20)
    found = _neuron_scores(2, 20, 0.1, scores=scores)
    assert found.count() == 4 and found.count(0.001) == 1 and found.count(1) == 40
    assert [(c.layer, c.index) for c in found.top()] == [(1, 19), (1, 18), (1, 17), (1, 16)]
    assert found.per_layer() == [0, 4] and found.per_layer(25) == [5, 20]
    assert found.to_dataframe().neuron[0] == 19 and len(found.to_dataframe()) == 40
    assert "by hones" in repr(found) and "<table" in found._repr_html_()
    for ratio in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match="ratio must be"):
            found.count(ratio)


def test_file_round_trip(tmp_path) -> None:
    before = _neuron_scores(2, 20, 0.1, scores=torch.rand(2, 20, dtype=torch.float64))
    before.save(tmp_path / "neurons.json")
    after = NeuronScores.load(tmp_path / "neurons.json")
    assert torch.allclose(after.scores, before.scores, atol=1e-8, rtol=0)
    assert [(c.layer, c.index) for c in after.top()] == [(c.layer, c.index) for c in before.top()]
    assert {**vars(after), "scores": 0} == {**vars(before), "scores": 0}
