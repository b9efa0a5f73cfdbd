"""Figures of logit lenses, direct logit attribution and attention knockout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from hones_lens.analysis import LogitLens
from hones_lens.model import PictureLike, Region, open_image, takes_iterables
from hones_lens.results import Labelled
from hones_lens.viz import theme
from hones_lens.viz.image_plots import ON_PALE, check_region, is_cut, on_grey, veil
from hones_lens.viz.text import nonbreaking, number
from hones_lens.viz.theme import (
    GRID,
    INK,
    MUTED,
    NEGATIVE,
    ON_ACCENT,
    RANDOM,
    SELECTED,
    SERIES,
    SURFACE,
    Plot,
    styled,
)

_LIGHT_TEXT_FROM = 0.55  # probability from which a cell is so dark that its text is light
_NARROW = 5  # tokens a layer that fit into the width of one panel
_TOKEN = 7.6  # points
_ACROSS = (3, 5)  # small maps side by side, in the width of one panel; five where there are many
_MOST_WIDE = 11  # layers up to which there are three
_SHADES: Any = {"vmin": -1, "vmax": 1, "edgecolors": SURFACE, "linewidth": 1.6}
_DASHES: Any = ("-", (0, (4, 2)), (0, (1, 1.5)))


def _panels(
    title: str, note: str, height: float, shape: tuple[int, int], panels: int = 1
) -> tuple[Plot, np.ndarray]:
    """An empty figure, as wide as so many panels, with axes [rows, columns]."""
    figure, axes = theme.new_plot(title, nonbreaking(note), height, panels=panels)
    for unused in axes:
        unused.remove()
    return figure, figure.subplots(*shape, squeeze=False)


# -- logit lens ----------------------------------------------------------------------------------------


def shorten_token(token: str, longest: int) -> str:
    """A token with characters that can't be drawn as escapes, cut to a length."""
    text = theme.drawable(token)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


@styled
def lens_grid(lens: LogitLens, place: int = 0, *, k: int = _NARROW, title: str = "") -> Plot:
    """A grid of layers by most likely tokens at one position, shaded by probability.

    Args:
        lens: From `logit_lens`.
        place: Index of the position in the lens.
        k: Number of tokens per layer, most likely first; at most as many as the lens has.
        title: Default: the position and its token.

    Raises:
        IndexError: No such place.
        ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    position_lens = lens[place]
    k = min(k, position_lens.ids.shape[-1])
    shares, tokens, n_layers = (
        position_lens.probabilities[0, :, :k].numpy(),
        position_lens.tokens[0],
        len(position_lens.layers),
    )
    position = position_lens.places[0]
    token = shorten_token(position.token, 24)
    note = f"{lens.model_name}. Shade and small figures: probability by the logit lens after each layer."
    heading = title or f"Logit lens: position {position.position} of row {position.row}, {token}"
    panels = 1 if k <= _NARROW else 2
    figure, ((axes,),) = _panels(heading, note, 0.4 + n_layers * 0.3, (1, 1), panels)
    longest = int((panels * theme.WIDTH - 0.8) / k * 72 / (0.64 * _TOKEN))
    axes.pcolormesh(shares, cmap=theme.diverging(), **_SHADES, gid="cells")
    for layer in range(n_layers):
        for rank in range(k):
            share = float(shares[layer, rank])
            ink = ON_ACCENT if share > _LIGHT_TEXT_FROM else INK
            text = shorten_token(tokens[layer][rank], longest)
            style = {"va": "center", "color": ink}
            axes.text(rank + 0.06, layer + 0.42, text, size=_TOKEN, gid="token", **style)
            axes.text(rank + 0.94, layer + 0.78, number(share, 2), size=5.2, ha="right", **style)
    axes.set_xticks(np.arange(k) + 0.5, labels=[str(rank + 1) for rank in range(k)])
    axes.set_yticks(np.arange(n_layers) + 0.5, labels=[str(layer) for layer in position_lens.layers])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set(xlabel="rank", ylabel="after layer")
    return figure


def _glow() -> ListedColormap:
    """Clear at the lower end, vermillion at the upper."""
    colours = [(*to_rgb(NEGATIVE), 0.92 * step / 255) for step in range(256)]
    return ListedColormap(colours, name="hones_glow")


# -- over the picture ----------------------------------------------------------------------------------


@takes_iterables
@styled
def image_lens(
    result: Labelled,
    image: PictureLike,
    region: Region | None = None,
    *,
    layers: Sequence[Any] | None = None,
    title: str = "",
) -> Plot:
    """The lens value over the picture for each layer; all layers share one colour scale.

    Args:
        result: From `image_token_lens`: layer, row, column.
        image: The picture, as `HookedVLM.prepare` takes it.
        region: The part of it that the grid shows, `inputs.regions[row][image]`; default: all.
        layers: Labels of the layers to draw; default: all.
        title: Default: `result.what`.

    Raises:
        ValueError: A result of other axes, a layer that it does not have, values that are not finite, or a
            region outside of the picture.
    """
    if result.axes != ("layer", "row", "column"):
        raise ValueError(f"a result with the axes layer, row, column is needed, not {', '.join(result.axes)}")
    if not bool(torch.isfinite(result.values).all()):
        raise ValueError(f"{result.what}: values that are not finite")
    names = result.names("layer") if layers is None else tuple(layers)
    maps = [result.select(layer=name).values.float() for name in names]
    ranks = result.what.startswith("rank")
    intensities = [-values.log10() if ranks else values for values in maps]  # larger is more
    low, high = (float(end(torch.stack(intensities))) for end in (torch.min, torch.max))
    limits = (low, high if high > low else low + 1)
    across = _ACROSS[len(names) > _MOST_WIDE]
    down = -(-(1 + len(names)) // across)
    rows, columns = maps[0].shape
    shown = open_image(image)
    height = down * ((theme.WIDTH - 0.9) / across * shown.height / shown.width + 0.27)
    visible = check_region(region, shown, (rows, columns))
    note = f"{rows} × {columns} image tokens; each layer's strongest is outlined. One scale for all layers."
    if is_cut(visible, shown):
        note += " Veiled: cut off before the model sees it."
    figure, axes = _panels(title or _capitalised(result.what), note, height, (down, across))
    for panel in axes.flat:
        panel.set_axis_off()
    first, *rest = axes.flat
    first.imshow(shown, interpolation="nearest")
    first.set_title("picture", size=8.8, pad=3)
    for panel, name, values in zip(rest, names, intensities, strict=False):
        _map(panel, shown, visible, name, values, limits)
    scale = on_grey(Normalize(*limits), _glow())
    bar = figure.colorbar(scale, ax=axes, fraction=0.045, pad=0.02, aspect=22, ticks=MaxNLocator(4))
    bar.outline.set(edgecolor=GRID)
    if ranks:
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{10**-value:,.0f}")
    bar.set_label(result.what.split(" of ")[0])
    return figure


def _map(
    axes: Axes,
    image: Image.Image,
    region: Region,
    name: Any,
    values: Tensor,
    limits: tuple[float, float],
) -> None:
    """Draw one layer's values over the picture in pale grey, with the largest outlined."""
    width, height = image.size
    left, top, right, bottom = region
    pale = Image.blend(image.convert("L"), Image.new("L", image.size, 255), 0.5).convert("RGB")
    axes.imshow(pale, interpolation="nearest")
    axes.imshow(
        values.numpy(),
        cmap=_glow(),
        vmin=limits[0],
        vmax=limits[1],
        extent=(left - 0.5, right - 0.5, bottom - 0.5, top - 0.5),
        interpolation="nearest",
    )
    rows, columns = values.shape
    row, column = divmod(int(values.argmax()), columns)
    wide, tall = (right - left) / columns, (bottom - top) / rows
    corner = (left + column * wide - 0.5, top + row * tall - 0.5)
    outline = {"fill": False, "edgecolor": ON_PALE, "linewidth": 1.3, "gid": "strongest"}
    axes.set_title(name if isinstance(name, str) else f"layer {name}", size=8.8, pad=3)
    axes.add_patch(Rectangle(corner, wide, tall, **outline))
    veil(axes, image.size, region)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


# -- direct logit attribution --------------------------------------------------------------------------


@styled
def direct_bars(result: Labelled, k: int = 20, title: str = "") -> Plot:
    """Contributions of components to a logit: by layer from below, or the k largest heads or neurons.

    Args:
        result: From `direct_logit_attribution`, over the rows (`mean=True`) or of one (`select(row=0)`), at
            one position.
        k: Number of heads or neurons, by absolute value.
        title: Default: `result.what`.

    Raises:
        ValueError: A result of several rows or positions.
    """
    if result.axes == ("layer",):
        names = [str(name) for name in result.names("layer")]
        return _layer_bars(result, names, {"attention and MLP": slice(0, None)}, title)
    if result.axes == ("component",):
        names = ["embed", *map(str, range((result.shape[0] - 1) // 2))]
        return _layer_bars(result, names, {"attention": slice(1, None, 2), "MLP": slice(2, None, 2)}, title)
    if len(result.axes) == 2 and result.axes[0] == "layer" and result.axes[1] in ("head", "neuron"):
        return _largest_bars(result, k, title)
    raise ValueError(
        f"a result by layer, component, head or neuron is needed, not one by {', '.join(result.axes)}: "
        "take mean=True or select(row=…)"
    )


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _error_bars(result: Labelled) -> Tensor | None:
    """Distances from the values to the lower and upper ends of their intervals, [2 …]."""
    if result.low is None or result.high is None:
        return None
    return torch.stack((result.values - result.low, result.high - result.values)).clamp(min=0)


def _note(result: Labelled) -> str:
    many = f"n = {result.n:,}. " if result.n else ""
    interval = "Whiskers: 95 % bootstrap interval. " if result.low is not None else ""
    return nonbreaking(f"{many}{interval}{' '.join(result.notes)}")


def _layer_bars(result: Labelled, names: Sequence[str], parts: dict[str, slice], title: str) -> Plot:
    """Vertical bars from the embedding to the last layer, with the parts of a layer side by side."""
    values, ends, n_places = result.values.numpy(), _error_bars(result), len(names)
    several = len(parts) > 1
    figure, (axes,) = theme.new_plot(title or _capitalised(result.what), _note(result), 2.75, legend=several)
    handles = []
    for i, (part, colour) in enumerate(zip(parts, SERIES, strict=False)):
        chosen = np.arange(len(values))[parts[part]]
        width = 0.8 / len(parts)
        first = n_places - len(chosen)
        x = np.arange(first, n_places) + (i - (len(parts) - 1) / 2) * width
        handles.append(axes.bar(x, values[chosen], width * 0.94, color=colour, gid=part))
        _whiskers(axes, x, values, ends, chosen)
    if several:
        handles.insert(0, axes.bar([0], values[:1], 0.4, color=RANDOM, gid="embed"))
        _whiskers(axes, np.zeros(1), values, ends, np.zeros(1, int))
        theme.add_legend(figure, handles, ["embedding", *parts])
    axes.axhline(0, color=MUTED, linewidth=0.9)
    step = 1 if n_places <= 16 else 4
    shown = [0, *range(1, n_places, step)]
    axes.set_xticks(shown, labels=[names[i] for i in shown])
    axes.tick_params(axis="x", length=0)
    axes.set(xlabel="layer", ylabel=_value_label(result), xlim=(-0.6, n_places - 0.4))
    axes.grid(axis="y")
    return figure


def _whiskers(axes: Axes, x: np.ndarray, values: np.ndarray, ends: Tensor | None, at: np.ndarray) -> None:
    if ends is not None:
        style = {"color": INK, "elinewidth": 1.1, "capsize": 2, "linestyle": "none"}
        axes.errorbar(x, values[at], yerr=ends.numpy()[:, at], **style)


def _largest_bars(result: Labelled, k: int, title: str) -> Plot:
    """Horizontal bars of the k values of largest absolute value, the largest on top."""
    flat = result.values.flatten()
    order = flat.abs().argsort(descending=True, stable=True)[:k]
    layers, units = (index.tolist() for index in torch.unravel_index(order, result.values.shape))
    kind = result.axes[1]
    names = [f"{layer}.{unit}" for layer, unit in zip(layers, units, strict=True)]
    note = f"The {len(names)} largest of {flat.numel():,} {kind}s (layer.{kind}). {_note(result)}"
    figure, (axes,) = theme.new_plot(
        title or _capitalised(result.what), nonbreaking(note), 0.6 + 0.21 * len(names)
    )
    values = flat[order].numpy()
    places = np.arange(len(names))
    axes.barh(places, values, 0.7, color=[SELECTED if v >= 0 else NEGATIVE for v in values], gid=kind)
    if (ends := _error_bars(result)) is not None:
        style = {"color": INK, "elinewidth": 1.1, "capsize": 2, "linestyle": "none"}
        axes.errorbar(values, places, xerr=ends.flatten(1)[:, order].numpy(), **style)
    axes.axvline(0, color=MUTED, linewidth=0.9)
    theme.name_rows(axes, names, spine=True)
    axes.set(xlabel=_value_label(result), ylabel=kind)
    return figure


def _value_label(result: Labelled) -> str:
    return result.what.split(" by each")[0]


# -- attention knockout --------------------------------------------------------------------------------


@styled
def knockout_curves(result: Labelled, title: str = "") -> Plot:
    """A curve for each edge over the layers, with its interval as a band.

    Args:
        result: From `attention_knockout`.
        title: Default: `result.what`.

    Raises:
        ValueError: A result of other axes.
    """
    if result.axes != ("layer", "edge"):
        raise ValueError(f"a result with the axes layer, edge is needed, not {', '.join(result.axes)}")
    bands = ["bands: 95 % bootstrap interval"] if result.low is not None else []
    note = nonbreaking(
        f"{'; '.join([f'n = {result.n}', *bands, *(line.rstrip('.') for line in result.notes)])}."
    )
    measure = result.what.split(" when ")[0]
    figure, (axes,) = theme.new_plot(title or "Attention knockout: source → target", note, 3.1)
    layers = np.array(result.names("layer"))
    axes.axhline(0, color=MUTED, linewidth=0.9)
    for i, edge in enumerate(result.names("edge")):
        curve = result.select(edge=edge)
        style = {"color": SERIES[i % len(SERIES)], "linestyle": _DASHES[i // len(SERIES) % len(_DASHES)]}
        axes.plot(layers, curve.values.numpy(), marker="o", markersize=3.5, label=edge, **style)
        if curve.low is not None and curve.high is not None:
            ends, band = (curve.low.numpy(), curve.high.numpy()), {"alpha": 0.18, "linewidth": 0}
            axes.fill_between(layers, *ends, color=style["color"], gid=f"band {edge}", **band)
    axes.set_xticks(layers[:: 1 if len(layers) <= 16 else 4])
    axes.set(xlabel="layer (centre of the window)", ylabel=measure.replace(" of ", "\nof ", 1))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2)
    axes.grid(axis="y")
    return figure
