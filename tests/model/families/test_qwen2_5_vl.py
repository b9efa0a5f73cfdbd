"""What is Qwen2.5-VL's own: order of patches, windows, positions in three streams, sizes, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.allocations import Allocations
from PIL import Image
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from hones_lens import HookedVLM, VLMInputs
from hones_lens.app.checks.parity import check_model
from hones_lens.model.loading import load_hf_model
from hones_lens.model.nn.mrope import mrope_positions
from hones_lens.model.nn.patches import PatchLayout


class Pair:
    def __init__(self, seed: int = 2, **config):
        self.hf, self.model = random_qwen.make_pair(random_qwen.make_config(**config), seed)
        self.inputs = random_qwen.mixed_batch(self.model)

    def logits(self, inputs: VLMInputs | None = None) -> Tensor:
        self.hf.model.rope_deltas = None
        with torch.no_grad():
            return self.hf(**(inputs or self.inputs).to_hf()).logits


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Windows of 42 pixels are three tokens, or six patches, on a side."""
    return Pair(vision={"window_size": 42, "depth": 3, "fullatt_block_indexes": [1]})


def places_in_hf_order(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of every patch in the order of Hugging Face's tower, by its own functions."""
    vision, thw = pair.hf.config.vision_config, pair.inputs.image_grid_thw
    assert thw is not None
    merge = vision.spatial_merge_size
    places = get_vision_position_ids(thw, merge)
    images = torch.arange(len(thw)).repeat_interleave(thw.prod(-1))
    order, _ = get_vision_window_index(thw, merge, vision.window_size, vision.patch_size)
    squares = torch.cat((images[:, None], places), dim=1).view(-1, merge**2, 3)
    return squares[order].view(-1, 3).unbind(-1)


def in_hf_order(pair: Pair, x: Tensor) -> Tensor:
    """[image patch …] in raster order, as [patch …] in the order of Hugging Face's tower."""
    images, rows, columns = places_in_hf_order(pair)
    assert pair.inputs.image_grid_thw is not None
    return x[images, rows * pair.inputs.image_grid_thw[images, 2] + columns]


# -- the vision tower ----------------------------------------------------------------------------


def test_hooks_see_raster_order_at_every_layer(pair: Pair) -> None:
    theirs: dict[str, Tensor] = {}
    handles = [
        block.register_forward_hook(lambda module, args, out, i=i: theirs.update({i: out}))
        for i, block in enumerate(pair.hf.model.visual.blocks)
    ]
    pair.logits()
    for handle in handles:
        handle.remove()
    _, cache = pair.model.run_with_cache(pair.inputs)
    for layer in range(3):
        ours = cache[f"vision_encoder.blocks.{layer}.hook_resid_post"]
        torch.testing.assert_close(in_hf_order(pair, ours), theirs[layer], atol=5e-5, rtol=1e-5)


VISION_SITES = {
    "attn.hook_z": ("attn.proj", "input"),
    "hook_attn_out": ("attn.proj", "output"),
    "mlp.hook_pre": ("mlp.gate_proj", "output"),
    "mlp.hook_pre_linear": ("mlp.up_proj", "output"),
    "mlp.hook_post": ("mlp.down_proj", "input"),
    "hook_mlp_out": ("mlp.down_proj", "output"),
    "hook_resid_pre": ("", "input"),
    "hook_resid_post": ("", "output"),
}


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", [*VISION_SITES, "attn.hook_q", "attn.hook_k", "attn.hook_v"])
def test_vision_edits_are_those_of_hf(pair: Pair, name: str, layer: int) -> None:
    path, where = VISION_SITES.get(name, ("attn.qkv", "output"))
    module = pair.hf.get_submodule(f"model.visual.blocks.{layer}.{path}".rstrip("."))
    noise: list[Tensor] = []

    def ours(x: Tensor, hook) -> Tensor:
        noise.append(torch.randn(x.shape, generator=torch.Generator().manual_seed(layer)))
        return x + noise[0]

    with torch.no_grad():
        actual = pair.model.run_with_hooks(
            pair.inputs, fwd_hooks=[(f"vision_encoder.blocks.{layer}.{name}", ours)]
        )
    wanted = in_hf_order(pair, noise[0]).flatten(1)
    if path == "attn.qkv":
        at = "qkv".index(name[-1]) * wanted.shape[1]
        wanted = torch.nn.functional.pad(wanted, (at, 2 * wanted.shape[1] - at))
    if where == "input":
        handle = module.register_forward_pre_hook(lambda module, args: (args[0] + wanted, *args[1:]))
    else:
        handle = module.register_forward_hook(lambda module, args, out: out + wanted)
    expected = pair.logits()
    handle.remove()
    assert random_llava.largest_difference(actual, expected, pair.inputs) <= 5e-5
    assert random_llava.largest_difference(actual, pair.logits(), pair.inputs) >= 1e-3


def test_a_patch_reaches_its_window_and_no_other(pair: Pair) -> None:
    """Windows of 6 x 6 patches (42 pixels / 7) in block 0; block 1 sees the whole image, and no other."""
    change: dict[str, Tensor] = {}

    def edit(x: Tensor, hook) -> Tensor:
        x[1, 3 * 10 + 7] += 1  # the second image has 4 x 10 patches: row 3, column 7
        return x

    names = [f"vision_encoder.blocks.{layer}.hook_attn_out" for layer in (0, 1)]
    _, clean = pair.model.run_with_cache(pair.inputs, names_filter=names)
    with pair.model.hooks([("vision_encoder.blocks.0.hook_resid_pre", edit)]):
        _, edited = pair.model.run_with_cache(pair.inputs, names_filter=names)
    for name in names:
        change[name] = (edited[name] - clean[name]).abs().amax(-1) > 1e-6
    window, whole = (change[name] for name in names)
    assert pair.inputs.patch_grids[1][0] == (4, 10)
    expected = torch.zeros(4, 10, dtype=torch.bool)
    expected[:, 6:] = True
    assert torch.equal(window[1, :40].view(4, 10), expected)
    assert whole[1, :40].all()
    assert not window[[0, 2]].any() and not whole[[0, 2]].any()


def test_windows_give_what_the_masked_pattern_gives(pair: Pair) -> None:
    """The pattern of the whole image, from rotated queries and keys; a window has its patches' part of it."""
    block = "vision_encoder.blocks.{}.attn.hook_{}".format
    kinds = ("rot_q", "rot_k", "v", "z", "pattern", "attn_scores")
    _, cache = pair.model.run_with_cache(
        pair.inputs, names_filter=[block(layer, kind) for layer in (0, 1) for kind in kinds]
    )
    unheard = pair.model.run_with_cache(pair.inputs, names_filter=block(0, "z"))[1][block(0, "z")]
    grids = [grid for row in pair.inputs.patch_grids for grid in row]
    windows = pair.model.vision_windows(pair.inputs)
    assert windows.shape == cache[block(0, "pattern")].shape[:2] + cache[block(0, "pattern")].shape[-1:]
    assert cache[block(0, "pattern")].sum(-1).sub(1).abs().max() < 1e-5, "filling attends to itself"
    for i, (rows, columns) in enumerate(grids):
        n = rows * columns
        at = torch.tensor([(row // 6, column // 6) for row in range(rows) for column in range(columns)])
        same = (at[:, None] == at[None]).all(-1)
        assert sorted(windows[i][windows[i] >= 0].tolist()) == list(range(n))
        for layer, seen in ((0, same), (1, torch.ones_like(same))):
            q, k, v = (cache[block(layer, kind)][i, :n] for kind in ("rot_q", "rot_k", "v"))
            scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
            expected = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            mixed = torch.einsum("hqk,khd->qhd", expected, v)
            torch.testing.assert_close(cache[block(layer, "z")][i, :n], mixed)
            if layer == 1:
                torch.testing.assert_close(cache[block(layer, "pattern")][i, :, :n, :n], expected)
                continue
            torch.testing.assert_close(unheard[i, :n], mixed)
            for number, places in enumerate(windows[i]):
                real = places[places >= 0]
                size = len(real)
                for kind, values in (("pattern", expected), ("attn_scores", scores)):
                    part = cache[block(0, kind)][i, number, :, :size, :size]
                    torch.testing.assert_close(part, values[:, real][:, :, real])
                assert bool((cache[block(0, "pattern")][i, number, :, :size, size:] == 0).all())


def test_a_pattern_in_windows_takes_no_room_for_pairs_that_are_in_none(pair: Pair) -> None:
    """For a picture of 40 x 40 patches: 30.7 MB a block would be the whole of it, 0.7 MB the windows'."""
    assert pair.inputs.pixel_values is not None
    ids = torch.full((1, 400), pair.model.cfg.image_token_id)
    pixels = torch.randn(1600, pair.inputs.pixel_values.shape[1])
    inputs = VLMInputs(ids, torch.ones_like(ids), pixels, torch.tensor([[1, 40, 40]]))
    name = "vision_encoder.blocks.{}.attn.hook_pattern".format
    largest: dict[int, int] = {}
    for layer in (0, 1):
        with torch.no_grad(), Allocations() as made:
            pair.model.run_with_hooks(
                inputs, fwd_hooks=[(name(layer), lambda x, hook: None)], stop_at_layer=0
            )
        largest[layer] = made.largest
    assert largest[1] == 4 * 3 * 1600**2, "a block without windows has all pairs"
    assert largest[0] < 4 * 3 * 1600**2 / 10


def test_windows_are_of_pictures(pair: Pair) -> None:
    with pytest.raises(ValueError, match="no pictures, so no windows"):
        pair.model.vision_windows(pair.model.prepare(None, "Look."))


def test_an_edited_pattern_counts_in_both_kinds_of_blocks(pair: Pair) -> None:
    def only_itself(x: Tensor, hook) -> Tensor:
        return torch.eye(x.shape[-1]).expand_as(x)

    for layer in (0, 1):
        seen: dict[str, Tensor] = {}
        hooks = [
            (f"vision_encoder.blocks.{layer}.attn.hook_pattern", only_itself),
            (f"vision_encoder.blocks.{layer}.attn.hook_v", lambda x, hook, s=seen: s.update(v=x)),
            (f"vision_encoder.blocks.{layer}.attn.hook_z", lambda x, hook, s=seen: s.update(z=x)),
        ]
        pair.model.run_with_hooks(pair.inputs, fwd_hooks=hooks)
        for i, (rows, columns) in enumerate(grid for row in pair.inputs.patch_grids for grid in row):
            torch.testing.assert_close(seen["z"][i, : rows * columns], seen["v"][i, : rows * columns])


def test_padding_of_the_tower_changes_nothing(pair: Pair) -> None:
    """Every image alone gives the embeddings that it has beside a larger one."""
    encoded = pair.model.with_image_embeds(pair.inputs).image_embeds
    pictures = random_qwen.make_images()
    alone = [
        pair.model.with_image_embeds(pair.model.prepare(picture, "Look.")).image_embeds
        for picture in pictures
    ]
    torch.testing.assert_close(encoded, torch.cat(alone), atol=5e-5, rtol=1e-5)


def test_a_layout_is_a_permutation() -> None:
    layout = PatchLayout([(4, 6), (2, 2), (6, 4)], 2, torch.device("cpu"))
    assert sorted(layout.padded_index.tolist()) == layout.is_patch.flatten().nonzero()[:, 0].tolist()
    assert layout.padded_index[:4].tolist() == [0, 1, 6, 7]  # the first square of a grid six patches wide
    assert layout.squares[1].tolist() == [2, 3, 8, 9]
    windows = layout.windows(4)
    actual = sorted(windows.members[windows.real].tolist())
    assert actual == sorted(layout.padded_index.tolist())
    assert windows.real.sum(-1).tolist() == [[16, 8], [4, 0], [16, 8]]


# -- positions -----------------------------------------------------------------------------------


def test_positions_are_those_of_hf(pair: Pair) -> None:
    inputs = pair.inputs
    expected, _ = pair.hf.model.get_rope_index(
        inputs.input_ids,
        inputs.mm_token_type_ids,
        inputs.image_grid_thw,
        attention_mask=inputs.attention_mask,
    )
    assert torch.equal(inputs.position_ids, expected)
    assert inputs.position_ids.shape == (3, *inputs.input_ids.shape)


def test_positions_by_hand() -> None:
    """Two tokens of text, an image of 2 x 3 tokens, one token of text; padded by one."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 0]]).bool()
    inputs = VLMInputs(
        torch.zeros(1, 10, dtype=torch.long),
        torch.tensor([[0] + [1] * 9]),
        image_mask_or_none=mask,
        grids=(((2, 3),),),
    )
    time, rows, columns = mrope_positions(inputs)[:, 0].tolist()
    assert time == [0, 0, 1, 2, 2, 2, 2, 2, 2, 5]
    assert rows == [0, 0, 1, 2, 2, 2, 3, 3, 3, 5]
    assert columns == [0, 0, 1, 2, 3, 4, 2, 3, 4, 5]


def test_text_goes_on_behind_an_image_at_the_end(pair: Pair) -> None:
    """No text follows the image: the next position is behind its larger side, not its last token.

    Hugging Face's forward pass has it so; its `generate` (5.23) counts on from the last token instead,
    in each stream, so the reference is a loop of forward passes.
    """
    model, two = pair.model, pair.inputs[1]
    end = int(two.image_mask[0].nonzero()[-1]) + 1
    cut = {"input_ids": two.input_ids[:, :end], "attention_mask": two.attention_mask[:, :end]}
    cut |= {"pixel_values": two.pixel_values, "image_grid_thw": two.image_grid_thw}
    known = model.as_inputs(cut)
    assert pair.inputs.grids[1][1] == (6, 2)
    start = int(known.position_ids[0, 0, -1])
    grown = known.extended(torch.tensor([[5, 6]]))
    assert grown.position_ids[:, 0, -2:].tolist() == [[start + 6, start + 7]] * 3
    expected = known.input_ids[:, :0]
    for _ in range(5):
        token = pair.logits(known.extended(expected))[:, -1:].argmax(-1)
        expected = torch.cat((expected, token), dim=1)
    for use_kv_cache in (True, False):
        assert torch.equal(model.generate(cut, 5, "tokens", use_kv_cache), expected)


def test_positions_of_ones_own(pair: Pair) -> None:
    flat = pair.inputs.position_ids.clone()
    flat[1:] = flat[0]
    given = {**pair.inputs.to_hf(), "position_ids": flat}
    with torch.no_grad():
        ours = pair.model(given)
        expected = pair.hf(**given).logits
    assert random_llava.largest_difference(ours, expected, pair.inputs) <= 5e-5
    assert random_llava.largest_difference(ours, pair.logits(), pair.inputs) > 1e-3


# -- inputs --------------------------------------------------------------------------------------


def test_pictures_keep_their_shape_within_the_bounds(pair: Pair) -> None:
    assert pair.inputs.grids == (((2, 3),), ((2, 5), (6, 2)), ())
    large = pair.model.prepare(Image.new("RGB", (400, 200)), "Look.").grids[0][0]
    small = pair.model.prepare(Image.new("RGB", (9, 9)), "Look.").grids[0][0]
    assert large[0] * large[1] <= 40 and large[1] > large[0]
    assert small == (2, 2)


@pytest.mark.parametrize("place", [(0, 0), (1, 4), (3, 9), (2, 7)])
def test_heatmap_of_patches_shows_where_the_picture_differs(pair: Pair, place: tuple[int, int]) -> None:
    row, column = place
    grey = Image.new("RGB", (70, 28), (114, 114, 114))
    marked = grey.copy()
    marked.paste((255, 0, 0), (7 * column, 7 * row, 7 * column + 7, 7 * row + 7))
    inputs = pair.model.prepare([grey, marked], ["Look."] * 2)
    _, cache = pair.model.run_with_cache(inputs, names_filter="vision_encoder.hook_embed")
    embeds = cache["vision_encoder.hook_embed"]
    patches = inputs.heatmap((embeds[1] - embeds[0]).norm(dim=-1), row=1)
    assert patches.shape == (4, 10)
    assert divmod(int(patches.argmax()), 10) == place
    tokens = pair.model.run_with_cache(inputs, names_filter="vision_projector.hook_in")[1]
    change = tokens["vision_projector.hook_in"].view(2, 10, -1).diff(dim=0)[0].norm(dim=-1)
    full = torch.zeros(inputs.input_ids.shape[1])
    full[inputs.image_mask[1]] = change
    for values in (change, full):
        assert inputs.heatmap(values, row=1).shape == (2, 5)


def test_heatmap_enlarged_to_pixels(pair: Pair) -> None:
    values = torch.zeros(10)
    values[7] = 1.0  # row 1, column 2 of 2 x 5
    large = pair.inputs.heatmap(values, row=1, image=0, pixels=(28, 70))
    assert large.shape == (28, 70)
    assert divmod(int(large.argmax()), 70)[0] in range(14, 28)
    assert float(large[21, 35]) > 0.9 and float(large[:, :14].max()) == 0


def test_rows_keep_their_own_patches(pair: Pair) -> None:
    logits = pair.model(pair.inputs)
    for rows in ([1], [2, 0], [1, 1]):
        part = pair.inputs[rows]
        torch.testing.assert_close(pair.model(part), logits[rows], atol=5e-5, rtol=1e-5)
    encoded = pair.model.with_image_embeds(pair.inputs)
    torch.testing.assert_close(pair.model(encoded[[1]]), logits[[1]], atol=5e-5, rtol=1e-5)


def test_chat_format_of_qwen_where_the_checkpoint_has_none(pair: Pair) -> None:
    model = HookedVLM.from_hf(pair.hf, random_qwen.make_processor(pair.hf.config))
    model.processor.chat_template = model.tokenizer.chat_template = None
    text = model.render("is it red?", [3])
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        "<|image_pad|><|image_pad|><|image_pad|><|vision_end|>is it red?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text == pair.model.render("is it red?", [3])


def test_what_hugging_faces_processor_makes(pair: Pair) -> None:
    """Its image and text steps, without the video processor that it can't be built without here."""
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    parts = pair.model.processor
    theirs = object.__new__(Qwen2_5_VLProcessor)
    theirs.image_processor, theirs.image_token = parts.image_processor, "<|image_pad|>"
    pictures = random_qwen.make_images()
    made = parts.image_processor(images=pictures, return_tensors="pt")
    texts, done = [], 0
    for question, n in zip(random_llava.QUESTIONS, (1, 2, 0), strict=True):
        shown = "".join(
            f"<|vision_start|>{theirs.replace_image_token(made, done + i)}<|vision_end|>" for i in range(n)
        )
        done += n
        texts.append(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{shown}{question}<|im_end|>\n<|im_start|>assistant\n"
        )
    encoded = parts.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    mapping = {**encoded, **made}
    assert torch.equal(mapping["input_ids"], pair.inputs.input_ids)
    assert torch.equal(pair.model(mapping), pair.model(pair.inputs))


# -- what is refused -----------------------------------------------------------------------------


def changed(inputs: VLMInputs, **values) -> dict:
    mapping = {**inputs.to_hf(), **values}
    mapping.pop("mm_token_type_ids", None)
    return {key: value for key, value in mapping.items() if value is not None}


def test_inputs_that_do_not_fit(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    thw = inputs.image_grid_thw
    with pytest.raises(ValueError, match="28 image tokens in input_ids, but pixel_values hold 0 images"):
        model(changed(inputs, pixel_values=None, image_grid_thw=None))
    with pytest.raises(ValueError, match="without image_grid_thw"):
        model(changed(inputs, image_grid_thw=None))
    with pytest.raises(ValueError, match=r"image_grid_thw asks for \[64, 294\]"):
        model(changed(inputs, image_grid_thw=thw[:2]))
    with pytest.raises(ValueError, match="image 0 has 3 × 8 patches, which 2 does not divide"):
        model(changed(inputs, image_grid_thw=torch.tensor([[1, 3, 8], *thw.tolist()[1:]])))
    swapped = torch.tensor([thw.tolist()[i] for i in (2, 1, 0)])
    with pytest.raises(ValueError, match="row 0 ends within image 0"):
        model(changed(inputs, image_grid_thw=swapped))


def test_video_is_refused(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    with pytest.raises(ValueError, match="'pixel_values_videos': video is not handled"):
        model({**inputs.to_hf(), "pixel_values_videos": torch.zeros(4, 294)})
    with pytest.raises(ValueError, match="image 0 has 2 frames; video is not handled"):
        model(changed(inputs, image_grid_thw=torch.tensor([[2, 4, 3], *inputs.image_grid_thw.tolist()[1:]])))
    ids = inputs.input_ids.clone()
    ids[2, -3] = model.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    with pytest.raises(ValueError, match="the prompt has video tokens; video is not handled"):
        model(changed(inputs, input_ids=ids))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_config", "use_sliding_window", True),
        ("text_config", "attention_dropout", 0.1),
        ("vision_config", "hidden_act", "no such"),
        ("vision_config", "in_channels", 1),
        ("vision_config", "out_hidden_size", 40),
        ("vision_config", "fullatt_block_indexes", [7]),
        ("vision_config", "window_size", 13),
        (
            "text_config",
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3]},
        ),
        ("text_config", "rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ],
)
def test_config_values_that_are_not_handled(part: str, key: str, value) -> None:
    hf = random_qwen.make_hf()
    setattr(getattr(hf.config, part), key, value)
    wanted = "mrope_section" if value and isinstance(value, dict) and "mrope_section" in value else key
    wanted = "rope_type" if isinstance(value, dict) and value["rope_type"] == "dynamic" else wanted
    with pytest.raises(ValueError, match=wanted):
        HookedVLM.from_hf(hf)


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_shared_and_the_hf_model_is_unchanged(tied: bool) -> None:
    config = random_qwen.make_config(text={"tie_word_embeddings": tied}, tie_word_embeddings=tied)
    hf = random_qwen.make_hf(config)
    before = {name: p.clone() for name, p in hf.named_parameters()}
    model = HookedVLM.from_hf(hf, random_qwen.make_processor(config))
    storages = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().data_ptr() in storages, name
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in hf.parameters())
    model(random_qwen.mixed_batch(model))
    for name, p in hf.named_parameters():
        assert torch.equal(p, before[name]), name


def test_a_folder_saved_by_hugging_face_passes_the_check(tmp_path: Path) -> None:
    hf = random_qwen.make_hf(seed=3)
    hf.save_pretrained(tmp_path)
    random_qwen.make_processor(hf.config).save_pretrained(str(tmp_path))
    theirs, processor = load_hf_model(str(tmp_path))
    assert processor.image_processor.patch_size == random_qwen.PATCH
    checks = check_model(HookedVLM.from_hf(theirs, processor), theirs, max_new_tokens=4)
    assert not [f"{check.name}: {check.figure}" for check in checks if not check.passed]
    model = HookedVLM.from_pretrained(str(tmp_path), min_pixels=196 * 4, max_pixels=196 * 9)
    rows, columns = model.prepare(Image.new("RGB", (300, 300)), "Look.").grids[0][0]
    assert rows * columns <= 9
    with pytest.raises(
        ValueError,
        match=r"unknown processor option of .*: 'max_pixel'; valid: min_pixels, max_pixels; did you",
    ):
        HookedVLM.from_pretrained(str(tmp_path), max_pixel=3)
    with pytest.raises(
        ValueError, match="unknown processor option of 'tiny-llava': 'max_pixels'; valid: none"
    ):
        HookedVLM.from_pretrained("tiny-llava", max_pixels=3)
