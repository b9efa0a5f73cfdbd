"""`vqav2`: the official files of VQA v2 (and v1), one of questions and one of annotations.

Name either file, or the folder that holds the two: beside `v2_mscoco_val2014_annotations.json` lies
`v2_OpenEnded_mscoco_val2014_questions.json`. A folder with more pairs than one can't be named.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.coco_names import coco_places
from hones_lens.data.files import load_records
from hones_lens.data.reading import list_under, read_json
from hones_lens.data.records import (
    BadRecord,
    Format,
    Record,
    Row,
    answers_of,
    identifier,
    label,
    mapping,
    text_of,
)

_QUESTIONS, _ANNOTATIONS = "questions.json", "annotations.json"


def rows(file: Path, task: str) -> list[Row]:
    """One row a question, and one an annotation that is a question's second or has none: errors name it."""
    questions_file, annotations_file = files_of(file)
    top = read_json(annotations_file)
    questions = list_under(read_json(questions_file), "questions", questions_file)
    annotations = list_under(top, "annotations", annotations_file)
    subset = str(top.get("data_subtype", ""))
    by_id = {raw["question_id"]: raw for raw in annotations if _has_id(raw)}
    asked = {raw["question_id"] for raw in questions if _has_id(raw)}
    seen: set[Any] = set()
    out = [
        Row(label(q, i, "question_id"), partial(_parse, q, by_id, subset)) for i, q in enumerate(questions)
    ]
    for i, raw in enumerate(annotations):
        name = f"annotation {label(raw, i, 'question_id')}"
        if not _has_id(raw) or raw["question_id"] not in asked:
            out.append(Row(name, partial(_refuse, "belongs to no question")))
        elif raw["question_id"] in seen:
            out.append(Row(name, partial(_refuse, "is the second one of its question")))
        else:
            seen.add(raw["question_id"])
    return out


def files_of(file: Path) -> tuple[Path, Path]:
    """The files of questions and of annotations.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: The other file can't be told.
    """
    if file.is_dir():
        questions, annotations = (sorted(file.glob(f"*{end}")) for end in (_QUESTIONS, _ANNOTATIONS))
        if len(questions) == len(annotations) == 1:
            return questions[0], annotations[0]
        raise ValueError(
            f"{file} holds {len(questions)} files *{_QUESTIONS} and {len(annotations)} *{_ANNOTATIONS}: "
            "name one of the files"
        )
    if not file.exists():
        raise FileNotFoundError(f"no such file: {file}")
    if file.name.endswith(_ANNOTATIONS):
        other = file.name.replace(_ANNOTATIONS, _QUESTIONS)
        return _existing(file, other.replace("mscoco", "OpenEnded_mscoco"), other), file
    if file.name.endswith(_QUESTIONS):
        other = file.name.replace(_QUESTIONS, _ANNOTATIONS)
        return file, _existing(file, other.replace("OpenEnded_", ""), other)
    raise ValueError(f"{file}: its name must end in {_QUESTIONS} or {_ANNOTATIONS}, as the official ones do")


def _existing(file: Path, *names: str) -> Path:
    for name in names:
        if file.with_name(name).exists():
            return file.with_name(name)
    raise FileNotFoundError(
        f"{file} needs the other file of its pair beside it: {' or '.join(dict.fromkeys(names))}"
    )


def _has_id(raw: Any) -> bool:
    return isinstance(raw, dict) and isinstance(raw.get("question_id"), int | str)


def _refuse(why: str) -> Record:
    raise BadRecord(why)


def _parse(raw: Any, annotations: dict[Any, Any], subset: str) -> Record:
    question = mapping(raw, "the question")
    number = identifier(question, "question_id")
    image = identifier(question, "image_id")
    if question["question_id"] not in annotations:
        raise BadRecord("has no annotation, so no answer")
    annotation = annotations[question["question_id"]]
    if str(annotation.get("image_id", image)) != image:
        raise BadRecord(f"is of image {image}, but its annotation of image {annotation['image_id']}")
    return Record(
        id=number,
        image_key=image,
        files=coco_places(_file_name(image, subset)),
        question=text_of(question.get("question"), "question"),
        answers=_answers(annotation),
        kind=str(annotation.get("answer_type") or ""),
    )


def _answers(annotation: dict[str, Any]) -> tuple[str, ...]:
    """The ten answers; the most frequent one alone where they are missing."""
    if annotation.get("answers") is None:
        return answers_of(annotation.get("multiple_choice_answer"))
    if not isinstance(annotation["answers"], list):
        raise BadRecord("answers are not a list")
    return answers_of([mapping(a, "an answer").get("answer") for a in annotation["answers"]])


def _file_name(image: str, subset: str) -> str:
    """COCO's name of an image, or that of 2017 where the subset is not told."""
    if not image.isdigit():
        raise BadRecord(f"image_id {image!r} is not a number of COCO")
    return f"COCO_{subset}_{int(image):012d}.jpg" if subset else f"{int(image):012d}.jpg"


FORMAT = Format("vqav2", ("vqa",), rows)
load = partial(load_records, FORMAT)
