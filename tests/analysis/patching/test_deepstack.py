"""What pictures write behind the first layers, patched and attributed as any other activation."""

from __future__ import annotations

import pytest
import torch
from helpers import random_llava, random_qwen3
from helpers.patching_pairs import cached, effect, model_and_pairs, put

from hones_lens.analysis import attribute_patching, patch_activations
from hones_lens.interventions.corruptions import gaussian_noise, mean_image_token

STACK = [f"blocks.{layer}.hook_deepstack" for layer in range(2)]
WHOLE = (slice(None),)
OPTIONS = {"raw": True, "by_pair": True, "progress": False}


def test_each_layer_is_patched_alone() -> None:
    model, pairs = model_and_pairs(random_qwen3)
    found = patch_activations(
        model, pairs, "deepstack", groups=["image", "last"], direction="noise", **OPTIONS
    )
    assert found.values.shape == (3, 2, 2)
    for layer, name in enumerate(STACK):
        real = effect(model, pairs, "noise", [put(name, cached(model, pairs.corrupted, name), WHOLE)])
        assert real.abs().max() > 0.1
        assert (found.values[:, layer, 0] - real).abs().max() < 1e-4 * real.abs().max().clamp(min=1)
    assert not found.values[:, :, 1].any(), "pictures write at no token of text"


@torch.no_grad()
def test_a_picture_is_what_enters_and_what_it_writes_behind_the_first_layers() -> None:
    model, pairs = model_and_pairs(random_qwen3)
    clean, names = model(pairs.clean), ["blocks.0.hook_resid_pre", *STACK]
    puts = [put(name, cached(model, pairs.clean, name), WHOLE) for name in names]
    restored = model.run_with_hooks(pairs.corrupted, fwd_hooks=puts)
    tokens = pairs.clean.attention_mask.bool()
    assert (restored - clean)[tokens].abs().max() < 1e-4
    for left_out in range(3):
        some = [hook for i, hook in enumerate(puts) if i != left_out]
        assert (model.run_with_hooks(pairs.corrupted, fwd_hooks=some) - clean)[tokens].abs().max() > 1e-2


@pytest.mark.slow
def test_integrated_gradients_are_complete() -> None:
    model, pairs = model_and_pairs(random_qwen3)
    options = {"direction": "noise", "method": "ig", "steps": 40, "by": "all", **OPTIONS}
    found = attribute_patching(model, pairs, "deepstack", **options).values
    for layer, name in enumerate(STACK):
        real = effect(model, pairs, "noise", [put(name, cached(model, pairs.corrupted, name), WHOLE)])
        assert (found[:, layer].flatten() - real).abs().max() < 0.02 * real.abs().max()


def test_models_without_it_say_so() -> None:
    model, pairs = model_and_pairs(random_llava)
    with pytest.raises(ValueError, match=r"no layer of .* has deepstack"):
        patch_activations(model, pairs, "deepstack", progress=False)


def test_corruptions_of_embeddings_are_of_all_parts_each_by_itself() -> None:
    model, pairs = model_and_pairs(random_qwen3)
    assert pairs.clean.image_embeds is not None
    n = int(pairs.clean.image_tokens[0][0])
    before = pairs.clean.image_embeds[:n].unflatten(-1, (3, -1))
    noisy = gaussian_noise(0.5)(model, pairs.clean).image_embeds
    assert noisy is not None
    change = noisy[:n].unflatten(-1, (3, -1)) - before
    spread = change.std((0, 2)) / before.std((0, 2))
    assert spread.tolist() == pytest.approx([0.5] * 3, rel=0.2)
    flat = mean_image_token()(model, pairs.clean).image_embeds
    assert flat is not None
    torch.testing.assert_close(
        flat[:n].unflatten(-1, (3, -1)), before.mean(0, keepdim=True).expand(n, -1, -1)
    )
    with pytest.raises(ValueError, match=r"a mean of shape \(32,\) for embeddings of 96 numbers"):
        mean_image_token(torch.zeros(32))(model, pairs.clean)
