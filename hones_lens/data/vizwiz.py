"""`vizwiz`: VizWiz-VQA's official JSON (`train.json`, `val.json`), a list with one question per picture.

    [{"image": "VizWiz_val_00000001.jpg", "question": "...", "answers": [{"answer": "...",
      "answer_confidence": "yes"}, ... ten], "answer_type": "other", "answerable": 1}]

`unanswerable` is an answer like any other; results can be broken down by `answer_type`. Pictures lie in the
image folder, or in its folder `train` or `val`. `test.json` has no answers. The captions of VizWiz are a
file in COCO's form: use `coco` for it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.files import load_records
from hones_lens.data.recognize import read_questions
from hones_lens.data.records import (
    BadRecord,
    Format,
    Record,
    Row,
    parse_answers,
    parse_object,
    parse_text,
)


def rows(file: Path, task: str) -> list[Row]:
    """One row per question."""
    questions = read_questions(file, "VizWiz's", "vizwiz", "image", under="")
    return [Row(name, partial(_parse, raw)) for name, raw in questions]


def _parse(raw: Any) -> Record:
    record = parse_object(raw, "the record")
    image = parse_text(record.get("image"), "image")
    answers = record.get("answers")
    if answers is not None and not isinstance(answers, list):
        raise BadRecord("answers are not a list")
    return Record(
        id=image,
        image_key=image,
        files=(image, *(f"{folder}/{image}" for folder in ("train", "val") if f"_{folder}_" in image)),
        question=parse_text(record.get("question"), "question"),
        answers=parse_answers(
            None if answers is None else [parse_object(a, "an answer").get("answer") for a in answers]
        ),
        kind=str(record.get("answer_type") or ""),
    )


FORMAT = Format("vizwiz", ("vqa",), rows)
load = partial(load_records, FORMAT)
