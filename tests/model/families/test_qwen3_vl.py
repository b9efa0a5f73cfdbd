"""What is Qwen3-VL's own: DeepStack, QK-norm, positions between learned ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import random_qwen
from helpers.hooked_pairs import hf_edited
from helpers.random_llava import largest_difference
from PIL import Image
from torch import Tensor

from hones_lens import VLMInputs
from hones_lens.analysis import direct_logit_attribution
from hones_lens.model import AttentionContext
from hones_lens.model.families import load_family
from hones_lens.model.nn.patch_tower import grid_positions
from hones_lens.model.nn.patches import PatchLayout

STACK = [f"blocks.{layer}.hook_deepstack" for layer in range(2)]


class Pair:
    def __init__(self) -> None:
        self.hf, self.model = random_qwen.make_pair(random_qwen.make_config(kind="qwen3_vl"), 5)
        self.inputs = random_qwen.mixed_batch(self.model)

    def hf_logits(self, inputs: VLMInputs) -> Tensor:
        self.hf.model.rope_deltas = None
        return self.hf(**inputs.to_hf()).logits


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def times(factor: float) -> Any:
    return lambda x, hook: factor * x


# -- DeepStack ---------------------------------------------------------------------------------------


def test_each_layer_gets_its_own_features_at_image_tokens(pair: Pair) -> None:
    written: list[Tensor] = []
    mergers = pair.hf.model.visual.deepstack_merger_list
    handles = [m.register_forward_hook(lambda _, args, out: written.append(out)) for m in mergers]
    pair.hf_logits(pair.inputs)
    for handle in handles:
        handle.remove()
    _, cache = pair.model.run_with_cache(pair.inputs)
    assert [name for name in cache if name.endswith("deepstack")] == STACK
    mask = pair.inputs.image_mask
    for name, expected in zip(STACK, written, strict=True):
        torch.testing.assert_close(cache[name][mask], expected, atol=1e-5, rtol=1e-5)
        assert not cache[name][~mask].any()
    assert not torch.allclose(*written)
    assert not torch.allclose(cache["hook_image_embed"], written[0])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_an_edit_there_is_that_of_the_merger(pair: Pair, layer: int, factor: float) -> None:
    found = pair.model.run_with_hooks(pair.inputs, fwd_hooks=[(STACK[layer], times(factor))])
    with hf_edited(pair.hf, f"model.visual.deepstack_merger_list.{layer}", "output", lambda x: factor * x):
        expected = pair.hf_logits(pair.inputs)
    assert largest_difference(found, expected, pair.inputs) <= 1e-4
    assert largest_difference(found, pair.model(pair.inputs), pair.inputs) > 1e-2
    name = f"vision_projector.deepstack.{layer}.hook_out"
    assert torch.equal(pair.model.run_with_hooks(pair.inputs, fwd_hooks=[(name, times(factor))]), found)


def test_pictures_that_were_encoded_before_carry_all_parts(pair: Pair) -> None:
    encoded, clean = pair.model.with_image_embeds(pair.inputs), pair.model(pair.inputs)
    assert encoded.image_embeds is not None and encoded.image_embeds.shape[1] == 3 * pair.model.cfg.d_model
    assert torch.equal(pair.model(encoded), clean)
    with pytest.raises(RuntimeError, match="the vision tower did not run"):
        pair.model.run_with_hooks(encoded, fwd_hooks=[("vision_encoder.hook_embed", times(2))])
    rows = [1, 0, 1]
    assert largest_difference(pair.model(encoded[rows]), clean[rows], encoded[rows]) <= 1e-4
    text = pair.model(encoded[2])
    assert largest_difference(text, clean[2:], encoded[2]) <= 1e-4


def test_layers_that_read_pictures_need_them_and_no_others(pair: Pair) -> None:
    model, n = pair.model, pair.model.cfg.n_layers
    full, ran = model(pair.inputs), list[int]()
    for layer in range(n + 1):
        resid = model(pair.inputs, stop_at_layer=layer)
        handle = model.vision_encoder.register_forward_hook(lambda *_, at=layer: ran.append(at))
        assert torch.equal(model(resid, start_at_layer=layer, inputs=pair.inputs), full)
        handle.remove()
    assert ran == [0, 1]
    blank = replace(pair.inputs, pixel_values=torch.zeros_like(pair.inputs.pixel_values))
    resid = model(pair.inputs, stop_at_layer=1)
    assert not torch.allclose(model(resid, start_at_layer=1, inputs=blank), full)


def test_the_hooks_run_on_text_and_at_every_new_token(pair: Pair) -> None:
    text = pair.model.prepare(None, ["how many?", "what?"])
    _, cache = pair.model.run_with_cache(text, names_filter=STACK)
    assert all(not cache[name].any() for name in STACK)
    add: Any = lambda x, hook: x + torch.linspace(-3, 3, x.shape[-1])  # noqa: E731
    for inputs in (text, pair.inputs):
        said: list[Tensor] = []
        for use_kv_cache in (True, False):
            with pair.model.hooks(fwd_hooks=[(name, add) for name in STACK]):
                said.append(pair.model.generate(inputs, 6, "tokens", use_kv_cache=use_kv_cache))
        assert torch.equal(*said)
        assert not torch.equal(said[0], pair.model.generate(inputs, 6, "tokens"))


def test_what_a_context_tells_is_enough_from_every_layer_on(pair: Pair) -> None:
    """As steering keeps clean activations: a stream, and the tensors of what blocks read besides it."""
    model = pair.model
    resid, context = model.enter(pair.inputs)
    full = model(pair.inputs, stop_at_layer=model.cfg.n_layers)
    for layer in range(model.cfg.n_layers):
        tensors = context.from_layer(layer).tensors()
        assert ("deepstack" in tensors) == (layer < 2)
        told = AttentionContext.of_tensors(tensors)
        assert torch.equal(model.run_blocks(resid, told, layer), full)
        rows = told[[1, 1]].masked(pair.inputs.attention_mask[[1, 1]].bool(), resid.shape[1]).repeated(2)
        repeated = model.run_blocks(resid[[1, 1, 1, 1]], rows, layer)
        torch.testing.assert_close(repeated, full[[1] * 4], atol=1e-4, rtol=1e-4)
        resid = model.run_blocks(resid, context, layer, layer + 1)


def test_decompositions_add_up_in_every_layer(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    _, cache = model.run_with_cache(inputs)
    for layer in range(model.cfg.n_layers + 1):
        last = "blocks.2.hook_resid_post"
        stream = cache[f"blocks.{layer}.hook_resid_pre" if layer < model.cfg.n_layers else last]
        parts, labels = cache.decompose_resid(layer, return_labels=True)
        torch.testing.assert_close(parts.sum(0), stream, atol=1e-4, rtol=1e-4)
        stacked = [f"{n}_deepstack" for n in range(min(layer, 2))]
        assert [name for name in labels if "deepstack" in name] == stacked
        for neurons in (True, False):
            whole, names = cache.get_full_resid_decomposition(
                layer, expand_neurons=neurons, return_labels=True
            )
            torch.testing.assert_close(whole.sum(0), stream, atol=1e-4, rtol=1e-4)
            assert len(names) == len(whole) and set(stacked) <= set(names)
        if layer < model.cfg.n_layers:
            mid = cache.decompose_resid(layer, mlp_input=True).sum(0)
            torch.testing.assert_close(mid, cache["resid_mid", layer], atol=1e-4, rtol=1e-4)
    _, labels = cache.decompose_resid(return_labels=True)
    assert labels[:5] == ["embed", "0_attn_out", "0_mlp_out", "0_deepstack", "1_attn_out"]
    parts, labels = cache.decompose_resid(1, mode="mlp", incl_embeds=False, return_labels=True)
    assert labels == ["0_mlp_out"]


def test_parts_over_the_norm_add_up_to_the_logit(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    logits, cache = model.run_with_cache(inputs)
    at = int(inputs.image_mask[0].nonzero()[-1])
    direction = model.tokens_to_residual_directions(7)
    expected = logits[:, at, 7]
    for expand in (True, False):
        whole = cache.get_full_resid_decomposition(apply_ln=True, pos_slice=at, expand_neurons=expand)
        torch.testing.assert_close((whole @ direction).sum(0), expected, atol=1e-3, rtol=1e-4)
    projected, names = cache.get_full_resid_decomposition(
        apply_ln=True, pos_slice=at, project_output_onto=direction, return_labels=True
    )
    torch.testing.assert_close(projected.sum(0), expected, atol=1e-3, rtol=1e-4)
    part = cache[STACK[1]][:, at] / cache["ln_final.hook_scale"][:, at] @ direction
    torch.testing.assert_close(projected[names.index("1_deepstack")], part, atol=1e-5, rtol=1e-4)
    names = [name for name in cache if not name.endswith("deepstack")]
    incomplete = model.run_with_cache(inputs, names_filter=names)[1]
    with pytest.raises(KeyError, match="hook_deepstack"):
        incomplete.decompose_resid()


def test_direct_logit_attribution_has_what_pictures_write(pair: Pair) -> None:
    row = pair.inputs[0].without_padding()
    logits = pair.model(row)[0, row.image_mask[0], 7]
    result = direct_logit_attribution(pair.model, row, 7, by="component", group="image")
    values = torch.as_tensor(result.values)[0]
    torch.testing.assert_close(values.sum(-1), logits, atol=1e-4, rtol=1e-4)
    names = list(result.labels["component"])
    assert names[:5] == ["embed", "attn 0", "mlp 0", "deepstack 0", "attn 1"]
    assert values[:, names.index("deepstack 0")].abs().min() > 1e-4
    by_layer = torch.as_tensor(
        direct_logit_attribution(pair.model, row, 7, by="layer", group="image").values
    )[0]
    torch.testing.assert_close(by_layer[:, 1], values[:, 1:4].sum(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(by_layer.sum(-1), logits, atol=1e-4, rtol=1e-4)


# -- QK-norm and positions ---------------------------------------------------------------------------


def test_qk_gives_the_scores_up_to_the_scales_of_the_norms(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    _, cache = model.run_with_cache(inputs)
    for layer in range(model.cfg.n_layers):
        x = cache[f"blocks.{layer}.ln1.hook_normalized"] * model.blocks[layer].ln1.weight
        products = torch.einsum("bpm,hmn,bpn->bhp", x, model.QK.AB[layer], x)
        scale_q, scale_k = (cache[f"blocks.{layer}.attn.{n}_norm.hook_scale"][..., 0] for n in "qk")
        scale_k = scale_k.repeat_interleave(2, dim=2)
        expected = products / (scale_q * scale_k).transpose(1, 2) / model.cfg.attn_scale
        # a token's score with itself, which the rotation does not change
        scores = cache[f"blocks.{layer}.attn.hook_attn_scores"].diagonal(dim1=2, dim2=3)
        tokens = inputs.attention_mask.bool()[:, None].expand_as(scores)
        torch.testing.assert_close(scores[tokens], expected[tokens], atol=1e-4, rtol=1e-4)


def test_positions_lie_between_the_learned_ones() -> None:
    table = torch.randn(4 * 4 + 1, 3, generator=torch.Generator().manual_seed(0))
    grids = [(2, 6), (7, 4), (1, 1), (4, 4)]
    found = grid_positions(table, PatchLayout(grids, 1, torch.device("cpu")))
    square = table[:16].view(1, 4, 4, 3).permute(0, 3, 1, 2)
    for image, (rows, columns) in enumerate(grids):
        expected = F.interpolate(square, (rows, columns), mode="bilinear", align_corners=True)[0]
        torch.testing.assert_close(found[image, : rows * columns], expected.flatten(1).T)
        assert not found[image, rows * columns :].any()
    torch.testing.assert_close(found[3, :16], table[:16])


def test_a_mark_moves_the_cells_where_the_heat_map_has_it(pair: Pair) -> None:
    blank = Image.new("RGB", (84, 56), (114, 114, 114))
    (rows, columns) = pair.model.prepare(blank, "Look.").grids[0][0]
    for row, column in ((0, 0), (1, columns - 1), (rows - 1, 2)):
        marked = blank.copy()
        box = (84 * column // columns, 56 * row // rows, 84 * (column + 1) // columns, 56 * (row + 1) // rows)
        marked.paste((255, 255, 255), box)
        inputs = pair.model.prepare([blank, marked], ["Look.", "Look."])
        _, cache = pair.model.run_with_cache(inputs, names_filter="vision_encoder.hook_embed")
        moved = (cache["vision_encoder.hook_embed"][1] - cache["vision_encoder.hook_embed"][0]).norm(dim=-1)
        by_cell = inputs.heatmap(moved, 1).unflatten(1, (columns, 2)).unflatten(0, (rows, 2)).sum((1, 3))
        assert divmod(int(by_cell.argmax()), columns) == (row, column)


# -- what is refused ---------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, str, Any]] = {
    r"vision_config\.out_hidden_size=48 is not handled; handled: 32": ("vision", "out_hidden_size", 48),
    r"vision_config\.hidden_act='nonsense' is not handled": ("vision", "hidden_act", "nonsense"),
    r"vision_config\.in_channels=1 is not handled": ("vision", "in_channels", 1),
    r"vision_config\.deepstack_visual_indexes=\(1, 0\) is not": (
        "vision",
        "deepstack_visual_indexes",
        [1, 0],
    ),
    r"vision_config\.deepstack_visual_indexes=\(3,\) is not": ("vision", "deepstack_visual_indexes", [3]),
    r"deepstack_visual_indexes has 2 blocks, the decoder 1: not": ("text", "num_hidden_layers", 1),
    r"text_config\.layer_types has 'sliding_attention'": ("text", "layer_types", ["sliding_attention"] * 3),
    r"text_config\.use_sliding_window=True is not handled": ("text", "use_sliding_window", True),
    r"text_config\.mrope_interleaved=False is not handled": (
        "text",
        "rope_parameters",
        {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": False},
    ),
    r"text_config\.mrope_section=\(2, 2, 2\) does not add up to d_head / 2 = 4": (
        "text",
        "rope_parameters",
        {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_config_values_that_are_not_handled(message: str) -> None:
    part, key, value = REFUSED[message]
    config = random_qwen.make_config(kind="qwen3_vl")
    setattr(getattr(config, f"{part}_config"), key, value)
    family: Any = load_family("qwen3_vl")
    with pytest.raises(ValueError, match=message):
        family.from_config(config, "tiny", torch.device("cpu"), torch.float32)


def test_mixtures_of_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown model family 'qwen3_vl_moe'"):
        load_family("qwen3_vl_moe")


def test_video_is_refused(pair: Pair) -> None:
    ids = pair.inputs.input_ids.clone()
    ids[2, -2] = pair.model.video_token_id
    with pytest.raises(ValueError, match="video is not handled"):
        pair.model({**pair.inputs.to_hf(), "input_ids": ids})
    with pytest.raises(ValueError, match="inputs key 'video_grid_thw': video is not handled"):
        pair.model({**pair.inputs.to_hf(), "video_grid_thw": torch.tensor([[2, 4, 4]])})
