"""`cocotext`: COCO-Text v2 (`cocotext.v2.json`), one record per text.

    {"imgs": {"540965": {"id": 540965, "file_name": "COCO_train2014_000000540965.jpg", "width": 640, ...}},
     "anns": {"45346": {"id": 45346, "image_id": 540965, "bbox": [x, y, width, height],
      "utf8_string": "STOP", "legibility": "legible", "language": "english", "class": "..."}},
     "imgToAnns": {...}}

Texts that are not legible, not English or not transcribed are not meant for the task. `imgToAnns` is
redundant and not read. A text whose box has no area or lies outside its picture (the official file holds
some) is left out with a warning that names it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.coco_paths import coco_image_paths
from hones_lens.data.files import load_records
from hones_lens.data.hones import parse_ocr_fields
from hones_lens.data.reading import describe_top_level
from hones_lens.data.recognize import read_file_of
from hones_lens.data.records import (
    BadRecord,
    Format,
    NotForTask,
    Record,
    Row,
    parse_id,
    parse_object,
    parse_size,
    parse_text,
)


def rows(file: Path, task: str) -> list[Row]:
    """One row per text."""
    top = read_file_of(file, "COCO-Text's", "cocotext")
    if not isinstance(top, dict) or not all(isinstance(top.get(key), dict) for key in ("imgs", "anns")):
        raise ValueError(
            f"{file} is not COCO-Text's: no objects 'imgs' and 'anns', but {describe_top_level(top)}"
        )
    if not top["anns"]:
        raise ValueError(f"{file} has no annotations")
    return [Row(key, partial(_parse, raw, key, top["imgs"])) for key, raw in top["anns"].items()]


def _parse(raw: Any, key: str, images: dict[str, Any]) -> Record:
    text = parse_object(raw, "the annotation")
    image_id = parse_id(text, "image_id")
    if image_id not in images:
        raise BadRecord(f"is of image {image_id}, which the file does not list")
    if text.get("legibility", "legible") == "legible" and text.get("utf8_string") in (None, ""):
        raise NotForTask("with text that is not transcribed")
    image = parse_object(images[image_id], f"image {image_id}")
    return Record(
        image_key=image_id,
        files=coco_image_paths(parse_text(image.get("file_name"), "file_name")),
        size=parse_size(image),
        **parse_ocr_fields(text, "utf8_string", ("id",), key),
    )


FORMAT = Format("cocotext", ("ocr",), rows, leaves_out_bad_boxes=True)
load = partial(load_records, FORMAT)
