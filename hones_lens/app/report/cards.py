"""Cards of a report: the picture, prompt and answers of an example, with attention maps of heads."""

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
from hones_lens.viz import check_region, is_cut, number

_SHADE, _DARKEST = 13, 163  # of the veil over patches without attention: grey, and opacity out of 255
_MOST_COLUMNS = 8  # heads in a line while lines are layers


@dataclass(frozen=True)
class HeadMap:
    """The attention map of one head over a picture; the reader chooses which head is shown.

    Attributes:
        head: Name of the head, `L3H5`.
        map: Image with one pixel for each patch, transparent where attention is largest; a data URI.
        place: Position of the map on the picture, as CSS.
        brightest: Position of the largest value on the map, as CSS.
        share: Total attention on the picture, from 0 to 1.
        note: Caption.
        chosen: Whether this head is shown first.
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
    """A named line of text below the pictures; `strong` ones are bold."""

    name: str
    text: str
    strong: bool = False


@dataclass(frozen=True)
class Card:
    """Pictures (label and data URI) in a row, heads to choose from, and lines of text."""

    pictures: Sequence[tuple[str, str]]
    facts: Sequence[Fact]
    looks: Sequence[HeadMap] = ()
    columns: int = 0
    aspect: str = ""


def example_card(example: ExampleView) -> Card:
    """The card of an example, with the heads whose attention was stored."""
    facts = [
        Fact("prompt", example.prompt),
        Fact("right answer", example.target, True),
        Fact("model", example.answer, True),
    ]
    if example.answer_masked is not None:
        facts.append(Fact(example.masked_label, example.answer_masked, True))
    looks = [_head_map(example, head, values) for head, values in example.looks.items()]
    uri = viz.image_uri(example.image)
    labels = ("picture", "attention by patch", "smoothed") if looks else ("picture",)
    aspect = f"{example.image.width} / {example.image.height}"
    return Card([(label, uri) for label in labels], facts, looks, _columns(list(example.looks)), aspect)


def _columns(heads: Sequence[str]) -> int:
    """Heads in a row: the heads of a layer, if all layers have equally many; else 0."""
    layers = [head.partition("H")[0] for head in heads]
    width = layers.count(layers[0]) if layers else 0
    whole = all(layers.count(layer) == width for layer in layers)
    return width if whole and 1 < width <= _MOST_COLUMNS else 0


def _head_map(example: ExampleView, head: str, values: Tensor) -> HeadMap:
    width, height = example.image.size
    rows, columns = values.shape
    left, top, right, bottom = check_region(example.region, example.image, (rows, columns))
    row, column = divmod(int(values.argmax()), columns)
    total, most = float(values.sum()), float(values.max())
    note = f"Attention of {head} from {example.attention_from} to {rows} × {columns} patches: "
    note += f"{number(total)} on the picture in all, {number(most)} on the brightest patch; dark is 0."
    if is_cut((left, top, right, bottom), example.image):
        note += " Veiled: cut off before the model sees it."
    return HeadMap(
        head=head,
        map=attention_uri(values),
        place=_css_box(left / width, top / height, (right - left) / width, (bottom - top) / height),
        brightest=_css_box(column / columns, row / rows, 1 / columns, 1 / rows),
        share=min(1.0, total),
        note=note,
        chosen=head == example.head,
    )


def _css_box(left: float, top: float, width: float, height: float) -> str:
    sides = {"left": left, "top": top, "width": width, "height": height}
    return "; ".join(f"{name}: {100 * value:.4g}%" for name, value in sides.items())


def attention_uri(values: Tensor) -> str:
    """An image with one pixel for each value, transparent at the largest and dark at 0, as a PNG data URI."""
    shares = values.double().numpy() / (float(values.max()) or 1.0)
    veil = np.round(_DARKEST * (1 - shares)).astype(np.uint8)
    pixels = np.stack((np.full_like(veil, _SHADE), veil), axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "LA").save(buffer, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pair_card(pair: PairView) -> Card:
    """The card of the first pair of an activation patching."""
    pictures = {"clean": pair.clean, "corrupted": pair.corrupted}
    facts = [Fact("pair", pair.id), Fact("prompt", pair.prompt), Fact("clean answer", pair.answer, True)]
    if pair.foil is not None:
        facts.append(Fact("other answer", pair.foil, True))
    for side, generated in (("clean", pair.clean_answer), ("corrupted", pair.corrupted_answer)):
        if generated:
            facts.append(Fact(f"the model, {side}", generated, True))
    shown = [(name, viz.image_uri(picture)) for name, picture in pictures.items() if picture is not None]
    return Card(shown, facts)
