"""`cocotext`: COCO-Text v2 (`cocotext.v2.json`), one record a text.

    {"imgs": {"540965": {"id": 540965, "file_name": "COCO_train2014_000000540965.jpg", "width": 640, ...}},
     "anns": {"45346": {"id": 45346, "image_id": 540965, "bbox": [x, y, width, height],
      "utf8_string": "STOP", "legibility": "legible", "language": "english", "class": "..."}},
     "imgToAnns": {...}}

Texts that are not legible, not English or not transcribed are not meant for the task. `imgToAnns` says
nothing that the annotations do not.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.coco_names import coco_places
from hones_lens.data.files import load_records
from hones_lens.data.hones import ocr_fields
from hones_lens.data.reading import outline, read_json
from hones_lens.data.records import (
    BadRecord,
    Format,
    NotForTask,
    Record,
    Row,
    identifier,
    mapping,
    size_of,
    text_of,
)


def rows(file: Path, task: str) -> list[Row]:
    """One row a text."""
    top = read_json(file)
    if not isinstance(top, dict) or not all(isinstance(top.get(key), dict) for key in ("imgs", "anns")):
        raise ValueError(f"{file} is not COCO-Text's: no objects 'imgs' and 'anns', but {outline(top)}")
    if not top["anns"]:
        raise ValueError(f"{file} has no annotations")
    return [Row(key, partial(_parse, raw, key, top["imgs"])) for key, raw in top["anns"].items()]


def _parse(raw: Any, key: str, images: dict[str, Any]) -> Record:
    text = mapping(raw, "the annotation")
    number = identifier(text, "image_id")
    if number not in images:
        raise BadRecord(f"is of image {number}, which the file does not list")
    if text.get("legibility", "legible") == "legible" and text.get("utf8_string") in (None, ""):
        raise NotForTask("with text that is not transcribed")
    image = mapping(images[number], f"image {number}")
    return Record(
        image_key=number,
        files=coco_places(text_of(image.get("file_name"), "file_name")),
        size=size_of(image),
        **ocr_fields(text, "utf8_string", ("id",), key),
    )


FORMAT = Format("cocotext", ("ocr",), rows)
load = partial(load_records, FORMAT)
