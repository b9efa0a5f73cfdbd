"""`pope`: POPE's yes-or-no questions about objects (`coco_pope_random.json` and the like), JSON lines.

    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?",
     "label": "yes"}

The answer is `yes` or `no`, and results can be broken down by it. The task `yes-no` scores answers as POPE's
own evaluation does, and gives its five measures; `vqa` takes `yes` and `no` alone. A JSON list of such
objects is read too. Splits are drawn over COCO's image ids, so they agree with `coco` and `vqav2`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.coco_paths import coco_image_id, coco_image_paths
from hones_lens.data.files import load_records
from hones_lens.data.recognize import read_questions
from hones_lens.data.records import BadRecord, Format, Record, Row, parse_id, parse_object, parse_text

LABELS = ("yes", "no")


def rows(file: Path, task: str) -> list[Row]:
    """One row per question."""
    questions = read_questions(
        file, "POPE's", "pope", "question_id", under="", question="text", answer="label"
    )
    return [Row(name, partial(_parse, raw)) for name, raw in questions]


def _parse(raw: Any) -> Record:
    record = parse_object(raw, "the question")
    image = parse_text(record.get("image"), "image")
    answer = parse_text(record.get("label"), "label").lower()
    if answer not in LABELS:
        raise BadRecord(f"label is {answer!r}, neither 'yes' nor 'no'")
    return Record(
        id=parse_id(record, "question_id"),
        image_key=coco_image_id(image) or image,
        files=coco_image_paths(image),
        question=parse_text(record.get("text"), "text"),
        answers=(answer,),
        kind=answer,
    )


FORMAT = Format("pope", ("yes-no", "vqa"), rows)
load = partial(load_records, FORMAT)
