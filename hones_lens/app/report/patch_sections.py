"""The section of a run's page about activation patching: text, figures and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from hones_lens.app.report.run_view import PatchView
from hones_lens.app.report.tables import Bold, Cell, Table
from hones_lens.results import Labelled, noise_mark
from hones_lens.viz import Plot, brackets, labelled, number, on_image, significant

_SITES = {
    "resid_pre": "The residual stream before a layer",
    "resid_mid": "The residual stream between a layer's attention and MLP",
    "resid_post": "The residual stream after a layer",
    "attn_out": "What a layer's attention adds",
    "mlp_out": "What a layer's MLP adds",
    "z": "Attention heads' outputs",
    "q": "Attention heads' queries",
    "k": "Attention heads' keys",
    "v": "Attention heads' values",
    "pattern": "Attention heads' patterns",
    "neurons": "Neurons",
    "deepstack": "What pictures add behind a layer (DeepStack)",
    "vision_z": "Outputs of the vision tower's heads",
    "vision_neurons": "Neurons of the vision tower",
}
_DIRECTIONS = {
    "denoise": "put from the clean run into the corrupted one",
    "noise": "put from the corrupted run into the clean one",
}
_POSITIONS = {
    "group": "at the tokens of one group at a time",
    "position": "at one position at a time",
    "all": "at all positions at once",
}
_MOST_PANELS = 16
_MOST_LAYERS = 12  # on the picture
_MOST_HEADS = 8  # on the picture
_MOST_TIPS = 4000  # most cells with a tooltip each; larger maps are rasterized
_MOST_ROWS, _MOST_COLUMNS = 48, 4  # limits of a table of all values
_LARGEST_ROWS = 16  # rows of a table of the largest values


def describe_patching(view: PatchView, model_name: str) -> str:
    """One sentence: which activations were patched, in which direction, and at which positions."""
    site, unit_nouns = view.options["what"], {"head": "head", "kv_head": "key-value head", "neuron": "neuron"}
    each_alone = next(
        (f", each {noun} alone" for axis, noun in unit_nouns.items() if axis in view.result.axes), ""
    )
    is_single_site = site.startswith("resid") or site.endswith("_out")
    direction = f"{'was' if is_single_site else 'were'} {_DIRECTIONS[view.options['direction']]}"
    positions = _POSITIONS[view.options["by"]]
    return f"{_SITES[site]} ({site}) of {model_name} {direction}{each_alone}, {positions}, on {view.pairs}."


def describe_values(view: PatchView) -> str:
    """One sentence: what the values measure."""
    metric = view.options["metric"]
    if view.options["raw"]:
        return f"By how much a patch changes {metric}."
    return (
        f"The share of the whole effect on {metric}: 0 where a patch does nothing, 1 where it does what "
        "changing the input does."
    )


def describe_answers(view: PatchView) -> str:
    """How many pairs the model gets right unpatched, and what that means; empty if it was not stored."""
    if view.problem:
        return f"Nothing can be concluded from it: {view.problem}."
    return f"{capitalized(view.answers)}." if view.answers else ""


def heat_map(result: Labelled) -> tuple[Plot, dict[str, list[str]]]:
    """The figure of a result, and the tooltips of its cells.

    If there are more panels than fit, those with the largest absolute values are drawn.
    """
    shown, panels = result, None
    if len(result.axes) == 3:
        panels = min(reversed(result.axes), key=lambda axis: len(result.names(axis)))
        shown = _select_largest(result, panels, _MOST_PANELS)
    figure = labelled(shown, panels=panels)
    if len(shown.axes) == 1:
        return figure, {}
    if shown.values.numel() > _MOST_TIPS:
        for axes in figure.axes:
            for artist in axes.findobj(lambda artist: artist.get_gid() in ("cells", "dots")):
                artist.set_rasterized(True)
        return figure, {}
    remaining = [axis for axis in shown.axes if axis != panels]
    order = [*([panels] if panels else []), *remaining]
    shape = shown.values.permute([shown.axes.index(axis) for axis in order]).shape
    indices = torch.cartesian_prod(*(torch.arange(size) for size in shape)).tolist()
    return figure, {"cells": [_tooltip(shown, dict(zip(order, index, strict=True))) for index in indices]}


def _tooltip(result: Labelled, axis_indices: dict[str, int]) -> str:
    """Tooltip of one value: its index, the value and its interval."""
    index = tuple(axis_indices[axis] for axis in result.axes)
    text = f"{index_text(result, index)}: {number(float(result.values[index]), sign=True)}"
    return f"{text} {interval_text(result, index)}".rstrip()


def index_text(result: Labelled, index: Sequence[int]) -> str:
    """The index of a value as text: `layer 3, image`."""
    names = [(axis, result.names(axis)[i]) for axis, i in zip(result.axes, index, strict=True)]
    return ", ".join(f"{axis} {name}" if isinstance(name, int) else str(name) for axis, name in names)


def interval_text(result: Labelled, index: Sequence[int]) -> str:
    """The interval of a value in brackets; empty if the result has none."""
    if result.low is None or result.high is None:
        return ""
    low, high = (float(end[tuple(index)]) for end in (result.low, result.high))
    return brackets(low, high)


def picture_figure(view: PatchView) -> Plot | None:
    """Values of a patching by position, over the first pair's picture; None for any other patching."""
    if view.pair is None or "position" not in view.result.axes:
        return None
    result = view.result
    other_axes = [axis for axis in result.axes if axis != "position"]
    if len(other_axes) == 2:
        result = _select_largest(_flatten_component_axes(result, other_axes), "component", _MOST_HEADS)
    elif other_axes and result.shape[0] > _MOST_LAYERS:
        layer_indices = torch.linspace(0, result.shape[0] - 1, _MOST_LAYERS).round().long().tolist()
        result = _select(result, other_axes[0], layer_indices)
    return on_image(result, view.pair.inputs, view.pair.clean)


def _flatten_component_axes(result: Labelled, axes: Sequence[str]) -> Labelled:
    """The result with its two component axes, such as layer and head, merged into a first axis."""
    pairs = [(a, b) for a in result.names(axes[0]) for b in result.names(axes[1])]
    names = tuple(f"{axes[0]} {a}, {axes[1]} {b}" for a, b in pairs)
    flat = {
        name: getattr(result, name).flatten(0, 1)
        for name in ("values", "low", "high", "p")
        if getattr(result, name) is not None
    }
    labels = {"component": names, "position": result.names("position")}
    return replace(result, axes=("component", "position"), labels=labels, **flat)


def _select_largest(result: Labelled, axis: str, most: int) -> Labelled:
    """The `most` entries of an axis with the largest absolute values, in their original order."""
    dim = result.axes.index(axis)
    if result.shape[dim] <= most:
        return result
    sizes = result.values.abs().movedim(dim, 0).flatten(1).amax(1)
    largest = sizes.argsort(descending=True, stable=True)[:most]
    return _select(result, axis, sorted(largest.tolist()))


def _select(result: Labelled, axis: str, chosen: Sequence[int]) -> Labelled:
    dim, index = result.axes.index(axis), torch.tensor(chosen)
    selected = {
        name: getattr(result, name).index_select(dim, index)
        for name in ("values", "low", "high", "p")
        if getattr(result, name) is not None
    }
    names = result.names(axis)
    note = f"{len(chosen)} of {len(names)} {axis}s are drawn"
    labels = {**result.labels, axis: tuple(names[i] for i in chosen)}
    return replace(result, labels=labels, notes=(*result.notes, note), **selected)


def largest_index(result: Labelled) -> tuple[int, ...]:
    """Index of the value that is largest in absolute value; the first one of several."""
    flat = int(result.values.abs().flatten().argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), result.shape))


def values_table(result: Labelled) -> Table:
    """A table of all values with their intervals, or of the largest; bold where the interval excludes 0."""
    is_significant = significant(result)
    if len(result.axes) == 2 and result.shape[0] <= _MOST_ROWS and result.shape[1] <= _MOST_COLUMNS:
        columns = (result.axes[0], *(str(name) for name in result.names(result.axes[1])))
        rows = [
            (str(name), *(_cell(result, (i, j), is_significant) for j in range(result.shape[1])))
            for i, name in enumerate(result.names(result.axes[0]))
        ]
        return Table("All values", columns, tuple(rows), _values_note(result, 0))
    count = math.prod(result.shape)
    shows_all = len(result.axes) == 1 and count <= _MOST_ROWS
    order = range(count) if shows_all else result.values.abs().flatten().argsort(descending=True, stable=True)
    rows = []
    for flat in list(order)[: count if shows_all else _LARGEST_ROWS]:
        index = tuple(int(i) for i in torch.unravel_index(torch.as_tensor(flat), result.shape))
        names = [str(result.names(axis)[i]) for axis, i in zip(result.axes, index, strict=True)]
        rows.append((*names, _cell(result, index, is_significant)))
    title = "All values" if shows_all else "Strongest"
    return Table(title, (*result.axes, "value"), tuple(rows), _values_note(result, count - len(rows)))


def _cell(result: Labelled, index: tuple[int, ...], is_significant: torch.Tensor | None) -> Cell:
    value = float(result.values[index])
    text = f"{number(value)}{noise_mark(value, result.noise)} {interval_text(result, index)}".rstrip()
    return Bold(text) if is_significant is not None and bool(is_significant[index]) else text


def _values_note(result: Labelled, left_out: int) -> str:
    note = f"{capitalized(result.what)}; n = {result.n:,}."
    if result.low is not None:
        note += " 95 % bootstrap intervals over pairs; bold: the interval lies away from 0."
    legend = result.noise_legend(result.values.flatten().tolist())
    note += f" {legend}." if legend else ""
    return note + (f" {left_out:,} more are not shown." if left_out else "")


def capitalized(text: str) -> str:
    """The text with a capital letter in front."""
    return text[:1].upper() + text[1:]
