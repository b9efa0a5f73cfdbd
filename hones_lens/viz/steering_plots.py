"""Figures of steering: what each method gains over the base, and what one task's scales do to the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hones_lens.hones import MEASURES, SideEffect, SideEffects, SteeringTable
from hones_lens.model import did_you_mean, takes_iterables
from hones_lens.results import Interval
from hones_lens.viz import theme
from hones_lens.viz.masking_plots import DOTS, error_bar_lengths
from hones_lens.viz.text import level, number
from hones_lens.viz.theme import GRID, INK, MUTED, NEGATIVE, RANDOM, SELECTED, Plot, styled

_GAINS = {"metric": "gain", "log_prob": "log_prob_gain"}


class GainRow(NamedTuple):
    """A method's gain: with its interval, or as the mean of several draws."""

    name: str
    gain: float
    interval: Interval | None
    draws: list[float]


def gain_rows(table: SteeringTable, measure: str = "metric") -> list[GainRow]:
    """One row a method, in the table's order without the base; the draws of RandNeuron are one row.

    Raises:
        ValueError: An unknown measure.
    """
    if measure not in _GAINS:
        raise ValueError(
            f"unknown measure {measure!r}; valid: {', '.join(MEASURES)}{did_you_mean(measure, MEASURES)}"
        )
    rows = []
    for method in dict.fromkeys(row.method for row in table.rows if row.method != "Base"):
        gains: list[Interval] = [getattr(r, _GAINS[measure]) for r in table.rows if r.method == method]
        values = [gain.value for gain in gains]
        if method == "RandNeuron":
            rows.append(GainRow(method, float(np.mean(values)), None, values))
        else:
            rows.append(GainRow(method, values[0], gains[0], []))
    return rows


@takes_iterables
@styled
def steering_bars(table: SteeringTable, measures: Sequence[str] = MEASURES) -> Plot:
    """Gain of every method over the base, with its interval; of the random sets the mean, and each.

    Args:
        table: One task.
        measures: One panel each: `metric`, `log_prob`.

    Raises:
        ValueError: Nothing but the base in the table, or an unknown measure.
    """
    rows_by_measure = {measure: gain_rows(table, measure) for measure in measures}
    if not all(rows_by_measure.values()):
        raise ValueError("no method in the table but the base")
    title = f"{table.task}: gain over the base by method of steering"
    height = 0.8 + 0.38 * len(next(iter(rows_by_measure.values())))
    figure, panels = theme.new_plot(title, _steering_note(table), height, panels=len(measures))
    for axes, (measure, rows) in zip(panels, rows_by_measure.items(), strict=True):
        _draw_gains(axes, rows)
        name = table.metric_name if measure == "metric" else "log-probability of the answer (nats)"
        axes.set_xlabel(f"gain of {name}")
        if axes is not panels[0]:
            axes.set_yticklabels([])
    return figure


def _steering_note(table: SteeringTable) -> str:
    base, n = table.row("Base"), len(table.example_ids)
    note = f"{table.n_neurons:,} neurons by {table.neuron_method.replace('_', ' ')}, learned on "
    note += f"{table.n_learned:,} and chosen on {table.n_chosen:,} examples; n = {n:,} held-out examples. "
    note += f"Base: {table.metric_name} {number(base.metric)}. "
    note += f"Whiskers: {level(base.gain)} bootstrap interval of the gain."
    draws = sum(row.method == "RandNeuron" for row in table.rows)
    return f"{note} RandNeuron: mean of {draws} random sets, and each of them." if draws else note


def _draw_gains(axes: Axes, rows: Sequence[GainRow]) -> None:
    """Horizontal bars, the first on top."""
    places = np.arange(len(rows))
    colours = [RANDOM if row.draws else SELECTED if row.gain >= 0 else NEGATIVE for row in rows]
    axes.barh(places, [row.gain for row in rows], 0.6, color=colours)
    for place, row in zip(places, rows, strict=True):
        if row.interval:
            style = {"color": INK, "elinewidth": 1.2, "capsize": 3, "linestyle": "none"}
            axes.errorbar([row.gain], [place], xerr=error_bar_lengths(row.gain, row.interval), **style)
        if row.draws:
            axes.scatter(row.draws, [place] * len(row.draws), color=INK, **DOTS, gid=f"draws-{place}")
    axes.axvline(0, color=MUTED, linewidth=0.9)
    theme.name_rows(axes, [row.name for row in rows])
    axes.locator_params(axis="x", nbins=5)


@styled
def side_effect_bars(effects: SideEffects) -> Plot:
    """Gain of every task under the scales of every task; the task that scales were learned for is filled.

    Raises:
        ValueError: No cells.
    """
    if not effects.cells:
        raise ValueError("no side effects to draw")
    owners = list(dict.fromkeys(cell.scales_of for cell in effects.cells))
    tasks = list(dict.fromkeys(cell.task for cell in effects.cells))
    step = len(tasks) + 0.9  # from one block of bars to the next
    title, height = "Every task under the scales of every task", 0.7 + 0.19 * step * len(owners)
    figure, (axes,) = theme.new_plot(title, _effects_note(effects), height, legend=True)
    for i, owner in enumerate(owners):
        _draw_effects(axes, [effects.cell(owner, task) for task in tasks], i * step)
        if i:
            axes.axhline(i * step - 0.95, color=GRID, linewidth=0.8)
    axes.axvline(0, color=MUTED, linewidth=0.9)
    middles = [i * step + (len(tasks) - 1) / 2 for i in range(len(owners))]
    axes.set_yticks(middles, labels=[f"scales of\n{owner}" for owner in owners])
    axes.set_ylim(len(owners) * step - 0.7, -0.8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("gain")
    axes.grid(axis="x")
    colours = [theme.SERIES[j % len(theme.SERIES)] for j in range(len(tasks))]
    style = {"linewidth": 6, "solid_capstyle": "butt"}
    theme.add_legend(figure, [Line2D([], [], color=colour, **style) for colour in colours], tasks)
    return figure


def _effects_note(effects: SideEffects) -> str:
    ns = sorted({cell.gain.n for cell in effects.cells})
    n = f"{ns[0]:,}" if len(ns) == 1 else f"{ns[0]:,}–{ns[-1]:,}"
    return (
        f"Gain of each task's own metric. n = {n} held-out examples. Whiskers: "
        f"{level(effects.cells[0].gain)} bootstrap interval. Filled: the task that they were learned for."
    )


def _draw_effects(axes: Axes, cells: Sequence[SideEffect], start: float) -> None:
    """The tasks under one task's scales, one bar each from `start` down."""
    for j, cell in enumerate(cells):
        colour, gain = theme.SERIES[j % len(theme.SERIES)], cell.gain
        inside = colour if cell.task == cell.scales_of else "none"
        axes.barh([start + j], [gain.value], 0.78, facecolor=inside, edgecolor=colour, linewidth=1.3)
        style = {"color": INK, "elinewidth": 1.1, "capsize": 2.2, "linestyle": "none"}
        axes.errorbar([gain.value], [start + j], xerr=error_bar_lengths(gain.value, gain), **style)
