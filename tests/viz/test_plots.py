"""What is drawn equals the numbers."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers import example_results as made
from helpers.figures import drawn, only, tick_labels
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from PIL import Image

from hones_lens.hones.attribution.head_scores import significant_heads
from hones_lens.viz import attention_plots, masking_plots, plots, theme

# --- Heads -------------------------------------------------------------------------------------


def test_heat_map_holds_the_scores_with_layer_0_on_top_and_0_in_the_middle_of_the_scale():
    heads = made.heads()
    figure = drawn(plots.head_heatmap(heads))
    axes = figure.axes[0]
    mesh = only(axes, "cells")
    np.testing.assert_array_equal(mesh.get_array(), heads.scores.numpy())
    assert mesh.norm(0.0) == 0.5
    assert mesh.norm.vmax == -mesh.norm.vmin == float(heads.scores.abs().max())
    assert axes.yaxis_inverted()
    assert tick_labels(axes.xaxis) == [str(i) for i in range(8)]
    assert tick_labels(axes.yaxis) == [str(i) for i in range(4)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")


def test_heat_map_outlines_the_critical_heads_and_writes_the_values():
    heads = made.heads(top_k=3)
    axes = plots.head_heatmap(heads).axes[0]
    outlined = {(int(p.get_y()), int(p.get_x())) for p in axes.patches if isinstance(p, Rectangle)}
    assert outlined == {(c.layer, c.index) for c in heads.top()}
    assert len(outlined) == 3
    halves = [(heads.score_ends[c.layer, c.index].diff().item()) / 2 for c in heads.top()]
    note = plots.head_heatmap(heads).heading.note
    assert note.endswith(f"interval of the critical heads: ± {min(halves):.3f} to ± {max(halves):.3f}.")
    written = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}
    for (layer, head), text in written.items():
        assert float(text.replace("−", "-")) == pytest.approx(float(heads.scores[layer, head]), abs=0.0051)
    assert len(written) == 32


def dots(heads) -> set[tuple[int, int]]:
    axes = plots.head_heatmap(heads).axes[0]
    return {(int(y), int(x)) for x, y in axes.collections[1].get_offsets()}


def test_dots_mark_the_heads_that_stand_over_all_heads():
    heads = made.heads()
    found = {(c.layer, c.index) for c in significant_heads(heads)}
    assert dots(heads) == found and {(1, 3), (3, 2)} <= found
    assert (2, 2) not in found and (0, 0) not in found, "one that does nothing, and one that was in the way"


def test_a_drop_that_stands_alone_does_not_among_many():
    drops = torch.tensor([1.0] * 6 + [0.0] * 19, dtype=torch.float64)
    ids = tuple(map(str, range(25)))
    one = replace(made.heads(), drops=drops.view(1, 1, -1), scores=drops.mean().view(1, 1), example_ids=ids)
    many = replace(made.heads((4, 8), 25), drops=torch.zeros(4, 8, 25, dtype=torch.float64), example_ids=ids)
    many.drops[1, 2] = drops
    many = replace(many, scores=many.drops.mean(-1))
    assert dots(replace(one, score_ends=None)) == {(0, 0)}
    assert dots(many) == set()
    note = plots.head_heatmap(many).heading.note.replace("\N{NO-BREAK SPACE}", " ")
    assert "Dot: stands at a false discovery rate of 5 % over 32 heads" in note


def test_heat_map_of_heads_that_were_not_all_measured():
    heads = made.raced_heads()
    figure = plots.head_heatmap(heads)
    values = figure.axes[0].collections[0].get_array()
    assert values.mask.tolist() == heads.scores.isnan().tolist()
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written[16:24] == [""] * 8 and all(written[24:])
    assert "Not exact: heads raced" in figure.heading.note
    assert dots(heads) == set() and "Dot" not in figure.heading.note


def test_heat_map_of_a_large_model_has_no_numbers_in_it_and_fewer_ticks():
    figure = drawn(plots.head_heatmap(made.heads((32, 32), top_k=30)))
    axes = figure.axes[0]
    assert not axes.texts
    assert tick_labels(axes.xaxis) == [str(i) for i in range(0, 32, 4)]


def test_heat_map_of_heads_that_do_nothing():
    nothing = replace(made.heads(), scores=torch.zeros(4, 8), drops=torch.zeros(4, 8, 60))
    figure = drawn(plots.head_heatmap(nothing))
    assert "No head lowers the metric." in figure.heading.note


# --- Neurons -----------------------------------------------------------------------------------


def test_bars_count_the_neurons_of_each_layer():
    neurons = made.neurons()
    axes = plots.neurons_per_layer([neurons]).axes[0]
    heights = [bar.get_height() for bar in axes.containers[0]]
    assert heights == neurons.per_layer()
    assert sum(heights) == neurons.count() == 15
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.containers[0]] == pytest.approx(range(4))
    (band,) = [patch for patch in axes.patches if patch not in axes.containers[0].patches]
    low, high = plots.chance_range(4, 384, 15)
    assert (band.get_y(), band.get_y() + band.get_height()) == (low, high) and low < high


def test_several_rankings_side_by_side_or_as_lines():
    few = [made.neurons(task=task, seed=i) for i, task in enumerate(("vqa", "ocr"))]
    figure = plots.neurons_per_layer(few)
    for bars, ranking in zip(figure.axes[0].containers, few, strict=True):
        assert [bar.get_height() for bar in bars] == ranking.per_layer()
        assert [round(bar.get_x() + bar.get_width() / 2) for bar in bars] == [0, 1, 2, 3]
    assert [text.get_text() for text in figure.legends[0].texts] == ["vqa", "ocr"]
    colours = [bars[0].get_facecolor() for bars in figure.axes[0].containers]
    assert [handle.get_facecolor() for handle in figure.legends[0].legend_handles] == colours

    deep = [made.neurons((32, 50), task=task, seed=i) for i, task in enumerate(("vqa", "ocr"))]
    axes = plots.neurons_per_layer(deep).axes[0]
    for line, ranking in zip(axes.lines, deep, strict=True):
        assert list(line.get_ydata()) == ranking.per_layer()
        assert list(line.get_xdata()) == list(range(32))


def test_rankings_of_one_task_are_told_apart_by_method():
    two = [made.neurons(method="hones"), made.neurons(method="direct", seed=1)]
    labels = [text.get_text() for text in plots.neurons_per_layer(two).legends[0].texts]
    assert labels == ["vqa · hones", "vqa · direct"]


def test_range_of_a_random_draw_is_the_hypergeometric_one():
    n_layers, d_mlp, k = 4, 40, 12

    def below(count: int) -> float:
        ways = sum(math.comb(d_mlp, c) * math.comb(3 * d_mlp, k - c) for c in range(count + 1))
        return ways / math.comb(n_layers * d_mlp, k)

    low, high = plots.chance_range(n_layers, d_mlp, k)
    assert below(low) >= 0.025 > below(low - 1)
    assert below(high) >= 0.975 > below(high - 1)
    assert plots.chance_range(2, 5, 10) == (5, 5)


def test_rankings_of_different_models_are_refused():
    with pytest.raises(ValueError, match=r"one model, got \[\(4, 384\), \(6, 384\)\]"):
        plots.neurons_per_layer([made.neurons(), made.neurons((6, 384))])
    with pytest.raises(ValueError, match="one model"):
        plots.neurons_per_layer([])


FIGURES = {
    "heads": lambda: plots.head_heatmap(made.heads()),
    "neurons": lambda: plots.neurons_per_layer([made.neurons()]),
    "curve": lambda: masking_plots.masking_curve(made.curve()),
    "bars": lambda: masking_plots.masking_bars(made.masking()),
    "kinds": lambda: masking_plots.kinds_bars(made.masking()),
    "rankings": lambda: masking_plots.ranking_bars({"hones": made.masking()}),
    "attention": lambda: attention_plots.attention_over_image(made.image(), made.attention(), "L1H3"),
}


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "attention"])
def test_every_figure_of_results_says_n_and_what_its_interval_is(name):
    heading = FIGURES[name]().heading
    assert re.search(r"n\s=\s\d+", heading.note)
    assert re.search(r"95\s%|standard error|[Rr]andom", heading.note)


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_clipped_at_the_figure_s_edges(name):
    figure = drawn(FIGURES[name]())
    box = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())  # of all that is drawn [inches]
    assert min(box.x0, box.y0) >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01
    assert box.y1 <= figure.get_figheight() + 0.01


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FIGURES)
def test_figures_show_in_jupyter_save_and_leave_nothing_behind(name, tmp_path):
    figure = FIGURES[name]()
    with Image.open(io.BytesIO(figure._repr_png_())) as shown:
        assert shown.width > 500
        assert shown.convert("RGB").getpixel((1, shown.height - 2)) == (255, 255, 255)
    assert figure.save(tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in figure.save(tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert not pyplot.get_fignums()


# --- Images ------------------------------------------------------------------------------------


def test_attention_lies_on_the_patches_and_keeps_the_picture_s_proportions():
    image, values = made.image((160, 112)), made.attention(4, 8)
    figure = drawn(attention_plots.attention_over_image(image, values, "L1H3"))
    axes = figure.axes[0]
    picture, over = axes.images
    np.testing.assert_array_equal(picture.get_array(), np.asarray(image))
    np.testing.assert_array_equal(over.get_array(), values.numpy())
    assert tuple(picture.get_extent()) == tuple(over.get_extent()) == (-0.5, 159.5, 111.5, -0.5)
    assert (over.norm.vmin, over.norm.vmax) == (0, pytest.approx(0.7))
    box = axes.get_window_extent()
    assert box.width / box.height == pytest.approx(160 / 112, rel=0.01)
    assert over.get_interpolation() == "nearest"
    (brightest,) = axes.patches
    assert (brightest.get_x(), brightest.get_y()) == (20 - 0.5, 28 - 0.5)
    assert (brightest.get_width(), brightest.get_height()) == (20, 28)
    assert "4 × 8 patches; brightest 0.700, in all 0.800" in figure.heading.note


def test_dark_is_0_and_the_brightest_patch_is_the_picture_itself():
    bare = attention_plots.attention_over_image(made.image(), made.attention(), bare=True)
    pixels = np.asarray(theme.plot_image(bare).convert("RGB")).astype(int)
    side = len(pixels)
    lit, dark = pixels[int(side * 1.5 / 8), int(side * 1.5 / 8)], pixels[side // 2, side // 4]
    assert lit.tolist() == [220, 40, 40]
    assert dark.max() < 70


def test_smooth_attention_is_interpolated_and_has_no_outline():
    axes = attention_plots.attention_over_image(made.image(), made.attention().bfloat16(), smooth=True).axes[
        0
    ]
    assert axes.images[1].get_interpolation() == "bicubic"
    assert not axes.patches


def test_attention_that_is_none_is_refused():
    for bad in (-0.1, math.nan):
        values = made.attention()
        values[0, 0] = bad
        with pytest.raises(ValueError, match="finite and at least 0"):
            attention_plots.attention_over_image(made.image(), values)
    drawn(attention_plots.attention_over_image(made.image(), torch.zeros(2, 2)))


# --- SVG for a page ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "attention"])
def test_svg_for_a_page_leaves_colours_fonts_and_heading_to_the_page(name):
    figure = FIGURES[name]()
    svg = theme.themed_svg(figure, "here", "what it shows")
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "what it shows"
    for light, _ in theme.PALETTE.values():
        assert light not in svg
    assert "var(--ink)" in svg
    for outside in ("http", "font-family", "xmlns", "DOCTYPE", "matplotlib"):
        assert outside not in svg
    texts = [text.text for text in root.iter("text")]
    assert figure.heading.title not in texts
    assert figure.heading.texts[0].get_visible()
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(i.startswith("here-") for i in ids)
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', svg))
    assert used == set(ids)
