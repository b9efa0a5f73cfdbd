"""`hones`: HONES's unified JSON, one record an image with a section for each of the four tasks.

    {"data": [{"image_id": 1, "image_info": {"file_name": "COCO_train2014_000000000001.jpg",
      "width": 640, "height": 480},
      "vqa": {"question_id": 1000, "question": "...", "answer": "...", "all_answers": ["...", ...]},
      "captions": [{"caption_id": 7, "caption": "..."}],
      "ocr": {"ocr_id": 5, "bbox": [x, y, width, height], "text": "...", "legibility": "legible"},
      "retrieval": [{"caption_id": 7, "caption": "..."}]}]}

A bare list of such records is read too, `vqa` and `ocr` may be lists of several, and where `retrieval`
is missing the captions serve. An image without a section is not meant for that task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.coco_names import coco_places
from hones_lens.data.files import load_records
from hones_lens.data.reading import outline, read_json
from hones_lens.data.records import (
    BadRecord,
    Format,
    NotForTask,
    Record,
    Row,
    answers_of,
    box_of,
    captions_of,
    identifier,
    label,
    mapping,
    size_of,
    text_of,
)

TASKS = ("vqa", "ocr", "caption", "retrieval")
_SECTIONS = {
    "vqa": ("vqa",),
    "ocr": ("ocr",),
    "caption": ("captions",),
    "retrieval": ("retrieval", "captions"),
}


def is_unified(top: Any) -> bool:
    """Whether the top level of a file is that of the unified JSON."""
    records = top.get("data") if isinstance(top, dict) else top
    return isinstance(records, list)


def rows(file: Path, task: str) -> list[Row]:
    """One row a section of the task."""
    return rows_of(read_json(file), file, task)


def rows_of(top: Any, file: Path, task: str) -> list[Row]:
    """The rows of a file's top level, one for each section of the task.

    Raises:
        ValueError: Another top level, or no records.
    """
    if not is_unified(top):
        raise ValueError(f"{file} is not HONES's unified JSON: no list of records, but {outline(top)}")
    records = top["data"] if isinstance(top, dict) else top
    if not records:
        raise ValueError(f"{file} has no records")
    return [row for i, record in enumerate(records) for row in _rows_of_record(record, i, task)]


def _rows_of_record(record: Any, index: int, task: str) -> Iterator[Row]:
    name = label(record, index, "image_id")
    section = None
    if isinstance(record, dict):
        section = next((record[key] for key in _SECTIONS[task] if record.get(key) is not None), None)
    several = section if isinstance(section, list) and task in ("vqa", "ocr") else [section]
    for one in several:
        yield Row(name, partial(_parse, record, one, task))


def _parse(raw: Any, section: Any, task: str) -> Record:
    record = mapping(raw, "the record")
    key = identifier(record, "image_id")
    if section is None:
        raise NotForTask(f"without {_SECTIONS[task][0]}")
    info = mapping(record.get("image_info"), "image_info") if record.get("image_info") is not None else {}
    if info.get("file_name") is None:
        raise BadRecord("has no image_info.file_name")
    return Record(
        image_key=key,
        files=coco_places(text_of(info["file_name"], "image_info.file_name")),
        size=size_of(info),
        **_FIELDS[task](section, key),
    )


def _vqa(section: Any, key: str) -> dict[str, Any]:
    vqa = mapping(section, "vqa")
    answers = vqa.get("all_answers")
    return {
        "id": identifier(vqa, "question_id") if vqa.get("question_id") is not None else key,
        "question": text_of(vqa.get("question"), "question"),
        "answers": answers_of(vqa.get("answer") if answers is None else answers),
        "kind": _kind(vqa, "answer_type"),
    }


def _ocr(section: Any, key: str) -> dict[str, Any]:
    return ocr_fields(mapping(section, "ocr"), "text", ("ocr_id",), key)


def ocr_fields(ocr: Mapping[str, Any], text: str, ids: tuple[str, ...], key: str) -> dict[str, Any]:
    """The fields of one text, as COCO-Text annotates it; only legible English is to be transcribed."""
    if ocr.get("legibility", "legible") != "legible":
        raise NotForTask("with text that is not legible")
    if ocr.get("language", "english") != "english":
        raise NotForTask("with text that is not English")
    return {
        "id": identifier(ocr, *ids) if any(ocr.get(i) is not None for i in ids) else key,
        "text": text_of(ocr.get(text), "text"),
        "box": box_of(ocr.get("bbox")),
        "kind": _kind(ocr, "class"),
    }


def _captions(section: Any, key: str) -> dict[str, Any]:
    return {"id": key, "references": captions_of(section)}


def _kind(section: Mapping[str, Any], key: str) -> str:
    return str(section.get(key) or "")


_FIELDS = {"vqa": _vqa, "ocr": _ocr, "caption": _captions, "retrieval": _captions}
FORMAT = Format("hones", TASKS, rows)

load = partial(load_records, FORMAT)
