"""The SVG for a page, colours, and pictures as data."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import example_results as made
from PIL import Image

from hones_lens.viz import masking_plots, plots, theme


def test_svg_is_the_same_every_time():
    one, two = (theme.themed_svg(masking_plots.masking_curve(made.curve()), "a", "b") for _ in range(2))
    assert one == two


def test_every_cell_says_its_number_when_pointed_at():
    heads = made.heads()
    tips = [f"cell {i} <&>" for i in range(32)]
    root = ElementTree.fromstring(theme.themed_svg(plots.head_heatmap(heads), "a", "b", {"cells": tips}))
    assert [title.text for title in root.iter("title")] == tips
    first = next(path for path in root.iter("path") if path.find("title") is not None)
    # −0.20 of at most 0.38: the negative colour, as strong as that.
    strength = float(re.search(r"fill-opacity: ([\d.]+)", first.get("style"))[1])
    assert "var(--negative)" in first.get("style")
    expected = float(heads.scores[0, 0].abs() / heads.scores.abs().max())
    assert strength == pytest.approx(expected, abs=0.02)


def test_diverging_scale_is_clear_at_0_and_even_on_both_sides():
    colours = theme.diverging().colors
    assert colours[50][3] == 0
    np.testing.assert_allclose([c[3] for c in colours], [c[3] for c in colours[::-1]])
    assert colours[0][3] == colours[-1][3] == 1


def test_pictures_are_reduced_and_stored_the_smaller_way():
    flat = theme.image_uri(made.image((800, 600)))
    assert flat.startswith("data:image/png;base64,")
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)
    photo = theme.image_uri(Image.fromarray(noise))
    assert photo.startswith("data:image/jpeg;base64,")
