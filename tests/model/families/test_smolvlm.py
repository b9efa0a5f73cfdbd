"""SmolVLM and Idefics3: tiles among the tokens and on the picture, what is refused, the processors."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_llava, random_smolvlm
from PIL import Image
from transformers import AutoModelForImageTextToText

from hones_lens import HookedVLM
from hones_lens.app.checks.parity import check_model
from hones_lens.app.runs.lengths import Lengths
from hones_lens.interventions import Box, token_mask
from hones_lens.model import model_without_weights
from hones_lens.model.tiles import n_tiles

KINDS = ("smolvlm", "idefics3")


@pytest.fixture(scope="module")
def tiled() -> tuple[Any, HookedVLM]:
    """A model whose tiles have pixels at their right and bottom that fill no patch."""
    return random_smolvlm.make_pair(random_smolvlm.make_config(vision={"image_size": 30}), 5)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_tiles_of_a_picture_are_grids_of_one_picture(tiled: tuple[Any, HookedVLM]) -> None:
    inputs = random_smolvlm.mixed_batch(tiled[1])
    assert [len(row) for row in inputs.grids] == [5, 6, 0]
    shown = [[layout.picture for layout in row] for row in inputs.layouts]
    assert shown == [[0] * 5, [0, 0, 0, 1, 1, 1], []]
    read = 28 / 30  # of a tile's side
    tile = (35 * read, 28 * read)
    assert inputs.regions[1][1] == pytest.approx((35, 0, 35 + tile[0], tile[1]))
    assert inputs.regions[1][2] == pytest.approx((0, 0, 70 * read, 28 * read))
    assert inputs.regions[1][4] == pytest.approx((0, 42, 28 * read, 42 + 42 * read))
    assert inputs.image_tokens == ((4,) * 5, (4,) * 6, ())
    groups = inputs.token_groups
    names = tiled[1].to_str_tokens(inputs.input_ids[0][groups["text"][0]])
    assert "<row_2_col_1>" in names and "<global-img>" in names and "<image>" not in names


def test_a_mark_moves_the_cells_that_lie_on_it(tiled: tuple[Any, HookedVLM]) -> None:
    """In each grid of a picture: tower, embeddings, heat map, box and positions agree."""
    model = tiled[1]
    blank = Image.new("RGB", (240, 180), (114, 114, 114))
    clean = model.prepare(blank, "what is it?")
    before = model.with_image_embeds(clean).image_embeds
    assert len(clean.grids[0]) == 5 and before is not None
    for image, (left, top, right, bottom) in enumerate(clean.regions[0]):
        for row, column in ((0, 1), (1, 0), (1, 1)):
            width, height = (right - left) / 2, (bottom - top) / 2
            x, y = left + (column + 0.5) * width, top + (row + 0.5) * height
            marked = blank.copy()
            marked.paste((255, 255, 255), (int(x) - 2, int(y) - 2, int(x) + 2, int(y) + 2))
            inputs = model.prepare(marked, "what is it?")
            names = ("vision_projector.hook_in", "vision_encoder.hook_embed")
            both = [model.run_with_cache(i, names_filter=list(names))[1] for i in (clean, inputs)]
            squares, patches = ((both[1][n] - both[0][n])[image].norm(dim=-1) for n in names)
            assert divmod(int(clean.heatmap(patches, 0, image).argmax()), 4) in {
                (2 * row + i, 2 * column + j) for i in (0, 1) for j in (0, 1)
            }
            changed = inputs.pixel_values[image] != clean.pixel_values[image]
            rows_at, columns_at = changed.any(0).nonzero().unbind(-1)
            assert rows_at.float().mean() // 14 == row and columns_at.float().mean() // 14 == column
            values = torch.zeros(clean.input_ids.shape[1])
            values[clean.image_positions(0, image)] = squares
            heat = clean.heatmap(values, 0, image)
            assert torch.equal(heat, squares.view(2, 2))
            box = token_mask(clean, Box(x - 2, y - 2, x + 2, y + 2, image=image))[0].nonzero()[:, 0]
            assert box.tolist() == [int(clean.cell_positions(0, image)[row, column])]


def test_each_cell_is_embedded_at_its_position(tiled: tuple[Any, HookedVLM]) -> None:
    """What the decoder reads at a cell's position is the projection of its own square of patches."""
    model = tiled[1]
    inputs = random_smolvlm.mixed_batch(model)
    _, cache = model.run_with_cache(inputs)
    patches, stream = cache["vision_projector.hook_in"], cache["hook_embed"]
    tower = cache["vision_encoder.ln_post.hook_normalized"]
    weight = model.vision_projector.linear.weight
    for row, tiles_before in ((0, 0), (1, 5)):
        for image in range(len(inputs.grids[row])):
            tile = tower[tiles_before + image].view(4, 4, -1)
            ln: Any = model.vision_encoder.ln_post
            for r, c in ((0, 0), (0, 1), (1, 0)):
                square = tile[2 * r : 2 * r + 2, 2 * c : 2 * c + 2] * ln.weight + ln.bias
                position = int(inputs.cell_positions(row, image)[r, c])
                torch.testing.assert_close(patches[tiles_before + image][2 * r + c], square.flatten())
                torch.testing.assert_close(stream[row, position], weight @ square.flatten())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", [1, 2])
def test_hugging_faces_processor_gives_the_same(kind: str, tiles: int) -> None:
    hf, model = random_smolvlm.make_pair(random_smolvlm.make_config(kind=kind, tiles=tiles), 6)
    prepared = random_smolvlm.mixed_batch(model)
    one, two, three = random_smolvlm.make_images()
    chats = [
        [{"role": "user", "content": [*[{"type": "image"}] * n, {"type": "text", "text": words}]}]
        for n, words in zip((1, 2, 0), random_llava.QUESTIONS, strict=True)
    ]
    texts = [
        model.tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats
    ]
    theirs = random_smolvlm.hugging_faces_processor(model.processor)
    mapping = dict(
        theirs(
            images=[[one], [two, three], []],
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
    )
    assert torch.equal(mapping["input_ids"], prepared.input_ids)
    assert mapping["pixel_values"].shape[:2] == (3, 2 if tiles == 1 else 6), "rows are padded with tiles"
    read = model.as_inputs(mapping)
    assert torch.equal(read.pixel_values, prepared.pixel_values)
    assert read.grids == prepared.grids and read.layouts == prepared.layouts
    assert torch.equal(model(mapping), model(prepared))
    expected = hf(**mapping).logits
    assert random_llava.relative_difference(model(mapping), expected, prepared) <= 2e-5
    assert torch.equal(hf(**prepared.to_hf()).logits, expected)


def test_number_of_tiles_is_the_processors() -> None:
    rng = torch.Generator().manual_seed(0)
    for longest, tile in ((56, 28), (60, 28), (90, 25), (20, 28)):
        config = random_smolvlm.make_config()
        processor = random_smolvlm.make_processor(config).image_processor
        processor.size, processor.max_image_size = {"longest_edge": longest}, {"longest_edge": tile}
        drawn = torch.randint(3, 90, (12, 2), generator=rng).tolist()
        for width, height in [(6, 3), (3, 6), *drawn]:  # odd sides become even, and need a tile more
            made = processor([[Image.new("RGB", (width, height))]], return_row_col_info=True)
            assert n_tiles(processor, width, height) == (made["rows"][0][0], made["cols"][0][0])


def test_markers_that_are_spelled(tiled: tuple[Any, HookedVLM]) -> None:
    """Idefics3's first tokenizer spells the markers of tiles; where a picture ends is found all the same."""
    hf, model = random_smolvlm.make_pair(random_smolvlm.make_config(kind="idefics3"), 7)
    model.processor.tokenizer = random_smolvlm.make_tokenizer(markers=random_smolvlm.MARKERS[:1])
    inputs = random_smolvlm.mixed_batch(model)
    assert [[layout.picture for layout in row] for row in inputs.layouts] == [[0] * 5, [0, 0, 0, 1, 1, 1], []]
    difference = random_llava.relative_difference(model(inputs), hf(**inputs.to_hf()).logits, inputs)
    assert difference <= 2e-5


def test_one_picture_twice_and_rows_taken_out(tiled: tuple[Any, HookedVLM]) -> None:
    model = tiled[1]
    one, two, _ = random_smolvlm.make_images()
    both = model.prepare([[one, two], [two], [one]], list(random_llava.QUESTIONS))
    assert [len(row) for row in both.grids] == [8, 3, 5] and len(both.pixel_values) == 16
    last = model.prepare([one, two], [random_llava.QUESTIONS[2], random_llava.QUESTIONS[1]])
    taken = both[[2, 1]]
    assert torch.equal(taken.pixel_values, last.pixel_values)
    assert (taken.grids, taken.layouts, taken.regions) == (last.grids, last.layouts, last.regions)
    torch.testing.assert_close(model(taken)[:, -4:], model(last)[:, -4:])
    encoded = model.with_image_embeds(both)[[2]]
    torch.testing.assert_close(model(encoded), model(both[[2]]))


def test_without_a_processor_each_tile_is_a_picture(tiled: tuple[Any, HookedVLM]) -> None:
    hf, model = tiled
    inputs = random_smolvlm.mixed_batch(model)
    bare = HookedVLM.from_hf(hf)
    located = bare.as_inputs(inputs.to_hf())
    assert [layout.picture for layout in located.layouts[1]] == list(range(6))
    assert torch.equal(bare(inputs.to_hf()), model(inputs))


def test_blank_tiles_are_kept(tiled: tuple[Any, HookedVLM]) -> None:
    """Zeros are a grey picture, not padding, where there are tokens for them."""
    model = tiled[1]
    inputs = random_smolvlm.mixed_batch(model)
    grey = replace(inputs, pixel_values=torch.zeros_like(inputs.pixel_values))
    assert torch.equal(model(grey.to_hf()), model(grey))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values_videos": torch.ones(1)}, "video is not handled"),
        ({"image_grid_thw": torch.ones(1, 3)}, "'image_grid_thw' is not read by smolvlm"),
        ({"pixel_attention_mask": torch.ones(1, 11, 30, 29)}, "does not fit pixel_values"),
        ({"pixel_attention_mask": torch.zeros(1, 11, 30, 30)}, "hides a part of a tile"),
        ({"pixel_values": None}, "44 image tokens in input_ids, but pixel_values hold 0 tiles of 4"),
        ({"pixel_values": torch.ones(11, 3, 28, 30)}, r"this model reads tiles \[n_tiles, 3, 30, 30\]"),
        ({"pixel_values": torch.ones(10, 3, 30, 30)}, "44 image tokens .* 10 tiles of 4 tokens, 40 in all"),
    ],
)
def test_inputs_that_do_not_fit(tiled: tuple[Any, HookedVLM], change: dict[str, Any], message: str) -> None:
    inputs = random_smolvlm.mixed_batch(tiled[1])
    with pytest.raises(ValueError, match=message):
        tiled[1].as_inputs(inputs.to_hf() | change)


def test_a_row_that_cuts_a_tile(tiled: tuple[Any, HookedVLM]) -> None:
    model = tiled[1]
    inputs = random_smolvlm.mixed_batch(model)
    ids = inputs.input_ids.clone()
    ids[0, inputs.image_positions(0, 4)[0]] = 7
    ids[2, -1] = model.cfg.image_token_id
    with pytest.raises(ValueError, match="row 0 has 19 image tokens, not a multiple of 4"):
        model.as_inputs({**inputs.to_hf(), "input_ids": ids})


def test_video_tokens_are_refused() -> None:
    model = random_smolvlm.make_pair()[1]
    model.tokenizer.add_tokens(["<video>"], special_tokens=True)
    with pytest.raises(ValueError, match="video is not handled"):
        model.prepare(None, "what is <video> it?")


def test_other_families_refuse_a_mask_of_pixels() -> None:
    model = random_llava.make_pair()[1]
    inputs = random_llava.mixed_batch(model)
    mapping = inputs.to_hf() | {"pixel_attention_mask": torch.ones(3, 28, 28)}
    with pytest.raises(ValueError, match="'pixel_attention_mask' is not read by llava"):
        model(mapping)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_factor": 3}, "config.scale_factor=3 does not divide the 4 patches"),
        ({"vision": {"image_size": [28, 28]}}, r"vision_config.image_size=\[28, 28\] is not handled"),
        ({"vision": {"num_channels": 1}}, "vision_config.num_channels=1 is not handled"),
        ({"vision": {"attention_dropout": 0.5}}, "vision_config.attention_dropout=0.5 is not handled"),
        ({"vision": {"hidden_act": "nothing"}}, "vision_config.hidden_act='nothing' is not handled"),
        ({"text": {"model_type": "mixtral"}}, "text_config.model_type='mixtral' is not handled"),
    ],
)
def test_configs_that_are_refused(tiled: tuple[Any, HookedVLM], options: dict, message: str) -> None:
    top = {key: value for key, value in options.items() if key not in ("text", "vision")}
    config = deepcopy(tiled[0].config)
    config.vision_config.image_size = 28
    for part, values in {"text_config": options.get("text"), "vision_config": options.get("vision")}.items():
        for key, value in (values or {}).items():
            object.__setattr__(getattr(config, part), key, value)
    for key, value in top.items():
        setattr(config, key, value)
    family = type(tiled[1])
    with pytest.raises(ValueError, match=message):
        family.from_config(config, "it", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_checked(kind: str, tmp_path: Path) -> None:
    hf, model = random_smolvlm.make_pair(random_smolvlm.make_config(kind=kind), 8)
    inputs = random_smolvlm.mixed_batch(model)
    folder = model.save_pretrained(tmp_path / "saved")
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(theirs(**inputs.to_hf()).logits, hf(**inputs.to_hf()).logits)
    loaded = HookedVLM.from_pretrained(str(folder))
    again = random_smolvlm.mixed_batch(loaded)
    assert torch.equal(again.input_ids, inputs.input_ids) and again.regions == inputs.regions
    assert torch.equal(loaded(again), model(inputs))
    assert loaded.processor.settings == {"image_seq_len": 4}


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_every_check_passes(kind: str) -> None:
    hf, model = random_smolvlm.make_pair(random_smolvlm.make_config(kind=kind), 9)
    checks = check_model(model, hf, 6)
    assert [check.name for check in checks if not check.passed] == []
    assert any("5 grids of 4 × 4, 0 of 10 marks" in check.figure for check in checks)


def test_a_plan_counts_tiles(tmp_path: Path) -> None:
    """As many tokens as the prompt has, by a folder's picture processor or a known model's settings."""
    model = random_smolvlm.make_pair()[1]
    folder = model.save_pretrained(tmp_path / "saved")
    model.cfg = replace(model.cfg, model_name=str(folder))
    lengths = Lengths(model)
    for picture in random_smolvlm.make_images():
        inputs = model.prepare(picture, "what is it?")
        assert lengths.n_grids(picture.size) == len(inputs.grids[0])
        others = int((inputs.token_groups["text"] & ~inputs.question_mask).sum())
        assert 0 <= lengths.of_picture(picture.size) - int(inputs.image_mask.sum()) <= others
    known = Lengths(model_without_weights("smolvlm-256m"))
    assert known.n_grids((640, 480)) == 3 * 4 + 1 and known.of_picture((640, 480)) == 13 * (64 + 3)
    assert Lengths(random_llava.make_pair()[1]).n_grids((640, 480)) == 1
