"""`gqa`: GQA's official question files (`testdev_balanced_questions.json`), one object keyed by question id.

    {"201307251": {"imageId": "n161313", "question": "...", "answer": "yes", "types": {...}, ...}, ...}

A list of such objects is read too, with the id under `question_id`, `questionId` or `id`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.files import load_records
from hones_lens.data.reading import describe_top_level
from hones_lens.data.recognize import read_file_of, require_answers
from hones_lens.data.records import BadRecord, Format, Record, Row, label, parse_id, parse_object, parse_text

_IDS = ("question_id", "questionId", "id")


def rows(file: Path, task: str) -> list[Row]:
    """One row per question."""
    top = read_file_of(file, "GQA's", "gqa")
    if isinstance(top, list) and top:
        require_answers(top, file, "answer")
        return [Row(label(raw, i, *_IDS), partial(_parse, raw, None)) for i, raw in enumerate(top)]
    if isinstance(top, dict) and top and all(isinstance(raw, dict) for raw in top.values()):
        require_answers(top.values(), file, "answer")
        return [Row(key, partial(_parse, raw, key)) for key, raw in top.items()]
    raise ValueError(f"{file} is not GQA's: no object or list of questions, but {describe_top_level(top)}")


def _parse(raw: Any, key: str | None) -> Record:
    question = parse_object(raw, "the question")
    image = parse_id(question, "imageId", "image_id")
    if "/" in image or "\\" in image:
        raise BadRecord(f"imageId {image!r} is no name of an image")
    types = question.get("types")
    return Record(
        id=parse_id(question, *_IDS) if key is None else key,
        image_key=image,
        files=(f"{image}.jpg",),
        question=parse_text(question.get("question"), "question"),
        answers=(parse_text(question.get("answer"), "answer"),),
        kind=str(types.get("structural") or "") if isinstance(types, dict) else "",
    )


FORMAT = Format("gqa", ("vqa",), rows)
load = partial(load_records, FORMAT)
