"""Values lie on the picture that the model saw: turned upright where EXIF says so, from image or file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import picture_files, random_llava
from helpers.attention_cases import HEADS
from helpers.figures import maps_of
from PIL import Image
from transformers.image_utils import load_image

from hones_lens import HookedVLM, Labelled, viz
from hones_lens.analysis import folded_attention, head_attention


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return random_llava.make_pair()[1]


def drawn_on(figure) -> list[np.ndarray]:
    """Every picture under a map, and whatever else the map's axes show."""
    return [np.asarray(image.get_array()) for axes in maps_of(figure) for image in axes.images]


def figures(model: HookedVLM, picture) -> dict[str, list[np.ndarray]]:
    inputs = model.prepare(picture, "is it red?")
    (region,) = inputs.regions[0]
    grid = torch.arange(16.0).view(4, 4)
    lens = Labelled("logit of 'a' by", torch.arange(32.0).view(2, 4, 4), ("layer", "row", "column"))
    return {
        "attention_over_image": drawn_on(viz.attention_over_image(picture, grid, region=region)),
        "attention_maps": drawn_on(head_attention(model, inputs, HEADS).plot(picture)),
        "on_image": drawn_on(viz.on_image(grid, inputs, picture)),
        "image_lens": drawn_on(viz.image_lens(lens, picture, region)),
    }


def test_figures_turn_the_picture_as_prepare_does(model: HookedVLM, tmp_path: Path) -> None:
    file = picture_files.write("orientation 6", tmp_path)
    with Image.open(file) as opened:
        upright = load_image(opened)
        expected = figures(model, upright)
        assert any(array.shape == (60, 40, 3) for array in expected["attention_over_image"])
        for given in (file, opened):
            for name, arrays in figures(model, given).items():
                for array, other in zip(arrays, expected[name], strict=True):
                    np.testing.assert_array_equal(array, other, err_msg=name)


def test_token_views_turn_the_picture_as_prepare_does(model: HookedVLM, tmp_path: Path) -> None:
    pytest.importorskip("circuitsvis")
    file = picture_files.write("orientation 6", tmp_path)
    folded = folded_attention(model, model.prepare(file, "is it red?"), list(HEADS))
    with Image.open(file) as opened:
        views = [viz.attention_tokens(folded, picture).html for picture in (load_image(opened), opened, file)]
    shown = [html.partition("<details>")[2] for html in views]
    assert "<image href=" in shown[0] and shown[0] == shown[1] == shown[2]
