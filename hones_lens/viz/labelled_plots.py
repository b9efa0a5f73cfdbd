"""Figures of `Labelled` results: curves, bars, and one or several heat maps."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hones_lens.results import Labelled, benjamini_hochberg
from hones_lens.viz import theme
from hones_lens.viz.text import nonbreaking, number
from hones_lens.viz.theme import GRID, INK, MUTED, ON_ACCENT, SELECTED, SURFACE, Plot, styled

_MOST_VALUES = (8, 16)  # columns and rows up to which a map has its numbers written in
_MOST_PANELS = 48  # of more entries, so many are drawn
_COLUMNS, _MOST_WIDE, _NARROW_COLUMNS = 4, 16, 8  # panels in a line, and in one where there are more than 16
_WIDE = (24, 60)  # columns from which a single map is wider than one panel
_MOST_TICKS = 48  # names on one axis; more of them are left out in between
_ALPHA = 0.05
_LIGHT_TEXT_FROM = 0.55  # share of the largest value from which a cell is so dark that its text is light


def significant(result: Labelled) -> Tensor | None:
    """Mask of values that differ from 0: by p-values at a false discovery rate of 5 %, else by interval.

    Returns:
        bool, shaped as the values; None where the result has neither.
    """
    if result.p is not None:
        has_p = ~result.p.isnan()
        is_significant = torch.zeros_like(has_p)
        if bool(has_p.any()):
            is_significant[has_p] = torch.from_numpy(
                benjamini_hochberg(result.p[has_p].double().numpy(), _ALPHA)[1]
            )
        return is_significant
    if result.low is None or result.high is None:
        return None
    return (result.low > 0) | (result.high < 0)


@styled
def labelled(result: Labelled, *, title: str | None = None, panels: str | None = None) -> Plot:
    """A figure of one, two or three axes.

    One axis: a curve over numbers, or bars over names, with intervals. Two: a heat map, the first axis
    downwards, centred at 0. Three: a heat map for each entry of one axis, all in one scale; of more than 48
    entries, 48 from the first to the last. A dot marks what differs from 0 (see `significant`).

    Args:
        result: What to draw.
        title: Default: `result.what`.
        panels: With three axes, the axis with one map per entry; default: the one beside row and column,
            else the one with the fewest entries.

    Raises:
        ValueError: No axes, more than three, or an unknown axis.
    """
    title = result.what if title is None else title
    if len(result.axes) == 1:
        return _line(result, title)
    if len(result.axes) == 2:
        return _maps([result], [""], result, title)
    if len(result.axes) != 3:
        raise ValueError(
            f"{result.what}: {len(result.axes)} axes ({', '.join(result.axes) or 'none'}) can't be drawn; "
            "select() entries until one, two or three are left"
        )
    names = result.names(axis := _panel_axis(result) if panels is None else panels)
    if len(names) > _MOST_PANELS:
        shown = torch.linspace(0, len(names) - 1, _MOST_PANELS).round().long().tolist()
        result = replace(result, notes=(*result.notes, f"{_MOST_PANELS} of {len(names)} {axis}s are shown"))
        names = tuple(names[i] for i in shown)
    parts = [result.select(**{axis: name}) for name in names]
    headings = [f"{axis} {name}" if isinstance(name, int) else str(name) for name in names]
    return _maps(parts, headings, result, title)


def _panel_axis(result: Labelled) -> str:
    """The axis that has a map for each of its entries: of pictures their layer, else the shortest."""
    beside = [axis for axis in result.axes if axis not in ("row", "column")]
    if len(beside) == 1:
        return beside[0]
    return min(reversed(result.axes), key=lambda axis: len(result.names(axis)))


def _note(result: Labelled) -> str:
    """Note below the figure: n, the meaning of marks, and the result's own notes."""
    parts = [] if result.n is None else [f"n = {result.n:,}."]
    if result.p is not None:
        parts.append("Dot: differs from 0 (false discovery rate < 5 %).")
    elif result.low is not None and len(result.axes) > 1:
        parts.append("Dot: 95 % interval without 0.")
    elif result.low is not None:
        parts.append(f"{'Band' if _has_numeric_axis(result) else 'Black line'}: 95 % interval.")
    note = " ".join([*parts, *(line.rstrip(".") + "." for line in result.notes)])
    return nonbreaking(re.sub(r"(?<!\w)-(?=\d)", "−", note))


def _has_numeric_axis(result: Labelled) -> bool:
    """Whether the labels of the first axis are numbers, so that a curve can be drawn over it."""
    return all(isinstance(name, (int, float)) for name in result.names(result.axes[0]))


def _value_label(result: Labelled, title: str, width: int) -> str:
    """Label of the values, wrapped; empty where the title already says it."""
    return "" if title == result.what else textwrap.fill(result.what, width)


# -- one axis ----------------------------------------------------------------------------------------


def _line(result: Labelled, title: str) -> Plot:
    (axis,), values = result.axes, result.values.double().numpy()
    names = result.names(axis)
    numbers = _has_numeric_axis(result)
    figure, (axes,) = theme.new_plot(title, _note(result), 2.5 if numbers else 0.36 * len(names) + 0.7)
    ends = [None if end is None else end.double().numpy() for end in (result.low, result.high)]
    if numbers:
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.plot(names, values, color=SELECTED, marker="o", markersize=3.5, gid="curve")
        if ends[0] is not None and ends[1] is not None:
            axes.fill_between(names, ends[0], ends[1], color=SELECTED, alpha=0.2, linewidth=0, gid="interval")
        axes.set(xlabel=axis, ylabel=_value_label(result, title, 36))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.grid(axis="y")
        return figure
    y = np.arange(len(names))
    axes.barh(y, values, height=0.62, color=SELECTED)
    if ends[0] is not None and ends[1] is not None:
        axes.hlines(y, ends[0], ends[1], color=INK, linewidth=1.4, gid="interval")
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_yticks(y, [theme.drawable(str(name)) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set(ylabel=axis, xlabel=_value_label(result, title, 48))
    axes.grid(axis="x")
    return figure


# -- heat maps ---------------------------------------------------------------------------------------


def _maps(parts: Sequence[Labelled], headings: Sequence[str], whole: Labelled, title: str) -> Plot:
    rows, columns = parts[0].shape
    narrow = len(parts) > _MOST_WIDE
    across = _NARROW_COLUMNS if narrow else min(_COLUMNS, len(parts))
    down = math.ceil(len(parts) / across)
    long = max(len(str(name)) for name in parts[0].names(parts[0].axes[1]))
    turned = long * columns > 40  # names of columns would touch
    height = min(5.0, max(1.2, 0.34 * rows) + 0.5) + (min(1.5, 0.075 * long) if turned else 0)
    wide = min(_COLUMNS, across) if len(parts) > 1 else 1 + sum(columns > many for many in _WIDE)
    if narrow:
        wide = 2
        height = 0.3 + min(1.6, 0.9 * wide * theme.WIDTH / across * rows / columns)
    figure, first = theme.new_plot(title, _note(whole), height * down, panels=wide)
    for axes in first:
        axes.remove()
    every = figure.subplots(down, across, squeeze=False).flatten()
    limit = float(whole.values.abs().nan_to_num(0).max()) or 1.0
    for axes, part, heading in zip(every, parts, headings, strict=False):
        mesh = _map(axes, part, limit, turned, narrow)
        axes.set_title(theme.drawable(heading))
        if narrow:
            axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
    for axes in every[len(parts) :]:
        axes.set_axis_off()
    ticks = MaxNLocator(5, symmetric=True)
    bar = figure.colorbar(mesh, ax=list(every), fraction=0.05 / wide, pad=0.02, aspect=14, ticks=ticks)
    assert bar.solids is not None
    bar.solids.set(rasterized=False, edgecolor="none", linewidth=0, gid=theme.CRISP)
    bar.outline.set_visible(False)
    bar.set_label(_value_label(whole, title, 30))
    if not bool((whole.values < 0).any()):
        bar.ax.set_ylim(0, limit)
    return figure


def _map(axes: Axes, part: Labelled, limit: float, turned: bool, narrow: bool = False) -> QuadMesh:
    (rows, columns), values = part.shape, part.values.double()
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values.numpy()),
        cmap=theme.diverging().with_extremes(bad=GRID),
        norm=TwoSlopeNorm(0, -limit, limit),
        edgecolors=SURFACE,
        linewidth=1.6 if columns <= 16 else 0.5 if columns <= 64 and not narrow else 0,
        gid="cells",
    )
    written = columns <= _MOST_VALUES[0] and rows <= _MOST_VALUES[1]
    marked = significant(part)
    if marked is not None:
        _draw_dots(axes, values, marked, limit, (0.9, 0.2) if written else (0.5, 0.5))
    if written:
        for (row, column), value in np.ndenumerate(values.numpy()):
            colour = ON_ACCENT if abs(value) > _LIGHT_TEXT_FROM * limit else INK
            style: dict[str, Any] = {"ha": "center", "va": "center", "size": 8.6, "color": colour}
            axes.text(column + 0.5, row + 0.54, "" if np.isnan(value) else number(value, 2), **style)
    axes.set(ylabel=part.axes[0], xlabel=part.axes[1])
    _ticks(axes.yaxis, part.names(part.axes[0]))
    _ticks(axes.xaxis, part.names(part.axes[1]))
    if turned:
        axes.tick_params(axis="x", rotation=90)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    return mesh


def _draw_dots(axes: Axes, values: Tensor, marked: Tensor, limit: float, offset: tuple[float, float]) -> None:
    """Draw a dot at `offset` (x, y) in each marked cell."""
    rows, columns = (index.numpy() for index in torch.nonzero(marked, as_tuple=True))
    strong = (values.abs()[marked] > _LIGHT_TEXT_FROM * limit).tolist()
    size = 9 if values.shape[1] <= 16 else 3
    colours = [ON_ACCENT if s else INK for s in strong]
    axes.scatter(columns + offset[0], rows + offset[1], s=size, c=colours, linewidths=0, zorder=3, gid="dots")


def _ticks(axis: Axis, names: Sequence[Any]) -> None:
    """Tick labels in the middle of the cells; long axes show only some of them."""
    n = len(names)
    step = math.ceil(n / _MOST_TICKS)
    if all(isinstance(name, int) for name in names):
        step = 1 if n <= 16 else 4 if n <= 40 else 8 if n <= 160 else math.ceil(n / 20)
    places = range(0, n, step)
    axis.set_ticks([i + 0.5 for i in places], labels=[theme.drawable(str(names[i])) for i in places])
    axis.set_tick_params(length=0)
