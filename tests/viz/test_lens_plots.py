"""What the figures of lenses, attribution and knockout show, against the numbers they were given."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from helpers.figures import groups
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from PIL import Image

from hones_lens.analysis.lens.table import LensPosition, LogitLens
from hones_lens.results.labelled import Labelled
from hones_lens.viz import theme
from hones_lens.viz.lens_plots import direct_bars, image_lens, knockout_curves, lens_grid, shorten_token

ODD = ("$x^2$", "a_{b}$", "\n", "<script>", "猫", "a very long token indeed")


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lens() -> LogitLens:
    """Two places, three layers, six tokens, some of which are hard to draw."""
    shares = random(0, 2, 3, 6).softmax(-1).sort(descending=True).values
    shares[1, 2, 0] = 0.9
    names = tuple(tuple(ODD if layer == 1 else tuple("abcdef") for layer in range(3)) for _ in range(2))
    ids = torch.arange(36).view(2, 3, 6)
    places = (LensPosition(0, 4, "Q"), LensPosition(1, 7, "$:"))
    return LogitLens("tiny", places, ("embed", 0, 1), ids, names, random(1, 2, 3, 6), shares)


def test_grid_shows_tokens_and_probabilities() -> None:
    given = lens()
    figure = lens_grid(given, 1, k=6)
    (axes,) = figure.axes
    cells = next(mesh for mesh in axes.collections if mesh.get_gid() == "cells")
    assert np.allclose(np.asarray(cells.get_array()).reshape(3, 6), given.probabilities[1])
    assert (cells.norm.vmin, cells.norm.vmax) == (-1, 1)
    tokens = [text for text in axes.texts if text.get_gid() == "token"]
    drawn = [text.get_text() for text in tokens]
    assert drawn[:6] == list("abcdef") and drawn[6:8] == ["$x^2$", "a_{b}$"], "no formulas"
    assert drawn[8:11] == ["\\n", "<script>", "\\u732b"] and drawn[11].endswith("…")
    numbers = [text.get_text() for text in axes.texts if text.get_gid() != "token"]
    assert numbers == [f"{share:.2f}" for share in given.probabilities[1].flatten().tolist()]
    light = [text.get_color() == theme.ON_ACCENT for text in tokens]
    assert light == [share > 0.55 for share in given.probabilities[1].flatten().tolist()] and any(light)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["embed", "0", "1"]
    assert figure.heading is not None and "position 7 of row 1, $:" in figure.heading.title
    figure.savefig(io.BytesIO(), format="svg")  # no glyph is missing


def test_grid_in_a_page_is_escaped_and_fits() -> None:
    figure = lens_grid(lens(), k=5)
    svg = theme.themed_svg(figure, "lens", "a lens")
    assert "<script>" not in svg and "&lt;script&gt;" in svg and "$x^2$" in svg
    for k in (1, 5, 6):
        figure = lens_grid(lens(), 1, k=k)
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert len([t for t in axes.texts if t.get_gid() == "token"]) == 3 * k
        for text in axes.texts:
            right = text.get_window_extent().transformed(axes.transData.inverted()).x1
            assert right <= np.floor(text.get_position()[0]) + 1.02, text.get_text()


def test_plot_of_a_lens_and_what_it_refuses() -> None:
    (axes,) = lens().plot(k=2).axes
    assert len([t for t in axes.texts if t.get_gid() == "token"]) == 6
    with pytest.raises(IndexError, match="there is no place 2"):
        lens_grid(lens(), 2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        lens_grid(lens(), k=0)


def test_tokens_as_drawn() -> None:
    assert shorten_token("▁red", 9) == "▁red" and shorten_token("Ġred", 9) == "Ġred"
    assert shorten_token("\t", 9) == "\\t" and shorten_token("0123456789", 5) == "0123…"


@pytest.mark.parametrize("value", ["log_prob", "rank"])
def test_maps_lie_where_the_grid_lies_on_the_picture(value: str) -> None:
    values = random(2, 3, 2, 4) if value == "log_prob" else torch.randperm(24).view(3, 2, 4).float() + 1
    what = f"{value.replace('_', '-')} of 'red' by the logit lens at each image token"
    result = Labelled(what, values, ("layer", "row", "column"), {"layer": ("embed", 0, 1)})
    picture = Image.new("RGB", (60, 40), "#123456")
    figure = image_lens(result, picture, (10.0, 0.0, 50.0, 40.0))
    shown = [axes for axes in figure.axes if axes.get_images()]
    assert [axes.get_title("left") for axes in shown] == ["picture", "embed", "layer 0", "layer 1"]
    assert np.array_equal(shown[0].get_images()[0].get_array(), np.asarray(picture))
    larger = values if value == "log_prob" else -values.log10()
    for axes, expected in zip(shown[1:], larger, strict=True):
        over = axes.get_images()[1]
        assert np.allclose(over.get_array(), expected)
        assert tuple(over.get_extent()) == (9.5, 49.5, 39.5, -0.5)
        limits = float(larger.min()), float(larger.max())
        assert over.get_clim() == pytest.approx(limits)
        assert [(veil.get_x(), veil.get_width()) for veil in groups(axes, "cut")] == [(-0.5, 10), (49.5, 10)]
        (box,) = groups(axes, "strongest")
        row, column = divmod(int(expected.argmax()), 4)
        assert box.get_xy() == (10 + 10 * column - 0.5, 20 * row - 0.5)
        assert (box.get_width(), box.get_height()) == (10, 20)
        assert axes.get_xlim() == (-0.5, 59.5) and axes.get_ylim() == (39.5, -0.5)
    bar = figure.axes[-1]
    assert bar.get_ylabel() == value.replace("_", "-") and bar.get_ylim() == pytest.approx(limits)
    assert figure.heading is not None and "Veiled" in figure.heading.note
    with pytest.raises(ValueError, match="does not lie in a picture of 60 × 40"):
        image_lens(result, picture, (10.0, 0.0, 80.0, 40.0))
    if value == "rank":
        figure.draw_without_rendering()
        at = [float(label.get_text()) for label in bar.get_yticklabels()]
        assert at == pytest.approx([10**-tick for tick in bar.get_yticks()], abs=0.5)


def test_some_layers_and_many_layers() -> None:
    result = Labelled("logit of 'a' by", random(0, 14, 2, 2), ("layer", "row", "column"))
    picture = Image.new("RGB", (20, 20))
    some = image_lens(result, picture, layers=(3, 1))
    shown = [axes for axes in some.axes if axes.get_images()]
    assert [axes.get_title("left") for axes in shown] == ["picture", "layer 3", "layer 1"]
    assert np.allclose(shown[1].get_images()[1].get_array(), result.values[3])
    assert tuple(shown[1].get_images()[1].get_extent()) == (-0.5, 19.5, 19.5, -0.5)
    assert len([a for a in image_lens(result, picture).axes if a.get_images()]) == 15
    with pytest.raises(ValueError, match="no layer 14"):
        image_lens(result, picture, layers=(14,))
    with pytest.raises(ValueError, match="axes layer, row, column is needed, not layer, head"):
        image_lens(Labelled("x", random(0, 2, 2), ("layer", "head")), picture)
    with pytest.raises(ValueError, match="not finite"):
        image_lens(Labelled("x", random(0, 1, 2, 2) / 0, ("layer", "row", "column")), picture)


def attributed(axes: tuple[str, ...], shape: tuple[int, ...], labels: dict | None = None) -> Labelled:
    values = random(3, *shape)
    ends = (values - random(4, *shape).abs(), values + random(5, *shape).abs())
    return Labelled(
        "added to the logit by each part", values, axes, labels or {}, 8, *ends, notes=("Mean 3.",)
    )


def whiskers(axes: Axes, upright: bool = True) -> list[tuple[float, float]]:
    """Ends of the error bars, in the order drawn; each stands in the middle of a bar."""
    found, places = [], []
    for container in axes.containers:
        for lines in getattr(container, "lines", (None, None, ()))[2]:
            found += [tuple(segment[:, int(upright)]) for segment in lines.get_segments()]
            places += [segment[0, int(not upright)] for segment in lines.get_segments()]
    if upright:
        middles = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    else:
        middles = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert places == pytest.approx(middles)
    return found


def test_bars_of_components_and_layers() -> None:
    names = ("embed", "attn 0", "mlp 0", "attn 1", "mlp 1")
    result = attributed(("component",), (5,), {"component": names})
    figure = direct_bars(result)
    (axes,) = figure.axes
    drawn = [bar.get_height() for bar in axes.patches]
    assert drawn == pytest.approx(result.values[[1, 3, 2, 4, 0]].tolist())
    assert result.low is not None and result.high is not None
    ends = [(float(result.low[i]), float(result.high[i])) for i in (1, 3, 2, 4, 0)]
    assert np.allclose(whiskers(axes), ends)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["embed", "0", "1"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["embedding", "attention", "MLP"]
    first_of_each = {bar.get_facecolor(): bar.get_height() for bar in reversed(axes.patches)}
    of_legend = [first_of_each[handle.get_facecolor()] for handle in figure.legends[0].legend_handles]
    assert of_legend == pytest.approx(result.values[[0, 1, 2]].tolist())
    assert sorted(round(bar.get_x() + bar.get_width() / 2) for bar in axes.patches) == [0, 1, 1, 2, 2]
    assert figure.heading is not None and "Mean 3." in figure.heading.note
    assert "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}8" in figure.heading.note
    layers = attributed(("layer",), (4,), {"layer": ("embed", 0, 1, 2)})
    (axes,) = direct_bars(layers).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(layers.values.tolist())


@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_bars_of_the_largest(kind: str) -> None:
    result = attributed(("layer", kind), (3, 6))
    (axes,) = direct_bars(result, k=5).axes
    order = result.values.flatten().abs().sort(descending=True).indices[:5]
    expected = result.values.flatten()[order]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(expected.tolist())
    names = [f"{i // 6}.{i % 6}" for i in order.tolist()]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == names
    colours = [to_rgb(theme.SELECTED if v >= 0 else theme.NEGATIVE) for v in expected.tolist()]
    assert [to_rgb(bar.get_facecolor()) for bar in axes.patches] == colours and len(set(colours)) == 2
    assert result.low is not None and result.high is not None
    ends = [(float(result.low.flatten()[i]), float(result.high.flatten()[i])) for i in order.tolist()]
    assert np.allclose(whiskers(axes, upright=False), ends)


def test_bars_refuse_rows_and_positions() -> None:
    with pytest.raises(ValueError, match=r"not one by row, layer: take mean=True or select\(row=…\)"):
        direct_bars(attributed(("row", "layer"), (2, 3)))
    one = attributed(("row", "layer"), (2, 3), {"layer": ("embed", 0, 1)})
    (axes,) = direct_bars(one.select(row=1)).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(one.values[1].tolist())


def test_curves_and_bands_of_a_knockout() -> None:
    values = -random(6, 4, 5).abs()
    what = "relative change of the right answer's probability when the target can't see the source"
    names = ("image → last", "image → question", "question → last", "last → last", "box → last")
    about = {"labels": {"edge": names}, "n": 9, "notes": ("one layer at a time",)}
    result = Labelled(what, values, ("layer", "edge"), low=values - 0.1, high=values + 0.2, **about)
    figure = knockout_curves(result)
    (axes,) = figure.axes
    curves = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert tuple(curves) == names
    looks = {(line.get_color(), line.get_linestyle()) for line in curves.values()}
    assert len(looks) == 5, "every curve looks different"
    bands = {band.get_gid(): band for band in axes.collections}
    for i, name in enumerate(names):
        assert np.allclose(curves[name].get_ydata(), values[:, i])
        corners = bands[f"band {name}"].get_paths()[0].vertices
        assert corners[:, 1].min() == pytest.approx(float(values[:, i].min()) - 0.1)
        for layer in range(4):
            here = corners[corners[:, 0] == layer, 1]
            ends = (float(values[layer, i]) - 0.1, float(values[layer, i]) + 0.2)
            assert (here.min(), here.max()) == pytest.approx(ends)
    assert axes.get_legend() is not None and "probability" in axes.get_ylabel()
    assert figure.heading is not None and "one layer at a time" in figure.heading.note
    single = Labelled(what, values, ("layer", "edge"), {"edge": names}, n=1)
    plain = knockout_curves(single)
    assert not plain.axes[0].collections and plain.heading is not None and "Band" not in plain.heading.note
    with pytest.raises(ValueError, match="axes layer, edge is needed"):
        knockout_curves(attributed(("layer",), (3,)))
