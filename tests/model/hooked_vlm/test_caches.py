"""What caches hold, their shapes and filters, and gradients in them."""

from __future__ import annotations

import pytest
import torch
from helpers import random_llava
from helpers.hooked_pairs import BY_HEAD_PAIR, COSTLY, Pair, hf_edited
from torch import Tensor

from hones_lens import HookedVLM, VLMInputs


def test_the_unfiltered_cache_holds_all_but_the_costly(pair: Pair) -> None:
    logits, cache = pair.model.run_with_cache(pair.inputs)
    pairs_of_patches = {
        f"vision_encoder.blocks.{layer}.attn.{name}" for layer in range(9) for name in BY_HEAD_PAIR
    }
    expected = {name for name in pair.model.hook_dict if not name.endswith(COSTLY)} - pairs_of_patches
    assert set(cache) == expected
    assert not any(value.requires_grad for value in cache.values())
    assert pair.difference(logits, pair.model(pair.inputs)) <= 5e-5


def test_shapes(gqa: Pair) -> None:
    _, cache = gqa.model.run_with_cache(gqa.inputs)
    _, costly = gqa.model.run_with_cache(gqa.inputs, names_filter=lambda name: name.endswith(COSTLY))
    n, images = gqa.inputs.input_ids.shape[1], 3
    by_pair = "vision_encoder.blocks.1.attn.hook_pattern"
    _, patterns = gqa.model.run_with_cache(gqa.inputs, names_filter=by_pair)
    assert patterns[by_pair].shape == (images, 3, 17, 17)
    decoder = {
        "attn.hook_q": (3, n, 4, 8),
        "attn.hook_k": (3, n, 2, 8),
        "attn.hook_v": (3, n, 2, 8),
        "attn.hook_rot_q": (3, n, 4, 8),
        "attn.hook_rot_k": (3, n, 2, 8),
        "attn.hook_attn_scores": (3, 4, n, n),
        "attn.hook_pattern": (3, 4, n, n),
        "attn.hook_z": (3, n, 4, 8),
        "hook_attn_out": (3, n, 32),
        "hook_resid_mid": (3, n, 32),
        "mlp.hook_pre": (3, n, 40),
        "mlp.hook_pre_linear": (3, n, 40),
        "mlp.hook_post": (3, n, 40),
        "ln1.hook_scale": (3, n, 1),
        "ln2.hook_normalized": (3, n, 32),
    }
    vision = {
        "attn.hook_q": (images, 17, 3, 8),
        "mlp.hook_post": (images, 17, 36),
        "hook_resid_post": (images, 17, 24),
    }
    assert (
        costly["blocks.2.attn.hook_result"].shape
        == costly["blocks.2.attn.hook_q_input"].shape
        == (3, n, 4, 32)
    )
    assert (
        costly["blocks.2.attn.hook_k_input"].shape
        == costly["blocks.2.attn.hook_v_input"].shape
        == (3, n, 2, 32)
    )
    assert costly["vision_encoder.blocks.1.attn.hook_result"].shape == (images, 17, 3, 24)
    for name, shape in decoder.items():
        assert cache[f"blocks.2.{name}"].shape == shape, name
    for name, shape in vision.items():
        assert cache[f"vision_encoder.blocks.1.{name}"].shape == shape, name
    assert cache["vision_projector.hook_in"].shape == (images, 16, 48)
    assert cache["hook_image_embed"].shape == (images, 16, 32)


def test_filters(model: HookedVLM, inputs: VLMInputs) -> None:
    z = "blocks.1.attn.hook_z"
    _, everything = model.run_with_cache(inputs)
    _, one = model.run_with_cache(inputs, names_filter=z)
    _, two = model.run_with_cache(inputs, names_filter=[z, "hook_image_embed"])
    _, some = model.run_with_cache(inputs, names_filter=lambda name: name.endswith("attn.hook_z"))
    assert set(one) == {z}
    assert set(two) == {z, "hook_image_embed"}
    places = [f"blocks.{i}" for i in range(3)] + [f"vision_encoder.blocks.{i}" for i in range(2)]
    assert set(some) == {f"{place}.attn.hook_z" for place in places}
    for cache in (one, two, some):
        torch.testing.assert_close(cache[z], everything[z], atol=5e-5, rtol=1e-5)
    assert not model.list_hooks()


def test_the_cache_of_text_alone_has_no_vision(model: HookedVLM) -> None:
    _, cache = model.run_with_cache(model.prepare(None, "is it red?"))
    assert not [name for name in cache if "vision" in name or "image" in name]
    assert "blocks.2.hook_resid_post" in cache


def test_nothing_is_computed_that_nobody_asked_for(model: HookedVLM, inputs: VLMInputs) -> None:
    ran: set[str] = set()
    handles = [
        point.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, point in model.hook_dict.items()
    ]
    try:
        model.run_with_cache(inputs, names_filter="blocks.1.attn.hook_pattern")
    finally:
        for handle in handles:
            handle.remove()
    costly = {name for name in ran if name.endswith((*COSTLY, *BY_HEAD_PAIR))}
    assert costly == {"blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"}


@pytest.mark.parametrize("cut", [-1, (2, 9), [0, 3, -2], slice(None, None, 5)])
def test_pos_slice(gqa: Pair, cut) -> None:
    model, inputs = gqa.model, gqa.inputs
    _, whole = model.run_with_cache(inputs)
    _, part = model.run_with_cache(inputs, pos_slice=cut)
    index = [cut] if isinstance(cut, int) else slice(*cut) if isinstance(cut, tuple) else cut
    for name in whole:
        if name.startswith("vision") or name == "hook_image_embed":
            expected = whole[name]
        elif name.endswith(BY_HEAD_PAIR):
            expected = whole[name][:, :, index]
        else:
            expected = whole[name][:, index]
        assert torch.equal(part[name], expected), name


def test_remove_batch_dim(model: HookedVLM, inputs: VLMInputs) -> None:
    one = inputs[0]
    _, with_batch = model.run_with_cache(one)
    _, without = model.run_with_cache(one, remove_batch_dim=True)
    assert with_batch.has_batch_dim and not without.has_batch_dim
    for name in with_batch:
        assert torch.equal(without[name], with_batch[name][0]), name
    with pytest.raises(ValueError, match=r"can't remove the batch axis of \S+: its size is 3"):
        model.run_with_cache(inputs, remove_batch_dim=True)
    assert not model.list_hooks()


def test_remove_batch_dim_of_a_row_with_two_images(model: HookedVLM, inputs: VLMInputs) -> None:
    two = inputs[1]
    _, with_batch = model.run_with_cache(two)
    _, without = model.run_with_cache(two, remove_batch_dim=True)
    for name in with_batch:
        by_image = name.startswith("vision") or name == "hook_image_embed"
        assert torch.equal(without[name], with_batch[name] if by_image else with_batch[name][0]), name


def test_cached_values_are_those_after_the_hooks(model: HookedVLM, inputs: VLMInputs) -> None:
    name = "blocks.1.hook_mlp_out"
    with model.hooks([(name, lambda x, hook: torch.zeros_like(x))]):
        _, cache = model.run_with_cache(inputs)
    assert (cache[name] == 0).all()
    assert torch.equal(cache["resid_post", 1], cache["resid_mid", 1])


def test_cached_gradients_are_those_of_autograd(gqa: Pair) -> None:
    """Against Hugging Face's loss and its modules, by gradients of tensors that autograd keeps."""
    answered = random_llava.mixed_batch(gqa.model, ["red", "two", "no"])
    sites = {
        "blocks.0.hook_resid_pre": ("model.language_model.layers.0", "input"),
        "blocks.1.attn.hook_z": ("model.language_model.layers.1.self_attn.o_proj", "input"),
        "blocks.2.mlp.hook_post": ("model.language_model.layers.2.mlp.down_proj", "input"),
        "vision_encoder.blocks.0.mlp.hook_post": ("model.vision_tower.encoder.layers.0.mlp.fc2", "input"),
        "hook_image_embed": ("model.multi_modal_projector", "output"),
    }
    loss, cache = gqa.model.run_with_cache(
        answered, names_filter=list(sites), incl_bwd=True, return_type="loss"
    )
    gqa.model.zero_grad(set_to_none=True)
    labels = answered.input_ids.masked_fill(~answered.answer_mask, -100)
    for name, (path, where) in sites.items():
        kept: list[Tensor] = []

        def keep(x: Tensor, kept=kept) -> Tensor:
            kept.append(x)
            return x

        with hf_edited(gqa.hf, path, where, keep):
            their_loss = gqa.hf(**answered.to_hf(), labels=labels).loss
        torch.testing.assert_close(loss, their_loss)
        (expected,) = torch.autograd.grad(their_loss, kept)
        actual = cache[f"{name}_grad"]
        torch.testing.assert_close(actual.reshape(expected.shape), expected, atol=1e-5, rtol=1e-3)
        assert expected.abs().max() > 1e-4


def test_every_gradient_can_be_cached(pair: Pair) -> None:
    answered = pair.answered
    _, cache = pair.model.run_with_cache(answered, incl_bwd=True, return_type="loss")
    pair.model.zero_grad(set_to_none=True)
    names = [name for name in cache if not name.endswith("_grad")]
    assert {f"{name}_grad" for name in names} < set(cache)
    for name in names:
        assert cache[f"{name}_grad"].shape == cache[name].shape, name


def test_a_gradient_edited_on_its_way(gqa: Pair) -> None:
    """A backward hook that stops the gradient at one block leaves the embedding without any."""
    answered = random_llava.mixed_batch(gqa.model, ["red", "two", "no"])
    grads: list[Tensor] = []
    hooks = [
        ("blocks.1.hook_resid_pre", lambda grad, hook: torch.zeros_like(grad)),
        ("blocks.0.hook_resid_pre", lambda grad, hook: grads.append(grad)),
    ]
    with gqa.model.hooks(bwd_hooks=hooks):
        gqa.model(answered, return_type="loss").backward()
    gqa.model.zero_grad(set_to_none=True)
    assert len(grads) == 1 and (grads[0] == 0).all()
    assert not gqa.model.list_hooks()
