"""LLaVA-NeXT: tiles among the tokens and on the picture, newlines, what is refused, the processors."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_anyres, random_llava
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from hones_lens import HookedVLM, viz
from hones_lens.analysis import head_attention
from hones_lens.analysis.patching.sites import vision_mask
from hones_lens.app.checks.parity import check_model
from hones_lens.app.runs.lengths import Lengths
from hones_lens.interventions import Box, patch_shuffle, token_mask
from hones_lens.model import VLMInputs, model_without_weights
from hones_lens.model.tiling import tiling_of

GREY, WHITE = (114, 114, 114), (255, 255, 255)
# Width, height, and the rows and columns of patches of the grid of tiles.
PICTURES = (((403, 310), (4, 6)), ((701, 280), (3, 7)), ((277, 843), (9, 3)), ((250, 251), (6, 6)))


@pytest.fixture(scope="module")
def pair() -> tuple[Any, HookedVLM]:
    return random_anyres.make_pair(seed=5)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_whole_and_tiles_are_grids_of_one_picture(pair: tuple[Any, HookedVLM]) -> None:
    """By hand: 40 × 31 fills 42 × 33 of 2 × 2 tiles, of which 4 rows of patches of 6 are kept."""
    inputs = random_anyres.mixed_batch(pair[1])
    assert inputs.grids == (((3, 3), (4, 6)), ((3, 3), (3, 7), (3, 3), (9, 3)), ())
    assert [[layout.picture for layout in row] for row in inputs.layouts] == [[0, 0], [0, 0, 1, 1], []]
    assert inputs.tower_entries == ((1, 4), (1, 3, 1, 3), ())
    assert inputs.image_tokens == ((9, 4 * 7), (9, 3 * 8, 9, 9 * 4), ())
    assert inputs.image_sizes.tolist() == [[31, 40], [28, 70], [84, 28]]
    assert inputs.regions[0][0] == (0, 0, 40, 31)
    assert inputs.regions[0][1] == pytest.approx((0, 3 * 31 / 33, 40, 31 * 31 / 33))
    assert inputs.regions[1][1] == pytest.approx((2 * 70 / 53, 0, 51 * 70 / 53, 28))
    assert inputs.regions[1][3] == pytest.approx((0, 0, 28, 84))


def test_newlines_are_a_group_of_their_own(pair: tuple[Any, HookedVLM]) -> None:
    model = pair[1]
    inputs = random_anyres.mixed_batch(model)
    _, cache = model.run_with_cache(inputs, names_filter=["hook_embed", "hook_image_embed"], stop_at_layer=0)
    newline = token_mask(inputs[:2], "newline")
    assert newline.sum(-1).tolist() == [4, 3 + 9] and not inputs.newline_mask[2].any()
    assert bool((newline <= inputs.image_mask[:2]).all())
    found = (cache["hook_embed"] == pair[0].model.image_newline).all(-1)
    assert torch.equal(found, inputs.newline_mask)
    first = inputs.cell_positions(0, 1)
    assert torch.equal(inputs.newline_mask[0].nonzero()[:, 0], first[:, -1] + 1)
    assert "newline" not in random_llava.mixed_batch(random_llava.make_pair()[1]).token_groups


@pytest.mark.parametrize(("size", "grid"), PICTURES)
def test_a_mark_changes_the_one_patch_that_it_lies_on(
    pair: tuple[Any, HookedVLM], size: tuple[int, int], grid: tuple[int, int]
) -> None:
    """In both grids: tower, heat map, box, embeddings and positions agree, and no other patch changes."""
    model, blank = pair[1], Image.new("RGB", size, GREY)
    clean = model.prepare(blank, "what is it?")
    assert clean.grids[0] == ((3, 3), grid)
    name = "vision_encoder.hook_embed"
    for image, (rows, columns) in enumerate(clean.grids[0]):
        for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 2)):
            x, y = centre(clean, image, row, column)
            marked = blank.copy()
            marked.paste(WHITE, (int(x) - 2, int(y) - 2, int(x) + 2, int(y) + 2))
            inputs = model.prepare([blank, marked], ["what is it?"] * 2)
            _, cache = model.run_with_cache(inputs, names_filter=name, stop_at_layer=0)
            before, after = cache[name].chunk(2)
            change = (after - before).norm(dim=-1)[:, 1:]  # by tile and patch
            of_grid = change[1:] if image else change[0]
            heat = clean.heatmap(of_grid, 0, image)
            assert heat.nonzero().tolist() == [[row, column]]
            assert int((of_grid > 0).sum()) == 1
            box = token_mask(clean, Box(x - 2, y - 2, x + 2, y + 2, image=image))
            position = int(clean.cell_positions(0, image)[row, column])
            assert box[0].nonzero()[:, 0].tolist() == [position]
            of_tower = (
                vision_mask(clean, box, 10, "box")[1:] if image else vision_mask(clean, box, 10, "box")[:1]
            )
            assert torch.equal(of_tower[:, 1:].flatten(), of_grid.flatten() > 0)
            assert not of_tower[:, 0].any()
            moved = (inputs.pixel_values[len(change) :] != inputs.pixel_values[: len(change)]).any(1)
            shown = [model.pictures(i)[image] for i in (inputs[0], inputs[1])]
            rows_at, columns_at = (shown[0] != shown[1]).any(0).nonzero().unbind(-1)
            assert set((rows_at // 7).tolist()) == {row} and set((columns_at // 7).tolist()) == {column}
            assert bool(moved[0].any()), "the whole shows no mark"


def centre(inputs: VLMInputs, image: int, row: int, column: int) -> tuple[float, float]:
    """The middle of a cell, in pixels of the picture."""
    (left, top, right, bottom), (rows, columns) = inputs.regions[0][image], inputs.grids[0][image]
    return left + (column + 0.5) * (right - left) / columns, top + (row + 0.5) * (bottom - top) / rows


def test_where_tiles_are_no_whole_number_of_patches() -> None:
    """Cells lie less than half a cell off: the middle of each is still on its patch."""
    vision = {**random_anyres.SIGLIP, "image_size": 30}
    model = random_anyres.make_pair(random_anyres.make_config(vision=vision))[1]
    blank = Image.new("RGB", (600, 481), GREY)
    clean = model.prepare(blank, "what is it?")
    assert clean.grids[0] == ((4, 4), (6, 8))
    for row in range(6):
        for column in range(8):
            x, y = (round(side) for side in centre(clean, 1, row, column))
            marked = blank.copy()
            marked.paste(WHITE, (x - 3, y - 3, x + 3, y + 3))
            inputs = model.prepare([blank, marked], ["what is it?"] * 2)
            _, cache = model.run_with_cache(inputs, names_filter="vision_encoder.hook_embed", stop_at_layer=0)
            before, after = cache["vision_encoder.hook_embed"].chunk(2)
            heat = clean.heatmap((after - before).norm(dim=-1)[1:], 0, 1)
            assert divmod(int(heat.argmax()), 8) == (row, column)


def test_each_cell_is_embedded_at_its_position(pair: tuple[Any, HookedVLM]) -> None:
    """What the decoder reads at a cell's position is the projection of its patch, found by hand."""
    model = pair[1]
    inputs = random_anyres.mixed_batch(model)
    _, cache = model.run_with_cache(inputs)
    tiles, stream = cache["vision_projector.hook_out"], cache["hook_embed"]
    whole = inputs.cell_positions(1, 2)
    assert torch.equal(stream[1, whole], tiles[9].view(3, 3, -1))
    cells = inputs.cell_positions(0, 1)  # of 2 × 2 tiles behind the whole, without their first and last row
    for row, column in ((0, 0), (1, 2), (2, 3), (3, 5)):
        tile, within = 2 * ((row + 1) // 3) + column // 3, 3 * ((row + 1) % 3) + column % 3
        assert torch.equal(stream[0, cells[row, column]], tiles[1 + tile, within])
    assert torch.equal(cache["hook_image_embed"], stream[inputs.image_mask])


def test_hugging_faces_processor_gives_the_same(pair: tuple[Any, HookedVLM]) -> None:
    hf, model = pair
    prepared = random_anyres.mixed_batch(model)
    texts = [
        "USER: " + "<image>\n" * n + f"{words} ASSISTANT:"
        for n, words in zip((1, 2, 0), random_llava.QUESTIONS, strict=True)
    ]
    theirs = random_anyres.hugging_faces_processor(model.processor)
    mapping = dict(
        theirs(
            images=random_anyres.make_images(),
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
    )
    assert torch.equal(mapping["input_ids"], prepared.input_ids)
    assert mapping["pixel_values"].shape[:2] == (3, 5), "pictures are padded with tiles"
    read = model.as_inputs(mapping)
    assert torch.equal(read.pixel_values, prepared.pixel_values)
    assert read.grids == prepared.grids and read.layouts == prepared.layouts
    assert torch.equal(model(mapping), model(prepared))
    expected = hf(**mapping).logits
    assert random_llava.relative_difference(model(mapping), expected, prepared) <= 2e-5
    assert torch.equal(hf(**prepared.to_hf()).logits, expected)


def test_one_picture_twice_and_rows_taken_out(pair: tuple[Any, HookedVLM]) -> None:
    model = pair[1]
    one, two, _ = random_anyres.make_images()
    both = model.prepare([[one, two], [two], [one]], list(random_llava.QUESTIONS))
    assert [len(row) for row in both.grids] == [4, 2, 2] and len(both.pixel_values) == 18
    last = model.prepare([one, two], [random_llava.QUESTIONS[2], random_llava.QUESTIONS[1]])
    taken = both[[2, 1]]
    assert torch.equal(taken.pixel_values, last.pixel_values)
    assert torch.equal(taken.image_sizes, last.image_sizes)
    assert (taken.grids, taken.layouts, taken.regions) == (last.grids, last.layouts, last.regions)
    torch.testing.assert_close(model(taken)[:, -4:], model(last)[:, -4:])
    encoded = model.with_image_embeds(both)[[2]]
    torch.testing.assert_close(model(encoded), model(both[[2]]))
    _, cache = model.run_with_cache(both)
    of_last = cache.apply_slice_to_batch_dim([2])
    assert torch.equal(of_last["vision_projector.hook_out"], cache["vision_projector.hook_out"][-5:])
    assert torch.equal(of_last["hook_image_embed"], cache["hook_image_embed"][-sum(both.image_tokens[2]) :])


def test_pixels_are_changed_by_grid(pair: tuple[Any, HookedVLM]) -> None:
    """Pictures that are put back are the same; a change of one grid leaves padding and other tiles alone."""
    model = pair[1]
    inputs = random_anyres.mixed_batch(model)
    shown = model.pictures(inputs)
    assert [tuple(picture.shape[1:]) for picture in shown[:4]] == [(21, 21), (28, 42), (21, 21), (21, 49)]
    assert torch.equal(model.with_pictures(inputs, shown).pixel_values, inputs.pixel_values)
    shown[1] = torch.zeros_like(shown[1])
    blank = model.with_pictures(inputs, shown).pixel_values
    assert torch.equal(blank[0], inputs.pixel_values[0]) and torch.equal(blank[5:], inputs.pixel_values[5:])
    assert bool((blank[1:3, :, 7:] == 0).all()) and torch.equal(
        blank[1:3, :, :7], inputs.pixel_values[1:3, :, :7]
    )
    assert bool((blank[3:5, :, :14] == 0).all())
    mixed = patch_shuffle(3)(model, inputs)
    before, after = (model.pictures(i)[1] for i in (inputs, mixed))
    squares = [sorted(map(str, squares_of(picture))) for picture in (before, after)]
    assert squares[0] == squares[1] and not torch.equal(before, after)


def squares_of(picture: Tensor) -> list[list[float]]:
    return picture.unfold(1, 7, 7).unfold(2, 7, 7).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values_videos": torch.ones(1)}, "video is not handled"),
        ({"image_grid_thw": torch.ones(1, 3)}, "'image_grid_thw' is not read by llava_next"),
        ({"pixel_attention_mask": torch.ones(1)}, "'pixel_attention_mask' is not read by llava_next"),
        ({"pixel_values": None}, "image_sizes without pixel_values"),
        ({"image_sizes": None}, "pixel_values without image_sizes"),
        ({"image_sizes": torch.ones(3)}, r"image_sizes are \[3\]; this model reads \[n_images, 2\]"),
        ({"image_sizes": torch.tensor([[31, 40]])}, "115 image tokens .* 1 pictures of 37 tokens in all"),
        ({"image_sizes": torch.tensor([[31, 40], [84, 28], [28, 70]])}, None),
        ({"image_sizes": torch.tensor([[28, 70], [31, 40], [84, 28]])}, "row 0 ends within image 1"),
        ({"pixel_values": torch.ones(12, 3, 21, 21)}, r"ask for tiles \[13, 3, 21, 21\]"),
        ({"pixel_values": torch.ones(3, 4, 3, 21, 21)}, r"image_sizes ask for \[3, 5 or more, …\]"),
    ],
)
def test_inputs_that_do_not_fit(
    pair: tuple[Any, HookedVLM], change: dict[str, Any], message: str | None
) -> None:
    inputs = random_anyres.mixed_batch(pair[1])
    assert int(inputs.image_mask.sum()) == 115
    if message is None:  # two pictures of a row, exchanged, have as many tokens and tiles
        pair[1].as_inputs(inputs.to_hf() | change)
        return
    with pytest.raises(ValueError, match=message):
        pair[1].as_inputs(inputs.to_hf() | change)


def test_a_picture_of_which_nothing_is_left(pair: tuple[Any, HookedVLM]) -> None:
    """Hugging Face's code cuts half of the patches off at each side."""
    vision = replace(pair[1].cfg.vision, tile_sizes=((42, 42),))
    assert tiling_of((42, 8), vision).patches == (6, 2)
    with pytest.raises(ValueError, match="400 × 1 pixels is so narrow"):
        tiling_of((1, 400), vision)


def test_other_families_refuse_sizes() -> None:
    model = random_llava.make_pair()[1]
    mapping = random_llava.mixed_batch(model).to_hf() | {"image_sizes": torch.ones(3, 2)}
    with pytest.raises(ValueError, match="inputs key 'image_sizes' is not read by llava"):
        model(mapping)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "image_grid_pinpoints",
            [[21, 42], [42, 40]],
            r"\[42, 40\]\] are not handled; .* side of a tile, 21",
        ),
        ("image_grid_pinpoints", [], r"config.image_grid_pinpoints=\[\] are not handled"),
        (
            "vision_feature_select_strategy",
            "full",
            "select_strategy='full' is not handled; handled: 'default'",
        ),
        ("projector_hidden_act", "nothing", "config.projector_hidden_act='nothing' is not handled"),
        ("text_config.model_type", "mixtral", "text_config.model_type='mixtral' is not handled"),
        ("vision_config.model_type", "pixtral", "vision_config.model_type='pixtral' is not handled"),
    ],
)
def test_configs_that_are_refused(pair: tuple[Any, HookedVLM], name: str, value: Any, message: str) -> None:
    config = deepcopy(pair[0].config)
    *part, key = name.split(".")
    object.__setattr__(getattr(config, part[0]) if part else config, key, value)
    with pytest.raises(ValueError, match=message):
        type(pair[1]).from_config(config, "it", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_grid_pinpoints": [[21, 42]]}, "are not those of the config"),
        ({"size": {"shortest_edge": 28}}, "not handled; handled: the side of the tower's images, 21"),
        ({"crop_size": {"height": 14, "width": 14}}, "not handled; handled: the side of the tower's images"),
    ],
)
def test_processors_that_are_refused(options: dict[str, Any], message: str) -> None:
    model = random_anyres.make_pair()[1]
    for key, value in options.items():
        setattr(model.processor.image_processor, key, value)
    with pytest.raises(ValueError, match=message):
        random_anyres.mixed_batch(model)


def test_saved_and_loaded(tmp_path: Path) -> None:
    hf, model = random_anyres.make_pair(seed=8)
    inputs = random_anyres.mixed_batch(model)
    folder = model.save_pretrained(tmp_path / "saved")
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(theirs(**inputs.to_hf()).logits, hf(**inputs.to_hf()).logits)
    loaded = HookedVLM.from_pretrained(str(folder))
    again = random_anyres.mixed_batch(loaded)
    assert torch.equal(again.input_ids, inputs.input_ids) and again.regions == inputs.regions
    assert torch.equal(loaded(again), model(inputs))
    assert loaded.processor.settings == model.processor.settings


@pytest.mark.exhaustive
def test_every_check_passes() -> None:
    hf, model = random_anyres.make_pair(seed=9)
    checks = check_model(model, hf, 6)
    assert [check.name for check in checks if not check.passed] == []
    assert any("2 grids of 3 × 3 and 3 × 4, 0 of 10 marks" in check.figure for check in checks)


def test_encoded_pictures_are_not_read_again(pair: tuple[Any, HookedVLM]) -> None:
    model = pair[1]
    inputs = random_anyres.mixed_batch(model)
    encoded = model.with_image_embeds(inputs)
    assert encoded.image_embeds.shape == (115, 32)
    other = replace(encoded, pixel_values=torch.zeros_like(inputs.pixel_values))
    assert torch.equal(model(other), model(inputs))


def test_a_plan_counts_tiles_and_newlines(pair: tuple[Any, HookedVLM]) -> None:
    """By hand: 640 × 480 fills 672 × 504 of 2 × 2 tiles, 36 rows of 48 patches, and the whole has 24 × 24."""
    known = Lengths(model_without_weights("llava-v1.6-mistral-7b"))
    assert known.n_grids((640, 480)) == 5 and known.of_picture((640, 480)) == 24 * 24 + 36 * 49
    onevision = Lengths(model_without_weights("llava-onevision-qwen2-0.5b"))
    assert onevision.n_grids((640, 480)) == 5 and onevision.of_picture((640, 480)) == 27 * 27 + 40 * 55


def test_figures_take_one_picture_for_its_two_grids(pair: tuple[Any, HookedVLM]) -> None:
    model, (one, two, _) = pair[1], random_anyres.make_images()
    inputs = model.prepare([one, two], "what is it?")
    assert inputs.n_pictures(0) == 2 and [inputs.picture_of(0, i) for i in range(4)] == [0, 0, 1, 1]
    found = head_attention(model, inputs, [(0, 1)])
    assert viz.attention_maps(found, [one, two], images=[0, 3]).axes
    with pytest.raises(ValueError, match="4 pictures for a row with 2 images"):
        viz.attention_maps(found, [one, one, two, two])


def test_a_region_may_reach_out_by_less_than_a_cell() -> None:
    picture = Image.new("RGB", (60, 40))
    assert viz.check_region((-9.0, 0.0, 66.0, 40.0), picture, (4, 7)) == (-9.0, 0.0, 66.0, 40.0)
    for region in ((-12.0, 0.0, 60.0, 40.0), (0.0, 0.0, 71.0, 40.0), (0.0, 5.0, 60.0, 60.0)):
        with pytest.raises(ValueError, match="does not lie in a picture of 60 × 40"):
            viz.check_region(region, picture, (4, 7))
