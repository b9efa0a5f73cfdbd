"""Cards of a report: pictures with what was asked and answered, and where each head looks."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from hones_lens import viz
from hones_lens.app.report.run_view import ExampleView, PairView
from hones_lens.viz import check_region, number

_SHADE, _DARKEST = 13, 163  # of the veil over patches without attention: grey, and opacity out of 255
_MOST_COLUMNS = 8  # heads in a line while lines are layers


@dataclass(frozen=True)
class Look:
    """One head that can be chosen: its map over the picture, and what is to be known about it.

    Attributes:
        head: Its name.
        map: A picture with a pixel for each patch, clear where the head looks most.
        place: Where on the picture the map lies, as CSS.
        brightest: Where on the map its largest value is, as CSS.
        share: Attention on the picture in all, from 0 to 1.
        note: In words.
        chosen: Shown at first.
    """

    head: str
    map: str
    place: str
    brightest: str
    share: float
    note: str
    chosen: bool


@dataclass(frozen=True)
class Fact:
    """A line below the pictures."""

    name: str
    text: str
    strong: bool = False


@dataclass(frozen=True)
class Card:
    """Pictures (label and data URI) in a row, heads to choose from, and lines of text."""

    pictures: Sequence[tuple[str, str]]
    facts: Sequence[Fact]
    looks: Sequence[Look] = ()
    columns: int = 0
    aspect: str = ""


def example_card(example: ExampleView) -> Card:
    """An example, with the heads whose attention is known."""
    facts = [
        Fact("prompt", example.prompt),
        Fact("right answer", example.target, True),
        Fact("model", example.answer, True),
    ]
    if example.answer_masked is not None:
        facts.append(Fact(example.masked_label, example.answer_masked, True))
    looks = [_look(example, head, values) for head, values in example.looks.items()]
    uri = viz.image_uri(example.image)
    labels = ("picture", "attention by patch", "smoothed") if looks else ("picture",)
    aspect = f"{example.image.width} / {example.image.height}"
    return Card([(label, uri) for label in labels], facts, looks, _columns(list(example.looks)), aspect)


def _columns(heads: Sequence[str]) -> int:
    """Heads in a line: those of a layer, where every layer has them all; else 0."""
    layers = [head.partition("H")[0] for head in heads]
    width = layers.count(layers[0]) if layers else 0
    whole = all(layers.count(layer) == width for layer in layers)
    return width if whole and 1 < width <= _MOST_COLUMNS else 0


def _look(example: ExampleView, head: str, values: Tensor) -> Look:
    width, height = example.image.size
    left, top, right, bottom = check_region(example.region, example.image)
    rows, columns = values.shape
    row, column = divmod(int(values.argmax()), columns)
    total, most = float(values.sum()), float(values.max())
    note = f"Attention of {head} from {example.attention_from} to {rows} × {columns} patches: "
    note += f"{number(total)} on the picture in all, {number(most)} on the brightest patch; dark is 0."
    if (left, top, right, bottom) != (0, 0, width, height):
        note += " Veiled: cut off before the model sees it."
    return Look(
        head=head,
        map=attention_uri(values),
        place=_box(left / width, top / height, (right - left) / width, (bottom - top) / height),
        brightest=_box(column / columns, row / rows, 1 / columns, 1 / rows),
        share=min(1.0, total),
        note=note,
        chosen=head == example.head,
    )


def _box(left: float, top: float, width: float, height: float) -> str:
    sides = {"left": left, "top": top, "width": width, "height": height}
    return "; ".join(f"{name}: {100 * value:.4g}%" for name, value in sides.items())


def attention_uri(values: Tensor) -> str:
    """A pixel for each value: clear at the largest, dark at 0; as a PNG data URI."""
    shares = values.double().numpy() / (float(values.max()) or 1.0)
    veil = np.round(_DARKEST * (1 - shares)).astype(np.uint8)
    pixels = np.stack((np.full_like(veil, _SHADE), veil), axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "LA").save(buffer, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pair_card(pair: PairView) -> Card:
    """The first pair of a patching."""
    pictures = {"clean": pair.clean, "corrupted": pair.corrupted}
    facts = [Fact("pair", pair.id), Fact("prompt", pair.prompt), Fact("clean answer", pair.answer, True)]
    if pair.foil is not None:
        facts.append(Fact("other answer", pair.foil, True))
    shown = [(name, viz.image_uri(picture)) for name, picture in pictures.items() if picture is not None]
    return Card(shown, facts)
