"""Figures of masking: what is drawn equals the numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import example_results as made
from helpers.figures import drawn, only, tick_labels

from hones_lens.hones.masking_result import KindDrop
from hones_lens.results.statistics import Interval
from hones_lens.viz import masking_plots


def lopsided(result):
    """The result with intervals that reach further up than down."""
    drop, lost = result.drop, result.log_prob_drop
    metric = replace(result.metric_interval, low=drop - 0.01, high=drop + 0.09)
    return replace(
        result,
        metric_interval=metric,
        log_prob_interval=replace(result.log_prob_interval, low=lost - 0.02, high=lost + 0.3),
        kinds={kind: replace(found, interval=metric) for kind, found in result.kinds.items()},
    )


@pytest.mark.parametrize("panel, measure", [(0, "metric"), (1, "log_prob")])
def test_curve_draws_selected_random_and_baseline(panel, measure):
    results = [lopsided(result) for result in made.curve()]
    axes = drawn(masking_plots.masking_curve(results[::-1])).axes[panel]
    shares = [100 * r.ratio for r in results]
    baseline, masked, interval = {
        "metric": ("baseline", "masked", "metric_interval"),
        "log_prob": ("baseline_log_prob", "masked_log_prob", "log_prob_interval"),
    }[measure]
    values = np.array([[getattr(c, measure) for c in r.controls] for r in results])

    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(np.asarray(lines["random sets"].get_ydata(), float), values.mean(axis=1))
    assert set(lines["nothing masked"].get_ydata()) == {getattr(results[0], baseline)}

    (bars,) = axes.containers
    np.testing.assert_allclose(np.asarray(bars[0].get_xdata(), float), shares)
    np.testing.assert_allclose(np.asarray(bars[0].get_ydata(), float), [getattr(r, masked) for r in results])
    ends = [
        (getattr(r, baseline) - getattr(r, interval).high, getattr(r, baseline) - getattr(r, interval).low)
        for r in results
    ]
    drawn_ends = [segment[:, 1].tolist() for segment in bars[2][0].get_segments()]
    np.testing.assert_allclose(drawn_ends, ends)

    dots = only(axes, "controls").get_offsets()
    np.testing.assert_allclose(dots, [(x, v) for x, row in zip(shares, values, strict=True) for v in row])
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (values.min(), values.max())

    assert axes.get_xscale() == "log"
    assert tick_labels(axes.xaxis) == ["0.46", "0.98", "2", "4.9", "10"]


def test_curve_of_one_point_one_panel_and_no_random_sets():
    figure = drawn(masking_plots.masking_curve([made.masking(controls=())], ("metric",)))
    (axes,) = figure.axes
    assert "No random sets were run." in figure.heading.note
    assert [line.get_label() for line in axes.lines][:1] == ["nothing masked"]
    band = drawn(masking_plots.masking_curve([made.masking()])).axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 0].max() > band[:, 0].min()


def test_figures_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no masking results"):
        masking_plots.masking_curve([])
    with pytest.raises(ValueError, match="no masking results"):
        masking_plots.ranking_bars({})
    with pytest.raises(ValueError, match="kind"):
        masking_plots.kinds_bars(replace(made.masking(), kinds={}))
    with pytest.raises(ValueError, match="'accuracy'; valid: metric, log_prob"):
        masking_plots.masking_curve([made.masking()], ("accuracy",))


def test_bars_of_one_result():
    result = lopsided(made.masking())
    metric, log_prob = drawn(masking_plots.masking_bars(result)).axes
    heights = [bar.get_height() for bar in metric.containers[0]]
    mean = float(np.mean([c.metric for c in result.controls]))
    np.testing.assert_allclose(heights, [result.baseline, result.masked, mean])
    written = [float(t.get_text().replace("−", "-")) for t in metric.texts]
    np.testing.assert_allclose(written, heights, atol=0.00051)
    np.testing.assert_array_equal(
        only(metric, "controls").get_offsets(), [(2, c.metric) for c in result.controls]
    )
    (whisker,) = metric.containers[1][2][0].get_segments()
    assert whisker[:, 0].tolist() == [1, 1]
    names = [name.replace("\n", " ") for name in tick_labels(metric.xaxis)]
    assert names == ["nothing masked", "selected neurons", "20 random sets"]
    np.testing.assert_allclose(whisker[:, 1], [0.71 - 0.09, 0.71 + 0.01])
    (whisker,) = log_prob.containers[1][2][0].get_segments()
    np.testing.assert_allclose(whisker[:, 1], [-1.05 - 0.3, -1.05 + 0.02])
    np.testing.assert_allclose([bar.get_height() for bar in log_prob.containers[0]][:2], [-0.21, -1.05])

    (alone,) = masking_plots.masking_bars(replace(result, controls=()), ("metric",)).axes
    assert len(alone.containers[0]) == 2


def test_kinds_from_the_largest_drop_with_their_random_sets():
    result = made.masking()
    axes = drawn(masking_plots.kinds_bars(result)).axes[0]
    order = ["name", "color", "shape"]
    assert tick_labels(axes.yaxis) == [f"{kind} (n = 66)" for kind in order]
    assert axes.yaxis_inverted()
    drops = [result.kinds[kind].baseline - result.kinds[kind].masked for kind in order]
    np.testing.assert_allclose([bar.get_width() for bar in axes.containers[0]], drops)
    for place, kind in enumerate(order):
        expected = [result.kinds[kind].baseline - c.kinds[kind] for c in result.controls]
        dots = only(axes, f"controls-{place}").get_offsets()
        np.testing.assert_allclose(dots[:, 0], expected)
        assert place < dots[:, 1].min() <= dots[:, 1].max() < place + 0.5
        ((left, _), (right, _)) = only(axes, f"range-{place}").get_segments()[0]
        assert (left, right) == pytest.approx((min(expected), max(expected)))


def test_kinds_with_intervals_get_whiskers():
    interval = Interval(0.2, 0.1, 0.35, 0.95, 66)
    result = made.masking()
    kinds = {kind: KindDrop(66, 0.9, 0.7, -0.2, -0.5, interval) for kind in result.kinds}
    figure = masking_plots.kinds_bars(replace(result, kinds=kinds))
    (whisker,) = figure.axes[0].containers[1][2][0].get_segments()
    np.testing.assert_allclose(whisker[:, 0], [0.1, 0.35])
    assert "95 % bootstrap interval" in figure.heading.note


@pytest.mark.parametrize("measure", ["metric", "log_prob"])
def test_rankings_from_the_largest_drop(measure):
    results = {
        "mean_activation": lopsided(made.masking(0.95, -0.19)),
        "hones": lopsided(made.masking()),
        "direct": lopsided(made.masking(0.88, -0.4)),
    }
    axes = drawn(masking_plots.ranking_bars(results, measure)).axes[0]
    assert tick_labels(axes.yaxis) == ["hones", "direct", "mean activation"]
    expected = [0.22, 0.05, -0.02] if measure == "metric" else [0.84, 0.19, -0.02]
    np.testing.assert_allclose([bar.get_width() for bar in axes.containers[0]], expected)
    down, up = (0.01, 0.09) if measure == "metric" else (0.02, 0.3)
    for place, (container, drop) in enumerate(zip(axes.containers[1:], expected, strict=True)):
        (segment,) = container[2][0].get_segments()
        np.testing.assert_allclose(segment[:, 0], [drop - down, drop + up], atol=1e-9)
        assert segment[:, 1].tolist() == [place, place]
    for place, name in enumerate(("hones", "direct", "mean_activation")):
        one = results[name]
        before = one.baseline if measure == "metric" else one.baseline_log_prob
        drops = [before - getattr(control, measure) for control in one.controls]
        np.testing.assert_allclose(only(axes, f"controls-{place}").get_offsets()[:, 0], drops)
    colours = [bar.get_facecolor()[:3] for bar in axes.containers[0]]
    assert colours[0] == colours[1] != colours[2]
