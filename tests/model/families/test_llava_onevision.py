"""LLaVA-OneVision: pooled grids, wholes among several pictures, what is refused, the processors."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_anyres, random_llava
from PIL import Image
from transformers import AutoModelForImageTextToText

from hones_lens import HookedVLM
from hones_lens.analysis.patching.sites import vision_mask
from hones_lens.app.checks.parity import check_model
from hones_lens.interventions import token_mask
from hones_lens.viz.image_plots import check_region

GREY, WHITE = (114, 114, 114), (255, 255, 255)


def make_pair(seed: int = 5, **options: Any) -> tuple[Any, HookedVLM]:
    return random_anyres.make_pair(random_anyres.make_config(kind="llava_onevision", **options), seed)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, HookedVLM]:
    return make_pair()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_grids_of_one_picture_and_of_several(pair: tuple[Any, HookedVLM]) -> None:
    """By hand: 4 × 6 patches are more than 1.1² tiles of 9 and become 2 × 3 cells; of two, each is whole."""
    inputs = random_anyres.mixed_batch(pair[1])
    assert inputs.grids == (((3, 3), (2, 3)), ((3, 3), (3, 3)), ())
    assert inputs.patch_grids == (((3, 3), (4, 6)), ((3, 3), (3, 3)), ())
    assert inputs.image_tokens == ((9, 2 * 4), (10, 10), ())
    assert inputs.tower_entries == ((1, 4), (1, 1), ())
    assert [[layout.picture for layout in row] for row in inputs.layouts] == [[0, 0], [0, 1], []]
    assert inputs.regions[1] == ((0, -21, 70, 49), (-28, 0, 56, 84)), "70 × 28 and 28 × 84, squared"
    assert inputs.batch_num_images.tolist() == [1, 2]
    newlines = inputs.newline_mask.sum(-1).tolist()
    assert newlines == [2, 2, 0]
    assert inputs.newline_mask[1, inputs.image_positions(1, 0)[-1]]


def test_cells_that_are_pooled_lie_where_their_region_says(pair: tuple[Any, HookedVLM]) -> None:
    """Pooling keeps what rises evenly: the middle of a cell is that of its share of the patches."""
    for patches, grid in (((4, 6), (2, 3)), ((7, 12), (3, 5)), ((9, 9), (8, 8))):
        rows, columns = (torch.arange(n) + 0.5 for n in patches)
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        pooled = pair[1].pooled(places, grid)
        for axis in (0, 1):
            expected = (torch.arange(grid[axis]) + 0.5) * patches[axis] / grid[axis]
            found = pooled[..., axis].movedim(axis, -1)
            torch.testing.assert_close(found, expected.expand_as(found))


def test_a_mark_changes_the_cells_around_it(pair: tuple[Any, HookedVLM]) -> None:
    """Tower, heat map and mask of the tower agree where patches are pooled, too."""
    model, blank = pair[1], Image.new("RGB", (403, 310), GREY)
    clean = model.prepare(blank, "what is it?")
    assert clean.grids[0] == ((3, 3), (2, 3))
    left, top, right, bottom = clean.regions[0][1]
    for row, column in ((0, 0), (1, 2), (2, 3), (3, 5)):
        x, y = left + (column + 0.5) * (right - left) / 6, top + (row + 0.5) * (bottom - top) / 4
        marked = blank.copy()
        marked.paste(WHITE, (int(x) - 2, int(y) - 2, int(x) + 2, int(y) + 2))
        inputs = model.prepare([blank, marked], ["what is it?"] * 2)
        name = "vision_encoder.hook_embed"
        _, cache = model.run_with_cache(inputs, names_filter=name, stop_at_layer=0)
        before, after = cache[name].chunk(2)
        heat = clean.heatmap((after - before).norm(dim=-1)[1:], 0, 1)
        assert heat.nonzero().tolist() == [[row, column]]
        cell = torch.zeros_like(clean.image_mask)
        cell[0, clean.cell_positions(0, 1)[row // 2, column // 2]] = True
        chosen = clean.heatmap(vision_mask(clean, cell, 9, "cell")[1:].float(), 0, 1)
        assert int(chosen.sum()) == 4 and chosen[row, column] == 1


def test_a_mark_in_a_square(pair: tuple[Any, HookedVLM]) -> None:
    """Of two pictures each is padded to a square: a mark changes the one patch that its region names."""
    model, blank = pair[1], Image.new("RGB", (300, 203), GREY)
    clean = model.prepare([blank, blank], "what is it?")
    left, top, right, bottom = clean.regions[0][1]
    assert check_region(clean.regions[0][1], blank, (3, 3)) == (left, top, right, bottom)
    with pytest.raises(ValueError, match="does not lie in a picture of 100 × 203"):
        check_region(clean.regions[0][1], Image.new("RGB", (100, 203)), (3, 3))
    for row, column in ((1, 0), (1, 2), (0, 1)):
        x, y = left + (column + 0.5) * (right - left) / 3, top + (row + 0.7) * (bottom - top) / 3
        marked = blank.copy()
        marked.paste(WHITE, (int(x) - 2, int(y) - 2, int(x) + 2, int(y) + 2))
        inputs = model.prepare([blank, marked], "what is it?")
        _, cache = model.run_with_cache(inputs, names_filter="vision_encoder.hook_embed", stop_at_layer=0)
        before, after = cache["vision_encoder.hook_embed"]
        change = (after - before).norm(dim=-1)
        assert inputs.heatmap(change, 0, 1).nonzero().tolist() == [[row, column]]


@pytest.mark.parametrize("together", [True, False])
def test_hugging_faces_processor_gives_the_same(pair: tuple[Any, HookedVLM], together: bool) -> None:
    """Pictures listed by row are those of `prepare`; in one list each is alone, and cut."""
    hf, model = pair
    prepared, pictures = random_anyres.mixed_batch(model), random_anyres.make_images()
    texts = [
        "USER: " + "<image>\n" * n + f"{words} ASSISTANT:"
        for n, words in zip((1, 2, 0), random_llava.QUESTIONS, strict=True)
    ]
    theirs = random_anyres.hugging_faces_processor(model.processor)
    images = [[pictures[0]], pictures[1:]] if together else pictures
    mapping = dict(theirs(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"))
    read = model.as_inputs(mapping)
    assert read.batch_num_images.tolist() == ([1, 2] if together else [1, 1, 1])
    assert torch.equal(mapping["input_ids"], prepared.input_ids) == together
    if together:
        assert torch.equal(read.pixel_values, prepared.pixel_values)
        assert read.grids == prepared.grids and read.layouts == prepared.layouts
    expected = hf(**mapping).logits
    assert random_llava.relative_difference(model(mapping), expected, read) <= 2e-5
    assert torch.equal(hf(**read.to_hf()).logits, expected)
    bare = {key: value for key, value in mapping.items() if key != "batch_num_images"}
    if not together:
        assert torch.equal(model(bare), model(mapping))


def test_one_picture_twice_and_rows_taken_out(pair: tuple[Any, HookedVLM]) -> None:
    """A picture alone and the same among others are read in two ways."""
    model = pair[1]
    one, two, _ = random_anyres.make_images()
    both = model.prepare([[one, two], [two], [one]], list(random_llava.QUESTIONS))
    assert both.tower_entries == ((1, 1), (1, 3), (1, 4)) and both.batch_num_images.tolist() == [2, 1, 1]
    last = model.prepare([[one], [one, two]], [random_llava.QUESTIONS[2], random_llava.QUESTIONS[0]])
    taken = both[[2, 0]]
    for key in ("pixel_values", "image_sizes", "batch_num_images"):
        assert torch.equal(getattr(taken, key), getattr(last, key)), key
    assert (taken.grids, taken.layouts, taken.regions) == (last.grids, last.layouts, last.regions)
    torch.testing.assert_close(model(taken)[:, -4:], model(last)[:, -4:])
    assert both[[0]].batch_num_images.tolist() == [2]
    shown = model.pictures(both)
    assert torch.equal(model.with_pictures(both, shown).pixel_values, both.pixel_values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values_videos": torch.ones(1)}, "video is not handled"),
        (
            {"batch_num_images": torch.tensor([1, 1])},
            r"batch_num_images=\[1, 1\] have 2 pictures, image_sizes 3",
        ),
        ({"batch_num_images": torch.tensor([1, 1, 1])}, "37 image tokens .* 3 pictures of"),
        ({"image_sizes": None}, "pixel_values without image_sizes"),
    ],
)
def test_inputs_that_do_not_fit(pair: tuple[Any, HookedVLM], change: dict[str, Any], message: str) -> None:
    inputs = random_anyres.mixed_batch(pair[1])
    with pytest.raises(ValueError, match=message):
        pair[1].as_inputs(inputs.to_hf() | change)


def test_pictures_of_two_rows_put_together(pair: tuple[Any, HookedVLM]) -> None:
    model = pair[1]
    one, two, _ = random_anyres.make_images()
    inputs = model.prepare([[one, two], [one, two]], list(random_llava.QUESTIONS[:2]))
    mapping = inputs.to_hf() | {"batch_num_images": torch.tensor([4])}
    with pytest.raises(ValueError, match=r"batch_num_images=\[4\] put pictures of row 0 and the next"):
        model.as_inputs(mapping)


def test_video_tokens_are_refused(pair: tuple[Any, HookedVLM]) -> None:
    model = pair[1]
    ids = torch.tensor([[5, model.cfg.d_vocab - 1, 6]])
    with pytest.raises(ValueError, match="video tokens; video is not handled"):
        model(ids)
    with pytest.raises(ValueError, match="inputs key 'batch_num_images' is not read by llava_next"):
        random_anyres.make_pair()[1]({"input_ids": ids, "batch_num_images": torch.tensor([1])})


@pytest.mark.parametrize("ratio", ["square", "anyres", "anyres_max_", "anyres_max_0"])
def test_other_aspect_ratios_are_refused(pair: tuple[Any, HookedVLM], ratio: str) -> None:
    config = deepcopy(pair[0].config)
    config.vision_aspect_ratio = ratio
    with pytest.raises(ValueError, match=f"config.vision_aspect_ratio='{ratio}' is not handled"):
        type(pair[1]).from_config(config, "it", torch.device("cpu"), torch.float32)


def test_saved_and_loaded(tmp_path: Path) -> None:
    hf, model = make_pair(8)
    inputs = random_anyres.mixed_batch(model)
    folder = model.save_pretrained(tmp_path / "saved")
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(theirs(**inputs.to_hf()).logits, hf(**inputs.to_hf()).logits)
    loaded = HookedVLM.from_pretrained(str(folder))
    again = random_anyres.mixed_batch(loaded)
    assert torch.equal(again.input_ids, inputs.input_ids) and again.regions == inputs.regions
    assert torch.equal(loaded(again), model(inputs))
    assert loaded.processor.settings == model.processor.settings


def test_a_group_of_newlines_has_no_patch(pair: tuple[Any, HookedVLM]) -> None:
    inputs = random_anyres.mixed_batch(pair[1])[:2]
    with pytest.raises(ValueError, match="token group 'newline' has no image token in row 0"):
        vision_mask(inputs, token_mask(inputs, "newline"), 9, "newline")


@pytest.mark.exhaustive
def test_every_check_passes() -> None:
    hf, model = make_pair(9)
    checks = check_model(model, hf, 6)
    assert [check.name for check in checks if not check.passed] == []
    assert any("2 grids of" in check.figure and "0 of 10 marks" in check.figure for check in checks)
