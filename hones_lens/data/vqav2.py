"""`vqav2`: the official files of VQA v2 (and v1), one of questions and one of annotations.

Name either file, or the folder that holds the two: beside `v2_mscoco_val2014_annotations.json` lies
`v2_OpenEnded_mscoco_val2014_questions.json`. A folder with more pairs than one can't be named.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.coco_paths import coco_image_paths
from hones_lens.data.files import load_records
from hones_lens.data.reading import parse_list
from hones_lens.data.recognize import read_file_of
from hones_lens.data.records import (
    BadRecord,
    Format,
    Record,
    Row,
    label,
    parse_answers,
    parse_id,
    parse_object,
    parse_text,
)

_QUESTIONS, _ANNOTATIONS = "questions.json", "annotations.json"


def rows(file: Path, task: str) -> list[Row]:
    """One row per question, and one per duplicate or unmatched annotation, so that its error can name it."""
    questions_file, annotations_file = find_file_pair(file)
    top = _read(annotations_file)
    questions = parse_list(_read(questions_file), "questions", questions_file)
    annotations = parse_list(top, "annotations", annotations_file)
    subset = str(top.get("data_subtype", ""))
    by_id = {raw["question_id"]: raw for raw in annotations if _has_id(raw)}
    question_ids = {raw["question_id"] for raw in questions if _has_id(raw)}
    annotated_ids: set[Any] = set()
    out = [
        Row(label(q, i, "question_id"), partial(_parse, q, by_id, subset)) for i, q in enumerate(questions)
    ]
    for i, raw in enumerate(annotations):
        name = f"annotation {label(raw, i, 'question_id')}"
        if not _has_id(raw) or raw["question_id"] not in question_ids:
            out.append(Row(name, partial(_raise_bad_record, "belongs to no question")))
        elif raw["question_id"] in annotated_ids:
            out.append(Row(name, partial(_raise_bad_record, "is the second one of its question")))
        else:
            annotated_ids.add(raw["question_id"])
    return out


def find_file_pair(file: Path) -> tuple[Path, Path]:
    """The question file and the annotation file.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: The pair is ambiguous, the file is another data set's, or holds a test set's questions
            (which have no answers), or its name is not an official one.
    """
    if file.is_dir():
        questions, annotations = (sorted(file.glob(f"*{suffix}")) for suffix in (_QUESTIONS, _ANNOTATIONS))
        if len(questions) == len(annotations) == 1:
            return questions[0], annotations[0]
        if len(questions) == 1 and not annotations:
            _refuse_test_questions(questions[0])
        raise ValueError(
            f"{file} holds {len(questions)} files *{_QUESTIONS} and {len(annotations)} *{_ANNOTATIONS}: "
            "name one of the files"
        )
    if not file.exists():
        raise FileNotFoundError(f"no such file: {file}")
    if file.name.endswith(_ANNOTATIONS):
        other = file.name.replace(_ANNOTATIONS, _QUESTIONS)
        return _first_existing(file, other.replace("mscoco", "OpenEnded_mscoco"), other), file
    if file.name.endswith(_QUESTIONS):
        other = file.name.replace(_QUESTIONS, _ANNOTATIONS)
        return file, _first_existing(file, other.replace("OpenEnded_", ""), other)
    _read(file)
    raise ValueError(f"{file}: its name must end in {_QUESTIONS} or {_ANNOTATIONS}, as the official ones do")


def _first_existing(file: Path, *names: str) -> Path:
    for name in names:
        if file.with_name(name).exists():
            return file.with_name(name)
    _refuse_test_questions(file)
    raise FileNotFoundError(
        f"{file} needs the other file of its pair beside it: {' or '.join(dict.fromkeys(names))}"
    )


def _read(file: Path) -> Any:
    """The top level of a file; raises ValueError if it is another data set's."""
    return read_file_of(file, "VQA v2's questions or annotations", "vqav2")


def _refuse_test_questions(file: Path) -> None:
    """Raise ValueError for the questions of a test set (`data_subtype` test2015 or test-dev2015)."""
    top = _read(file)
    if isinstance(top, dict) and str(top.get("data_subtype", "")).startswith("test"):
        raise ValueError(
            f"{file} holds a test set's questions and no answers, which are not public: use the "
            "validation or training set"
        )


def _has_id(raw: Any) -> bool:
    return isinstance(raw, dict) and isinstance(raw.get("question_id"), int | str)


def _raise_bad_record(reason: str) -> Record:
    raise BadRecord(reason)


def _parse(raw: Any, annotations: dict[Any, Any], subset: str) -> Record:
    question = parse_object(raw, "the question")
    question_id = parse_id(question, "question_id")
    image_id = parse_id(question, "image_id")
    if question["question_id"] not in annotations:
        raise BadRecord("has no annotation, so no answer")
    annotation = annotations[question["question_id"]]
    if str(annotation.get("image_id", image_id)) != image_id:
        raise BadRecord(f"is of image {image_id}, but its annotation of image {annotation['image_id']}")
    return Record(
        id=question_id,
        image_key=image_id,
        files=coco_image_paths(_file_name(image_id, subset)),
        question=parse_text(question.get("question"), "question"),
        answers=_answers(annotation),
        kind=str(annotation.get("answer_type") or ""),
    )


def _answers(annotation: dict[str, Any]) -> tuple[str, ...]:
    """The ten answers; if they are missing, the most frequent one."""
    if annotation.get("answers") is None:
        return parse_answers(annotation.get("multiple_choice_answer"))
    if not isinstance(annotation["answers"], list):
        raise BadRecord("answers are not a list")
    return parse_answers([parse_object(a, "an answer").get("answer") for a in annotation["answers"]])


def _file_name(image_id: str, subset: str) -> str:
    """COCO's file name of an image: that of 2014 if the subset is known, else that of 2017."""
    if not image_id.isdigit():
        raise BadRecord(f"image_id {image_id!r} is not a number of COCO")
    return f"COCO_{subset}_{int(image_id):012d}.jpg" if subset else f"{int(image_id):012d}.jpg"


FORMAT = Format("vqav2", ("vqa",), rows)
load = partial(load_records, FORMAT)
