"""Figures of selected components: heads as a map of layers and heads, neurons by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hones_lens.hones import HeadScores, NeuronScores
from hones_lens.model import takes_iterables
from hones_lens.viz import theme
from hones_lens.viz.text import nonbreaking, number
from hones_lens.viz.theme import GRID, INK, ON_ACCENT, RANDOM, SURFACE, Plot, styled

_MOST_VALUES = (8, 12)  # heads and layers up to which a map has its numbers written in
_LIGHT_TEXT_FROM = 0.55  # share of the largest score from which a cell is so dark that its text is light


@styled
def head_heatmap(heads: HeadScores) -> Plot:
    """Heat map of layers × heads: drop of the metric when a head is replaced.

    The scale is centred at 0. Critical heads are outlined; a dot marks the heads whose
    drop stands at a false discovery rate of 5 % over all heads (`HeadScores.discoveries`).
    """
    n_layers, n_heads = heads.scores.shape
    title = f"{heads.task}: drop of {heads.metric_name} without a head"
    height = min(4.4, max(1.5, 0.42 * n_layers) + 0.5)
    figure, (axes,) = theme.new_plot(title, _heads_note(heads), height)
    limit = float(heads.scores.abs().nan_to_num(0).max()) or 1.0
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(heads.scores.numpy()),
        cmap=theme.diverging().with_extremes(bad=GRID),
        norm=TwoSlopeNorm(0, -limit, limit),
        edgecolors=SURFACE,
        linewidth=1.6 if n_heads <= 16 else 0.5,
        gid="cells",
    )
    outline = {"fill": False, "edgecolor": INK, "linewidth": 1.5, "clip_on": False}
    for layer, head, _ in heads.top():
        axes.add_patch(Rectangle((head + 0.04, layer + 0.04), 0.92, 0.92, **outline))
    written = n_heads <= _MOST_VALUES[0] and n_layers <= _MOST_VALUES[1]
    _draw_dots(axes, heads, limit, (0.84, 0.22) if written else (0.5, 0.5))
    if written:
        _write_values(axes, heads.scores, limit)
    axes.set(xlabel="head", ylabel="layer")
    _index_ticks(axes, n_heads, n_layers)
    ticks = MaxNLocator(5, symmetric=True)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02, aspect=14, ticks=ticks)
    assert bar.solids is not None
    bar.solids.set(rasterized=False, edgecolor="none", linewidth=0, gid=theme.CRISP)
    bar.outline.set_visible(False)
    return figure


def _heads_note(heads: HeadScores) -> str:
    top, n = len(heads.top()), heads.drops.shape[-1]
    note = f"Outlined: the {top} critical heads. " if top else "No head lowers the metric. "
    if heads.discoveries is not None:
        note += f"Dot: stands at a false discovery rate of 5 % over {int(heads.asked.sum()):,} heads. "
    if not bool(heads.measured.all()):
        note += f"Empty: the {int((~heads.measured).sum()):,} heads that were not measured. "
    if heads.traded:
        note += f"Not exact: {heads.traded}. "
    if n == 1:
        return f"{note}n = 1 example."
    if heads.score_ends is None:
        return nonbreaking(f"{note}n = {n:,} examples.")
    halves = (heads.score_ends[..., 1] - heads.score_ends[..., 0]) / 2
    shown = [float(halves[layer, head]) for layer, head, _ in heads.top()]
    half = f"of a head, median: ± {number(float(halves.nanmedian()))}"
    if shown:
        half = f"of the critical heads: ± {number(min(shown))} to ± {number(max(shown))}"
    return nonbreaking(f"{note}n = {n:,} examples; 95 % interval {half}.")


def _draw_dots(axes: Axes, heads: HeadScores, limit: float, offset: tuple[float, float]) -> None:
    """A dot at (x, y) of `offset` in the cell of each head that stands."""
    marked = torch.zeros(heads.scores.shape, dtype=torch.bool)
    for place in heads.discoveries or ():
        marked[place] = True
    layers, columns = (index.numpy() for index in torch.nonzero(marked, as_tuple=True))
    strong = heads.scores.abs()[marked].numpy() > _LIGHT_TEXT_FROM * limit
    colours = [ON_ACCENT if s else INK for s in strong]
    size = 9 if heads.scores.shape[1] <= 16 else 3
    axes.scatter(columns + offset[0], layers + offset[1], s=size, c=colours, linewidths=0, zorder=3)


def _write_values(axes: Axes, scores: Tensor, limit: float) -> None:
    for (layer, head), score in np.ndenumerate(scores.numpy()):
        colour = ON_ACCENT if abs(score) > _LIGHT_TEXT_FROM * limit else INK
        text = "" if np.isnan(score) else number(float(score), 2)
        axes.text(head + 0.5, layer + 0.54, text, ha="center", va="center", size=8.6, color=colour)


def _index_ticks(axes: Axes, n_heads: int, n_layers: int) -> None:
    """Whole numbers in the middle of the cells, layer 0 on top."""
    for axis, count in ((axes.xaxis, n_heads), (axes.yaxis, n_layers)):
        step = 1 if count <= 16 else 4 if count <= 40 else 8
        axis.set_ticks(np.arange(0, count, step) + 0.5, labels=[str(i) for i in range(0, count, step)])
        axis.set_tick_params(length=0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)


def chance_range(n_layers: int, d_mlp: int, k: int) -> tuple[int, int]:
    """95 % range of a layer's count if k neurons were drawn from all layers (hypergeometric)."""
    counts = np.arange(max(0, k - (n_layers - 1) * d_mlp), min(k, d_mlp) + 1)
    log = [_log_choose(d_mlp, int(c)) + _log_choose((n_layers - 1) * d_mlp, k - int(c)) for c in counts]
    below = np.cumsum(np.exp(np.array(log) - _log_choose(n_layers * d_mlp, k)))
    low, high = np.searchsorted(below, (0.025, 0.975))
    return int(counts[low]), int(counts[min(high, len(counts) - 1)])


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@takes_iterables
@styled
def neurons_per_layer(neurons: Sequence[NeuronScores]) -> Plot:
    """Number of task neurons in each layer, for one or several rankings (of tasks, or methods).

    Raises:
        ValueError: No rankings, or rankings of models with different numbers of layers.
    """
    if not neurons or len({len(ranking.scores) for ranking in neurons}) > 1:
        raise ValueError(f"need rankings of one model, got {[tuple(r.scores.shape) for r in neurons]}")
    n_layers = len(neurons[0].scores)
    examples = sorted({ranking.n_examples for ranking in neurons})
    n = f"{examples[0]:,}" if len(examples) == 1 else f"{examples[0]:,}–{examples[-1]:,}"
    note = f"{_sizes(neurons)}; n = {n} examples."
    ranges = {
        chance_range(ranking.n_asked // ranking.scores.shape[1], ranking.scores.shape[1], ranking.count())
        for ranking in neurons
    }
    shared = len(ranges) == 1 and n_layers > 1
    if shared:
        note += " Grey: 95 % range of a layer's count if as many neurons were drawn at random."
    title = "Task neurons per layer" if len(neurons) > 1 else f"{neurons[0].task}: task neurons per layer"
    figure, (axes,) = theme.new_plot(title, note, 2.5, legend=len(neurons) > 1)
    if shared:
        axes.axhspan(*next(iter(ranges)), color=RANDOM, alpha=0.22, linewidth=0, zorder=0)
    handles = _count_marks(axes, neurons)
    step = 1 if n_layers <= 16 else 4
    axes.set_xticks(range(0, n_layers, step))
    axes.set(xlabel="layer", ylabel="neurons", xlim=(-0.6, n_layers - 0.4), ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.grid(axis="y")
    if len(neurons) > 1:
        theme.add_legend(figure, handles, _names(neurons))
    return figure


def _sizes(neurons: Sequence[NeuronScores]) -> str:
    total, counts = neurons[0].n_asked, sorted({ranking.count() for ranking in neurons})
    return f"{' / '.join(f'{c:,}' for c in counts)} of {total:,} neurons"


def _names(neurons: Sequence[NeuronScores]) -> list[str]:
    """Names that distinguish the rankings: the task, or else task and method."""
    by_task = len({ranking.task for ranking in neurons}) == len(neurons)
    return [ranking.task if by_task else f"{ranking.task} · {ranking.method}" for ranking in neurons]


def _count_marks(axes: Axes, neurons: Sequence[NeuronScores]) -> list:
    """Bars, side by side, while there is room for them; else lines."""
    n_layers, many = len(neurons[0].scores), len(neurons)
    handles = []
    for i, ranking in enumerate(neurons):
        x, counts = np.arange(n_layers), ranking.per_layer()
        colour = theme.SERIES[i % len(theme.SERIES)]
        if n_layers * many <= 48:
            width = 0.8 / many
            handles.append(axes.bar(x + (i - (many - 1) / 2) * width, counts, width * 0.94, color=colour))
        else:
            handles += axes.plot(x, counts, color=colour, marker="o", markersize=3)
    if many == 1 and n_layers <= 16:
        axes.bar_label(handles[0], padding=2, size=9)
        axes.margins(y=0.12)
    return handles
