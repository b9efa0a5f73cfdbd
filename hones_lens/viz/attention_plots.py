"""Figures of attention over pictures: one map, or several heads and pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from hones_lens.analysis import SINK_RATIO, HeadAttention
from hones_lens.model import PictureLike, Pictures, Region, open_image, open_images, takes_iterables
from hones_lens.viz import theme
from hones_lens.viz.image_plots import check_region, is_cut, on_grey, region_of, veil
from hones_lens.viz.text import nonbreaking, number
from hones_lens.viz.theme import BRIGHT, GRID, MUTED, Plot, styled

_MAPS_PER_LINE = 4  # maps side by side
_MAPS_IN_ONE_PANEL = 2  # maps side by side that fit into the width of one panel


@styled
def attention_over_image(
    image: PictureLike,
    heatmap: Float[Tensor, "rows columns"],
    title: str = "",
    *,
    region: Region | None = None,
    smooth: bool = False,
    bare: bool = False,
) -> Plot:
    """Attention of a head over a picture: values on the patch grid are laid over it, dark at 0.

    Without smoothing, the patch with the largest value is outlined.

    Args:
        image: The picture, as `HookedVLM.prepare` takes it; its proportions are kept.
        heatmap: A value of at least 0 per patch, in raster order (`VLMInputs.heatmap`).
        title: E.g. the head.
        region: The part of the picture that the grid shows, `inputs.regions[row][image]`; default: all.
        smooth: Interpolate between patches.
        bare: The picture alone, edge to edge: no heading, scale or note.

    Raises:
        ValueError: A value that is negative or not finite, or a region outside of the picture.
    """
    values = _check_attention(heatmap)
    shown = open_image(image)
    rows, columns = values.shape
    visible = check_region(region, shown, (rows, columns))
    width, height = shown.size
    if bare:
        figure = Plot(figsize=(4, 4 * height / width))
        axes = figure.add_axes((0, 0, 1, 1))
    else:
        brightest, total = number(float(values.max())), number(float(values.sum()))
        note = f"{rows} × {columns} patches; brightest {brightest}, in all {total}."
        if is_cut(visible, shown):
            note += " Veiled: cut off before the model sees it."
        tall = min(5.0, (theme.WIDTH - 0.8) * height / width + 0.2)
        figure, (axes,) = theme.new_plot(title, note, tall)
    limit = float(values.max()) or 1.0
    _draw_attention(axes, shown, values, visible, limit, smooth)
    if not bare:
        _add_colorbar(figure, [axes], limit, "attention")
    return figure


class _HeadMap(NamedTuple):
    """One head's attention over one picture."""

    picture: Image.Image
    region: Region
    name: str
    values: Tensor  # [rows columns], 0 where sinks were removed
    total: float  # sinks included
    removed: Tensor  # bool [rows columns]
    lost: float  # attention of what was removed


@takes_iterables
@styled
def attention_maps(
    found: HeadAttention,
    pictures: Pictures,
    *,
    images: Sequence[int] | None = None,
    smooth: bool = False,
    remove_sinks: bool | Bool[Tensor, "rows columns"] = False,
    times: float = SINK_RATIO,
    one_scale: bool = False,
    title: str = "",
) -> Plot:
    """Attention maps of several heads over the pictures of a row; every picture starts a new line.

    Args:
        found: From `head_attention`.
        pictures: All pictures of the row, in order; a single picture need not be in a list.
        images: Indices of the images to draw, of which a picture in tiles has several; default: all.
        smooth: Interpolate between patches; else the brightest patch is outlined.
        remove_sinks: Set attention sinks (`HeadAttention.sinks`), or the tokens of a mask on the grid, to 0.
            They are crossed out, and the attention they held is written above each map.
        times: How much more attention than the median image token a sink has.
        one_scale: All maps share one scale; else each goes up to its own brightest patch.
        title: Default: the query token or group.

    Raises:
        ValueError: Another number of pictures than the row has, a mask of another shape, and as
            `HeadAttention.on_image` and `HeadAttention.sinks`.
        IndexError: No such image.
    """
    picture_list = open_images(pictures)
    expected = found.inputs.n_pictures(0) if found.n_images else 0
    if len(picture_list) != expected or not picture_list:
        raise ValueError(f"{len(picture_list)} pictures for a row with {expected} images")
    lines = []
    for image in range(found.n_images) if images is None else images:
        maps = _head_maps(found, picture_list, image, remove_sinks, times)
        wide = -(-len(maps) // -(-len(maps) // _MAPS_PER_LINE))  # lines of about one length
        lines += [maps[i : i + wide] for i in range(0, len(maps), wide)]
    panels = 1 if max(map(len, lines)) <= _MAPS_IN_ONE_PANEL else 2
    across = max(map(len, lines))
    side = (panels * theme.WIDTH - 0.9) / across
    heights = [side * line[0].picture.height / line[0].picture.width for line in lines]
    note = _maps_note(lines, found, remove_sinks, times, one_scale)
    heading = title or f"Attention from {found.source}"
    tall = sum(heights) + len(lines) * (0.42 if remove_sinks is False else 0.55)
    figure, axes = theme.new_plot(heading, nonbreaking(note), tall, panels=panels)
    for unused in axes:
        unused.remove()
    grid = figure.subplots(len(lines), across, squeeze=False, height_ratios=heights)
    limit = max(float(one.values.max()) for line in lines for one in line) or 1.0
    for row, line in zip(grid, lines, strict=True):
        for panel in row:
            panel.set_axis_off()
        for panel, one in zip(row, line, strict=False):
            _draw(panel, one, limit if one_scale else float(one.values.max()) or 1.0, smooth)
    label = "attention" if one_scale else "share of each map's brightest"
    _add_colorbar(figure, list(grid.flat), limit if one_scale else 1.0, label, 16 * len(lines))
    return figure


def _head_maps(
    found: HeadAttention,
    pictures: Sequence[Image.Image],
    image: int,
    remove_sinks: bool | Tensor,
    times: float,
) -> list[_HeadMap]:
    """The map of every head over one picture."""
    on_image = found.on_image(image)
    grid = tuple(on_image.shape[1:])
    removed = torch.zeros(grid, dtype=torch.bool)
    if isinstance(remove_sinks, Tensor):
        removed = remove_sinks.cpu()
    elif remove_sinks:
        removed = found.sinks(image, times)
    if tuple(removed.shape) != grid:
        raise ValueError(f"a mask of {tuple(removed.shape)} for image {image}, whose grid is {grid}")
    picture = pictures[found.inputs.picture_of(0, image)]
    region = region_of(found.inputs, 0, image, picture)
    several = f" · image {image}" if found.n_images > 1 else ""
    maps = []
    for name, values in zip(found.names, on_image, strict=True):
        total, lost = float(values.sum()), float(values[removed].sum())
        visible = _check_attention(values).masked_fill(removed, 0.0)
        maps.append(_HeadMap(picture, region, name + several, visible, total, removed, lost))
    return maps


def _maps_note(
    lines: Sequence[Sequence[_HeadMap]],
    found: HeadAttention,
    remove_sinks: bool | Tensor,
    times: float,
    one_scale: bool,
) -> str:
    firsts = {id(line[0].picture): line[0] for line in lines}.values()
    grids = ", ".join(dict.fromkeys(f"{m.values.shape[0]} × {m.values.shape[1]}" for m in firsts))
    note = f"{found.model_name}; {grids} image tokens, one row. "
    note += "One scale for all. " if one_scale else "Each map has its own scale. "
    if any(is_cut(m.region, m.picture) for m in firsts):
        note += "Veiled: cut off before the model sees it. "
    if remove_sinks is False:
        return note + "Above: attention on the picture, and the brightest token's."
    count = sum(int(m.removed.sum()) for m in firsts)
    total = sum(m.removed.numel() for m in firsts)
    why = "as given"
    if not isinstance(remove_sinks, Tensor):
        why = f"that draw over {times:g} times the median's attention, over all heads and layers"
    note += "Above: attention on the picture, and the brightest token's that is left. "
    if not count:
        return f"{note}No sinks were removed: of {total:,} image tokens there are none {why}."
    return f"{note}Crossed out, and what lay there: {count} of {total:,} image tokens, sinks {why}."


def _draw(axes: Axes, head_map: _HeadMap, limit: float, smooth: bool) -> None:
    _draw_attention(axes, head_map.picture, head_map.values, head_map.region, limit, smooth)
    if bool(head_map.removed.any()):
        rows, columns = head_map.values.shape
        left, top, right, bottom = head_map.region
        y, x = (index.numpy() + 0.5 for index in torch.nonzero(head_map.removed, as_tuple=True))
        across, down = left + x * (right - left) / columns - 0.5, top + y * (bottom - top) / rows - 0.5
        size = min(60.0, 900.0 / columns)
        axes.scatter(across, down, s=size, marker="x", color=BRIGHT, linewidths=1.1, gid="removed")
    caption = f"picture {number(head_map.total, 2)}, brightest {number(float(head_map.values.max()), 2)}"
    if head_map.lost or bool(head_map.removed.any()):
        caption += f"\nsinks {number(head_map.lost, 2)}"
    axes.annotate(
        caption,
        (0, 1),
        (0, 2),
        xycoords="axes fraction",
        textcoords="offset points",
        va="bottom",
        size=7.4,
        color=MUTED,
        linespacing=1.15,
        gid="told",
    )
    axes.set_title(head_map.name, size=9.2, pad=12 + 9.5 * caption.count("\n"))


# -- shared by both figures ----------------------------------------------------------------------


def _check_attention(heatmap: Tensor) -> Tensor:
    values = heatmap.detach().float().cpu()
    if not bool(torch.isfinite(values).all()) or float(values.min()) < 0:
        raise ValueError("attention must be finite and at least 0")
    return values


def _draw_attention(
    axes: Axes, image: Image.Image, values: Tensor, region: Region, limit: float, smooth: bool
) -> Any:
    """The picture, darkened by values over its region, the brightest patch outlined, the rest veiled."""
    width, height = image.size
    left, top, right, bottom = region
    axes.imshow(image, interpolation="none" if width >= 224 else "nearest")
    overlay = axes.imshow(
        values.numpy(),
        cmap=theme.spotlight(),
        vmin=0,
        vmax=limit,
        extent=(left - 0.5, right - 0.5, bottom - 0.5, top - 0.5),
        interpolation="bicubic" if smooth else "nearest",
    )
    veil(axes, image.size, region)
    if not smooth:
        rows, columns = values.shape
        row, column = divmod(int(values.argmax()), columns)
        wide, tall = (right - left) / columns, (bottom - top) / rows
        corner = (left + column * wide - 0.5, top + row * tall - 0.5)
        style = {"fill": False, "edgecolor": BRIGHT, "linewidth": 2, "gid": "brightest"}
        axes.add_patch(Rectangle(corner, wide, tall, **style))
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_axis_off()
    return overlay


def _add_colorbar(figure: Plot, axes: list[Axes], limit: float, label: str, aspect: float = 16) -> None:
    """Colour bar of the spotlight colours, the same on light and dark pages."""
    scale = on_grey(Normalize(0, limit), theme.spotlight())
    bar = figure.colorbar(scale, ax=axes, fraction=0.045, pad=0.02, aspect=aspect, ticks=MaxNLocator(4))
    bar.outline.set(edgecolor=GRID)
    bar.set_label(label)
