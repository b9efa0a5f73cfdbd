"""Attention over pictures: what lies on them equals Hugging Face's attentions, where the model saw it."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import example_results as made, random_llava, random_qwen
from helpers.attention_cases import FAMILIES, HEADS, ROW, patches, pictures_of, twin
from helpers.figures import check_drawing, drawn, groups, maps_of
from PIL import Image

from hones_lens.analysis.attention import HeadAttention, head_attention
from hones_lens.viz import attention_plots, theme


def looked(family: ModuleType, heads=tuple(HEADS), **options) -> HeadAttention:
    both, inputs, _ = twin(family)
    return head_attention(both.model, inputs, heads, row=ROW, **options)


def number_in(text: str, name: str) -> float:
    return float(text.split(name)[1].split(",")[0].split("\n")[0])


@FAMILIES
def test_every_head_lies_on_every_picture_where_the_model_saw_it(family_maps) -> None:
    family, figure = family_maps
    both, inputs, theirs = twin(family)
    axes = maps_of(figure)
    assert len(axes) == 2 * len(HEADS)
    cells = [(image, layer, head) for image in (0, 1) for layer, head in HEADS]
    for place, (image, layer, head) in zip(axes, cells, strict=True):
        expected = theirs[layer, ROW, head, -1][patches(both, inputs, ROW, image)].numpy()
        picture, over = place.images
        np.testing.assert_array_equal(picture.get_array(), np.asarray(pictures_of(family)[image]))
        np.testing.assert_allclose(over.get_array(), expected, atol=1e-6)
        left, top, right, bottom = inputs.regions[ROW][image]
        assert over.get_extent() == [left - 0.5, right - 0.5, bottom - 0.5, top - 0.5]
        assert over.norm.vmax == pytest.approx(expected.max(), abs=1e-6)
        assert place.get_title("left") == f"L{layer}H{head} · image {image}"
        (told,) = groups(place, "told")
        assert number_in(told.get_text(), "picture ") == pytest.approx(expected.sum(), abs=0.0051)
        assert number_in(told.get_text(), "brightest ") == pytest.approx(expected.max(), abs=0.0051)
        (outline,) = groups(place, "brightest")
        row, column = np.unravel_index(expected.argmax(), expected.shape)
        wide, tall = (right - left) / expected.shape[1], (bottom - top) / expected.shape[0]
        corner = (left + column * wide - 0.5, top + row * tall - 0.5)
        assert outline.get_xy() == pytest.approx(corner)
        assert (outline.get_width(), outline.get_height()) == pytest.approx((wide, tall))


@pytest.fixture
def family_maps(made) -> tuple[ModuleType, theme.Plot]:
    return made, looked(made).plot(pictures_of(made))


@FAMILIES
def test_what_the_processor_cuts_off_is_veiled(family_maps) -> None:
    family, figure = family_maps
    _, inputs, _ = twin(family)
    width, height = pictures_of(family)[0].size
    cut = groups(maps_of(figure)[0], "cut")
    if family is random_qwen:
        assert not cut and "Veiled" not in figure.heading.note
        return
    left, top, right, bottom = inputs.regions[ROW][0]
    veiled = sum(patch.get_width() * patch.get_height() for patch in cut)
    assert veiled == pytest.approx(width * height - (right - left) * (bottom - top)) and veiled > 0
    for patch in cut:
        middle = patch.get_x() + 0.5 + patch.get_width() / 2
        assert not left < middle < right
    assert "Veiled: cut off before the model sees it" in figure.heading.note


def planted(image: int) -> HeadAttention:
    """Attention of the tiny LLaVA with two tokens of an image that all heads look at."""
    both, inputs, _ = twin(random_llava)
    found = looked(random_llava)
    grid = patches(both, inputs, ROW, image)
    received = found.received.clone()
    received[grid[[0, 2], [1, 3]]] = 9 * received[grid].median()
    object.__setattr__(found, "received", received)
    return found


def test_sinks_are_put_out_crossed_and_told() -> None:
    _, inputs, _ = twin(random_llava)
    found = planted(1)
    figure = found.plot(pictures_of(random_llava), remove_sinks=True)
    untouched, touched = maps_of(figure)[:3], maps_of(figure)[3:]
    for head, place in enumerate(untouched):
        np.testing.assert_array_equal(place.images[1].get_array(), found.on_image(0)[head].numpy())
        assert not groups(place, "removed") and "sinks" not in groups(place, "told")[0].get_text()
    left, top, right, bottom = inputs.regions[ROW][1]
    for head, place in enumerate(touched):
        whole = found.on_image(1)[head]
        left_over = whole.clone()
        left_over[0, 1] = left_over[2, 3] = 0.0
        np.testing.assert_array_equal(place.images[1].get_array(), left_over.numpy())
        assert place.images[1].norm.vmax == float(left_over.max())
        (crosses,) = groups(place, "removed")
        cell = torch.tensor([(right - left) / 4, (bottom - top) / 4])
        expected = torch.tensor([[1.5, 0.5], [3.5, 2.5]]) * cell + torch.tensor([left - 0.5, top - 0.5])
        np.testing.assert_allclose(crosses.get_offsets(), expected, rtol=1e-5)
        told = groups(place, "told")[0].get_text()
        assert number_in(told, "picture ") == pytest.approx(float(whole.sum()), abs=0.0051)
        assert number_in(told, "sinks ") == pytest.approx(float(whole[0, 1] + whole[2, 3]), abs=0.0051)
    note = figure.heading.note.replace("\n", " ")
    assert "2 of 32 image tokens, sinks that draw over 5 times the median's attention" in note
    check_drawing(figure)


def test_sinks_that_are_given_and_pictures_without_any() -> None:
    found = looked(random_llava)
    given = torch.zeros(4, 4, dtype=torch.bool)
    given[3] = True
    figure = found.plot(pictures_of(random_llava), images=[1], remove_sinks=given, smooth=True)
    assert len(maps_of(figure)) == 3
    for head, place in enumerate(maps_of(figure)):
        values = found.on_image(1)[head]
        np.testing.assert_array_equal(place.images[1].get_array()[:3], values[:3].numpy())
        assert not place.images[1].get_array()[3].any()
        assert place.images[1].get_interpolation() == "bicubic" and not groups(place, "brightest")
        told = groups(place, "told")[0].get_text()
        assert number_in(told, "sinks ") == pytest.approx(float(values[3].sum()), abs=0.0051)
    assert "4 of 16 image tokens, sinks as given" in figure.heading.note
    none = found.plot(pictures_of(random_llava), remove_sinks=True, times=1000.0)
    assert "No sinks were removed: of 32 image tokens there are none" in none.heading.note
    with pytest.raises(ValueError, match=r"a mask of \(2, 2\) for image 0, whose grid is \(4, 4\)"):
        found.plot(pictures_of(random_llava), remove_sinks=torch.ones(2, 2, dtype=torch.bool))


def test_one_scale_or_each_its_own() -> None:
    found = looked(random_llava)
    largest = max(float(found.on_image(image).max()) for image in (0, 1))
    shared = found.plot(pictures_of(random_llava), one_scale=True)
    assert {place.images[1].norm.vmax for place in maps_of(shared)} == {largest}
    bar = next(axes for axes in shared.axes if axes.get_ylabel() == "attention")
    assert bar.get_ylim() == (0, pytest.approx(largest))
    own = found.plot(pictures_of(random_llava))
    assert len({place.images[1].norm.vmax for place in maps_of(own)}) == 6
    assert "Each map has its own scale" in own.heading.note


def test_many_heads_stand_in_lines_of_about_one_length() -> None:
    heads = [(layer, head) for layer in range(3) for head in range(3)][:5]
    figure = drawn(looked(random_llava, heads).plot(pictures_of(random_llava), images=[0]))
    tops = [round(place.get_window_extent().y1) for place in maps_of(figure)]
    assert len(set(tops)) == 2 and tops == sorted(tops, reverse=True)
    assert [tops.count(top) for top in sorted(set(tops), reverse=True)] == [3, 2]
    box = maps_of(figure)[0].get_window_extent()
    assert box.width / box.height == pytest.approx(40 / 31, rel=0.01)
    check_drawing(figure)


def test_who_looks_is_the_heading() -> None:
    figure = looked(random_llava, source="question").plot(pictures_of(random_llava))
    assert figure.heading.title.startswith("Attention from question, mean over")
    assert looked(random_llava).plot(pictures_of(random_llava), title="here").heading.title == "here"


def test_what_is_refused() -> None:
    found, pictures = looked(random_llava), pictures_of(random_llava)
    with pytest.raises(ValueError, match="1 pictures for a row with 2 images"):
        found.plot(pictures[0])
    with pytest.raises(IndexError, match="no image 2"):
        found.plot(pictures, images=[2])
    with pytest.raises(ValueError, match=r"the region .* does not lie in a picture of 10 × 10"):
        found.plot([picture.resize((10, 10)) for picture in pictures])


# --- One map -----------------------------------------------------------------------------------


def test_one_map_over_a_part_of_the_picture() -> None:
    figure = attention_plots.attention_over_image(
        made.image((160, 112)), made.attention(), region=(24.0, 0.0, 136.0, 112.0)
    )
    place = figure.axes[0]
    assert place.images[1].get_extent() == [23.5, 135.5, 111.5, -0.5]
    (brightest,) = groups(place, "brightest")
    assert brightest.get_xy() == (24 + 14 - 0.5, 14 - 0.5)
    assert [patch.get_x() for patch in groups(place, "cut")] == [-0.5, 135.5]
    check_drawing(figure)
    for region in ((0.0, 0.0, 200.0, 112.0), (50.0, 0.0, 50.0, 112.0)):
        with pytest.raises(ValueError, match="does not lie in a picture of 160 × 112"):
            attention_plots.attention_over_image(made.image((160, 112)), made.attention(), region=region)


def test_the_veil_is_seen_and_what_is_lit_is_the_picture() -> None:
    image = Image.new("RGB", (160, 112), (200, 30, 30))
    bare = attention_plots.attention_over_image(
        image, made.attention(), region=(24.0, 0.0, 136.0, 112.0), bare=True
    )
    pixels = np.asarray(theme.plot_image(bare).convert("RGB")).astype(int)
    scale = pixels.shape[1] / 160

    def at(x, y):
        return pixels[int(y * scale), int(x * scale)]

    assert at(24 + 21, 21).tolist() == [200, 30, 30]
    assert at(80, 90).max() < 100
    assert at(10, 50).min() > 200 and at(150, 50).min() > 200
