"""`textvqa`: TextVQA's official JSON (`TextVQA_0.5.1_val.json`), ten answers per question.

{"data": [{"question_id": 34602, "image_id": "003a8ae2ef43b901", "question": "...",
  "answers": ["...", ...], "image_width": 1024, "image_height": 664, ...}]}
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.files import load_records
from hones_lens.data.recognize import read_questions
from hones_lens.data.records import (
    Format,
    Record,
    Row,
    parse_answers,
    parse_id,
    parse_object,
    parse_size,
    parse_text,
)


def rows(file: Path, task: str) -> list[Row]:
    """One row per question."""
    questions = read_questions(file, "TextVQA's", "textvqa", "question_id")
    return [Row(name, partial(_parse, raw)) for name, raw in questions]


def _parse(raw: Any) -> Record:
    record = parse_object(raw, "the record")
    image = parse_id(record, "image_id")
    return Record(
        id=parse_id(record, "question_id"),
        image_key=image,
        files=(f"{image}.jpg",),
        size=parse_size(record, "image_width", "image_height"),
        question=parse_text(record.get("question"), "question"),
        answers=parse_answers(record.get("answers")),
    )


FORMAT = Format("textvqa", ("vqa",), rows)
load = partial(load_records, FORMAT)
