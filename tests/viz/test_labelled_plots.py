"""What is drawn of a labelled result equals its numbers."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from hones_lens.results.labelled import Labelled
from hones_lens.viz import theme
from hones_lens.viz.labelled_plots import labelled, significant


def drawn(figure: theme.Plot) -> theme.Plot:
    """The figure after drawing, so that ticks and labels are final."""
    figure.savefig(io.BytesIO(), format="png")
    return figure


def group(axes: Axes, gid: str):
    """The artist of that id."""
    (found,) = [artist for artist in axes.get_children() if artist.get_gid() == gid]
    return found


def tick_labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def maps(figure: theme.Plot) -> list[Axes]:
    return [axes for axes in figure.axes if any(a.get_gid() == "cells" for a in axes.get_children())]


def made(shape: tuple[int, ...], axes: tuple[str, ...], seed: int = 0, **more) -> Labelled:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    width = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    options = {"n": 12, "low": values - width, "high": values + width, **more}
    return Labelled("share restored", values, axes, **options)


def test_a_curve_over_numbers_with_its_interval() -> None:
    result = made((5,), ("layer",), labels={"layer": (2, 3, 4, 6, 9)}, notes=("clean 3, corrupted -1.5",))
    figure = drawn(labelled(result))
    axes = figure.axes[0]
    curve = group(axes, "curve")
    np.testing.assert_array_equal(curve.get_xdata(), [2, 3, 4, 6, 9])
    np.testing.assert_array_equal(curve.get_ydata(), result.values.numpy())
    (path,) = group(axes, "interval").get_paths()
    low, high = result.low, result.high
    assert low is not None and high is not None
    for i, x in enumerate((2, 3, 4, 6, 9)):
        ends = sorted({y for px, y in path.vertices if px == x})
        assert (ends[0], ends[-1]) == pytest.approx((float(low[i]), float(high[i])))
    assert axes.get_xlabel() == "layer"
    heading = figure.heading
    assert heading is not None and heading.title == "share restored"
    assert heading.note.replace("\u00a0", " ") == "n = 12. Band: 95 % interval. clean 3, corrupted −1.5."


def test_bars_over_names_the_first_on_top() -> None:
    result = made((3,), ("group",), labels={"group": ("image", "question", "last")})
    axes = drawn(labelled(result, title="Where it is")).axes[0]
    bars = [patch for patch in axes.patches if patch.get_height() > 0.5]
    assert [bar.get_width() for bar in bars] == pytest.approx(result.values.tolist())
    assert tick_labels(axes.yaxis) == ["image", "question", "last"] and axes.yaxis_inverted()
    ends = [segment[:, 0].tolist() for segment in group(axes, "interval").get_segments()]
    places = [segment[:, 1].tolist() for segment in group(axes, "interval").get_segments()]
    assert places == [[i, i] for i in range(3)]
    assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == pytest.approx(range(3))
    assert result.low is not None and result.high is not None
    expected = torch.stack((result.low, result.high), 1).tolist()
    assert np.allclose(ends, expected)
    assert axes.get_xlabel() == "share restored", "the title does not say it"
    assert labelled(result).axes[0].get_xlabel() == ""
    assert axes.figure.heading.note.replace("\u00a0", " ") == "n = 12. Black line: 95 % interval."


def test_a_title_of_its_own_leaves_the_unit_to_the_axes() -> None:
    over_layers, grid = made((5,), ("layer",)), made((4, 3), ("layer", "group"))
    assert labelled(over_layers, title="Where").axes[0].get_ylabel() == "share restored"
    for title, expected in ((None, ""), ("Where", "share restored")):
        figure = labelled(grid, title=title)
        assert [axes.get_ylabel() for axes in figure.axes if axes not in maps(figure)] == [expected]


def test_a_map_holds_the_values_in_a_scale_around_0() -> None:
    result = made((4, 3), ("layer", "group"), labels={"group": ("image", "question", "last")})
    figure = drawn(labelled(result))
    (axes,) = maps(figure)
    mesh = group(axes, "cells")
    np.testing.assert_array_equal(mesh.get_array(), result.values.numpy())
    assert mesh.norm(0.0) == 0.5 and mesh.norm.vmax == -mesh.norm.vmin == float(result.values.abs().max())
    assert axes.yaxis_inverted() and (axes.get_ylabel(), axes.get_xlabel()) == ("layer", "group")
    assert tick_labels(axes.yaxis) == ["0", "1", "2", "3"]
    assert tick_labels(axes.xaxis) == ["image", "question", "last"]
    written = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert len(written) == 12
    for at, text in written.items():
        assert float(text.replace("−", "-")) == pytest.approx(float(result.values[at]), abs=0.0051)


def test_dots_are_where_the_interval_leaves_out_0() -> None:
    result = made((4, 3), ("layer", "head"))
    low, high = result.low, result.high
    assert low is not None and high is not None
    expected = {at for at in np.ndindex(4, 3) if low[at] > 0 or high[at] < 0}
    assert 0 < len(expected) < 12
    (axes,) = maps(labelled(result))
    assert {(int(y), int(x)) for x, y in group(axes, "dots").get_offsets()} == expected


def test_p_values_are_marked_at_a_false_discovery_rate() -> None:
    p = torch.tensor([[0.001, 0.012, 0.03], [0.045, 0.9, 0.034]], dtype=torch.float64)
    result = Labelled("change", torch.ones(2, 3), ("layer", "head"), p=p)
    # Benjamini and Hochberg by hand: the largest rank i with p(i) ≤ 0.05 i / 6 is 2.
    expected = torch.tensor([[True, True, False], [False, False, False]])
    assert torch.equal(significant(result), expected)
    with_nan = Labelled("change", torch.ones(2, 3), ("layer", "head"), p=p.where(p < 0.9, torch.nan))
    marked = significant(with_nan)
    assert marked is not None and not bool(marked[1, 1]) and bool(marked[0, 0])
    assert significant(Labelled("change", torch.ones(2), ("layer",))) is None
    heading = labelled(result).heading
    assert heading is not None and "false discovery rate < 5\u00a0%" in heading.note


def test_unknown_values_are_grey_and_have_no_number() -> None:
    values = torch.tensor([[1.0, torch.nan], [0.5, -2]])
    (axes,) = maps(labelled(Labelled("x", values, ("layer", "head"))))
    mesh = group(axes, "cells")
    assert mesh.get_array().mask.tolist() == [[False, True], [False, False]] and mesh.norm.vmax == 2
    assert [t.get_text() for t in axes.texts] == ["1.00", "", "0.50", "−2.00"]


def test_three_axes_are_a_map_for_each_entry_of_the_shortest_in_one_scale() -> None:
    groups = ("image", "question", "last")
    result = made((4, 8, 3), ("layer", "head", "group"), labels={"group": groups})
    panels = maps(drawn(labelled(result)))
    assert [axes.get_title(loc="left") for axes in panels] == list(groups)
    for axes, name in zip(panels, groups, strict=True):
        mesh = group(axes, "cells")
        np.testing.assert_array_equal(mesh.get_array(), result.select(group=name).values.numpy())
        assert mesh.norm.vmax == float(result.values.abs().max())
    by_layer = maps(labelled(result, panels="layer"))
    assert [axes.get_title(loc="left") for axes in by_layer] == [f"layer {i}" for i in range(4)]
    six = maps(labelled(made((6, 7, 8), ("layer", "head", "position"))))
    assert len(six) == 6 and len({round(axes.get_position().y0, 2) for axes in six}) == 2, "not two rows"


def test_a_lens_of_every_layer_of_a_large_model_draws_a_map_a_layer() -> None:
    labels = {"layer": ("embed", *range(32))}
    result = made((33, 24, 24), ("layer", "row", "column"), labels=labels)
    panels = maps(labelled(result))
    assert [axes.get_title(loc="left") for axes in panels] == ["embed", *(f"layer {i}" for i in range(32))]
    for i, axes in enumerate(panels):
        np.testing.assert_array_equal(group(axes, "cells").get_array(), result.values[i].numpy())


def test_of_many_entries_some_are_shown_from_the_first_to_the_last() -> None:
    plot = labelled(made((81, 2, 2), ("layer", "row", "column")))
    titles = [axes.get_title(loc="left") for axes in maps(plot)]
    assert len(titles) == 48 and (titles[0], titles[-1]) == ("layer 0", "layer 80")
    assert plot.heading is not None and "48 of 81 layers are shown" in plot.heading.note


def test_many_names_are_turned_and_many_numbers_thinned() -> None:
    names = tuple(f"{i} token" for i in range(60))
    result = made((4, 60), ("layer", "position"), labels={"position": names})
    (axes,) = maps(drawn(labelled(result)))
    labels = axes.xaxis.get_ticklabels()
    assert {label.get_rotation() for label in labels} == {90.0}
    assert [label.get_text() for label in labels] == list(names[::2]) and not axes.texts
    (axes,) = maps(drawn(labelled(made((32, 384), ("layer", "neuron")))))
    assert len(axes.get_xticks()) <= 20 and tick_labels(axes.yaxis)[:2] == ["0", "4"]


def test_nothing_is_cut_off() -> None:
    """Around the figure is a margin of background."""
    names = tuple(f"{i} a_long_token" for i in range(20))
    results = [
        made((12, 20), ("layer", "position"), labels={"position": names}, notes=("a note " * 30,)),
        made((3,), ("group",), labels={"group": ("image", "a very long name of a group", "last")}),
        made((4, 8, 3), ("layer", "head", "group")),
    ]
    for result in results:
        pixels = np.asarray(theme.plot_image(result.plot()).convert("L"))
        assert pixels.min() < 128
        for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
            assert edge.min() > 240, result.axes


def test_it_goes_into_a_page_and_a_file(tmp_path) -> None:
    figure = made((4, 3), ("layer", "group")).plot(title="")
    svg = theme.themed_svg(figure, "patch", "where it is")
    assert svg.startswith("<svg") and "var(--ink)" in svg
    file = figure.save(tmp_path / "figure.png")
    with Image.open(file) as image:
        assert image.size[0] > 500


@pytest.mark.parametrize(
    ("result", "options", "says"),
    [
        (made((), ()), {}, r"0 axes \(none\) can't be drawn"),
        (made((2, 2, 2, 2), ("a", "b", "c", "d")), {}, r"4 axes \(a, b, c, d\) can't be drawn; select"),
        (made((2, 2, 2), ("a", "b", "c")), {"panels": "d"}, "no axis 'd'; there are a, b, c"),
    ],
)
def test_refusals(result: Labelled, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        labelled(result, **options)
