"""Figures of values over pictures, such as the effect of patching each image token."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from hones_lens.model import PictureLike, Region, VLMInputs, did_you_mean, open_image
from hones_lens.results import Labelled
from hones_lens.viz import theme
from hones_lens.viz.text import nonbreaking, number
from hones_lens.viz.theme import GRID, SURFACE, Plot, styled

SCALES = ("diverging", "sequential")
_GRID_AXES = ("row", "column")
_MAPS_PER_LINE = 4
_BACKING = 0.88  # grey under a scale of see-through colours, on light and dark pages alike
ON_PALE = "#16191d"  # marks on pale pictures, whatever the page


def check_region(region: Region | None, picture: Image.Image, grid: tuple[int, int]) -> Region:
    """The part of a picture that a grid of so many rows and columns shows; None: all of it.

    Cells at its sides may lie on padding: in part, or as many at both sides.

    Raises:
        ValueError: A region that has no area or reaches out of the picture otherwise.
    """
    width, height = picture.size
    left, top, right, bottom = region or (0.0, 0.0, float(width), float(height))
    if not (_lies_on(left, right, width, grid[1]) and _lies_on(top, bottom, height, grid[0])):
        shown = f"{left:g},{top:g} – {right:g},{bottom:g}"
        raise ValueError(f"the region {shown} does not lie in a picture of {width} × {height}")
    return (left, top, right, bottom)


def _lies_on(start: float, end: float, side: int, cells: int) -> bool:
    """Whether so many cells lie on a side of a picture, or are padded at both ends alike."""
    cell = (end - start) / cells
    return cell > 0 and (-cell < start < end < side + cell or (start < 0 and abs(start + end - side) < cell))


def is_cut(region: Region, picture: Image.Image) -> bool:
    """Whether a part of the picture lies outside a region of it."""
    left, top, right, bottom = region
    return left > 0 or top > 0 or right < picture.width or bottom < picture.height


def region_of(inputs: VLMInputs, row: int, image: int, picture: Image.Image) -> Region:
    """The region of a picture that the grid of an image covers.

    Raises:
        IndexError: No such image.
        ValueError: It is not known of these inputs, or the picture is not the one they were made from.
    """
    if row >= len(inputs.grids) or image >= len(inputs.grids[row]):
        raise IndexError(f"there is no image {image} in row {row}")
    if len(inputs.regions) != len(inputs):
        raise ValueError("where pictures lie is not known of these inputs: make them with model.prepare")
    return check_region(inputs.regions[row][image], picture, inputs.grids[row][image])


def veil(axes: Axes, size: tuple[int, int], region: Region) -> None:
    """Cover the part of a picture outside a region with a veil."""
    width, height = size
    left, top, right, bottom = region
    sides = {
        "left": (0, 0, left, height),
        "right": (right, 0, width, height),
        "top": (left, 0, right, top),
        "bottom": (left, bottom, right, height),
    }
    for x0, y0, x1, y1 in sides.values():
        if x1 - x0 > 1e-6 and y1 - y0 > 1e-6:
            style = {"color": SURFACE, "alpha": 0.8, "linewidth": 0, "gid": "cut"}
            axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, **style))


def on_grey(norm: Normalize, colours: ListedColormap) -> ScalarMappable:
    """A colour scale for transparent colours, as they look on a light picture."""
    shades = colours(np.linspace(0, 1, 256))
    mixed = shades[:, :3] * shades[:, 3:] + _BACKING * (1 - shades[:, 3:])
    return ScalarMappable(norm, ListedColormap(mixed))


class _ImageMap(NamedTuple):
    """One map over the picture."""

    name: str
    values: Tensor  # [rows columns]
    away: Tensor | None  # bool [rows columns]: the interval lies away from 0


@styled
def on_image(
    values: Labelled | Float[Tensor, "*axes"],
    inputs: VLMInputs,
    picture: PictureLike,
    *,
    row: int = 0,
    image: int = 0,
    scale: str | None = None,
    title: str = "",
) -> Plot:
    """Values over a picture's patches, for instance the effect of patching each position.

    Args:
        values: [pos], [token] or [rows columns]; or Labelled on `position` or on `row` and `column`, with at
            most one other axis, each of whose entries gets a picture.
        inputs: The prepared inputs that the positions refer to.
        picture: The picture, as `HookedVLM.prepare` takes it.
        row, image: Index of the row, and of the image in it.
        scale: `diverging` around 0, or `sequential` from the smallest value; default: diverging where a value
            is negative, else sequential from 0.
        title: Default: what the values are.

    Raises:
        ValueError: Other axes, values that are not finite or don't fit the image, or an unknown scale.
        IndexError: No such image.
    """
    if scale is not None and scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; valid: {', '.join(SCALES)}{did_you_mean(scale, SCALES)}")
    shown = open_image(picture)
    region = region_of(inputs, row, image, shown)
    result = values if isinstance(values, Labelled) else _as_labelled(values, inputs)
    layers = _layers(result, inputs, row, image)
    stacked = torch.stack([layer.values for layer in layers])
    if not bool(torch.isfinite(stacked).all()):
        raise ValueError(f"{result.what}: values that are not finite")
    colours = _colour_scale(stacked, scale)
    across = min(_MAPS_PER_LINE, len(layers))
    panels, down = (1 if across <= 2 else 2), -(-len(layers) // across)
    wide = (panels * theme.WIDTH - 0.9) / across
    tall = min(5.0, wide * shown.height / shown.width) + (0.25 if len(layers) > 1 else 0.1)
    heading = title or _heading(result)
    figure, axes = theme.new_plot(
        heading,
        nonbreaking(_note(result, layers, region, shown, inputs, row)),
        down * tall,
        panels=panels,
    )
    for unused in axes:
        unused.remove()
    grid = figure.subplots(down, across, squeeze=False)
    for panel in grid.flat:
        panel.set_axis_off()
    for panel, layer in zip(grid.flat, layers, strict=False):
        _draw(panel, shown, region, layer, colours)
    _add_bar(figure, list(grid.flat), colours, result.what if title and result.what != "values" else "")
    return figure


def _add_bar(figure: Plot, axes: list[Axes], colours: _ColourScale, label: str) -> None:
    """A colour bar beside the axes."""
    bar = figure.colorbar(
        on_grey(*colours), ax=axes, fraction=0.045, pad=0.02, aspect=18, ticks=MaxNLocator(5)
    )
    bar.outline.set(edgecolor=GRID)
    if label:
        bar.set_label(textwrap.fill(label, 40))


def _as_labelled(values: Tensor, inputs: VLMInputs) -> Labelled:
    names = {1: ("position",), 2: _GRID_AXES}
    if values.ndim not in names:
        raise ValueError(f"values of {values.ndim} axes; give [pos], [token], [rows columns] or Labelled")
    return Labelled("values", values, names[values.ndim])


def _layers(result: Labelled, inputs: VLMInputs, row: int, image: int) -> list[_ImageMap]:
    """One map for each entry of the axis that is not a position."""
    on = ("position",) if "position" in result.axes else _GRID_AXES
    others = [axis for axis in result.axes if axis not in on]
    if not set(on) <= set(result.axes) or len(others) > 1:
        raise ValueError(
            f"{result.what}: axes {', '.join(result.axes)}; needed are position, or row and column, and at "
            "most one more: select(…) an entry of the others"
        )
    maps = []
    for name in result.names(others[0]) if others else [""]:
        part = result.select(**{others[0]: name}) if others else result
        label = f"{others[0]} {name}" if others and not isinstance(name, str) else str(name)
        away = None
        if part.low is not None and part.high is not None:
            clear = ((part.low > 0) | (part.high < 0)).float()
            away = _values_on_grid(clear, part.axes, inputs, row, image).bool()
        maps.append(
            _ImageMap(label, _values_on_grid(part.values.float(), part.axes, inputs, row, image), away)
        )
    return maps


def _values_on_grid(values: Tensor, axes: Sequence[str], inputs: VLMInputs, row: int, image: int) -> Tensor:
    """Values on the grid of the image."""
    if tuple(axes) == ("position",):
        return inputs.heatmap(values, row, image)
    values = values.T if tuple(axes) == ("column", "row") else values
    grid = inputs.grids[row][image]
    if tuple(values.shape) not in (grid, inputs.patch_grids[row][image]):
        raise ValueError(
            f"values of {tuple(values.shape)} for image {image} of row {row}, whose grid is {grid}"
        )
    return values


class _ColourScale(NamedTuple):
    """The colours of all maps."""

    norm: Normalize
    colours: ListedColormap


def _colour_scale(shown: Tensor, scale: str | None) -> _ColourScale:
    """The colours of all maps: diverging around 0, or from nothing upwards."""
    low, high = float(shown.min()), float(shown.max())
    if scale == "diverging" or (scale is None and low < 0):
        limit = max(abs(low), abs(high)) or 1.0
        return _ColourScale(Normalize(-limit, limit), theme.diverging())
    start = low if scale == "sequential" else 0.0
    colours = theme.diverging()(np.linspace(0.5, 1, 256))
    return _ColourScale(Normalize(start, high if high > start else start + 1.0), ListedColormap(colours))


def _draw(axes: Axes, picture: Image.Image, region: Region, layer: _ImageMap, scale: _ColourScale) -> None:
    """The picture in pale grey under the values; dots where the interval lies away from 0."""
    width, height = picture.size
    left, top, right, bottom = region
    pale = Image.blend(picture.convert("L"), Image.new("L", picture.size, 255), 0.5).convert("RGB")
    axes.imshow(pale, interpolation="nearest")
    axes.imshow(
        layer.values.numpy(),
        cmap=scale.colours,
        norm=scale.norm,
        alpha=0.9,
        extent=(left - 0.5, right - 0.5, bottom - 0.5, top - 0.5),
        interpolation="nearest",
    )
    veil(axes, picture.size, region)
    if layer.away is not None and bool(layer.away.any()):
        rows, columns = layer.values.shape
        y, x = (index.numpy() + 0.5 for index in torch.nonzero(layer.away, as_tuple=True))
        across, down = left + x * (right - left) / columns - 0.5, top + y * (bottom - top) / rows - 0.5
        axes.scatter(across, down, s=6, color=ON_PALE, linewidths=0, gid="away")
    if layer.name:
        axes.set_title(theme.drawable(layer.name), size=8.8, pad=3)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _heading(result: Labelled) -> str:
    n = f" (n = {result.n:,})" if result.n else ""
    return nonbreaking(result.what[:1].upper() + result.what[1:] + n)


def _note(
    result: Labelled,
    layers: Sequence[_ImageMap],
    region: Region,
    picture: Image.Image,
    inputs: VLMInputs,
    row: int,
) -> str:
    rows, columns = layers[0].values.shape
    parts = [f"{rows} × {columns} patches."]
    if len(layers) > 1:
        parts.append("One scale for all.")
    if result.low is not None:
        parts.append("Dot: 95 % interval away from 0.")
    if is_cut(region, picture):
        parts.append("Veiled: cut off before the model sees it.")
    parts += [_largest_in_text(result, inputs, row)] if "position" in result.labels else []
    parts += [f"{line.rstrip('.')}." for line in result.notes]
    return " ".join(part for part in parts if part)


def _largest_in_text(result: Labelled, inputs: VLMInputs, row: int) -> str:
    """A note with the largest value at a text token, which the picture can't show."""
    off = (~inputs.image_mask[row]).nonzero()[:, 0].tolist()
    by_position = result.values.movedim(result.axes.index("position"), -1)
    if by_position.shape[-1] != inputs.input_ids.shape[1] or not off:
        return ""
    rest = by_position[..., off].flatten()
    largest = int(rest.abs().argmax())
    where = result.names("position")[off[largest % len(off)]]
    return f"Largest off the picture: {number(float(rest[largest]), 2)} at {where}."
