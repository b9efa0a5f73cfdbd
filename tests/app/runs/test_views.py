"""What a run keeps for its report: examples with where heads look and logit lenses, and the flow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import example_results as made
from transformers import AutoModelForImageTextToText

import hones_lens as hl
from hones_lens.app.report.run_folder import read_view
from hones_lens.app.runs import views as run_views
from hones_lens.app.runs.data_choice import DataChoice
from hones_lens.app.runs.folder import Run
from hones_lens.hones.attribution.attribute import attribute_neurons

MODELS = pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
FEW = DataChoice(n_discovery=4, n_dev=4, n_held_out=2)


@MODELS
def test_promoted_tokens_of_a_run_turn_with_the_activation_s_sign(name: str, tmp_path: Path) -> None:
    """What one more unit of activation of a neuron's own sign adds to the logits, worked out by hand."""
    model = hl.HookedVLM.from_pretrained(name)
    run = Run(tmp_path / "run", {"model": name, "task": "vqa"})
    heads, examples = made.heads(), FEW.discovery("vqa")
    neurons = attribute_neurons(model, "vqa", examples, heads, progress=False)
    flow = run_views.find_flow(model, run, "vqa", FEW, heads, neurons)
    run.files("promoted", lambda: run_views.save_promoted(model, run, flow))
    promoted = read_view(run.folder).promoted
    assert list(promoted) == [c[:2] for c in neurons.top()]
    prompts = [hl.load_task("vqa").prompt(example) for example in examples]
    total = torch.zeros(4, model.cfg.d_mlp, dtype=torch.float64)
    for example, prompt in zip(examples, prompts, strict=True):
        _, cache = model.run_with_cache(model.prepare(example.image, prompt))
        total += torch.stack([cache[f"blocks.{layer}.mlp.hook_post"][0, -1].double() for layer in range(4)])
    hf_model = AutoModelForImageTextToText.from_pretrained(hl.checkpoint_path(name))
    decoder, signs = hf_model.model.language_model, set()
    for (layer, index), found in promoted.items():
        activation = float(total[layer, index]) / len(examples)
        assert found.activation == pytest.approx(activation, abs=1e-5)
        signs.add(activation > 0)
        row = decoder.norm.weight * decoder.layers[layer].mlp.down_proj.weight[:, index]
        logits = hf_model.lm_head.weight @ (row if activation > 0 else -row)
        for value, text in zip(logits.topk(5).values, found.tokens, strict=True):
            tied = (
                (logits - value).abs().lt(1e-4).nonzero()[:, 0].tolist()
            )  # rows that training never touched
            assert text in model.to_str_tokens(tied)
    assert signs == {True, False}


@MODELS
def test_examples_hold_every_head_s_attention_and_the_lenses_readings(name: str, tmp_path: Path) -> None:
    model = hl.HookedVLM.from_pretrained(name)
    heads, neurons = made.heads().top(), made.neurons()
    views = run_views.example_views(model, "vqa", FEW, heads, neurons)
    example, view = FEW.test("vqa")[1], views[1]
    inputs = model.prepare(example.image, view.prompt)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
    names = [f"L{layer}H{head}" for layer in range(4) for head in range(8)]
    assert list(view.looks) == names and view.head == f"L{heads[0].layer}H{heads[0].index}" == "L1H3"
    for layer in range(4):
        for head in range(8):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, head, -1][inputs.image_mask[0]]
            found = view.looks[f"L{layer}H{head}"]
            assert torch.allclose(found.flatten(), pattern, atol=1e-5)
    assert view.region == inputs.regions[0][0]
    assert view.lens.ids[0, -1].tolist() == logits[0, -1].topk(5).indices.tolist()
    assert view.answer == model.generate(inputs, 24)[0]
    (first, *_) = model.continuation(view.prompt, view.target)
    for layer in range(4):
        stream = cache[f"blocks.{layer}.hook_resid_post"][0][inputs.image_mask[0]]
        read = model.unembed(model.ln_final(stream)).log_softmax(-1)[:, first]
        shown = view.image_lens.select(layer=layer).values.flatten()
        np.testing.assert_allclose(shown, read.detach(), atol=1e-4)
    run = Run(tmp_path / "run", {"model": name, "task": "vqa"})
    run.files("examples", lambda: run_views.save_examples(run, views))
    again = read_view(run.folder).examples
    assert [v.answer_masked for v in again] == [v.answer_masked for v in views]
    assert all(torch.equal(again[1].looks[head], view.looks[head]) for head in names)


def test_of_a_large_model_the_given_heads_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_views, "_MOST_HEADS", 31)
    model = hl.HookedVLM.from_pretrained("tiny-llava")
    heads = made.heads().top()
    (view,) = run_views.example_views(model, "vqa", FEW, heads, made.neurons(), count=1)
    assert list(view.looks) == [f"L{head.layer}H{head.index}" for head in heads] and len(heads) == 3


def test_the_flow_is_that_of_the_run_s_neurons_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hl.HookedVLM.from_pretrained("tiny-llava")
    run = Run(tmp_path / "run", {"model": "tiny-llava", "task": "vqa"})
    heads = made.heads()
    neurons = attribute_neurons(model, "vqa", FEW.discovery("vqa"), heads, progress=False)
    flow = run_views.find_flow(model, run, "vqa", FEW, heads, neurons)
    assert [c[:2] for c in flow.neurons] == [c[:2] for c in neurons.top()]
    expected = [c.score for c in neurons.top()]
    assert flow.contributions.sum(0).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert flow.n_examples == 4
    kept = run.path("flow.json").read_bytes()
    monkeypatch.setattr(run_views, "head_neuron_flow", None)  # would raise: it is not computed again
    again = run_views.find_flow(model, run, "vqa", FEW, heads, neurons)
    assert run.path("flow.json").read_bytes() == kept and torch.equal(again.contributions, flow.contributions)
