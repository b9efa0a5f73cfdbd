"""Hooks against each other: what one does follows from what another does."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers import random_llava
from helpers.hooked_pairs import Pair
from torch import Tensor

from hones_lens import HookedVLM, VLMInputs

# -- hooks against each other --------------------------------------------------------------------


def both(model: HookedVLM, inputs: VLMInputs, first: str, second: str, edit: Tensor) -> tuple[Tensor, Tensor]:
    def add(x: Tensor, hook) -> Tensor:
        return x + edit

    with torch.no_grad():
        return tuple(model.run_with_hooks(inputs, fwd_hooks=[(name, add)]) for name in (first, second))


@pytest.mark.parametrize("prefix", ["", "vision_encoder."])
@pytest.mark.parametrize("grad", [False, True])
def test_resid_mid_reaches_the_skip_path(gqa: Pair, prefix: str, grad: bool) -> None:
    d = gqa.model.cfg.vision.d_model if prefix else gqa.model.cfg.d_model
    edit = torch.randn(d)

    def add(x: Tensor, hook) -> Tensor:
        return x + edit

    with nullcontext() if grad else torch.no_grad():
        for layer in range(2):
            block = f"{prefix}blocks.{layer}"
            mid = gqa.model.run_with_hooks(gqa.inputs, fwd_hooks=[(f"{block}.hook_resid_mid", add)])
            out = gqa.model.run_with_hooks(gqa.inputs, fwd_hooks=[(f"{block}.hook_attn_out", add)])
            assert gqa.difference(mid, out) <= 5e-5


def test_resid_post_is_the_next_resid_pre(gqa: Pair) -> None:
    for layer in range(2):
        names = (f"blocks.{layer}.hook_resid_post", f"blocks.{layer + 1}.hook_resid_pre")
        post, pre = both(gqa.model, gqa.inputs, *names, torch.randn(32))
        assert torch.equal(post, pre)
    _, cache = gqa.model.run_with_cache(gqa.inputs)
    for layer in range(2):
        assert torch.equal(cache["resid_post", layer], cache["resid_pre", layer + 1])
    assert torch.equal(cache["hook_embed"], cache["resid_pre", 0])


def test_image_embed_is_the_projectors_output_merged_in(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs
    _, cache = model.run_with_cache(inputs)
    assert torch.equal(cache["hook_image_embed"], cache["vision_projector.hook_out"])
    mask = inputs.image_mask
    assert torch.equal(cache["hook_embed"][mask], cache["hook_image_embed"].flatten(0, 1))
    assert torch.equal(cache["hook_embed"][~mask], cache["hook_text_embed"][~mask])


def test_scores_and_pattern(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    tokens = inputs.attention_mask.bool()
    _, cache = model.run_with_cache(inputs)
    n = inputs.input_ids.shape[1]
    for layer, block in enumerate(model.blocks):
        scores, pattern = cache["attn_scores", layer], cache["pattern", layer]
        groups = model.cfg.n_heads // model.cfg.n_key_value_heads
        for row, head, query, key in [(0, 0, n - 1, n - 2), (1, 3, n - 3, 5), (2, 2, n - 1, n - 5)]:
            q = cache["rot_q", layer][row, query, head]
            k = cache["rot_k", layer][row, key, head // groups]
            allowed = bool(tokens[row, key])
            expected = q @ k / block.attn.d_head**0.5 if allowed else torch.tensor(-torch.inf)
            torch.testing.assert_close(scores[row, head, query, key], expected)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1) | ~tokens[:, None, None]
        where = tokens[:, None, :, None].expand_as(scores)
        assert (scores.isneginf() == hidden.expand_as(scores))[where].all()
        torch.testing.assert_close(scores.softmax(-1), pattern)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:3]))
        values = cache["v", layer].repeat_interleave(groups, dim=2)
        torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, values), cache["z", layer])


def test_an_edited_pattern_is_what_mixes_the_values(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs
    new = torch.rand(3, 4, inputs.input_ids.shape[1], inputs.input_ids.shape[1])
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook) -> None:
        seen[hook.name] = x

    hooks = [
        ("blocks.1.attn.hook_pattern", lambda x, hook: new),
        ("blocks.1.attn.hook_v", keep),
        ("blocks.1.attn.hook_z", keep),
    ]
    model.run_with_hooks(inputs, fwd_hooks=hooks)
    values = seen["blocks.1.attn.hook_v"].repeat_interleave(2, dim=2)
    expected = torch.einsum("bhqk,bkhd->bqhd", new, values)
    torch.testing.assert_close(seen["blocks.1.attn.hook_z"], expected)


def test_an_edited_score_is_an_edited_pattern(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs

    def score(x: Tensor, hook) -> Tensor:
        x[:, 2, :, -8:-4] += 1.5
        return x

    def pattern(x: Tensor, hook) -> Tensor:
        x[:, 2, :, -8:-4] *= torch.tensor(1.5).exp()
        return x / x.sum(-1, keepdim=True)

    with torch.no_grad():
        by_score = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_attn_scores", score)])
        by_pattern = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_pattern", pattern)])
    assert gqa.difference(by_score, by_pattern) <= 5e-5


@pytest.mark.parametrize("prefix", ["", "vision_encoder."])
def test_head_results_sum_to_attn_out(gqa: Pair, prefix: str) -> None:
    names = [f"{prefix}blocks.1.attn.hook_{name}" for name in ("z", "result")]
    out_name = f"{prefix}blocks.1.hook_attn_out"
    _, cache = gqa.model.run_with_cache(gqa.inputs, names_filter=[*names, out_name])
    attn = gqa.model.get_submodule(f"{prefix}blocks.1.attn")
    total = cache[names[1]].sum(-2) + attn.b_O
    torch.testing.assert_close(total, cache[out_name], atol=2e-5, rtol=1e-5)
    weight = attn.o.weight[:, 2 * attn.d_head : 3 * attn.d_head]
    torch.testing.assert_close(cache[names[1]][:, :, 2], cache[names[0]][:, :, 2] @ weight.T)


def test_zeroing_a_heads_result_is_zeroing_its_z(gqa: Pair) -> None:
    def zero(x: Tensor, hook) -> Tensor:
        x = x.clone()
        x[:, :, 1] = 0
        return x

    with torch.no_grad():
        for prefix in ("blocks.0", "vision_encoder.blocks.0"):
            z, result = (
                gqa.model.run_with_hooks(gqa.inputs, fwd_hooks=[(f"{prefix}.attn.hook_{name}", zero)])
                for name in ("z", "result")
            )
            assert gqa.difference(z, result) <= 5e-5


def test_rotated_query_is_the_query_rotated_by_its_position(gqa: Pair) -> None:
    _, cache = gqa.model.run_with_cache(gqa.inputs)
    half = gqa.model.cfg.d_head // 2
    row, n = 2, int(gqa.inputs.attention_mask[2].sum())
    for before, after in (("q", "rot_q"), ("k", "rot_k")):
        x, turned = cache[before, 1][row, -n:], cache[after, 1][row, -n:]
        angles = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        as_complex = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(1)
        expected = torch.cat((as_complex.real, as_complex.imag), dim=-1)
        torch.testing.assert_close(turned, expected, atol=2e-5, rtol=1e-5)


# -- split inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_a_split_input_feeds_one_head_alone(gqa: Pair, letter: str) -> None:
    model, inputs = gqa.model, gqa.inputs
    name, edit = f"blocks.1.attn.hook_{letter}_input", torch.randn(32)
    seen: dict[str, Tensor] = {}

    def add(x: Tensor, hook) -> Tensor:
        assert x.shape[2:] == ((4, 32) if letter == "q" else (2, 32))
        x[:, :, 1] += edit
        return x

    def keep(x: Tensor, hook) -> None:
        seen[hook.name] = x

    _, clean = model.run_with_cache(inputs)
    watched = [(f"blocks.1.attn.hook_{other}", keep) for other in "qkv"]
    with torch.no_grad():
        model.run_with_hooks(inputs, fwd_hooks=[(name, add), *watched])
    for other in "qkv":
        before, after = clean[other, 1].clone(), seen[f"blocks.1.attn.hook_{other}"]
        if other == letter:
            resid = clean["resid_pre", 1] + edit
            scale = (resid.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
            weight = getattr(model, f"W_{letter.upper()}")[1, 1]
            before[:, :, 1] = (resid / scale * model.blocks[1].ln1.weight) @ weight
        torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-5)


def test_split_inputs_change_neither_logits_nor_gradients(gqa: Pair) -> None:
    model = gqa.model
    answered = random_llava.mixed_batch(model, ["red", "two", "no"])
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    loss, cache = model.run_with_cache(answered, names_filter=names, incl_bwd=True, return_type="loss")
    split_names = [f"blocks.1.attn.hook_{letter}_input" for letter in "qkv"]
    try:
        model.set_use_split_qkv_input(True)
        assert model.cfg.use_split_qkv_input
        with_split, split = model.run_with_cache(
            answered, names_filter=[*names, *split_names], incl_bwd=True, return_type="loss"
        )
        assert set(split_names) <= set(model.run_with_cache(answered)[1])
    finally:
        model.set_use_split_qkv_input(False)
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(with_split, loss)
    for name in names:
        torch.testing.assert_close(split[f"{name}_grad"], cache[f"{name}_grad"], atol=1e-5, rtol=1e-4)
    # What reaches the block's input flows over the heads' own inputs and the skip path.
    to_heads = sum(split[f"{name}_grad"].sum(2) for name in split_names)
    mid_name = "blocks.1.hook_resid_mid"
    _, mid = model.run_with_cache(answered, names_filter=[mid_name], incl_bwd=True, return_type="loss")
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(
        to_heads + mid[f"{mid_name}_grad"], cache[f"{names[1]}_grad"], atol=1e-5, rtol=1e-4
    )
