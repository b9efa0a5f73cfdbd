"""Figures of tasks compared: what is drawn equals the numbers, and chance equals drawn random sets."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from helpers import example_comparisons as made
from matplotlib.axes import Axes

from hones_lens.hones.masking import matched_random_sets
from hones_lens.hones.masking_result import MaskingResult
from hones_lens.hones.overlap.group_masking import GroupMasking
from hones_lens.hones.overlap.groups import chance_sizes, find_overlap
from hones_lens.viz import theme
from hones_lens.viz.overlap_plots import group_masking_bars, overlap_layers, overlap_shared, overlap_sizes


def drawn(figure: theme.Plot) -> theme.Plot:
    figure.savefig(io.BytesIO(), format="png")
    return figure


def widths(axes: Axes) -> list[float]:
    return [b.get_width() for c in axes.containers if hasattr(c, "patches") for b in c.patches]


def names(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def chance_lines(axes: Axes) -> list[float]:
    """Where they are, each across its own bar."""
    (lines,) = [artist for artist in axes.collections if artist.get_gid() == "chance"]
    for place, segment in enumerate(lines.get_segments()):
        assert segment[:, 1].mean() == pytest.approx(place) and np.ptp(segment[:, 1]) < 1
    return [segment[0][0] for segment in lines.get_segments()]


@pytest.mark.parametrize("n_tasks", [2, 3, 4])
def test_chance_is_the_mean_over_random_selections(n_tasks):
    found = made.shared(made.TASKS[:n_tasks])
    draws, sizes = 150, {name: 0.0 for name in found.groups}
    sets = {
        task: matched_random_sets(neurons, 4, 40, draws, seed=i)
        for i, (task, neurons) in enumerate(found.selected.items())
    }
    for draw in range(draws):
        drawn_sets = {task: [(c.layer, c.index) for c in s[draw]] for task, s in sets.items()}
        one = find_overlap(drawn_sets, shape=(4, 40), draws=1)
        for name, neurons in one.groups.items():
            sizes[name] += len(neurons) / draws
    expected = chance_sizes(found)
    assert list(expected) == list(sizes)
    for name, size in sizes.items():
        assert expected[name] == pytest.approx(size, abs=0.6), name
    per_task = sum(len(neurons) for neurons in found.selected.values())
    weights = [1] * n_tasks + list(range(2, n_tasks + 1))
    assert np.dot(weights, list(expected.values())) == pytest.approx(per_task)


def test_sizes_beside_chance():
    found = made.shared()
    axes = drawn(overlap_sizes(found)).axes[0]
    assert names(axes) == list(found.groups) and axes.yaxis_inverted()
    assert widths(axes) == [len(neurons) for neurons in found.groups.values()]
    assert chance_lines(axes) == pytest.approx(list(chance_sizes(found).values()))
    said = [text.get_text() for text in axes.texts]
    assert [text.xy[1] for text in axes.texts] == pytest.approx(range(len(said)))
    assert said[-1] == f"{len(found.groups['general'])}  (chance {chance_sizes(found)['general']:.1f})"
    assert "Selected of 160 neurons: vqa 16, ocr 16, caption 16, retrieval 16." in axes.figure.heading.note


def test_shared_by_pairs_and_all_with_p_values():
    found = made.shared()
    axes = drawn(overlap_shared(found)).axes[0]
    assert names(axes)[0] == "vqa & ocr" and names(axes)[-1] == "all 4 tasks"
    assert widths(axes) == [each.count for each in found.shared]
    assert chance_lines(axes) == pytest.approx([each.expected for each in found.shared])
    assert [text.get_text() for text in axes.texts] == [f"{e.count}  (p = {e.p:.2g})" for e in found.shared]
    assert "500 such sets" in axes.figure.heading.note
    two = drawn(overlap_shared(made.shared(("vqa", "ocr")))).axes[0]
    assert names(two) == ["vqa & ocr"]


@pytest.mark.parametrize("n_layers", [4, 28])
def test_layers_are_bars_or_lines_of_the_same_counts(n_layers):
    found = made.shared(n_layers=n_layers)
    figure = drawn(overlap_layers(found))
    axes = figure.axes[0]
    if n_layers == 4:
        series = [[bar.get_height() for bar in c.patches] for c in axes.containers]
        for container in axes.containers:
            assert [round(bar.get_x() + bar.get_width() / 2) for bar in container.patches] == [0, 1, 2, 3]
    else:
        assert all(list(line.get_xdata()) == list(range(28)) for line in axes.lines)
        series = [list(line.get_ydata()) for line in axes.lines]
    frame = found.per_layer()
    alone = frame[[f"{task} only" for task in made.TASKS]].sum(axis=1)
    assert series == [alone.tolist(), *(frame[name].tolist() for name in ("pair", "triple", "general"))]
    assert sum(map(sum, series)) == len(found.owners)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["one task", "pair", "triple", "general"]
    drawn_in = (
        [container.patches[0].get_facecolor() for container in axes.containers]
        if n_layers == 4
        else [line.get_color() for line in axes.lines]
    )
    handles = figure.legends[0].legend_handles
    assert drawn_in == [h.get_facecolor() if n_layers == 4 else h.get_color() for h in handles]


def lopsided(result: MaskingResult) -> MaskingResult:
    """The result with intervals that reach further up than down."""
    metric = replace(result.metric_interval, high=result.drop + 0.2)
    return replace(
        result,
        metric_interval=metric,
        log_prob_interval=replace(result.log_prob_interval, high=result.log_prob_drop + 0.5),
    )


@pytest.mark.parametrize("measure", ["metric", "log_prob"])
def test_each_task_has_a_panel_of_groups(measure):
    groups = GroupMasking(tuple(lopsided(result) for result in made.groups().results))
    figure = drawn(group_masking_bars(groups, measure))
    assert [axes.get_title(loc="left").split(" (")[0] for axes in figure.axes] == list(made.TASKS)
    for axes, task in zip(figure.axes, made.TASKS, strict=True):
        results = [r for r in groups.results if r.task == task]
        drops = [r.drop if measure == "metric" else r.log_prob_drop for r in results]
        assert names(axes) == [r.method for r in results] and widths(axes) == pytest.approx(drops)
        lines = [c.lines[2][0].get_segments()[0] for c in axes.containers if not hasattr(c, "patches")]
        ends = [(line[0][0], line[1][0]) for line in lines]
        assert [line[:, 1].tolist() for line in lines] == [[i, i] for i in range(len(results))]
        intervals = [r.metric_interval if measure == "metric" else r.log_prob_interval for r in results]
        assert np.allclose(ends, [(i.low, i.high) for i in intervals])
        (dots,) = [artist for artist in axes.collections if artist.get_gid() == "controls-0"]
        mine = [0.01 * d if measure == "metric" else 0.02 * d for d in range(5)]
        assert dots.get_offsets()[:, 0].tolist() == pytest.approx(mine)
    assert "n = 84 held-out" in figure.heading.note and "5 random sets" in figure.heading.note
    assert "3 neurons of each group" in figure.heading.title


def test_one_task_alone_says_its_baseline():
    figure = drawn(group_masking_bars(made.groups(), tasks=["ocr"]))
    assert len(figure.axes) == 1 and figure.axes[0].get_xlabel() == "drop of ANLS"
    assert figure.heading.title.startswith("ocr: ") and "Nothing masked: ANLS 0.930." in figure.heading.note
    with pytest.raises(ValueError, match=r"tasks \['gqa'\] were not measured; there are: vqa, ocr"):
        group_masking_bars(made.groups(), tasks=["gqa"])
    with pytest.raises(ValueError, match="unknown measure"):
        group_masking_bars(made.groups(), "logit")


@pytest.mark.parametrize("what", ["sizes", "shared", "layers", "groups"])
def test_nothing_is_clipped_and_results_plot_themselves(what):
    figure = made.groups().plot() if what == "groups" else made.shared().plot(what)
    drawn(figure)
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02


def test_an_unknown_figure_is_refused():
    with pytest.raises(ValueError, match="unknown figure 'venn'; valid: sizes, shared, layers"):
        made.shared().plot("venn")


def test_lens_tables_show_tokens_as_they_are():
    page = made.lens()._repr_html_()
    assert "<code>&lt;b&gt;</code>&nbsp;+1.2" in page and "<b>" not in page and "n = 84" in page
    rows = page.split("<tr>")[2:]
    assert len(rows) == 3 and rows[0].count("–") == 2 and "▁red" in rows[1] and "&lt;/s&gt;" in rows[2]
