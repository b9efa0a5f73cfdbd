"""Edits at hooks against forward hooks on Hugging Face's modules."""

from __future__ import annotations

import pytest
import torch
from helpers.hooked_pairs import Pair, hf_edited
from torch import Tensor

# Our hook → Hugging Face's module, and whether the hook is at its output or its input.
DECODER_SITES = {
    "attn.hook_q": ("self_attn.q_proj", "output"),
    "attn.hook_k": ("self_attn.k_proj", "output"),
    "attn.hook_v": ("self_attn.v_proj", "output"),
    "attn.hook_z": ("self_attn.o_proj", "input"),
    "hook_attn_out": ("self_attn.o_proj", "output"),
    "hook_resid_pre": ("", "input"),
    "hook_resid_post": ("", "output"),
    "mlp.hook_pre": ("mlp.gate_proj", "output"),
    "mlp.hook_pre_linear": ("mlp.up_proj", "output"),
    "mlp.hook_post": ("mlp.down_proj", "input"),
    "hook_mlp_out": ("mlp.down_proj", "output"),
}
VISION_SITES = {
    "attn.hook_q": ("self_attn.q_proj", "output"),
    "attn.hook_k": ("self_attn.k_proj", "output"),
    "attn.hook_v": ("self_attn.v_proj", "output"),
    "attn.hook_z": ("self_attn.out_proj", "input"),
    "hook_attn_out": ("self_attn.out_proj", "output"),
    # Hugging Face keeps hidden states before a hook on the layer sees them; the sum's last term will do.
    "hook_resid_post": ("mlp.fc2", "output"),
    "mlp.hook_pre": ("mlp.fc1", "output"),
    "mlp.hook_post": ("mlp.fc2", "input"),
    "hook_mlp_out": ("mlp.fc2", "output"),
}
OTHER_SITES = {
    "hook_text_embed": ("model.language_model.embed_tokens", "output"),
    "hook_image_embed": ("model.multi_modal_projector", "output"),
    "vision_projector.hook_in": ("model.multi_modal_projector", "input"),
    "vision_projector.hook_out": ("model.multi_modal_projector", "output"),
    "vision_encoder.hook_embed": ("model.vision_tower.pre_layrnorm", "input"),
}


def check_against_hf(pair: Pair, name: str, path: str, where: str) -> None:
    """The same noise, by our hook and by a hook of Hugging Face's module."""
    noise: dict[str, Tensor] = {}

    def ours(x: Tensor, hook) -> Tensor:
        noise["it"] = 0.5 * torch.randn(x.shape)
        return x + noise["it"]

    with torch.no_grad():
        clean = pair.model(pair.inputs)
        found = pair.model.run_with_hooks(pair.inputs, fwd_hooks=[(name, ours)])
        with hf_edited(pair.hf, path, where, lambda x: x + noise["it"].reshape(x.shape)):
            expected = pair.hf(**pair.inputs.to_hf()).logits
    assert pair.difference(found, expected) <= 5e-5, name
    assert pair.difference(clean, expected) >= 1e-3, name


@pytest.mark.parametrize("name", DECODER_SITES)
def test_decoder_edits_are_those_of_hf(pair: Pair, name: str) -> None:
    path, where = DECODER_SITES[name]
    for layer in range(2):
        module = f"model.language_model.layers.{layer}.{path}".rstrip(".")
        check_against_hf(pair, f"blocks.{layer}.{name}", module, where)


@pytest.mark.parametrize("name", VISION_SITES)
def test_vision_edits_are_those_of_hf(llava: Pair, name: str) -> None:
    path, where = VISION_SITES[name]
    for layer in range(2):
        module = f"model.vision_tower.encoder.layers.{layer}.{path}".rstrip(".")
        check_against_hf(llava, f"vision_encoder.blocks.{layer}.{name}", module, where)


@pytest.mark.parametrize("name", OTHER_SITES)
def test_embedding_edits_are_those_of_hf(llava: Pair, name: str) -> None:
    check_against_hf(llava, name, *OTHER_SITES[name])


NORMS = {
    "blocks.1.ln1": "model.language_model.layers.1.input_layernorm",
    "blocks.1.ln2": "model.language_model.layers.1.post_attention_layernorm",
    "ln_final": "model.language_model.norm",
    "vision_encoder.ln_pre": "model.vision_tower.pre_layrnorm",
    "vision_encoder.blocks.0.ln1": "model.vision_tower.encoder.layers.0.layer_norm1",
    "vision_encoder.blocks.1.ln2": "model.vision_tower.encoder.layers.1.layer_norm2",
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_edits_are_those_of_hf(llava: Pair, name: str) -> None:
    """normalized is before the weight; a scale twice as large halves what is normalised."""
    module = llava.hf.get_submodule(NORMS[name])
    bias = getattr(module, "bias", torch.zeros(()))
    factor = 2.0

    def larger(x: Tensor, hook) -> Tensor:
        return x * factor

    def moved(x: Tensor, hook) -> Tensor:
        return x + 1

    edits = {
        f"{name}.hook_scale": (larger, lambda out: (out - bias) / factor + bias),
        f"{name}.hook_normalized": (moved, lambda out: out + module.weight),
    }
    for hook_name, (ours, theirs) in edits.items():
        with torch.no_grad():
            found = llava.model.run_with_hooks(llava.inputs, fwd_hooks=[(hook_name, ours)])
            with hf_edited(llava.hf, NORMS[name], "output", theirs):
                expected = llava.hf(**llava.inputs.to_hf()).logits
        assert llava.difference(found, expected) <= 5e-5, hook_name


def test_the_pattern_is_that_of_hf(gqa: Pair) -> None:
    gqa.hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            theirs = gqa.hf(**gqa.inputs.to_hf(), output_attentions=True).attentions
    finally:
        gqa.hf.set_attn_implementation("sdpa")
    _, cache = gqa.model.run_with_cache(gqa.inputs)
    tokens = gqa.inputs.attention_mask.bool()
    for layer in range(3):
        difference = (cache["pattern", layer] - theirs[layer]).transpose(1, 2)[tokens]
        assert difference.abs().max() <= 2e-5
