"""Values over a picture's patches: what is drawn equals the numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import random_llava
from helpers.attention_cases import FAMILIES, ROW, patches, pictures_of, twin
from helpers.figures import check_drawing, drawn, groups, maps_of

from hones_lens import VLMInputs
from hones_lens.results.labelled import Labelled
from hones_lens.viz.image_plots import on_image


def by_position(family, *lead: int, interval: bool = False, seed: int = 0) -> Labelled:
    """As patching by position gives it: layers, then positions with names."""
    _, inputs, _ = twin(family)
    length = inputs.input_ids.shape[1]
    values = torch.randn(*lead, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ends = {"low": values - 0.8, "high": values + 0.8} if interval else {}
    names = tuple(f"{i} token" for i in range(length))
    axes = ("layer", "position")[-values.ndim :]
    return Labelled("share restored", values, axes, {"position": names}, n=12, **ends)


def scale_of(figure):
    """The colour bar's axes."""
    (bar,) = [axes for axes in figure.axes if not axes.images and axes.get_ylabel() == "" and axes.axison]
    return bar


@pytest.mark.exhaustive
@FAMILIES
@pytest.mark.parametrize("image", [0, 1])
def test_patching_by_position_lies_on_the_patches(made, image: int) -> None:
    both, inputs, _ = twin(made)
    result = by_position(made, 3)
    picture = pictures_of(made)[image]
    figure = on_image(result, inputs, picture, row=ROW, image=image)
    grid = patches(both, inputs, ROW, image)
    shown = result.values[:, grid]
    places = maps_of(figure)
    assert [place.get_title("left") for place in places] == ["layer 0", "layer 1", "layer 2"]
    left, top, right, bottom = inputs.regions[ROW][image]
    for place, expected in zip(places, shown, strict=True):
        over = place.images[1]
        np.testing.assert_allclose(over.get_array(), expected.numpy(), rtol=1e-6)
        assert over.get_extent() == [left - 0.5, right - 0.5, bottom - 0.5, top - 0.5]
        assert over.norm.vmax == -over.norm.vmin == pytest.approx(float(shown.abs().max()))
        assert over.get_cmap().name == "hones_diverging"
    assert figure.heading.title == "Share restored (n = 12)".replace(" = ", "\u00a0=\u00a0")
    off = (~inputs.image_mask[ROW]).nonzero()[:, 0]
    _, at = divmod(int(result.values[:, off].abs().argmax()), len(off))
    largest = float(result.values[:, off].flatten()[result.values[:, off].abs().argmax()])
    told = f"Largest off the picture: {largest:.2f} at {int(off[at])} token.".replace("-", "−")
    assert told in figure.heading.note
    check_drawing(figure)


@FAMILIES
def test_the_same_values_in_every_form_that_they_may_have(made) -> None:
    both, inputs, _ = twin(made)
    picture, grid = pictures_of(made)[1], patches(both, inputs, ROW, 1)
    values = by_position(made).values.float()
    on_grid = values[grid]
    forms = [
        values,
        values[grid.flatten()],
        on_grid,
        Labelled("v", on_grid, ("row", "column")),
        Labelled("v", on_grid.T, ("column", "row")),
        by_position(made),
    ]
    for form in forms:
        (place,) = maps_of(on_image(form, inputs, picture, row=ROW, image=1))
        np.testing.assert_allclose(place.images[1].get_array(), on_grid.numpy(), rtol=1e-6)
    named = Labelled("v", torch.stack((on_grid, -on_grid)), ("group", "row", "column"), {"group": ("a", "b")})
    places = maps_of(on_image(named, inputs, picture, row=ROW, image=1))
    assert [place.get_title("left") for place in places] == ["a", "b"]
    np.testing.assert_allclose(places[1].images[1].get_array(), -on_grid.numpy())


def test_scales_and_their_bars() -> None:
    _, inputs, _ = twin(random_llava)
    picture = random_llava.make_images(1)[0]
    values = torch.linspace(0.2, 0.8, 16).view(4, 4)
    limits = {None: (0.0, 0.8), "sequential": (0.2, 0.8), "diverging": (-0.8, 0.8)}
    for scale, expected in limits.items():
        figure = drawn(on_image(values, inputs, picture, scale=scale))
        (place,) = maps_of(figure)
        norm = place.images[1].norm
        assert (norm.vmin, norm.vmax) == pytest.approx(expected)
        assert scale_of(figure).get_ylim() == pytest.approx(expected)
        alphas = place.images[1].get_cmap()(norm(np.array(expected)))[:, 3]
        assert alphas.tolist() == pytest.approx([1.0, 1.0] if scale == "diverging" else [0.0, 1.0])
    flat = maps_of(on_image(torch.zeros(4, 4), inputs, picture))[0].images[1]
    assert flat.norm.vmax > flat.norm.vmin == 0


def test_dots_where_the_interval_is_away_from_0() -> None:
    both, inputs, _ = twin(random_llava)
    result = by_position(random_llava, interval=True)
    figure = on_image(result, inputs, random_llava.make_images(1)[0], row=0)
    (place,) = maps_of(figure)
    (dots,) = groups(place, "away")
    left, top, right, bottom = inputs.regions[0][0]
    cells = {
        (int((y + 0.5 - top) * 4 / (bottom - top)), int((x + 0.5 - left) * 4 / (right - left)))
        for x, y in dots.get_offsets()
    }
    away = result.values[patches(both, inputs, 0, 0)].abs() > 0.8
    assert cells == {tuple(cell) for cell in away.nonzero().tolist()} and 0 < len(cells) < 16
    assert "Dot: 95" in figure.heading.note
    assert "Veiled" in figure.heading.note and groups(place, "cut")


def test_what_is_refused() -> None:
    _, inputs, _ = twin(random_llava)
    picture, grid = random_llava.make_images(1)[0], torch.zeros(4, 4)
    three = Labelled("v", torch.zeros(2, 2, 4, 4), ("layer", "head", "row", "column"))
    refused = {
        "'log'; valid: diverging, sequential": (grid, {"scale": "log"}),
        "values of 3 axes": (torch.zeros(2, 4, 4), {}),
        "axes layer, head, row, column; needed are position": (three, {}),
        "axes layer; needed are position": (Labelled("v", torch.zeros(3), ("layer",)), {}),
        r"values of \(2, 8\) for image 0 of row 0, whose grid is \(4, 4\)": (torch.zeros(2, 8), {}),
        "7 values fit neither|values fit neither": (torch.zeros(7), {}),
        "values: values that are not finite": (grid / 0, {}),
    }
    for message, (values, options) in refused.items():
        with pytest.raises(ValueError, match=message):
            on_image(values, inputs, picture, **options)
    with pytest.raises(IndexError, match="no image 1 in row 0"):
        on_image(grid, inputs, picture, image=1)
    bare = VLMInputs(inputs.input_ids, inputs.attention_mask, grids=inputs.grids)
    with pytest.raises(ValueError, match=r"make them with model\.prepare"):
        on_image(grid, bare, picture)
