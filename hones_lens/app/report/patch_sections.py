"""The part of a run's page about activation patching: words, figures and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from hones_lens.app.report.run_view import PatchView
from hones_lens.app.report.tables import Cell, Strong, Table
from hones_lens.results import Labelled
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
    "vision_z": "Outputs of the vision tower's heads",
    "vision_neurons": "Neurons of the vision tower",
}
_WAYS = {
    "denoise": "put from the clean run into the corrupted one",
    "noise": "put from the corrupted run into the clean one",
}
_PLACES = {
    "group": "at the tokens of one group at a time",
    "position": "at one position at a time",
    "all": "at all positions at once",
}
_MOST_PANELS = 16
_MOST_LAYERS = 12  # on the picture
_MOST_HEADS = 8  # on the picture
_MOST_TIPS = 4000  # cells of a map that say their number when pointed at; more are drawn as a picture
_MOST_ROWS, _MOST_COLUMNS = 48, 4  # of a table of all values
_STRONGEST = 16  # rows of a table of some


def done(view: PatchView, model_name: str) -> str:
    """What was patched where."""
    what, units = view.options["what"], {"head": "head", "kv_head": "key-value head", "neuron": "neuron"}
    alone = next((f", each {told} alone" for axis, told in units.items() if axis in view.result.axes), "")
    one = what.startswith("resid") or what.endswith("_out")
    way = f"{'was' if one else 'were'} {_WAYS[view.options['direction']]}"
    place = _PLACES[view.options["by"]]
    return f"{_SITES[what]} ({what}) of {model_name} {way}{alone}, {place}, on {view.pairs}."


def meant(view: PatchView) -> str:
    """What the numbers mean."""
    metric = view.options["metric"]
    if view.options["raw"]:
        return f"By how much a patch changes {metric}."
    return (
        f"The share of the whole effect on {metric}: 0 where a patch does nothing, 1 where it does what "
        "changing the input does."
    )


def heat_map(result: Labelled) -> tuple[Plot, dict[str, list[str]]]:
    """The figure of a result, and what its cells say when pointed at.

    Of more panels than fit, those with the largest values are drawn.
    """
    shown, panels = result, None
    if len(result.axes) == 3:
        panels = min(reversed(result.axes), key=lambda axis: len(result.names(axis)))
        shown = _strongest(result, panels, _MOST_PANELS)
    figure = labelled(shown, panels=panels)
    if len(shown.axes) == 1:
        return figure, {}
    if shown.values.numel() > _MOST_TIPS:
        for axes in figure.axes:
            for many in axes.findobj(lambda artist: artist.get_gid() in ("cells", "dots")):
                many.set_rasterized(True)
        return figure, {}
    rest = [axis for axis in shown.axes if axis != panels]
    order = [*([panels] if panels else []), *rest]
    moved = shown.values.permute([shown.axes.index(axis) for axis in order]).shape
    places = torch.cartesian_prod(*(torch.arange(size) for size in moved)).tolist()
    return figure, {"cells": [_told(shown, dict(zip(order, at, strict=True))) for at in places]}


def _told(result: Labelled, at: dict[str, int]) -> str:
    """One value, with where it is and its interval."""
    index = tuple(at[axis] for axis in result.axes)
    text = f"{place(result, index)}: {number(float(result.values[index]), sign=True)}"
    return f"{text} {ends(result, index)}".rstrip()


def place(result: Labelled, index: Sequence[int]) -> str:
    """Where a value is: `layer 3, image`."""
    names = [(axis, result.names(axis)[i]) for axis, i in zip(result.axes, index, strict=True)]
    return ", ".join(f"{axis} {name}" if isinstance(name, int) else str(name) for axis, name in names)


def ends(result: Labelled, index: Sequence[int]) -> str:
    """The interval of a value, in brackets; empty where there is none."""
    if result.low is None or result.high is None:
        return ""
    low, high = (float(end[tuple(index)]) for end in (result.low, result.high))
    return brackets(low, high)


def on_picture(view: PatchView) -> Plot | None:
    """What was patched position by position over the first pair's picture; None where it was not."""
    if view.pair is None or "position" not in view.result.axes:
        return None
    result = view.result
    others = [axis for axis in result.axes if axis != "position"]
    if len(others) == 2:
        result = _strongest(_joined(result, others), "component", _MOST_HEADS)
    elif others and result.shape[0] > _MOST_LAYERS:
        steps = torch.linspace(0, result.shape[0] - 1, _MOST_LAYERS).round().long().tolist()
        result = _some(result, others[0], steps)
    return on_image(result, view.pair.inputs, view.pair.clean)


def _joined(result: Labelled, axes: Sequence[str]) -> Labelled:
    """Layers and heads as one axis in front, `component`."""
    pairs = [(a, b) for a in result.names(axes[0]) for b in result.names(axes[1])]
    names = tuple(f"{axes[0]} {a}, {axes[1]} {b}" for a, b in pairs)
    flat = {
        name: getattr(result, name).flatten(0, 1)
        for name in ("values", "low", "high", "p")
        if getattr(result, name) is not None
    }
    labels = {"component": names, "position": result.names("position")}
    return replace(result, axes=("component", "position"), labels=labels, **flat)


def _strongest(result: Labelled, axis: str, most: int) -> Labelled:
    """The entries of an axis with the largest values, whatever their sign, in their order."""
    at = result.axes.index(axis)
    if result.shape[at] <= most:
        return result
    sizes = result.values.abs().movedim(at, 0).flatten(1).amax(1)
    best = sizes.argsort(descending=True, stable=True)[:most]
    return _some(result, axis, sorted(best.tolist()))


def _some(result: Labelled, axis: str, chosen: Sequence[int]) -> Labelled:
    at, index = result.axes.index(axis), torch.tensor(chosen)
    cut = {
        name: getattr(result, name).index_select(at, index)
        for name in ("values", "low", "high", "p")
        if getattr(result, name) is not None
    }
    names = result.names(axis)
    told = f"{len(chosen)} of {len(names)} {axis}s are drawn"
    labels = {**result.labels, axis: tuple(names[i] for i in chosen)}
    return replace(result, labels=labels, notes=(*result.notes, told), **cut)


def best(result: Labelled) -> tuple[int, ...]:
    """Where the value of largest size is; of several, the first."""
    flat = int(result.values.abs().flatten().argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), result.shape))


def values(result: Labelled) -> Table:
    """All values with their intervals, or the strongest; bold: the interval lies away from 0."""
    marked = significant(result)
    if len(result.axes) == 2 and result.shape[0] <= _MOST_ROWS and result.shape[1] <= _MOST_COLUMNS:
        columns = (result.axes[0], *(str(name) for name in result.names(result.axes[1])))
        rows = [
            (str(name), *(_cell(result, (i, j), marked) for j in range(result.shape[1])))
            for i, name in enumerate(result.names(result.axes[0]))
        ]
        return Table("All values", columns, tuple(rows), _values_note(result, 0))
    count = math.prod(result.shape)
    whole = len(result.axes) == 1 and count <= _MOST_ROWS
    order = range(count) if whole else result.values.abs().flatten().argsort(descending=True, stable=True)
    rows = []
    for flat in list(order)[: count if whole else _STRONGEST]:
        index = tuple(int(i) for i in torch.unravel_index(torch.as_tensor(flat), result.shape))
        names = [str(result.names(axis)[i]) for axis, i in zip(result.axes, index, strict=True)]
        rows.append((*names, _cell(result, index, marked)))
    title = "All values" if whole else "Strongest"
    return Table(title, (*result.axes, "value"), tuple(rows), _values_note(result, count - len(rows)))


def _cell(result: Labelled, index: tuple[int, ...], marked: torch.Tensor | None) -> Cell:
    text = f"{number(float(result.values[index]))} {ends(result, index)}".rstrip()
    return Strong(text) if marked is not None and bool(marked[index]) else text


def _values_note(result: Labelled, left_out: int) -> str:
    note = f"{sentence(result.what)}; n = {result.n:,}."
    if result.low is not None:
        note += " 95 % bootstrap intervals over pairs; bold: the interval lies away from 0."
    return note + (f" {left_out:,} more are not shown." if left_out else "")


def sentence(text: str) -> str:
    """The text with a capital letter in front."""
    return text[:1].upper() + text[1:]
