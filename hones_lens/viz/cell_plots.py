"""Figures of tokens in cells: attention between cells, and one value per cell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hones_lens.analysis import Cells, FoldedAttention
from hones_lens.results import Labelled
from hones_lens.viz import theme
from hones_lens.viz.labelled_plots import labelled
from hones_lens.viz.lens_plots import shorten_token
from hones_lens.viz.theme import FONT, GRID, INK, ON_ACCENT, Plot, styled

_MOST_HEADS = 16
_LONGEST = 24  # letters of a cell's name
_SIZE, _TALL, _GAP, _PAD = 9.2, 17.0, 3.0, 3.5  # of text, of a cell, between and in cells [points]
_LIGHT_TEXT_FROM = 0.55  # share of the largest value from which a cell is so dark that its text is light


@styled
def cell_patterns(folded: FoldedAttention, title: str = "") -> Plot:
    """A heat map of queries by keys for each head, over the cells; all share one colour scale.

    Args:
        folded: From `folded_attention`.
        title: Default: the model.

    Raises:
        ValueError: More heads than 16.
    """
    if len(folded.heads) > _MOST_HEADS:
        raise ValueError(f"{len(folded.heads)} heads can't be drawn at once: take at most {_MOST_HEADS}")
    names = tuple(shorten_token(name, _LONGEST) for name in folded.cells.names)
    result = Labelled(
        "attention",
        folded.pattern,
        ("head", "query", "key"),
        {"head": folded.names, "query": names, "key": names},
        notes=("An image is one cell: its keys are summed, its queries averaged.",),
    )
    return labelled(result, title=title or f"{folded.model_name}: attention between tokens", panels="head")


class _PlacedCell(NamedTuple):
    """A cell's name and position [points]."""

    name: str
    left: float
    line: int
    width: float


@styled
def cell_values(
    cells: Cells, values: Float[Tensor, " pos"], *, fold: str = "mean", what: str = "value", title: str = ""
) -> Plot:
    """The row's tokens in order, each coloured by its value.

    Args:
        cells: From `fold_tokens`.
        values: One value per position of the row.
        fold: Reduction over a cell's tokens: `sum`, `mean` or `max`.
        what: Name of the values.
        title: Default: `what`.

    Raises:
        ValueError: An unknown fold, another number of values, or values that are not finite.
    """
    folded = cells.fold(check_finite(values, what), fold)
    limit = float(folded.abs().max()) or 1.0
    placed = _place_cells(cells.names, 2 * theme.WIDTH * 72 - 90)
    height = (placed[-1].line + 1) * (_TALL + _GAP)
    note = f"An image is the {fold} of its tokens."
    figure, axes = theme.new_plot(title or what, note, max(1.0, height / 72 + 0.2), panels=2)
    for unused in axes:
        unused.remove()
    panel = figure.subplots()
    norm = Normalize(-limit, limit)
    for one, value in zip(placed, folded.tolist(), strict=True):
        _draw(panel, one, theme.diverging()(norm(value)), abs(value) > _LIGHT_TEXT_FROM * limit)
    panel.set(xlim=(0, 2 * theme.WIDTH * 72 - 90), ylim=(max(height, 72), -_GAP))
    panel.set_axis_off()
    scale = ScalarMappable(norm, theme.diverging())
    ticks = MaxNLocator(4, symmetric=True)
    bar = figure.colorbar(scale, ax=panel, fraction=0.05, pad=0.02, aspect=8, ticks=ticks)
    bar.outline.set(edgecolor=GRID)
    if title:
        bar.set_label(shorten_token(what, 40))
    return figure


def check_finite(values: Tensor, what: str) -> Tensor:
    """The values on the CPU.

    Raises:
        ValueError: Some are not finite.
    """
    values = values.detach().float().cpu()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{what}: values that are not finite")
    return values


def _place_cells(names: tuple[str, ...], across: float) -> list[_PlacedCell]:
    """Place the names from left to right, with a new line where a name does not fit."""
    font, left, line, out = FontProperties(family=FONT, size=_SIZE), 0.0, 0, []
    for name in names:
        text = shorten_token(name, _LONGEST)
        width = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] + 2 * _PAD
        if left and left + width > across:
            left, line = 0.0, line + 1
        out.append(_PlacedCell(text, left, line, width))
        left += width + _GAP
    return out


def _draw(axes: Axes, cell: _PlacedCell, colour: tuple[float, ...], strong: bool) -> None:
    top = cell.line * (_TALL + _GAP)
    style = {"facecolor": colour, "edgecolor": GRID, "linewidth": 0.6, "gid": "cell"}
    axes.add_patch(Rectangle((cell.left, top), cell.width, _TALL, **style))
    ink = ON_ACCENT if strong else INK
    position = (cell.left + _PAD, top + _TALL / 2)
    axes.text(*position, cell.name, size=_SIZE, va="center_baseline", color=ink, gid="name")
