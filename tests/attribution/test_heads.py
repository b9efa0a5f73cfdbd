"""Localization against a loop over Hugging Face's model: example by example, head by head."""

from __future__ import annotations

import pytest
import torch
from attribution.build import (
    ALL_TASKS,
    FAMILIES,
    N_HEADS,
    N_LAYERS,
    examples_of,
    hf_input_hook,
    hf_layers,
    hf_prediction,
    other_heads_mean,
    pair,
)
from tiny import make_config, make_pair

from hones_lens.attribution.heads import HeadScores, localize_heads
from hones_lens.results import Component
from hones_lens.tasks import load_task


def _scores(heads: torch.Tensor, k: int = 3) -> HeadScores:
    return HeadScores(
        task="vqa",
        metric_name="accuracy",
        intervention="replace_with_other_heads_mean",
        model_name="m",
        scores=heads,
        drops=heads[..., None].expand(-1, -1, 2).clone(),
        baseline=1.0,
        base_scores=torch.ones(2, dtype=torch.float64),
        example_ids=("a", "b"),
        kinds=("x", "y"),
        top_k=k,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ALL_TASKS)
def test_equals_a_naive_loop_on_hf(name: str, family: str) -> None:
    hf_model, model = pair(family)
    task, examples = load_task(name), list(examples_of(name, family=family))
    found = localize_heads(model, name, examples, batch_size=2, progress=False)

    said = [hf_prediction(hf_model, model, example, task) for example in examples]
    base = [task.score(p, e) for p, e in zip(said, examples, strict=True)]
    assert found.base_scores.tolist() == base
    assert found.baseline == task.aggregate(said, examples)
    assert any(base), "nothing to lose: the comparison would be empty"
    differing = 0
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            with hf_input_hook(hf_layers(hf_model)[layer].self_attn.o_proj, other_heads_mean(head)):
                under = [hf_prediction(hf_model, model, example, task) for example in examples]
            each = [b - task.score(p, e) for b, p, e in zip(base, under, examples, strict=True)]
            differing += sum(a != b for a, b in zip(found.drops[layer, head].tolist(), each, strict=True))
            assert found.scores[layer, head] == found.baseline - task.aggregate(under, examples)
    assert differing == 0
    assert found.drops.any(), "no head matters: the comparison would be empty"


def test_what_comes_back() -> None:
    _, model = pair()
    examples = list(examples_of("vqa", 2))
    found = localize_heads(model, load_task("vqa"), examples, top_k=2, progress=False)
    for tensor in (found.scores, found.drops, found.base_scores):
        assert tensor.device.type == "cpu" and not tensor.requires_grad
    assert found.scores.shape == (N_LAYERS, N_HEADS)
    assert found.drops.shape == (N_LAYERS, N_HEADS, 2)
    assert found.example_ids == tuple(e.id for e in examples) and found.kinds == tuple(
        e.kind for e in examples
    )
    assert len(found.top()) <= 2 and all(c.score > 0 for c in found.top())
    frame = found.to_dataframe()
    assert len(frame) == N_LAYERS * N_HEADS
    assert frame.score.tolist() == found.scores.flatten().tolist()
    assert "vqa" in repr(found) and "<table" in found._repr_html_()


def test_top_takes_positive_heads_only_and_orders_ties() -> None:
    scores = torch.tensor([[0.5, -1.0, 0.0], [0.2, 0.5, 0.0]], dtype=torch.float64)
    assert _scores(scores, 4).top() == [Component(0, 0, 0.5), Component(1, 1, 0.5), Component(1, 0, 0.2)]
    assert _scores(scores, 4).top(1) == [Component(0, 0, 0.5)]
    assert _scores(-scores.abs() - 1).top() == []


def test_file_round_trip(tmp_path) -> None:
    before = _scores(torch.rand(2, 3, dtype=torch.float64))
    before.save(tmp_path / "heads.json")
    after = HeadScores.load(tmp_path / "heads.json")
    assert torch.allclose(after.scores.double(), before.scores, atol=1e-7, rtol=0)
    assert torch.allclose(after.drops.double(), before.drops, atol=1e-7, rtol=0)
    assert after.example_ids == before.example_ids and after.kinds == before.kinds
    assert [(c.layer, c.index) for c in after.top()] == [(c.layer, c.index) for c in before.top()]


def test_bad_input() -> None:
    _, model = pair()
    examples = list(examples_of("vqa", 2))
    with pytest.raises(ValueError, match="no examples"):
        localize_heads(model, "vqa", [], progress=False)
    with pytest.raises(ValueError, match="occurs twice"):
        localize_heads(model, "vqa", [examples[0], examples[0]], progress=False)
    with pytest.raises(ValueError, match="unknown task"):
        localize_heads(model, "sing", examples, progress=False)
    with pytest.raises(ValueError, match=f"{examples[0].id}.*references"):
        localize_heads(model, "caption", examples, progress=False)
    single = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="one head"):
        localize_heads(make_pair(make_config(text=single))[1], "vqa", examples, progress=False)


def test_values_that_are_not_finite_are_named() -> None:
    _, model = make_pair(make_config(text={"num_hidden_layers": 1}))
    model.unembed.linear.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=examples_of("vqa", 2)[0].id):
        localize_heads(model, "vqa", list(examples_of("vqa", 2)), progress=False)
