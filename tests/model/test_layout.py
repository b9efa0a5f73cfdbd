"""Where the cells of a grid lie among an image's tokens, by hand and on a model that drops a patch."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from helpers.families import family_pair

from hones_lens.model import ImageLayout


def test_cells_of_a_layout_with_all_kinds_of_tokens() -> None:
    layout = ImageLayout(leading=1, missing=1, row_end=1, trailing=2)
    assert layout.cells((2, 3)).tolist() == [
        [-1, 1, 2],
        [4, 5, 6],
    ]  # class, two cells, newline, three cells, …
    assert layout.n_tokens((2, 3)) == 1 + 2 + 1 + 3 + 1 + 2


def test_newlines_and_tiles_by_hand() -> None:
    """Two tiles of 2 × 3 patches side by side, without their first row and first column."""
    layout = ImageLayout(leading=1, row_end=1, trailing=1, entries=2, tile=(2, 3), across=2, cut=(1, 1))
    assert layout.newlines((1, 5)).tolist() == [False] * 6 + [True, True]
    assert layout.patch_places((1, 5)).tolist() == [[4, 5, 9, 10, 11]]
    assert ImageLayout(missing=2, row_end=1).newlines((2, 3)).tolist() == [False, True, *[False] * 3, True]
    assert ImageLayout.of_json(json.loads(json.dumps(asdict(layout)))) == layout


def test_siglip_without_its_first_patch() -> None:
    """The tokens are those of the patches 1 to 15: the cell before them has none, and is 0 on a map."""
    pair = family_pair("llava of mistral and siglip")
    first = int(pair.inputs.image_mask[0].nonzero()[0, 0])
    expected = torch.arange(-1, 15).view(4, 4) + first
    expected[0, 0] = -1
    assert pair.inputs.image_tokens == ((15,), (15, 15), ())
    assert torch.equal(pair.inputs.cell_positions(0, 0), expected)
    values = torch.arange(float(pair.inputs.input_ids.shape[1]))
    assert torch.equal(pair.inputs.heatmap(values), expected.clamp(min=0).float())
    with torch.no_grad():
        _, cache = pair.model.run_with_cache(pair.inputs, names_filter="vision_projector.hook_in")
        _, tower = pair.model.run_with_cache(
            pair.inputs, names_filter="vision_encoder.blocks.0.hook_resid_post"
        )
    features, states = cache["vision_projector.hook_in"], tower["vision_encoder.blocks.0.hook_resid_post"]
    assert features.shape[1] == 15 and torch.equal(features, states[:, 1:])
