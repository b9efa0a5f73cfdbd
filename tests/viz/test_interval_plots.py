"""Dots and bars with intervals: what is drawn equals the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import example_comparisons as made
from helpers.figures import check_drawing, drawn, groups, only, tick_labels

from hones_lens.hones.attribution.held_out import HeldOutHeads
from hones_lens.viz import theme
from hones_lens.viz.interval_plots import evaluation_dots, held_out_bars, lens_changes


def dots(axes) -> list[list[float]]:
    return only(axes, "values").get_offsets().tolist()


def whiskers(axes, count: int) -> dict[int, tuple[float, float]]:
    """Low and high end by row."""
    lines = {i: artist for i in range(count) for artist in groups(axes, f"interval-{i}")}
    ends = {i: line.get_segments()[0][:, 0].tolist() for i, line in lines.items()}
    return {i: (pytest.approx(low), pytest.approx(high)) for i, (low, high) in ends.items()}


def test_an_evaluation_is_a_dot_for_all_examples_and_for_each_kind():
    figure = drawn(evaluation_dots(made.evaluation()))
    (axes,) = figure.axes
    assert dots(axes) == [pytest.approx(dot) for dot in ([0.81, 0], [0.8, 1], [1.0, 2])]
    assert whiskers(axes, 3) == {0: (0.67, 0.95), 1: (0.65, 0.95)}, "one example has no interval"
    names = [name.replace("\N{NO-BREAK SPACE}", " ") for name in tick_labels(axes.yaxis)]
    assert names == ["all (n = 21)", "colour (n = 20)", "<count> (n = 1)"]
    assert axes.yaxis_inverted() and axes.get_xlabel() == "accuracy"
    check_drawing(figure)


def test_one_kind_is_not_drawn_beside_all():
    evaluation = made.evaluation()
    only_colour = replace(evaluation, kinds={"colour": evaluation.kinds["colour"]})
    assert len(dots(drawn(evaluation_dots(only_colour)).axes[0])) == 1


def test_held_out_heads_are_bars_with_the_mean_beside_random_sets():
    figure = drawn(held_out_bars(made.held_out()))
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.containers[0]] == pytest.approx([0.4, 0.02, 0.21])
    assert tick_labels(axes.yaxis) == ["L1H3", "L3H2 *", "mean"], "a star where a drop does not hold"
    assert only(axes, "controls-2").get_offsets()[:, 0].tolist() == pytest.approx([0.01, 0.05])
    note = figure.heading.note.replace("\N{NO-BREAK SPACE}", " ")
    for words in ("Selected on 60 other", "n = 84", "*: does not hold", "5 %", "2 random sets"):
        assert words in note
    check_drawing(figure)
    holding = replace(made.held_out(), heads=made.held_out().heads[:1], random=())
    note = held_out_bars(holding).heading.note
    assert "*" not in note and "No random sets were run." in note


def test_a_selection_of_no_heads_is_refused():
    nothing: HeldOutHeads = replace(made.held_out(), heads=())
    with pytest.raises(ValueError, match="no head was selected"):
        held_out_bars(nothing)


def test_the_largest_changes_of_the_lens_with_their_intervals_and_signs():
    figure = drawn(lens_changes(made.lens(), k=3))
    (axes,) = figure.axes
    assert dots(axes) == [pytest.approx(dot) for dot in ([1.2, 0], [0.9, 1], [-0.4, 2])]
    assert whiskers(axes, 3) == {}
    colours = [tuple(colour) for colour in only(axes, "values").get_facecolors()[:, :3].tolist()]
    assert colours[0] == colours[1] == pytest.approx(theme.to_rgb(theme.SELECTED))
    assert colours[2] == pytest.approx(theme.to_rgb(theme.NEGATIVE))
    assert [name[:8] for name in tick_labels(axes.yaxis)] == ["layer 2:"] * 3
    note = figure.heading.note.replace("\N{NO-BREAK SPACE}", " ")
    assert note == "The 3 largest of 4 changes; n = 84."
    check_drawing(figure)


def test_all_changes_with_the_one_interval_there_is():
    axes = drawn(lens_changes(made.lens())).axes[0]
    assert dots(axes)[3] == pytest.approx([0.31, 3])
    assert whiskers(axes, 4) == {3: (0.2, 0.44)}


def test_no_change_and_no_rows_are_refused():
    with pytest.raises(ValueError, match="no logit changes"):
        lens_changes(replace(made.lens(), falls=((), ()), rises=((), ())))
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        lens_changes(made.lens(), k=0)
