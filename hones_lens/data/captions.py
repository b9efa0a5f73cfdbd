"""Files of captions: Karpathy's `dataset_*.json` and COCO's official `captions_*.json`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.coco_paths import coco_image_paths
from hones_lens.data.reading import parse_list
from hones_lens.data.records import (
    BadRecord,
    Record,
    Row,
    label,
    parse_captions,
    parse_id,
    parse_object,
    parse_size,
    parse_text,
)

TASKS = ("caption", "retrieval")


def is_karpathy(top: Any) -> bool:
    """Whether a file's top level is Karpathy's: `images` with sentences, and no annotations beside them."""
    if not isinstance(top, dict) or "annotations" in top or not isinstance(top.get("images"), list):
        return False
    return any(isinstance(raw, dict) and "sentences" in raw for raw in top["images"])


def is_coco_captions(top: Any) -> bool:
    """Whether a file's top level is COCO's own: `images` and `annotations`."""
    return isinstance(top, dict) and "images" in top and "annotations" in top


def karpathy_rows(top: Any, file: Path, key: str) -> list[Row]:
    """Rows of `{"images": [{"filename": ..., "filepath": ..., "sentences": [{"raw": ...}], ...}]}`.

    Args:
        top, file: The file's top level, and its name for errors.
        key: The field that identifies an image: `cocoid` in COCO's file, `filename` in those of Flickr.
    """
    images = parse_list(top, "images", file)
    return [
        Row(label(raw, i, key, "filename"), partial(_parse_karpathy, raw, key))
        for i, raw in enumerate(images)
    ]


def _parse_karpathy(raw: Any, key: str) -> Record:
    image = parse_object(raw, "the record")
    name = parse_text(image.get("filename"), "filename")
    if image.get("filepath"):
        name = f"{parse_text(image['filepath'], 'filepath')}/{name}"
    image_id = parse_id(image, key)
    return Record(
        id=image_id,
        image_key=image_id,
        files=coco_image_paths(name),
        references=parse_captions(image.get("sentences")),
    )


def coco_captions_rows(top: Any, file: Path) -> list[Row]:
    """Rows of `images` (`id`, `file_name`, `width`, `height`) and `annotations` (`image_id`, `caption`).

    Each image gives one row with all its captions. An annotation of an image that is not listed also gives
    a row, so that its error can name it.
    """
    captions: dict[Any, list[Any]] = {}
    rows: list[Row] = []
    images = parse_list(top, "images", file)
    listed_ids = {
        raw["id"] for raw in images if isinstance(raw, dict) and isinstance(raw.get("id"), int | str)
    }
    for i, raw in enumerate(parse_list(top, "annotations", file)):
        image = raw.get("image_id") if isinstance(raw, dict) else None
        if isinstance(image, int | str) and image in listed_ids:
            captions.setdefault(image, []).append(raw)
        else:
            rows.append(Row(f"annotation {label(raw, i, 'id')}", partial(_raise_unlisted_image, raw)))
    for i, raw in enumerate(images):
        rows.append(Row(label(raw, i, "id"), partial(_parse_coco_captions, raw, captions)))
    return rows


def _raise_unlisted_image(raw: Any) -> Record:
    image_id = parse_id(parse_object(raw, "the annotation"), "image_id")
    raise BadRecord(f"is of image {image_id}, which the file does not list")


def _parse_coco_captions(raw: Any, captions: dict[Any, list[Any]]) -> Record:
    image = parse_object(raw, "the image")
    image_id = parse_id(image, "id")
    return Record(
        id=image_id,
        image_key=image_id,
        files=coco_image_paths(parse_text(image.get("file_name"), "file_name")),
        size=parse_size(image),
        references=parse_captions(captions.get(image["id"])),
    )
