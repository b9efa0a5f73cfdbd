"""Contrast vectors against Hugging Face's hidden states, and what they do to the shipped models' answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hf_twin import Twin
from torch import Tensor

from hones_lens import HookedVLM, VLMInputs, counterfactual_pairs, load_task
from hones_lens.analysis.steering_vectors import mean_difference


@pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])
@pytest.mark.parametrize("group", ["last", "image"])
@torch.no_grad()
def test_difference_of_the_means_of_two_sets(made, group: str) -> None:
    both = Twin(made)
    pictures = made.make_images(3) if made is random_llava else made.make_images()
    sets = [
        both.model.prepare(pictures, list(random_llava.QUESTIONS)),
        both.model.prepare(pictures[:1], ["what?"]),
    ]

    def rows(inputs: VLMInputs, layer: int) -> Tensor:
        """Mean over the group's tokens of what enters a layer, [row d_model]."""
        states = both.run(inputs, output_hidden_states=True).hidden_states[layer]
        masks = inputs.token_groups[group]
        return torch.stack([state[mask].mean(0) for state, mask in zip(states, masks, strict=True)])

    for layer, at, enters in ((0, "pre", 0), (0, "post", 1), (1, "post", 2), (2, "pre", 2)):
        found = mean_difference(both.model, sets[0], sets[1], layer, group, at=at, batch_size=2)
        first, second = (rows(inputs, enters) for inputs in sets)
        assert torch.allclose(found.vector, first.mean(0) - second.mean(0), atol=1e-5)
        assert found.n == (3, 1)
        spread = (((first - first.mean(0)) ** 2).sum() / 4).sqrt()
        assert found.spread == pytest.approx(float(spread), abs=1e-5)
        assert found.norm == pytest.approx(float(found.vector.pow(2).sum().sqrt()))
    back = mean_difference(both.model, sets[1], sets[0], 2, group, at="pre")
    assert torch.allclose(back.vector, -found.vector, atol=1e-5)
    assert f"blocks.2.hook_resid_pre, token group {group}: length" in str(back)


def test_the_hook_adds_the_vector_where_it_was_measured() -> None:
    both = Twin(random_llava)
    inputs = both.model.prepare(random_llava.make_images(3), list(random_llava.QUESTIONS))
    found = mean_difference(both.model, inputs[:2], inputs[2], 1, "last", at="mid")
    for hook, group, factor in (
        (found.hook(inputs=inputs, strength=2.0), "last", 2.0),
        (found.hook("image", inputs=inputs), "image", 1.0),
    ):
        where = inputs.token_groups[group][..., None]
        steps = both.edit(1, "hook_resid_mid", lambda x, w=where, f=factor: x + w * f * found.vector)
        with torch.no_grad():
            logits = both.model.run_with_hooks(inputs, fwd_hooks=[hook])
        assert random_llava.largest_difference(logits, both.logits(inputs, steps), inputs) < 1e-4


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_from_blue_to_red(name: str) -> None:
    """Red minus blue, learned on other scenes, makes the answer red; a random vector as long does not."""
    model, task = HookedVLM.from_pretrained(name), load_task("vqa")

    def asked(split: str, answer: str, n: int) -> VLMInputs:
        pairs = counterfactual_pairs("vqa", "color", split, limit=60)
        both = [(e, said) for p in pairs for e, said in zip((p.clean, p.corrupted), p.answers, strict=True)]
        chosen = [e for e, said in both if said == answer][:n]
        assert len(chosen) == n
        return model.prepare([e.image for e in chosen], [task.target_prompt(e) for e in chosen])

    red, blue, other = asked("discovery", "red", 12), asked("discovery", "blue", 12), asked("dev", "blue", 12)
    found = mean_difference(model, red, blue, layer=2)

    def said(vector: Tensor) -> list[str]:
        hook = replace(found, vector=vector).hook(inputs=other, strength=2.0)
        with model.hooks(fwd_hooks=[hook]):
            return model.generate(other)

    assert model.generate(other).count("blue") >= 11
    assert said(found.vector).count("red") >= 11
    noise = torch.randn(found.vector.shape)
    assert said(noise / noise.norm() * found.norm).count("red") <= 2


def test_bad_input_raises() -> None:
    both = Twin(random_llava)
    inputs = random_llava.mixed_batch(both.model)
    with pytest.raises(ValueError, match="layer 3 is not in 0 … 2"):
        mean_difference(both.model, inputs, inputs, 3)
    with pytest.raises(ValueError, match="valid: pre, mid, post"):
        mean_difference(both.model, inputs, inputs, 0, at="top")
    with pytest.raises(ValueError, match="'image' is empty in row 2"):
        mean_difference(both.model, inputs, inputs, 0, "image")
