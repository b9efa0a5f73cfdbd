"""Files of captions: Karpathy's `dataset_*.json` and COCO's official `captions_*.json`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.coco_names import coco_places
from hones_lens.data.reading import list_under
from hones_lens.data.records import (
    BadRecord,
    Record,
    Row,
    captions_of,
    identifier,
    label,
    mapping,
    size_of,
    text_of,
)

TASKS = ("caption", "retrieval")


def is_karpathy(top: Any) -> bool:
    """Whether a file's top level is Karpathy's: `images`, and no annotations beside them."""
    return isinstance(top, dict) and "images" in top and "annotations" not in top


def is_official(top: Any) -> bool:
    """Whether a file's top level is COCO's own: `images` and `annotations`."""
    return isinstance(top, dict) and "images" in top and "annotations" in top


def karpathy_rows(top: Any, file: Path, key: str) -> list[Row]:
    """Rows of `{"images": [{"filename": ..., "filepath": ..., "sentences": [{"raw": ...}], ...}]}`.

    Args:
        top, file: The file's top level, and its name for errors.
        key: What identifies an image: `cocoid` in COCO's file, `filename` in those of Flickr.
    """
    images = list_under(top, "images", file)
    return [Row(label(raw, i, key, "filename"), partial(_karpathy, raw, key)) for i, raw in enumerate(images)]


def _karpathy(raw: Any, key: str) -> Record:
    image = mapping(raw, "the record")
    name = text_of(image.get("filename"), "filename")
    if image.get("filepath"):
        name = f"{text_of(image['filepath'], 'filepath')}/{name}"
    number = identifier(image, key)
    return Record(
        id=number,
        image_key=number,
        files=coco_places(name),
        references=captions_of(image.get("sentences")),
    )


def official_rows(top: Any, file: Path) -> list[Row]:
    """Rows of `images` (`id`, `file_name`, `width`, `height`) and `annotations` (`image_id`, `caption`).

    A row is an image with all its captions; an annotation of an image that is not listed is a row too,
    so that its error can name it.
    """
    captions: dict[Any, list[Any]] = {}
    rows: list[Row] = []
    images = list_under(top, "images", file)
    known = {raw["id"] for raw in images if isinstance(raw, dict) and isinstance(raw.get("id"), int | str)}
    for i, raw in enumerate(list_under(top, "annotations", file)):
        image = raw.get("image_id") if isinstance(raw, dict) else None
        if isinstance(image, int | str) and image in known:
            captions.setdefault(image, []).append(raw)
        else:
            rows.append(Row(f"annotation {label(raw, i, 'id')}", partial(_stray, raw)))
    for i, raw in enumerate(images):
        rows.append(Row(label(raw, i, "id"), partial(_official, raw, captions)))
    return rows


def _stray(raw: Any) -> Record:
    number = identifier(mapping(raw, "the annotation"), "image_id")
    raise BadRecord(f"is of image {number}, which the file does not list")


def _official(raw: Any, captions: dict[Any, list[Any]]) -> Record:
    image = mapping(raw, "the image")
    number = identifier(image, "id")
    return Record(
        id=number,
        image_key=number,
        files=coco_places(text_of(image.get("file_name"), "file_name")),
        size=size_of(image),
        references=captions_of(captions.get(image["id"])),
    )
