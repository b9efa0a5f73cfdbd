"""Neurons of some layers: the scores of all, restricted, and nothing in the others' place."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from helpers.hf_task_loops import critical_heads, examples_of, pair

from hones_lens.data import counterfactual_pairs
from hones_lens.hones import NeuronScores, attribute_neurons, evaluate_masking, head_neuron_flow

FAMILIES = pytest.mark.parametrize("family", ["llava", "qwen"])


@cache
def scores(family: str, method: str = "hones", **limits: Any) -> NeuronScores:
    model, heads = pair(family)[1], critical_heads(family=family)
    options: dict[str, Any] = {"method": method, "progress": False, "ratio": 0.2, **limits}
    return attribute_neurons(model, "vqa", examples_of("vqa", 3, family=family), heads, **options)


@FAMILIES
@pytest.mark.parametrize(
    "method", ["hones", "direct", "mean_activation", "gradient_times_activation", "exact_ablation", "random"]
)
@pytest.mark.parametrize("layers", [(0, 2), "1-2", 1], ids=str)
def test_some_layers_are_the_full_ranking_restricted(family: str, method: str, layers: Any) -> None:
    full, some = scores(family, method), scores(family, method, layers=layers)
    chosen = {(0, 2): [0, 2], "1-2": [1, 2], 1: [1]}[layers]
    others = [layer for layer in range(3) if layer not in chosen]
    assert some.layers == tuple(chosen)
    assert torch.allclose(some.scores[chosen], full.scores[chosen], atol=1e-6, rtol=1e-5)
    assert bool(some.scores[others].isnan().all()) and bool(some.scores[chosen].isfinite().all())
    if method == "hones":
        assert some.errors is not None and full.errors is not None
        assert torch.allclose(some.errors[chosen], full.errors[chosen], atol=1e-6, rtol=1e-5)
        assert bool(some.errors[others].isnan().all())
    n = len(chosen) * full.scores.shape[1]
    assert some.count() == round(0.2 * n) and some.n_asked == n
    assert {c.layer for c in some.top()} <= set(chosen) and len(some.top(n)) == n == len(some.to_dataframe())
    with pytest.raises(ValueError, match=f"{n} were scored: {len(chosen)} of 3 layers"):
        some.top(n + 1)


@pytest.mark.parametrize("method", ["gradient_times_activation", "attribution_patching"])
def test_below_the_lowest_layer_is_no_graph(method: str) -> None:
    model, in_graph = pair("llava")[1], dict[int, bool]()
    pairs = counterfactual_pairs("vqa", "color", "dev", 2) if method == "attribution_patching" else ()
    options: dict[str, Any] = {"method": method, "progress": False} | ({"pairs": pairs} if pairs else {})
    full = attribute_neurons(model, "vqa", examples_of("vqa", 2), **options)

    def note(x: torch.Tensor, hook: Any) -> None:
        if torch.is_grad_enabled():
            in_graph[hook.layer()] = x.requires_grad

    with model.hooks([(f"blocks.{layer}.mlp.hook_post", note) for layer in range(3)]):
        some = attribute_neurons(model, "vqa", examples_of("vqa", 2), layers=[1, 2], **options)
    assert in_graph == {0: False, 1: False, 2: True}  # the graph begins behind this hook of layer 1
    torch.testing.assert_close(some.scores[1:], full.scores[1:])


def test_what_follows_from_some_layers(tmp_path: Any) -> None:
    model, examples = pair("llava")[1], examples_of("vqa", 3)
    some = scores("llava", layers=(0, 2))
    some.save(tmp_path / "neurons.json")
    again = NeuronScores.load(tmp_path / "neurons.json")
    assert again.layers == (0, 2) and torch.equal(again.scores.isnan(), some.scores.isnan())
    assert again.top() == some.top()
    assert "2 of 3 layers (0, 2) were asked for" in str(some)
    masked = evaluate_masking(model, "vqa", examples, some, n_controls=1, progress=False)
    assert masked.n_neurons == some.count() == round(0.2 * some.n_asked)
    flow = head_neuron_flow(model, "vqa", examples, critical_heads(), some, progress=False)
    assert [(c.layer, c.index) for c in flow.neurons] == [(c.layer, c.index) for c in some.top()]
    some.plot()


@pytest.mark.parametrize(
    ("layers", "message"),
    [("0-7", "layer 3 is not in 0 … 2"), ("x", "'x' is no layer"), ([], "at least one")],
)
def test_layers_that_are_not_there(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute_neurons(pair("llava")[1], "vqa", examples_of("vqa", 2), method="random", layers=layers)
