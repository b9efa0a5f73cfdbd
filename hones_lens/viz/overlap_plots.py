"""Figures of tasks compared: the neurons that they share beside chance, by layer, and each group masked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hones_lens.hones import GroupMasking, MaskingResult, Overlap, chance_sizes, masking_measure
from hones_lens.model import require_choice, takes_iterables
from hones_lens.viz import theme
from hones_lens.viz.masking_plots import DropRow, draw_rows
from hones_lens.viz.text import level, number
from hones_lens.viz.theme import INK, SELECTED, Plot, styled

_SPECIFIC = "one task"
_MOST_BARS = 12  # layers up to which counts by layer are bars


@styled
def overlap_sizes(overlap: Overlap) -> Plot:
    """Number of neurons in each group, beside the mean for random sets."""
    sizes = {name: len(neurons) for name, neurons in overlap.groups.items()}
    chance = chance_sizes(overlap)
    note = f"{_selected_note(overlap)} Line: mean if each task's neurons were random, as many in each layer."
    figure, (axes,) = theme.new_plot("Neurons by how many tasks share them", note, 0.75 + 0.36 * len(sizes))
    labels = [f"{size}  (chance {chance[name]:.1f})" for name, size in sizes.items()]
    _count_bars(axes, list(sizes), list(sizes.values()), list(chance.values()), labels)
    return figure


@styled
def overlap_shared(overlap: Overlap) -> Plot:
    """Neurons shared by every pair of tasks and by all tasks, beside chance, with p-values."""
    names = [" & ".join(sharing.tasks) for sharing in overlap.shared]
    if len(overlap.tasks) > 2:
        names[-1] = f"all {len(overlap.tasks)} tasks"
    labels = [f"{sharing.count}  (p = {sharing.p:.2g})" for sharing in overlap.shared]
    note = (
        f"{_selected_note(overlap)} Line: mean for random sets with as many neurons in each layer; p: share "
    )
    note += f"of {overlap.draws:,} such sets that share at least as many."
    figure, (axes,) = theme.new_plot("Neurons that tasks share", note, 0.75 + 0.36 * len(names))
    counts, expected = (
        [getattr(sharing, what) for sharing in overlap.shared] for what in ("count", "expected")
    )
    _count_bars(axes, names, counts, expected, labels)
    return figure


def overlap_figure(overlap: Overlap, what: str = "sizes") -> Plot:
    """One of the figures of an overlap.

    Args:
        overlap: The overlap.
        what: `sizes` of the groups beside chance, what tasks have `shared` beside chance, or counts by
            `layers`.

    Raises:
        ValueError: None of these.
    """
    known = {"sizes": overlap_sizes, "shared": overlap_shared, "layers": overlap_layers}
    require_choice("figure", what, known)
    return known[what](overlap)


def _selected_note(overlap: Overlap) -> str:
    sizes = ", ".join(f"{task} {len(neurons):,}" for task, neurons in overlap.selected.items())
    return f"Selected of {overlap.n_layers * overlap.d_mlp:,} neurons: {sizes}."


def _count_bars(
    axes: Axes,
    names: Sequence[str],
    counts: Sequence[int],
    chance: Sequence[float],
    labels: Sequence[str],
) -> None:
    """Horizontal bars of counts, each with a line where chance would be."""
    places = np.arange(len(names))
    bars = axes.barh(places, counts, 0.6, color=SELECTED)
    axes.vlines(chance, places - 0.42, places + 0.42, color=INK, linewidth=1.8, gid="chance", zorder=3)
    top = max(*counts, *chance)
    for bar, count, mean, label in zip(bars, counts, chance, labels, strict=True):
        place = (max(count, mean), bar.get_y() + bar.get_height() / 2)
        where = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "size": 9.2}
        axes.annotate(label, place, **where)
    theme.name_rows(axes, names, spine=True)
    axes.set_xlim(0, 1.42 * top or 1)
    axes.set_xlabel("neurons")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


@styled
def overlap_layers(overlap: Overlap) -> Plot:
    """Number of neurons in each layer by degree of sharing: of one task, of each pair, and so on."""
    frame, n = overlap.per_layer(), len(overlap.tasks)
    alone = list(frame.columns[:n])
    curves = {_SPECIFIC: frame[alone].sum(axis=1), **{name: frame[name] for name in frame.columns[n:]}}
    total = len(overlap.owners)
    note = f"{total:,} neurons that at least one task selected. {_selected_note(overlap)}"
    figure, (axes,) = theme.new_plot("Shared neurons by layer", note, 2.4, legend=True)
    handles = []
    for i, (name, values) in enumerate(curves.items()):
        colour = theme.SERIES[i % len(theme.SERIES)]
        if overlap.n_layers <= _MOST_BARS:
            width = 0.8 / len(curves)
            places = np.arange(overlap.n_layers) + (i - (len(curves) - 1) / 2) * width
            handles.append(axes.bar(places, values, width * 0.94, color=colour, label=name))
        else:
            handles += axes.plot(values.to_numpy(), color=colour, marker="o", markersize=3, label=name)
    axes.set_xticks(range(0, overlap.n_layers, 1 if overlap.n_layers <= 16 else 4))
    axes.set(xlabel="layer", ylabel="neurons", xlim=(-0.6, overlap.n_layers - 0.4), ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.grid(axis="y")
    theme.add_legend(figure, handles, list(curves))
    return figure


@takes_iterables
@styled
def group_masking_bars(
    groups: GroupMasking, measure: str = "metric", tasks: Sequence[str] | None = None
) -> Plot:
    """Drop of each task when each group of neurons is masked, with intervals, against random sets.

    Args:
        groups: All groups cut to one size.
        measure: `metric` or `log_prob`.
        tasks: Which tasks; default: all.

    Raises:
        ValueError: An unknown measure, or a task that was not measured.
    """
    by_task: dict[str, list[MaskingResult]] = {}
    for result in groups.results:
        by_task.setdefault(result.task, []).append(result)
    shown = list(by_task) if tasks is None else list(tasks)
    if unknown := [task for task in shown if task not in by_task]:
        raise ValueError(f"tasks {unknown} were not measured; there are: {', '.join(by_task)}")
    m, single_task = masking_measure(by_task[shown[0]][0], measure), shown[0] if len(shown) == 1 else ""
    subject = f"{single_task}: drop" if single_task else "Drop"
    title = f"{subject} with {groups.size:,} neurons of each group masked"
    count = sum(len(by_task[task]) for task in shown)
    figure, panels = theme.new_plot(title, _groups_note(by_task, shown, measure), 0.7 + 0.31 * count)
    for axes in panels:
        axes.remove()
    heights = [len(by_task[task]) for task in shown]
    grid = figure.subplots(len(shown), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, task in zip(grid, shown, strict=True):
        results = by_task[task]
        draw_rows(axes, [_row(result, measure) for result in results])
        task_measure = masking_measure(results[0], measure)
        if not single_task:
            axes.set_title(f"{task} ({task_measure.short}{task_measure.unit})", fontweight="bold")
    name = m.short if single_task or m.unit else "the metric"
    grid[-1].set_xlabel(f"drop of {name}{' (nats)' if m.unit else ''}")
    return figure


def _row(result: MaskingResult, measure: str) -> DropRow:
    m = masking_measure(result, measure)
    return DropRow(result.method, m.drop, m.interval, [m.baseline - value for value in m.controls])


def _groups_note(by_task: dict[str, list[MaskingResult]], shown: Sequence[str], measure: str) -> str:
    firsts = [by_task[task][0] for task in shown]
    ns = [r.metric_interval.n for r in firsts]
    n = ", ".join(f"{count:,} ({r.task})" for count, r in zip(ns, firsts, strict=True))
    n = f"{ns[0]:,}" if len(set(ns)) == 1 else n
    draws = sorted({len(r.controls) for r in firsts})
    text = f"n = {n} held-out examples. Whiskers: {level(firsts[0].metric_interval)} bootstrap interval. "
    text += f"Grey: {'/'.join(map(str, draws))} random sets for each group, as many neurons in each layer."
    if len(firsts) == 1:
        m = masking_measure(firsts[0], measure)
        text += f" Nothing masked: {m.short} {number(m.baseline)}{m.unit}."
    return text
