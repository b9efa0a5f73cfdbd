"""One dot a component: what is drawn equals the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import example_comparisons as made
from helpers.figures import check_drawing, drawn, only
from matplotlib.colors import to_hex
from scipy.stats import spearmanr

from hones_lens.viz import theme
from hones_lens.viz.scatter_plots import agreement_scatter, ranking_scatter, scale_dots


def places(axes, gid: str) -> list[list[float]]:
    return only(axes, gid).get_offsets().tolist()


def named(axes) -> dict[str, tuple[float, float]]:
    return {text.get_text(): text.xy for text in axes.texts}


def test_measured_changes_stand_over_estimated_ones():
    figure = drawn(agreement_scatter(made.agreement()))
    (axes,) = figure.axes
    expected = [[0.4, 0.5], [-0.2, -0.1], [0.1, 0.3]]
    assert places(axes, "components") == [pytest.approx(dot) for dot in expected]
    assert named(axes) == {
        name: pytest.approx(dot) for name, dot in zip(("L0.1", "L2.0", "L3.3"), expected, strict=True)
    }
    assert only(axes, "equal").get_xydata().tolist() == [pytest.approx([-0.2] * 2), pytest.approx([0.5] * 2)]
    rho = spearmanr(*zip(*expected, strict=True)).statistic
    note = figure.heading.note.replace("\N{NO-BREAK SPACE}", " ")
    assert f"n = 4 pairs, 3 components. Spearman {rho:.2f} [" in note
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("estimated change of the metric", "measured change")
    check_drawing(figure)


def test_one_pair_has_no_interval_and_many_components_no_names():
    assert "Spearman" not in agreement_scatter(made.agreement(1)).heading.note
    wide = replace(
        made.agreement(),
        components=tuple((0, i) for i in range(13)),
        estimated=torch.randn(4, 13).double(),
        measured=torch.randn(4, 13).double(),
    )
    axes = drawn(agreement_scatter(wide)).axes[0]
    assert not axes.texts and len(places(axes, "components")) == 13


def test_two_rankings_head_by_head_with_the_shared_ones_set_off():
    figure = drawn(ranking_scatter(made.rankings()))
    (axes,) = figure.axes
    others = [[0.1, 0.2], [-0.2, 0.1], [0.0, -0.1], [0.2, 0.3]]
    assert places(axes, "others") == [pytest.approx(dot) for dot in others], "without the unmeasured head"
    assert places(axes, "shared") == [pytest.approx([0.5, 0.6])]
    assert to_hex(only(axes, "shared").get_facecolors()[0]) == theme.SELECTED
    assert named(axes) == {"L0H1": pytest.approx((0.5, 0.6))}
    note = figure.heading.note.replace("\N{NO-BREAK SPACE}", " ")
    for words in ("n = 5 heads", "0.70 [−0.10, 0.95]", "the 1 among the best 2 of both", "(p = 0.6)"):
        assert words in note
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("<mean>", "patch")
    check_drawing(figure)


def test_scales_by_layer_and_the_line_of_no_change():
    figure = drawn(scale_dots(made.scales()))
    (axes,) = figure.axes
    assert places(axes, "layer-0") == [pytest.approx([0, 1.5])]
    (x, first), (other_x, second) = places(axes, "layer-2")
    assert (first, second) == pytest.approx((0.75, 1.0))
    assert 1.6 < x < other_x < 2.4, "within their layer's own column"
    down, same = (to_hex(colour) for colour in only(axes, "layer-2").get_facecolors())
    assert (down, same) == (theme.NEGATIVE, theme.SELECTED)
    assert any(list(line.get_ydata()) == [1, 1] for line in axes.lines)
    note = figure.heading.note.replace("\N{NO-BREAK SPACE}", " ")
    assert note.startswith("3 neurons, max |a| 0.500. Learned on n = 44")
    assert figure.heading.title == "tiny-llava, vqa: scales of <HONES>"
    check_drawing(figure)


def test_scales_of_no_neurons_are_refused():
    with pytest.raises(ValueError, match="no neurons are scaled"):
        scale_dots(replace(made.scales(), neurons=(), offsets=()))
