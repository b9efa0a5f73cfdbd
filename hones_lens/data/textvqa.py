"""`textvqa`: TextVQA's official JSON (`TextVQA_0.5.1_val.json`), ten answers a question.

{"data": [{"question_id": 34602, "image_id": "003a8ae2ef43b901", "question": "...",
  "answers": ["...", ...], "image_width": 1024, "image_height": 664, ...}]}
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.files import load_records
from hones_lens.data.reading import list_under, read_json
from hones_lens.data.records import (
    Format,
    Record,
    Row,
    answers_of,
    identifier,
    label,
    mapping,
    size_of,
    text_of,
)


def rows(file: Path, task: str) -> list[Row]:
    """One row a question."""
    records = list_under(read_json(file), "data", file)
    if not records:
        raise ValueError(f"{file} has no records")
    return [Row(label(raw, i, "question_id"), partial(_parse, raw)) for i, raw in enumerate(records)]


def _parse(raw: Any) -> Record:
    record = mapping(raw, "the record")
    image = identifier(record, "image_id")
    return Record(
        id=identifier(record, "question_id"),
        image_key=image,
        files=(f"{image}.jpg",),
        size=size_of(record, "image_width", "image_height"),
        question=text_of(record.get("question"), "question"),
        answers=answers_of(record.get("answers")),
    )


FORMAT = Format("textvqa", ("vqa",), rows)
load = partial(load_records, FORMAT)
