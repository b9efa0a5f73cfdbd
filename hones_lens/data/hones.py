"""`hones`: HONES's unified JSON, one record per image with a section for each of the four tasks.

    {"data": [{"image_id": 1, "image_info": {"file_name": "COCO_train2014_000000000001.jpg",
      "width": 640, "height": 480},
      "vqa": {"question_id": 1000, "question": "...", "answer": "...", "all_answers": ["...", ...]},
      "captions": [{"caption_id": 7, "caption": "..."}],
      "ocr": {"ocr_id": 5, "bbox": [x, y, width, height], "text": "...", "legibility": "legible"},
      "retrieval": [{"caption_id": 7, "caption": "..."}]}]}

A bare list of such records is read too; `vqa` and `ocr` may be lists of several objects; if `retrieval`
is missing, `captions` is used. An image without the section of a task is not meant for that task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.coco_paths import coco_image_paths
from hones_lens.data.files import load_records
from hones_lens.data.reading import describe_top_level
from hones_lens.data.recognize import read_file_of, require_answers
from hones_lens.data.records import (
    BadRecord,
    Format,
    NotForTask,
    Record,
    Row,
    label,
    parse_answers,
    parse_box,
    parse_captions,
    parse_id,
    parse_object,
    parse_size,
    parse_text,
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
    """One row per section of the task."""
    return unified_rows(read_file_of(file, "HONES's unified JSON", "hones"), file, task)


def unified_rows(top: Any, file: Path, task: str) -> list[Row]:
    """The rows of a file's top level, one for each section of the task.

    Raises:
        ValueError: The top level is not that of the unified JSON, or holds no records.
    """
    if not is_unified(top):
        raise ValueError(
            f"{file} is not HONES's unified JSON: no list of records, but {describe_top_level(top)}"
        )
    records = top["data"] if isinstance(top, dict) else top
    if not records:
        raise ValueError(f"{file} has no records")
    if not any(isinstance(record, dict) and "image_id" in record for record in records):
        raise ValueError(
            f"{file} is not HONES's unified JSON: no record has 'image_id'; the first is "
            f"{describe_top_level(records[0])}"
        )
    if task == "vqa":
        sections = (section for record in records for section in _record_sections(record, task))
        require_answers(sections, file, "all_answers", "answer")
    return [row for i, record in enumerate(records) for row in _record_rows(record, i, task)]


def _record_rows(record: Any, index: int, task: str) -> Iterator[Row]:
    name = label(record, index, "image_id")
    for entry in _record_sections(record, task):
        yield Row(name, partial(_parse, record, entry, task))


def _record_sections(record: Any, task: str) -> list[Any]:
    """The sections of a task in one record, `[None]` if it has none."""
    section = None
    if isinstance(record, dict):
        section = next((record[key] for key in _SECTIONS[task] if record.get(key) is not None), None)
    return section if isinstance(section, list) and task in ("vqa", "ocr") else [section]


def _parse(raw: Any, section: Any, task: str) -> Record:
    record = parse_object(raw, "the record")
    key = parse_id(record, "image_id")
    if section is None:
        raise NotForTask(f"without {_SECTIONS[task][0]}")
    info = (
        parse_object(record.get("image_info"), "image_info") if record.get("image_info") is not None else {}
    )
    if info.get("file_name") is None:
        raise BadRecord("has no image_info.file_name")
    return Record(
        image_key=key,
        files=coco_image_paths(parse_text(info["file_name"], "image_info.file_name")),
        size=parse_size(info),
        **_FIELDS[task](section, key),
    )


def _vqa(section: Any, key: str) -> dict[str, Any]:
    vqa = parse_object(section, "vqa")
    answers = vqa.get("all_answers")
    return {
        "id": parse_id(vqa, "question_id") if vqa.get("question_id") is not None else key,
        "question": parse_text(vqa.get("question"), "question"),
        "answers": parse_answers(vqa.get("answer") if answers is None else answers),
        "kind": _label(vqa, "answer_type"),
    }


def _ocr(section: Any, key: str) -> dict[str, Any]:
    return parse_ocr_fields(parse_object(section, "ocr"), "text", ("ocr_id",), key)


def parse_ocr_fields(ocr: Mapping[str, Any], text: str, ids: tuple[str, ...], key: str) -> dict[str, Any]:
    """The record fields of one text annotated as in COCO-Text.

    Raises:
        NotForTask: The text is not legible, or not English.
    """
    if ocr.get("legibility", "legible") != "legible":
        raise NotForTask("with text that is not legible")
    if ocr.get("language", "english") != "english":
        raise NotForTask("with text that is not English")
    return {
        "id": parse_id(ocr, *ids) if any(ocr.get(i) is not None for i in ids) else key,
        "text": parse_text(ocr.get(text), "text"),
        "box": parse_box(ocr.get("bbox")),
        "kind": _label(ocr, "class"),
    }


def _captions(section: Any, key: str) -> dict[str, Any]:
    return {"id": key, "references": parse_captions(section)}


def _label(section: Mapping[str, Any], key: str) -> str:
    return str(section.get(key) or "")


_FIELDS = {"vqa": _vqa, "ocr": _ocr, "caption": _captions, "retrieval": _captions}
FORMAT = Format("hones", TASKS, rows)

load = partial(load_records, FORMAT)
