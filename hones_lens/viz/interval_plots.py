"""Figures of values with their intervals: a metric by kind, heads on held-out examples, lens differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from hones_lens.analysis import LensDifference
from hones_lens.engine import Evaluation
from hones_lens.hones import HeldOutHeads
from hones_lens.model import takes_iterables
from hones_lens.viz import theme
from hones_lens.viz.lens_plots import shorten_token
from hones_lens.viz.masking_plots import DropRow, draw_rows
from hones_lens.viz.text import level, nonbreaking
from hones_lens.viz.theme import INK, MUTED, NEGATIVE, SELECTED, Plot, styled

_TOKEN = 14  # characters of a token in a row's name


class _Mark(NamedTuple):
    """A value in a row of its own; the ends of its interval are None where it has none."""

    name: str
    value: float
    low: float | None
    high: float | None
    colour: str


def _draw_marks(axes: Axes, marks: Sequence[_Mark]) -> None:
    """A dot with a whisker in each row, the first on top."""
    places = np.arange(len(marks))
    for place, mark in zip(places, marks, strict=True):
        if mark.low is not None and mark.high is not None:
            axes.hlines(place, mark.low, mark.high, color=INK, linewidth=1.2, gid=f"interval-{place}")
    colours = [mark.colour for mark in marks]
    axes.scatter([mark.value for mark in marks], places, s=26, c=colours, zorder=3, gid="values")
    theme.name_rows(axes, [mark.name for mark in marks])


@styled
def evaluation_dots(evaluation: Evaluation) -> Plot:
    """The metric over all examples and for each kind of example, with its interval where there is one."""
    whole = evaluation.interval
    marks = [_Mark(f"all (n = {whole.n})", whole.value, whole.low, whole.high, INK)]
    kinds = evaluation.kinds if len(evaluation.kinds) > 1 else {}
    for kind, metric in kinds.items():
        low, high = (None, None) if metric.interval is None else (metric.interval.low, metric.interval.high)
        name = nonbreaking(f"{kind or 'no kind'} (n = {metric.n})")
        marks.append(_Mark(name, metric.value, low, high, SELECTED))
    note = nonbreaking(f"n = {whole.n:,} examples. Whiskers: {level(whole)} interval.")
    title = f"{evaluation.model_name}, {evaluation.task}: {evaluation.metric_name}"
    figure, (axes,) = theme.new_plot(title, note, 0.75 + 0.3 * len(marks))
    _draw_marks(axes, marks)
    axes.set_xlabel(evaluation.metric_name)
    return figure


@takes_iterables
@styled
def held_out_bars(result: HeldOutHeads) -> Plot:
    """Drop of the metric for each selected head on held-out examples, and their mean beside random sets.

    Raises:
        ValueError: No selected heads.
    """
    if not result.heads:
        raise ValueError("no head was selected: there is nothing to draw")
    rows = [
        DropRow(f"L{head.layer}H{head.head}{'' if head.holds else ' *'}", head.drop.value, head.drop, [])
        for head in result.heads
    ]
    rows.append(DropRow("mean", result.mean_drop.value, result.mean_drop, list(result.random)))
    figure, (axes,) = theme.new_plot(
        f"{result.task}: selected heads on held-out examples",
        _held_out_note(result),
        0.75 + 0.36 * len(rows),
    )
    draw_rows(axes, rows)
    axes.set_xlabel(f"drop of {result.metric_name}")
    return figure


def _held_out_note(result: HeldOutHeads) -> str:
    n, interval = len(result.example_ids), level(result.mean_drop)
    note = f"Selected on {result.n_selected_on:,} other examples; n = {n:,}. Whiskers: {interval} interval. "
    if not all(head.holds for head in result.heads):
        note += f"*: does not hold at a false discovery rate of {100 * result.q:g} %. "
    draws = len(result.random)
    note += f"Grey: mean drop of {draws} random sets of other heads." if draws else "No random sets were run."
    return nonbreaking(note)


@styled
def lens_changes(difference: LensDifference, k: int = 12) -> Plot:
    """The k largest changes of a token's logit over all layers, largest on top, with their intervals.

    Raises:
        ValueError: No token changes, or a k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    tokens = [(layer, token) for layer, *tables in difference.rows for table in tables for token in table]
    if not tokens:
        raise ValueError("no logit changes at any layer: there is nothing to draw")
    largest = sorted(tokens, key=lambda pair: -abs(pair[1].delta))[:k]
    marks = [
        _Mark(
            theme.drawable(f"layer {layer}: {shorten_token(token.token, _TOKEN)}"),
            token.delta,
            token.low,
            token.high,
            SELECTED if token.delta > 0 else NEGATIVE,
        )
        for layer, token in largest
    ]
    note = f"The {len(marks)} largest of {len(tokens):,} changes; n = {difference.n_examples:,}."
    if any(token.low is not None for _, token in largest):
        note += " Whiskers: 95 % interval."
    figure, (axes,) = theme.new_plot(difference.title, nonbreaking(note), 0.75 + 0.26 * len(marks))
    _draw_marks(axes, marks)
    axes.axvline(0, color=MUTED, linewidth=0.9)
    axes.set_xlabel("fall of the logit")
    return figure
