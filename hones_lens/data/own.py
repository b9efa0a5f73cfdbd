"""`own`: your own data, a CSV or JSONL file, or a folder with one of them and the pictures.

Columns (keys in JSONL); each task needs those listed for it:

    image (or file_name)     every task: the picture, relative to the image folder or to the file
    question; answer         vqa; or `answers`, a JSON list of several accepted ones
    text; bbox               ocr; bbox is a JSON list [x, y, width, height] in pixels
    caption                  caption and retrieval; or `references`, a JSON list of several
    id                       optional: names the record (default: `line 7`)
    image_id                 optional: one id for all copies of a picture (default: the column image)
    kind                     optional: a label to break results down by

A row that is empty in all of a task's columns is not meant for that task. Other columns are not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from hones_lens.data.files import load_records
from hones_lens.data.reading import read_csv, read_jsonl
from hones_lens.data.recognize import read_file_of, refuse_others
from hones_lens.data.records import (
    BadRecord,
    Format,
    NotForTask,
    Record,
    Row,
    parse_answers,
    parse_box,
    parse_captions,
    parse_id,
    parse_object,
    parse_text,
)

SUFFIXES = (".csv", ".jsonl")
# By task: it reads one column of each group.
COLUMNS = {
    "vqa": (("question",), ("answer", "answers")),
    "ocr": (("text",), ("bbox",)),
    "caption": (("caption", "references"),),
    "retrieval": (("caption", "references"),),
}


def find_data_file(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """The only file with one of these suffixes in a folder.

    Raises:
        ValueError: No such file, or several.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{folder} must hold exactly one file {' or '.join(suffixes)}, but holds {names}")
    return files[0]


def rows(file: Path, task: str) -> list[Row]:
    """One row per line; raises ValueError if the file lacks the columns of the task."""
    file = find_data_file(file) if file.is_dir() else file
    if file.suffix.lower() not in SUFFIXES:
        if file.suffix.lower() == ".json":
            read_file_of(file, f"one of your own ({' or '.join(SUFFIXES)})")
        raise ValueError(f"{file} is neither {' nor '.join(SUFFIXES)}")
    is_csv = file.suffix.lower() == ".csv"
    lines = read_csv(file) if is_csv else read_jsonl(file)
    columns = {key for _, raw in lines if isinstance(raw, dict) for key in raw}
    if {"raw", "filename", "sentids"} <= columns:
        raise ValueError(f"{file} is Flickr30k's file of captions: use the data set 'flickr30k' for it")
    if not is_csv and not has_columns(columns, task):
        refuse_others([raw for _, raw in lines], file, "one of your own")
    require_columns(columns, task, str(file))
    return [Row(_label(raw, n), partial(_parse, raw, f"line {n}", task, is_csv)) for n, raw in lines]


def has_columns(columns: set[str], task: str) -> bool:
    """Whether every column that the task needs is there."""
    return not any(columns.isdisjoint(group) for group in COLUMNS[task])


def require_columns(columns: set[str], task: str, source: str) -> None:
    """Raise ValueError if a column that the task needs is missing from every row."""
    for group in COLUMNS[task]:
        if columns.isdisjoint(group):
            raise ValueError(
                f"{source} has no column {' or '.join(group)}, which {task} needs; "
                f"it has: {', '.join(sorted(columns))}"
            )


def _label(raw: Any, line: int) -> str:
    name = raw.get("id") if isinstance(raw, dict) else None
    return f"{name} (line {line})" if name not in (None, "") else f"line {line}"


def _parse(raw: Any, line: str, task: str, is_csv: bool) -> Record:
    row = _drop_empty_cells(parse_object(raw, "the row"))
    require_task_fields(row, task)
    key = "image" if "image" in row else "file_name"
    image = PurePath(parse_text(row.get(key), "image")).as_posix()
    return Record(
        id=parse_id(row, "id") if "id" in row else line,
        image_key=parse_id(row, "image_id") if "image_id" in row else image,
        files=(image,),
        kind=str(row.get("kind", "")),
        **FIELDS[task](_parse_json_cells(row) if is_csv else row),
    )


def _drop_empty_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without its empty cells."""
    return {k: v for k, v in row.items() if v is not None and not (isinstance(v, str) and not v.strip())}


def require_task_fields(row: Mapping[str, Any], task: str) -> None:
    """Raise NotForTask for a row that has nothing in the task's columns."""
    if not any(column in row for group in COLUMNS[task] for column in group):
        raise NotForTask(f"without {COLUMNS[task][0][0]}")


def _parse_json_cells(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the JSON lists in its CSV cells parsed."""
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
    answers = parse_answers(row.get("answers", row.get("answer")))
    return {"question": parse_text(row.get("question"), "question"), "answers": answers}


def _ocr(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": parse_text(row.get("text"), "text"), "box": parse_box(row.get("bbox"))}


def _captions(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"references": parse_captions(row.get("references", row.get("caption")))}


# By task: the record fields that it reads, from a row.
FIELDS = {"vqa": _vqa, "ocr": _ocr, "caption": _captions, "retrieval": _captions}

FORMAT = Format("own", tuple(COLUMNS), rows, images_beside=True)
load = partial(load_records, FORMAT)
