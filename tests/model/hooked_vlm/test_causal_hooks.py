"""Every hook is there, causal, and has gradients; edits in place are edits."""

from __future__ import annotations

import pytest
import torch
from helpers.hooked_pairs import BY_HEAD_PAIR, COSTLY, Pair, identity, noise_hook, trainable
from torch import Tensor

from hones_lens import HookedVLM


def test_the_names_of_the_contract_are_there(model: HookedVLM) -> None:
    block = (
        "hook_resid_pre hook_resid_mid hook_resid_post hook_attn_out hook_mlp_out mlp.hook_pre mlp.hook_post"
    )
    block += " ln1.hook_scale ln1.hook_normalized ln2.hook_scale ln2.hook_normalized"
    attn = "q k v z rot_q rot_k attn_scores pattern result q_input k_input v_input"
    in_block = [*block.split(), *(f"attn.hook_{name}" for name in attn.split())]
    top = "hook_text_embed hook_image_embed hook_embed ln_final.hook_scale ln_final.hook_normalized"
    expected = {*top.split(), "vision_projector.hook_in", "vision_projector.hook_out"}
    expected |= {
        f"blocks.{layer}.{name}" for layer in range(3) for name in [*in_block, "mlp.hook_pre_linear"]
    }
    expected |= {f"vision_encoder.blocks.{layer}.{name}" for layer in range(2) for name in in_block}
    assert expected <= set(model.hook_dict)


def test_every_hook_is_causal_with_and_without_gradients(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    with torch.no_grad():
        clean = model(inputs)
    dead, unequal = [], []
    for name in model.hook_dict:
        edited = [(name, noise_hook())]
        with torch.no_grad():
            without = model.run_with_hooks(inputs, fwd_hooks=edited)
        with_gradients = model.run_with_hooks(inputs, fwd_hooks=edited)
        if pair.difference(without, clean) < 1e-3:
            dead.append(name)
        if pair.difference(without, with_gradients) > 5e-5:
            unequal.append(name)
    assert not dead
    assert not unequal


@pytest.mark.exhaustive
def test_gradients_pass_through_every_hook(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    blocked = []
    for name in model.hook_dict:
        seen: list[Tensor] = []

        def watch(x: Tensor, hook, seen=seen) -> Tensor:
            leaf = x.detach().requires_grad_()
            seen.append(leaf)
            return leaf

        logits = model.run_with_hooks(inputs, fwd_hooks=[(name, watch)])
        (gradient,) = torch.autograd.grad(logits[inputs.attention_mask.bool()].pow(2).sum(), seen)
        if not gradient.isfinite().all() or gradient.abs().max() == 0:
            blocked.append(name)
    assert not blocked


@pytest.mark.exhaustive
def test_identity_hooks_change_nothing(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    with torch.no_grad():
        clean = model(inputs)
        for name in model.hook_dict:
            actual = model.run_with_hooks(inputs, fwd_hooks=[(name, identity)])
            if name.endswith((*BY_HEAD_PAIR, *COSTLY)):  # another kernel, or another order of the sums
                assert pair.difference(actual, clean) <= 5e-5, name
            else:
                assert torch.equal(actual, clean), name


@pytest.mark.exhaustive
def test_an_edit_in_place_is_the_same_edit(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs

    def doubled(x: Tensor, hook) -> Tensor:
        return x * 1.5

    def doubled_in_place(x: Tensor, hook) -> Tensor:
        x *= 1.5
        return x

    with torch.no_grad():
        for name in model.hook_dict:
            returned = model.run_with_hooks(inputs, fwd_hooks=[(name, doubled)])
            in_place = model.run_with_hooks(inputs, fwd_hooks=[(name, doubled_in_place)])
            assert pair.difference(returned, in_place) <= 5e-5, name


IN_PLACE = ["attn.hook_q", "attn.hook_v", "attn.hook_z", "mlp.hook_post", "hook_mlp_out", "hook_resid_pre"]


@pytest.mark.parametrize("name", [f"blocks.1.{name}" for name in IN_PLACE] + ["hook_embed"])
def test_gradients_after_an_edit_in_place(gqa: Pair, name: str) -> None:
    """As TransformerLens's users write it: `z[:, :, head] = 0; return z`."""

    def halved(x: Tensor, hook) -> Tensor:
        mask = torch.ones_like(x)
        mask[:, :, 0] = 0.5
        return x * mask

    def halved_in_place(x: Tensor, hook) -> Tensor:
        x[:, :, 0] *= 0.5
        return x

    weights = [gqa.model.blocks[0].attn.o.weight, gqa.model.blocks[2].mlp.up.weight]
    grads = []
    for hook in (halved, halved_in_place):
        with trainable(*weights):
            logits = gqa.model.run_with_hooks(gqa.inputs, fwd_hooks=[(name, hook)])
            grads.append(torch.autograd.grad(logits[:, -1].pow(2).sum(), weights))
    for returned, in_place in zip(*grads, strict=True):
        torch.testing.assert_close(returned, in_place, atol=1e-4, rtol=1e-4)


def test_an_edit_in_place_leaves_the_callers_tensors_alone(gqa: Pair) -> None:
    def zero(x: Tensor, hook) -> Tensor:
        x.zero_()
        return x

    model = gqa.model
    with torch.no_grad():
        encoded = model.with_image_embeds(gqa.inputs)
        kept = encoded.image_embeds.clone()
        clean = model(encoded)
        model.run_with_hooks(encoded, fwd_hooks=[("hook_image_embed", zero)])
        assert torch.equal(encoded.image_embeds, kept)
        assert torch.equal(model(encoded), clean)
        resid = model(gqa.inputs, stop_at_layer=1)
        before = resid.clone()
        hooks = [("blocks.1.hook_resid_pre", zero)]
        model.run_with_hooks(resid, start_at_layer=1, inputs=gqa.inputs, fwd_hooks=hooks)
        assert torch.equal(resid, before)
        with model.hooks(hooks):
            _, cache = model.run_with_cache(gqa.inputs)
        torch.testing.assert_close(cache["resid_post", 0], before, atol=2e-5, rtol=1e-5)
