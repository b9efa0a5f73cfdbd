"""What is Qwen2-VL's own; what it shares with Qwen2.5-VL is tested there and in `test_parity.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_qwen
from PIL import Image

from hones_lens import HookedVLM


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return random_qwen.make_pair(random_qwen.make_config(kind="qwen2_vl"), 5)[1]


def test_blocks_of_the_tower_see_the_whole_picture(model: HookedVLM) -> None:
    with pytest.raises(ValueError, match="attends to whole pictures in every block"):
        model.vision_windows(random_qwen.mixed_batch(model))
    names = [f"vision_encoder.blocks.{layer}.attn.hook_pattern" for layer in range(3)]
    _, cache = model.run_with_cache(random_qwen.mixed_batch(model), names_filter=names)
    patches = max(r * c for row in random_qwen.mixed_batch(model).patch_grids for r, c in row)
    assert [cache[name].shape for name in names] == [(3, 3, patches, patches)] * 3


@torch.no_grad()
def test_a_mark_moves_the_cells_where_the_heat_map_has_it(model: HookedVLM) -> None:
    blank = Image.new("RGB", (84, 56), (114, 114, 114))
    (rows, columns) = model.prepare(blank, "Look.").grids[0][0]
    for row, column in ((0, 0), (1, columns - 1), (rows - 1, 2)):
        marked = blank.copy()
        box = (84 * column // columns, 56 * row // rows, 84 * (column + 1) // columns, 56 * (row + 1) // rows)
        marked.paste((255, 255, 255), box)
        inputs = model.prepare([blank, marked], ["Look.", "Look."])
        _, cache = model.run_with_cache(inputs, names_filter="vision_encoder.hook_embed")
        moved = (cache["vision_encoder.hook_embed"][1] - cache["vision_encoder.hook_embed"][0]).norm(dim=-1)
        by_cell = inputs.heatmap(moved, 1).unflatten(1, (columns, 2)).unflatten(0, (rows, 2)).sum((1, 3))
        assert divmod(int(by_cell.argmax()), columns) == (row, column)


REFUSED: dict[str, tuple[str, str, Any]] = {
    r"vision_config\.hidden_size=48 is not handled; handled: 32": ("vision", "hidden_size", 48),
    r"vision_config\.hidden_act='nonsense' is not handled": ("vision", "hidden_act", "nonsense"),
    r"vision_config\.in_channels=1 is not handled": ("vision", "in_channels", 1),
    r"text_config\.use_sliding_window=True is not handled": ("text", "use_sliding_window", True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_config_values_that_are_not_handled(message: str) -> None:
    part, key, value = REFUSED[message]
    config = random_qwen.make_config(kind="qwen2_vl")
    setattr(getattr(config, f"{part}_config"), key, value)
    with pytest.raises(ValueError, match=message):
        type(random_qwen.make_pair(random_qwen.make_config(kind="qwen2_vl"))[1]).from_config(
            config, "tiny", torch.device("cpu"), torch.float32
        )


def test_video_is_refused(model: HookedVLM) -> None:
    inputs = random_qwen.mixed_batch(model)
    ids = inputs.input_ids.clone()
    ids[2, -2] = model.video_token_id
    with pytest.raises(ValueError, match="video is not handled"):
        model({**inputs.to_hf(), "input_ids": ids})
