"""A figure of the flow from critical heads through task neurons to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.path import Path

from hones_lens.hones import HeadNeuronFlow
from hones_lens.viz import theme
from hones_lens.viz.lens_plots import shorten_token
from hones_lens.viz.text import nonbreaking, percent
from hones_lens.viz.theme import INK, MUTED, RANDOM, SERIES, SURFACE, Plot, styled

_PLACES = (0.0, 1.0, 2.0)  # of the three columns
_BAR = 0.025  # half a node's width
_LINE = 0.19  # inches that a label needs
_LONGEST = 14  # letters of a token
_OTHERS = "others"
COLUMNS = ("heads", "neurons", "tokens")
LINKS = ("head-neuron", "neuron-token")


@dataclass
class _Node:
    """A bar: its name, the flow through it, and its upper end, counted downwards."""

    name: str
    colour: str
    size: float = 0.0
    top: float = 0.0
    used: dict[str, float] = field(default_factory=lambda: {"in": 0.0, "out": 0.0})


@dataclass(frozen=True)
class _Link:
    """A link from a node of one column to a node of the next."""

    source: int
    target: int
    size: float


@dataclass(frozen=True)
class _Drawing:
    """Nodes of the columns in their order, and the links between them."""

    columns: tuple[list[_Node], ...]
    links: tuple[list[_Link], ...]

    @property
    def total(self) -> float:
        """The total flow."""
        return sum(node.size for node in self.columns[1])


@styled
def head_neuron_token_flow(
    flow: HeadNeuronFlow, *, heads: int = 8, neurons: int = 12, tokens: int = 2, title: str = ""
) -> Plot:
    """Critical heads, the neurons that they feed, and the tokens that these promote, joined by links.

    A link from a head to a neuron is as wide as what the head contributes to the neuron's importance (HONES
    eq. H3), so that a neuron is as tall as its importance. On the right this height is split between the
    tokens that it promotes most, in proportion to how much it promotes each.

    Args:
        flow: From `head_neuron_flow`.
        heads: How many to draw, by what they contribute to the neurons drawn; the rest become one.
        neurons: How many, the most important first.
        tokens: How many of each neuron.
        title: Default: the task.

    Raises:
        ValueError: Fewer than one of these, more tokens than the flow has, or nothing that flows.
    """
    drawing = _lay_out(flow, heads, neurons, tokens)
    tallest = max(len(column) for column in drawing.columns)
    heading = title or f"{flow.task}: from critical heads through task neurons to tokens"
    note = _note(flow, drawing, tokens)
    height = max(2.6, 2 * _LINE * (tallest - 1))
    figure, axes = theme.new_plot(heading, nonbreaking(note), height, panels=2)
    for unused in axes:
        unused.remove()
    panel = figure.subplots()
    for stage, name in enumerate(LINKS):
        _draw_links(panel, drawing, stage, name)
    for column, name in enumerate(COLUMNS):
        _draw_nodes(panel, drawing.columns[column], _PLACES[column], name)
    end = 2 * drawing.total
    for x, text in zip(_PLACES, ("critical heads", "task neurons", "tokens promoted"), strict=True):
        side = {0.0: "right", 1.0: "center", 2.0: "left"}[x]
        panel.text(x, -0.025 * end, text, ha=side, va="bottom", size=9.2, color=MUTED)
    panel.set(xlim=(-0.28, 2.42), ylim=(1.01 * end, -0.06 * end))
    panel.set_axis_off()
    return figure


def flow_tooltips(
    flow: HeadNeuronFlow, *, heads: int = 8, neurons: int = 12, tokens: int = 2
) -> dict[str, list[str]]:
    """Tooltips of each bar and link of the figure, for `theme.themed_svg`."""
    drawing = _lay_out(flow, heads, neurons, tokens)
    tooltips = {
        name: [f"{node.name}: {_amount(node.size, drawing)}" for node in column]
        for name, column in zip(COLUMNS, drawing.columns, strict=True)
    }
    for stage, name in enumerate(LINKS):
        left, right = drawing.columns[stage], drawing.columns[stage + 1]
        tooltips[name] = [
            f"{left[link.source].name} → {right[link.target].name}: {_amount(link.size, drawing)}"
            for link in drawing.links[stage]
        ]
    return tooltips


def _amount(size: float, drawing: _Drawing) -> str:
    return f"{size:.3g} ({percent(size / drawing.total)} of what is drawn)"


# -- layout -------------------------------------------------------------------------------


def _lay_out(flow: HeadNeuronFlow, heads: int, neurons: int, tokens: int) -> _Drawing:
    """The nodes with sizes and positions, and the links."""
    if min(heads, neurons, tokens) < 1:
        raise ValueError(f"draw at least one of each, not {heads} heads, {neurons} neurons, {tokens} tokens")
    if tokens > len(flow.promoted[0]):
        raise ValueError(f"{tokens} tokens of each neuron asked for; the flow has {len(flow.promoted[0])}")
    shown = [n for n in range(len(flow.neurons)) if float(flow.contributions[:, n].sum()) > 0][:neurons]
    if not shown:
        raise ValueError("no critical head contributes to any of these neurons: nothing flows")
    feeds = flow.contributions[:, shown].numpy()
    left, links_in = _heads(flow, feeds, heads)
    middle = [_Node(_neuron_name(flow, n), INK) for n in shown]
    order = _by_layer(flow, shown, links_in)
    right, links_out = _tokens(flow, [shown[n] for n in order], feeds.sum(0)[order], tokens)
    moved = {old: new for new, old in enumerate(order)}
    links_in = [_Link(link.source, moved[link.target], link.size) for link in links_in]
    drawing = _Drawing((left, [middle[n] for n in order], right), (links_in, links_out))
    for stage, links in enumerate(drawing.links):
        for link in links:
            drawing.columns[stage][link.source].size += link.size if stage == 0 else 0.0
            drawing.columns[stage + 1][link.target].size += link.size
    for column in drawing.columns:
        _stack_nodes(column, drawing.total)
    return drawing


def _heads(flow: HeadNeuronFlow, feeds: np.ndarray, most: int) -> tuple[list[_Node], list[_Link]]:
    """The heads that contribute most, by layer, and the others as one."""
    best = np.argsort(-feeds.sum(1), kind="stable")[:most]
    best = [int(h) for h in best if feeds[h].sum() > 0]
    rest = [h for h in range(len(feeds)) if h not in best and feeds[h].sum() > 0]
    colours = {h: SERIES[i] if i < len(SERIES) else RANDOM for i, h in enumerate(best)}
    nodes, rows = [], []
    for h in sorted(best, key=lambda h: flow.heads[h][:2]):
        nodes.append(_Node(f"L{flow.heads[h].layer}H{flow.heads[h].index}", colours[h]))
        rows.append(feeds[h])
    if rest:
        nodes.append(_Node(f"{len(rest)} {_OTHERS}", RANDOM))
        rows.append(feeds[rest].sum(0))
    links = [_Link(h, n, float(v)) for h, row in enumerate(rows) for n, v in enumerate(row) if v > 0]
    return nodes, links


def _neuron_name(flow: HeadNeuronFlow, n: int) -> str:
    sign = " (−)" if float(flow.activations[n]) < 0 else ""
    return f"L{flow.neurons[n].layer}N{flow.neurons[n].index}{sign}"


def _by_layer(flow: HeadNeuronFlow, shown: Sequence[int], links: Sequence[_Link]) -> list[int]:
    """The neurons by layer; within a layer in the order of their heads."""
    middle = {
        n: _weighted_mean([(link.source, link.size) for link in links if link.target == n])
        for n in range(len(shown))
    }
    return sorted(range(len(shown)), key=lambda n: (flow.neurons[shown[n]].layer, middle[n]))


def _weighted_mean(weighted: Sequence[tuple[float, float]]) -> float:
    return sum(position * size for position, size in weighted) / sum(size for _, size in weighted)


def _tokens(
    flow: HeadNeuronFlow, shown: Sequence[int], sizes: np.ndarray, most: int
) -> tuple[list[_Node], list[_Link]]:
    """The tokens, one node per token, in the order of the neurons that promote them."""
    into: dict[str, list[tuple[int, float]]] = {}
    for n, (neuron, size) in enumerate(zip(shown, sizes, strict=True)):
        best = [promoted for promoted in flow.promoted[neuron][:most] if promoted.logit > 0]
        whole = sum(promoted.logit for promoted in best)
        for promoted in best:
            into.setdefault(promoted.token, []).append((n, float(size) * promoted.logit / whole))
    order = sorted(into, key=lambda token: _weighted_mean(into[token]))
    nodes = [_Node(shorten_token(token, _LONGEST), MUTED) for token in order]
    links = [_Link(n, t, size) for t, token in enumerate(order) for n, size in into[token]]
    return nodes, sorted(links, key=lambda link: (link.source, link.target))


def _stack_nodes(column: Sequence[_Node], total: float) -> None:
    """Place the nodes of a column: half of the height for nodes, half for equal gaps between them."""
    gap = total / (len(column) - 1) if len(column) > 1 else 0.0
    top = 0.0 if len(column) > 1 else total / 2
    for node in column:
        node.top = top
        top += node.size + gap


# -- drawing -------------------------------------------------------------------------------------------


def _draw_links(axes: Axes, drawing: _Drawing, stage: int, name: str) -> None:
    """Draw each link as a band as tall as its size, each below the one before."""
    left, right = drawing.columns[stage], drawing.columns[stage + 1]
    links = drawing.links[stage]
    starts, ends = {}, {}
    for link in sorted(links, key=lambda link: (link.source, link.target)):
        node = left[link.source]
        starts[link] = node.top + node.used["out"]
        node.used["out"] += link.size
    for link in sorted(links, key=lambda link: (link.target, link.source)):
        node = right[link.target]
        ends[link] = node.top + node.used["in"]
        node.used["in"] += link.size
    x0, x1 = _PLACES[stage] + _BAR, _PLACES[stage + 1] - _BAR
    bands = [_band(x0, starts[link], x1, ends[link], link.size) for link in links]
    colours = [left[link.source].colour if stage == 0 else RANDOM for link in links]
    style = {"facecolors": colours, "alpha": 0.42 if stage == 0 else 0.32, "linewidths": 0}
    axes.add_collection(PathCollection(bands, gid=name, **style), autolim=False)


def _band(x0: float, y0: float, x1: float, y1: float, size: float) -> Path:
    """From (x0, y0) to (x1, y1), `size` tall, with level ends."""
    middle = (x0 + x1) / 2
    corners = [(x0, y0), (middle, y0), (middle, y1), (x1, y1)]
    back = [(x1, y1 + size), (middle, y1 + size), (middle, y0 + size), (x0, y0 + size)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    return Path([*corners, *back, (x0, y0)], codes)


def _draw_nodes(axes: Axes, column: Sequence[_Node], x: float, name: str) -> None:
    boxes = []
    for node in column:
        low, high = node.top, node.top + node.size
        boxes.append(
            Path([(x - _BAR, low), (x + _BAR, low), (x + _BAR, high), (x - _BAR, high), (x - _BAR, low)])
        )
        side, shift = ("right", -0.05) if name == "heads" else ("left", 0.05)
        style = {"size": 8.6, "ha": side, "va": "center", "gid": f"{name}-name"}
        if name == "neurons":
            style["bbox"] = {"facecolor": SURFACE, "alpha": 0.7, "linewidth": 0, "pad": 0.8}
        axes.text(x + shift, (low + high) / 2, node.name, **style)
    colours = [node.colour for node in column]
    axes.add_collection(PathCollection(boxes, facecolors=colours, linewidths=0, gid=name), autolim=False)


def _note(flow: HeadNeuronFlow, drawing: _Drawing, tokens: int) -> str:
    share = percent(drawing.total / flow.total)
    note = (
        "Width on the left: what a head contributes to a neuron's importance (HONES eq. H3). Drawn: "
        f"{len(drawing.columns[1])} of {len(flow.neurons):,} task neurons, {share} of the importance of all "
        f"neurons. Right: the {tokens} token{'s' if tokens > 1 else ''} that a neuron promotes most; its "
        "importance is split by how much. "
    )
    if any("(−)" in node.name for node in drawing.columns[1]):
        note += "(−): active below 0 on average, so that its output row counts the other way round. "
    return f"{note}n = {flow.n_examples:,} examples."
