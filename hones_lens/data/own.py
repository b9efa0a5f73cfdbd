"""`own`: your own data, a CSV or JSONL file, or a folder with one of them and the pictures.

Columns (keys in JSONL), of which a task needs its own:

    image (or file_name)     every task: the picture, relative to the image folder or to the file
    question; answer         vqa; or `answers`, a JSON list of several accepted ones
    text; bbox               ocr; bbox is a JSON list [x, y, width, height] in pixels
    caption                  caption and retrieval; or `references`, a JSON list of several
    id                       optional: names the record (default: `line 7`)
    image_id                 optional: one id for all copies of a picture (default: the column image)
    kind                     optional: a label to break results down by

A row without anything in a task's columns is not meant for that task. Other columns are not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from hones_lens.data.files import load_records
from hones_lens.data.reading import read_csv, read_jsonl
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
    mapping,
    text_of,
)

SUFFIXES = (".csv", ".jsonl")
# What a task reads: one of the columns of each group.
COLUMNS = {
    "vqa": (("question",), ("answer", "answers")),
    "ocr": (("text",), ("bbox",)),
    "caption": (("caption", "references"),),
    "retrieval": (("caption", "references"),),
}


def file_in(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """The only file of such a kind in a folder.

    Raises:
        ValueError: None, or several.
    """
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{folder} must hold exactly one file {' or '.join(suffixes)}, but holds {names}")
    return found[0]


def rows(file: Path, task: str) -> list[Row]:
    """One row a line, where the file has the columns of the task."""
    file = file_in(file) if file.is_dir() else file
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{file} is neither {' nor '.join(SUFFIXES)}")
    is_csv = file.suffix.lower() == ".csv"
    lines = read_csv(file) if is_csv else read_jsonl(file)
    columns = {key for _, raw in lines if isinstance(raw, dict) for key in raw}
    need_columns(columns, task, str(file))
    return [Row(_label(raw, n), partial(_parse, raw, f"line {n}", task, is_csv)) for n, raw in lines]


def need_columns(columns: set[str], task: str, where: str) -> None:
    """Raise ValueError where a column that the task needs is in no row."""
    for group in COLUMNS[task]:
        if columns.isdisjoint(group):
            raise ValueError(
                f"{where} has no column {' or '.join(group)}, which {task} needs; "
                f"it has: {', '.join(sorted(columns))}"
            )


def _label(raw: Any, line: int) -> str:
    name = raw.get("id") if isinstance(raw, dict) else None
    return f"{name} (line {line})" if name not in (None, "") else f"line {line}"


def _parse(raw: Any, line: str, task: str, is_csv: bool) -> Record:
    row = _without_empty(mapping(raw, "the row"))
    need_something(row, task)
    key = "image" if "image" in row else "file_name"
    image = PurePath(text_of(row.get(key), "image")).as_posix()
    return Record(
        id=identifier(row, "id") if "id" in row else line,
        image_key=identifier(row, "image_id") if "image_id" in row else image,
        files=(image,),
        kind=str(row.get("kind", "")),
        **FIELDS[task](_unpacked(row) if is_csv else row),
    )


def _without_empty(row: Mapping[str, Any]) -> dict[str, Any]:
    """An empty cell is as good as none."""
    return {k: v for k, v in row.items() if v is not None and not (isinstance(v, str) and not v.strip())}


def need_something(row: Mapping[str, Any], task: str) -> None:
    """Raise NotForTask for a row that has nothing in the task's columns."""
    if not any(column in row for group in COLUMNS[task] for column in group):
        raise NotForTask(f"without {COLUMNS[task][0][0]}")


def _unpacked(row: dict[str, Any]) -> dict[str, Any]:
    """Cells of a CSV that hold JSON lists, read."""
    out = dict(row)
    for key in {"answers", "bbox", "references"} & row.keys():
        try:
            out[key] = json.loads(row[key])
        except json.JSONDecodeError as error:
            raise BadRecord(f"{key} is not a JSON list: {row[key][:60]!r}") from error
        if not isinstance(out[key], list):
            raise BadRecord(f"{key} is not a JSON list: {row[key][:60]!r}")
    return out


def _vqa(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = answers_of(row.get("answers", row.get("answer")))
    return {"question": text_of(row.get("question"), "question"), "answers": answers}


def _ocr(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": text_of(row.get("text"), "text"), "box": box_of(row.get("bbox"))}


def _captions(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"references": captions_of(row.get("references", row.get("caption")))}


# The fields of a record that each task reads.
FIELDS = {"vqa": _vqa, "ocr": _ocr, "caption": _captions, "retrieval": _captions}

FORMAT = Format("own", tuple(COLUMNS), rows, images_beside=True)
load = partial(load_records, FORMAT)
