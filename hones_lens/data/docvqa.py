"""`docvqa`: DocVQA's official JSON (`val_v1.0.json`, `val_v1.0_withQT.json`), several answers per question.

    {"dataset_name": "docvqa", "dataset_split": "val", "data": [{"questionId": 49153, "question": "...",
      "image": "documents/pybv0228_81.png", "docId": 14465, "ucsf_document_id": "pybv0228",
      "ucsf_document_page_no": "81", "answers": ["0.28"], "question_types": ["figure/diagram"]}]}

Pictures (one page each) lie in the folder `documents` of the image folder, or in the image folder itself.
`test_v1.0.json` has no answers. Answers are scored by ANLS, the data set's official metric.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePosixPath
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
    parse_text,
)


def rows(file: Path, task: str) -> list[Row]:
    """One row per question."""
    questions = read_questions(file, "DocVQA's", "docvqa", "questionId")
    return [Row(name, partial(_parse, raw)) for name, raw in questions]


def _parse(raw: Any) -> Record:
    record = parse_object(raw, "the record")
    image = parse_text(record.get("image"), "image")
    types = record.get("question_types")
    return Record(
        id=parse_id(record, "questionId"),
        image_key=image,
        files=tuple(dict.fromkeys((image, PurePosixPath(image).name))),
        question=parse_text(record.get("question"), "question"),
        answers=parse_answers(record.get("answers")),
        kind=str(types[0]) if isinstance(types, list) and types else "",
    )


FORMAT = Format("docvqa", ("vqa-anls",), rows)
load = partial(load_records, FORMAT)
