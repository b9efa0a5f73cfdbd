"""Figures of steering: what is drawn equals the numbers."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from helpers import example_comparisons as made
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from hones_lens.hones.steering.side_effects import SideEffects
from hones_lens.hones.steering.table import SteeringTable
from hones_lens.results.statistics import Interval
from hones_lens.viz import theme
from hones_lens.viz.steering_plots import gain_rows, side_effect_bars, steering_bars

METHODS = ["Fixed-Amp", "Grid-Search", "RandNeuron", "HONES without KL", "HONES"]


def drawn(figure: theme.Plot) -> theme.Plot:
    figure.savefig(io.BytesIO(), format="png")
    return figure


def bars(axes: Axes) -> list[tuple[float, float, str]]:
    """Middle, width and colour of each bar, from the top."""
    return [
        (b.get_y() + b.get_height() / 2, b.get_width(), to_hex(b.get_facecolor()))
        for container in axes.containers
        if hasattr(container, "patches")
        for b in container.patches
    ]


def ends(axes: Axes) -> list[tuple[float, float, float]]:
    """Place, low and high end of each whisker."""
    lines = [c.lines[2][0].get_segments()[0] for c in axes.containers if not hasattr(c, "patches")]
    return [(line[0][1], line[0][0], line[1][0]) for line in lines]


def wider(gain: Interval) -> Interval:
    """Reaching twice as far up as down."""
    return replace(gain, high=gain.value + 2 * (gain.value - gain.low))


def lopsided(table: SteeringTable) -> SteeringTable:
    rows = [replace(row, gain=wider(row.gain), log_prob_gain=wider(row.log_prob_gain)) for row in table.rows]
    return replace(table, rows=tuple(rows))


@pytest.mark.parametrize("panel, measure", [(0, "metric"), (1, "log_prob")])
def test_bars_are_gains_with_their_intervals_and_draws(panel, measure):
    table = lopsided(made.steering())
    axes = drawn(steering_bars(table)).axes[panel]
    times = {"metric": 1, "log_prob": 5}[measure]
    expected = {**made.GAINS, "RandNeuron": float(np.mean(made.DRAWS))}
    assert [(y, w) for y, w, _ in bars(axes)] == [
        (i, pytest.approx(times * expected[method])) for i, method in enumerate(METHODS)
    ]
    colours = [colour for *_, colour in bars(axes)]
    assert colours == [theme.NEGATIVE, theme.SELECTED, theme.RANDOM, theme.SELECTED, theme.SELECTED]
    half = {"metric": 0.03, "log_prob": 0.11}[measure]
    for place, low, high in ends(axes):
        gain = times * expected[METHODS[int(place)]]
        assert (low, high) == (pytest.approx(gain - half), pytest.approx(gain + 2 * half))
    assert [int(place) for place, *_ in ends(axes)] == [0, 1, 3, 4], "the random sets have no one interval"
    (dots,) = [artist for artist in axes.collections if artist.get_gid() == "draws-2"]
    assert dots.get_offsets()[:, 0].tolist() == pytest.approx([times * gain for gain in made.DRAWS])
    assert set(dots.get_offsets()[:, 1]) == {METHODS.index("RandNeuron")}
    assert axes.yaxis_inverted() and ("accuracy" in axes.get_xlabel()) == (measure == "metric")


def test_methods_stand_at_the_first_panel_and_the_note_says_n_base_and_draws():
    figure = drawn(steering_bars(made.steering()))
    first, second = ([t.get_text() for t in axes.get_yticklabels()] for axes in figure.axes)
    assert first == METHODS and not any(second)
    note = figure.heading.note
    for words in ("n = 84 held-out", "learned on 147 and chosen on 63", "Base: accuracy 0.700", "95 %"):
        assert words in note
    assert "mean of 5 random sets" in note and figure.heading.title.startswith("vqa: ")
    without = steering_bars(made.steering(methods=("Base", "HONES")), ["metric"])
    assert "random sets" not in without.heading.note and len(without.axes) == 1


def test_rows_are_methods_in_order_and_bad_ones_are_refused():
    assert [row.name for row in gain_rows(made.steering())] == METHODS
    with pytest.raises(ValueError, match="unknown measure 'logit'; valid: metric, log_prob"):
        gain_rows(made.steering(), "logit")
    with pytest.raises(ValueError, match="no method in the table but the base"):
        steering_bars(made.steering(methods=("Base",)))


def test_side_effects_are_drawn_task_by_task():
    cells = tuple(replace(cell, gain=wider(cell.gain)) for cell in made.effects().cells)
    effects = replace(made.effects(), cells=cells)
    axes = drawn(side_effect_bars(effects)).axes[0]
    widths = [width for _, width, _ in bars(axes)]
    assert widths == [pytest.approx(cell.gain.value) for cell in effects.cells]
    found = [(pytest.approx(low), pytest.approx(high)) for _, low, high in ends(axes)]
    step = len(made.TASKS) + 0.9
    beside = [made.TASKS.index(c.scales_of) * step + made.TASKS.index(c.task) for c in effects.cells]
    assert [place for place, *_ in ends(axes)] == pytest.approx(beside)
    assert [place for place, *_ in bars(axes)] == pytest.approx(beside)
    middles = [i * step + (len(made.TASKS) - 1) / 2 for i in range(len(made.TASKS))]
    assert axes.get_yticks().tolist() == pytest.approx(middles)
    assert [(cell.gain.low, cell.gain.high) for cell in effects.cells] == found
    places = [place for place, *_ in bars(axes)]
    assert places == sorted(places) and axes.yaxis_inverted()
    filled = [b.get_facecolor()[3] > 0 for c in axes.containers if hasattr(c, "patches") for b in c.patches]
    assert filled == [cell.task == cell.scales_of for cell in effects.cells]
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"scales of\n{task}" for task in made.TASKS]
    legend = axes.figure.legends[0]
    assert [t.get_text() for t in legend.get_texts()] == list(made.TASKS)
    assert [to_hex(h.get_color()) for h in legend.legend_handles] == list(theme.SERIES)
    assert "n = 12–84 held-out examples" in axes.figure.heading.note
    with pytest.raises(ValueError, match="no side effects to draw"):
        side_effect_bars(SideEffects("m", ()))


@pytest.mark.parametrize("what", ["steering", "effects"])
def test_nothing_is_clipped_and_results_plot_themselves(what):
    figure = {"steering": made.steering, "effects": made.effects}[what]().plot()
    drawn(figure)
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02


def test_log_probabilities_of_a_table_with_other_draws():
    table = made.steering()
    kept = tuple(row for row in table.rows if (row.method, row.draw) != ("RandNeuron", 4))
    fewer = replace(table, rows=kept)
    (row,) = [row for row in gain_rows(fewer, "log_prob") if row.draws]
    assert row.gain == pytest.approx(5 * np.mean(made.DRAWS[:4])) and len(row.draws) == 4
