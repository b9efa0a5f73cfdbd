"""Pictures of tokens in cells: what is drawn equals Hugging Face's attentions, folded, and the values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_llava
from helpers.attention_cases import FAMILIES, HEADS, ROW, patches, twin
from helpers.figures import check_drawing, drawn, groups
from matplotlib.colors import to_rgb

from hones_lens.analysis.token_cells import fold_tokens, folded_attention
from hones_lens.viz import theme
from hones_lens.viz.cell_plots import cell_patterns, cell_values


def cells_of(axes) -> np.ndarray:
    (mesh,) = groups(axes, "cells")
    return np.asarray(mesh.get_array())


@pytest.mark.exhaustive
@FAMILIES
def test_a_map_for_each_head_holds_the_folded_pattern(made) -> None:
    both, inputs, theirs = twin(made)
    folded = folded_attention(both.model, inputs, HEADS, row=ROW)
    figure = drawn(folded.plot())
    maps = [axes for axes in figure.axes if groups(axes, "cells")]
    assert [axes.get_title("left") for axes in maps] == ["L0H3", "L2H1", "L1H0"]
    at = folded.cells.images.index(1)
    for axes, (layer, head) in zip(maps, HEADS, strict=True):
        whole, shown = theirs[layer, ROW, head], cells_of(axes)
        last = [float(whole[-1, list(span)].sum()) for span in folded.cells.spans]
        np.testing.assert_allclose(shown[-1], last, atol=1e-5)
        image = patches(both, inputs, ROW, 1).flatten()
        before = folded.cells.spans[0]
        np.testing.assert_allclose(shown[at, 0], float(whole[image][:, before].sum(1).mean()), atol=1e-5)
        assert axes.yaxis_inverted() and (axes.get_ylabel(), axes.get_xlabel()) == ("query", "key")
        for axis in (axes.xaxis, axes.yaxis):
            names = [label.get_text() for label in axis.get_ticklabels()]
            assert names == [name[:24].replace("\n", "\\n") for name in folded.cells.names]
    bar = figure.axes[-1]
    assert bar.get_ylabel() == "attention"
    assert bar.get_ylim() == (0, pytest.approx(float(folded.pattern.max())))
    assert figure.heading.title.endswith("attention between tokens")
    assert "keys are summed, its queries averaged" in figure.heading.note
    check_drawing(figure)


def test_too_many_heads_are_refused() -> None:
    both, inputs, _ = twin(random_llava)
    folded = folded_attention(both.model, inputs, HEADS[:1], row=ROW)
    many = replace(folded, heads=((0, 3),) * 17, pattern=folded.pattern.expand(17, -1, -1))
    with pytest.raises(ValueError, match="17 heads can't be drawn at once: take at most 16"):
        cell_patterns(many)


@pytest.mark.exhaustive
@FAMILIES
@pytest.mark.parametrize("fold", ["mean", "sum", "max"])
def test_tokens_stand_in_their_order_with_the_colour_of_their_value(made, fold: str) -> None:
    both, inputs, _ = twin(made)
    cells = fold_tokens(both.model, inputs, row=ROW)
    values = torch.randn(inputs.input_ids.shape[1], generator=torch.Generator().manual_seed(0))
    figure = drawn(cell_values(cells, values, fold=fold, what="activation", title="L0N1"))
    axes, bar = figure.axes
    expected = np.array([float(getattr(values[list(span)], fold)()) for span in cells.spans])
    boxes, names = groups(axes, "cell"), groups(axes, "name")
    assert [text.get_text() for text in names] == [name[:24].replace("\n", "\\n") for name in cells.names]
    limit = np.abs(expected).max()
    for box, text, value in zip(boxes, names, expected, strict=True):
        *colour, strength = box.get_facecolor()
        assert strength == pytest.approx(abs(value) / limit, abs=0.021)  # the scale has steps
        if strength > 0.02:
            assert tuple(colour) == to_rgb(theme.SELECTED if value > 0 else theme.NEGATIVE)
        strong = abs(value) > 0.55 * limit
        assert text.get_color() == (theme.ON_ACCENT if strong else theme.INK)
        inner, outer = text.get_window_extent(), box.get_window_extent()
        assert outer.x0 <= inner.x0 and inner.x1 <= outer.x1 + 1 and outer.y0 <= inner.y1 <= outer.y1
    order = [(-round(box.get_window_extent().y0), box.get_window_extent().x0) for box in boxes]
    assert order == sorted(order) and len({line for line, _ in order}) > 1
    assert bar.get_ylim() == pytest.approx((-limit, limit)) and bar.get_ylabel() == "activation"
    assert figure.heading.note == f"An image is the {fold} of its tokens."
    check_drawing(figure)


def test_values_that_do_not_fit_are_refused() -> None:
    both, inputs, _ = twin(random_llava)
    cells = fold_tokens(both.model, inputs, row=ROW)
    with pytest.raises(ValueError, match="'median'; valid: sum, mean, max"):
        cell_values(cells, torch.zeros(inputs.input_ids.shape[1]), fold="median")
    with pytest.raises(ValueError, match="5 values for"):
        cell_values(cells, torch.zeros(5))
    with pytest.raises(ValueError, match="heat: values that are not finite"):
        cell_values(cells, torch.full((inputs.input_ids.shape[1],), torch.nan), what="heat")
    assert len(groups(cell_values(cells, torch.zeros(inputs.input_ids.shape[1])).axes[0], "cell")) == len(
        cells
    )
