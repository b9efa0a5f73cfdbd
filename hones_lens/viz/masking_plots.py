"""Figures of masking: curves, bars, kinds of question and rankings, each beside the matched random sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from hones_lens.hones import MEASURES, MaskingMeasure, MaskingResult, masking_measure
from hones_lens.model import takes_iterables
from hones_lens.results import Interval
from hones_lens.viz import theme
from hones_lens.viz.text import join_words, level, number, percent
from hones_lens.viz.theme import INK, MUTED, NEGATIVE, RANDOM, SELECTED, Plot, styled

DOTS = {"s": 9, "alpha": 0.5, "linewidths": 0}  # one random set each


def _sample_note(results: Sequence[MaskingResult]) -> str:
    """Note on n, the interval and the random sets."""
    ns = sorted({r.metric_interval.n for r in results})
    n = f"{ns[0]:,}" if len(ns) == 1 else f"{ns[0]:,}–{ns[-1]:,}"
    interval = f"{level(results[0].metric_interval)} bootstrap interval of the drop"
    text = f"n = {n} held-out examples. Whiskers: {interval}."
    counts = sorted({len(r.controls) for r in results})
    if not counts[-1]:
        return f"{text} No random sets were run."
    sets = "/".join(str(c) for c in counts if c)
    return f"{text} Random: {sets} sets with as many neurons in each layer."


def error_bar_lengths(drop: float, interval: Interval) -> list[list[float]]:
    """Distances from the drop to both ends of its interval, in the form of matplotlib's error bars."""
    return [[max(0.0, drop - interval.low)], [max(0.0, interval.high - drop)]]


@takes_iterables
@styled
def masking_curve(results: Sequence[MaskingResult], measures: Sequence[str] = MEASURES) -> Plot:
    """The measures against the share of neurons masked, beside matched random sets.

    Args:
        results: One task and method at several shares.
        measures: One panel each: `metric`, `log_prob`.

    Raises:
        ValueError: No results, or an unknown measure.
    """
    if not results:
        raise ValueError("no masking results to draw")
    results = sorted(results, key=lambda r: r.ratio)
    shown = [masking_measure(results[0], measure).short for measure in measures]
    title = f"{results[0].task}: {join_words(shown)} with neurons masked"
    note = f"Neurons selected by {results[0].method.replace('_', ' ')}. {_sample_note(results)}"
    figure, panels = theme.new_plot(title, note, 2.75, panels=len(measures), legend=True)
    for axes, measure in zip(panels, measures, strict=True):
        _curve_panel(axes, results, [masking_measure(result, measure) for result in results])
    handles, labels = panels[0].get_legend_handles_labels()
    theme.add_legend(figure, handles, labels)
    return figure


def _curve_panel(axes: Axes, results: Sequence[MaskingResult], values: Sequence[MaskingMeasure]) -> None:
    shares = np.array([100 * result.ratio for result in results])
    axes.axhline(values[0].baseline, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), label="nothing masked")
    if any(m.controls for m in values):
        low, high = (np.array([f(m.controls or (math.nan,)) for m in values]) for f in (min, max))
        ends = shares if len(shares) > 1 else shares * [0.96, 1.04]
        low, high = (np.broadcast_to(edge, ends.shape) for edge in (low, high))
        axes.fill_between(ends, low, high, color=RANDOM, alpha=0.2, linewidth=0)
        axes.plot(shares, [m.random_mean for m in values], color=RANDOM, marker="_", label="random sets")
        dots = [(share, value) for share, m in zip(shares, values, strict=True) for value in m.controls]
        axes.scatter(*zip(*dots, strict=True), s=9, color=RANDOM, alpha=0.45, linewidths=0, gid="controls")
    whiskers = np.hstack([error_bar_lengths(m.drop, m.interval)[::-1] for m in values])
    masked = [m.masked for m in values]
    style = {"color": SELECTED, "marker": "o", "markersize": 4.5, "capsize": 2.5, "elinewidth": 1.2}
    axes.errorbar(shares, masked, yerr=whiskers, label="selected neurons", zorder=4, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(shares.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([percent(result.ratio).removesuffix(" %") for result in results])
    axes.set_xlabel("neurons masked (% of all)")
    axes.set_ylabel(values[0].name if not values[0].unit else "log-probability of answer (nats)")
    axes.grid(axis="y")
    axes.margins(x=0.06)


@takes_iterables
@styled
def masking_bars(result: MaskingResult, measures: Sequence[str] = MEASURES) -> Plot:
    """Nothing masked, the selected neurons masked, random sets masked (mean, each, and their range)."""
    title = f"{result.task}: {result.n_neurons:,} neurons masked ({percent(result.ratio)})"
    figure, panels = theme.new_plot(title, _sample_note([result]), 2.6, panels=len(measures))
    for axes, measure in zip(panels, measures, strict=True):
        m = masking_measure(result, measure)
        heights = [m.baseline, m.masked] + ([m.random_mean] if m.controls else [])
        names = ["nothing\nmasked", "selected\nneurons", f"{len(m.controls)} random\nsets"][: len(heights)]
        bars = axes.bar(names, heights, 0.62, color=[INK, SELECTED, RANDOM][: len(heights)])
        whiskers = error_bar_lengths(m.drop, m.interval)[::-1]
        axes.errorbar([1], [m.masked], yerr=whiskers, color=MUTED, capsize=4, linestyle="none")
        if m.controls:
            axes.scatter([2] * len(m.controls), m.controls, color=INK, **DOTS, gid="controls")
        down = max(heights) <= 0
        ends = [m.baseline, m.baseline - (m.interval.low if not down else m.interval.high)]
        ends += [max(m.controls) if not down else min(m.controls)] if m.controls else []
        worst = min if down else max
        for bar, height, end in zip(bars, heights, ends, strict=False):
            place = (bar.get_x() + bar.get_width() / 2, worst(height, end))
            move, side = ((0, -3), "top") if down else ((0, 3), "bottom")
            where = {"xytext": move, "textcoords": "offset points", "ha": "center", "va": side}
            axes.annotate(number(height), place, size=9.2, **where)
        axes.margins(y=0.12)
        axes.set_ylabel(m.name if not m.unit else "log-probability of answer (nats)")
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y")
    return figure


class DropRow(NamedTuple):
    """A drop, its interval where there is one, and the drops of the random sets."""

    name: str
    drop: float
    interval: Interval | None
    random: list[float]


def draw_rows(axes: Axes, rows: Sequence[DropRow]) -> None:
    """Horizontal bars, the first on top, with the random sets below each."""
    places = np.arange(len(rows))
    colours = [SELECTED if row.drop >= 0 else NEGATIVE for row in rows]
    axes.barh(places, [row.drop for row in rows], 0.6, color=colours)
    for place, (_, drop, interval, random) in zip(places, rows, strict=True):
        if interval:
            style = {"color": INK, "elinewidth": 1.2, "capsize": 3, "linestyle": "none"}
            axes.errorbar([drop], [place], xerr=error_bar_lengths(drop, interval), **style)
        if random:
            y = place + 0.42
            axes.hlines(y, min(random), max(random), color=RANDOM, linewidth=1.6, gid=f"range-{place}")
            axes.scatter(random, [y] * len(random), color=RANDOM, **DOTS, gid=f"controls-{place}")
    axes.axvline(0, color=MUTED, linewidth=0.9)
    theme.name_rows(axes, [row.name for row in rows])


@styled
def kinds_bars(result: MaskingResult) -> Plot:
    """Drop of the metric for each kind of question, largest first, against the random sets.

    Whiskers are drawn where a kind carries an `interval` of its drop.

    Raises:
        ValueError: The result has no kinds.
    """
    if not result.kinds:
        raise ValueError("the result is not broken down by kind of question")
    order = sorted(result.kinds, key=lambda kind: result.kinds[kind].masked - result.kinds[kind].baseline)
    rows = []
    for kind in order:
        kind_result = result.kinds[kind]
        random = [kind_result.baseline - control.kinds[kind] for control in result.controls]
        interval = getattr(kind_result, "interval", None)
        rows.append(
            DropRow(
                f"{kind or 'all'} (n = {kind_result.n})",
                kind_result.baseline - kind_result.masked,
                interval,
                random,
            )
        )
    count, n = len(result.controls), result.metric_interval.n
    note = f"{result.n_neurons:,} neurons masked, n = {n:,} held-out examples."
    note += f" Grey: {count} random sets, and their range." if count else " No random sets were run."
    if rows[0].interval:
        note += f" Whiskers: {level(rows[0].interval)} bootstrap interval."
    title = f"{result.task}: drop by kind, {percent(result.ratio)} of the neurons masked"
    figure, (axes,) = theme.new_plot(title, note, 0.75 + 0.36 * len(rows))
    draw_rows(axes, rows)
    axes.set_xlabel(f"drop of {result.metric_name}")
    return figure


@styled
def ranking_bars(results: Mapping[str, MaskingResult], measure: str = "metric") -> Plot:
    """Drop when the best neurons of each ranking are masked, largest first, against matched random sets.

    Args:
        results: By the ranking's name, at the same number of neurons.
        measure: `metric` or `log_prob`.

    Raises:
        ValueError: No results, or an unknown measure.
    """
    if not results:
        raise ValueError("no masking results to draw")
    measured_by_name = {name: masking_measure(result, measure) for name, result in results.items()}
    order = sorted(measured_by_name, key=lambda name: -measured_by_name[name].drop)
    rows = []
    for name in order:
        m = measured_by_name[name]
        random = [m.baseline - value for value in m.controls]
        rows.append(DropRow(name.replace("_", " "), m.drop, m.interval, random))
    first = next(iter(results.values()))
    sizes = sorted({result.n_neurons for result in results.values()})
    title = f"{first.task}: drop of {measured_by_name[order[0]].short} by ranking"
    size = " / ".join(f"{s:,}" for s in sizes)
    note = f"The best {size} neurons of each. {_sample_note(list(results.values()))}"
    figure, (axes,) = theme.new_plot(title, note, 0.75 + 0.36 * len(rows))
    draw_rows(axes, rows)
    axes.set_xlabel(
        f"drop of {measured_by_name[order[0]].short}{' (nats)' if measured_by_name[order[0]].unit else ''}"
    )
    return figure
