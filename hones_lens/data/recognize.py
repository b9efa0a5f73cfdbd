"""Tells the JSON files of known data sets apart; a reader refuses the file of another one by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hones_lens.data.reading import describe_top_level, parse_list, read_json_or_jsonl
from hones_lens.data.records import label

_ANSWERS, _LABEL = ("answers",), ("label",)
_SAMPLED = 5  # records looked at; one faulty record does not hide the format


class KnownFile(NamedTuple):
    """A kind of file and how its records look.

    Attributes:
        dataset: The data set that reads such files; empty if none does.
        description: What the file is, for error messages.
        under: Key of the list of records at the top level; empty if the top level is the list (or the
            object whose values are the records).
        keys: Keys that a record has.
        absent: A key that the top level does not have.
        answers: Keys under which a record may hold its answer; the publishers' test sets have none of them.
        where: What the top level must be like beyond that.
    """

    dataset: str
    description: str
    under: str
    keys: frozenset[str]
    absent: str = ""
    answers: tuple[str, ...] = ()
    where: Callable[[Any], bool] | None = None


def _known(
    dataset: str,
    description: str,
    under: str,
    keys: str,
    absent: str = "",
    *,
    answers: tuple[str, ...] = (),
    where: Callable[[Any], bool] | None = None,
) -> KnownFile:
    return KnownFile(dataset, description, under, frozenset(keys.split()), absent, answers, where)


def _is_test(top: dict[str, Any]) -> bool:
    """Whether a file of VQA v2 is of test2015 or test-dev2015."""
    return str(top.get("data_subtype", "")).startswith("test")


def _of_vizwiz(top: Any) -> bool:
    return any(str(raw.get("image")).startswith("VizWiz_") for raw in _sample(_records(top, "")))


# The first that matches counts.
KNOWN_FILES = (
    _known("cocotext", "COCO-Text's file", "anns", "image_id utf8_string"),
    _known("cocotext", "COCO-Text's file", "anns", "image_id legibility"),
    _known("vqav2", "VQA v2's test questions", "questions", "question", answers=_ANSWERS, where=_is_test),
    _known("vqav2", "VQA v2's file of questions", "questions", "question_id image_id question"),
    _known("vqav2", "VQA v2's file of annotations", "annotations", "question_id answers"),
    _known("coco", "a file of COCO captions", "annotations", "image_id caption"),
    _known("", "COCO's file of objects, without captions", "annotations", "category_id"),
    _known("coco", "Karpathy's file of COCO captions", "images", "sentences cocoid", "annotations"),
    _known("flickr30k", "Karpathy's file of Flickr captions", "images", "sentences", "annotations"),
    _known("", "COCO's list of images, without captions", "images", "file_name", "annotations"),
    _known("hones", "HONES's unified JSON", "data", "image_id image_info"),
    _known("hones", "HONES's unified JSON", "", "image_id image_info"),
    _known("", "TextCaps's file of captions", "data", "image_id caption_str"),
    _known("docvqa", "DocVQA's file of questions", "data", "questionId question image", answers=_ANSWERS),
    _known("", "InfographicVQA's file of questions", "data", "questionId question image_local_name"),
    _known("", "ST-VQA's file of questions", "data", "question file_path file_name"),
    _known("textvqa", "TextVQA's file of questions", "data", "image_id question", answers=_ANSWERS),
    _known("pope", "POPE's file of questions", "", "image text label"),
    _known("pope", "LLaVA's form of questions", "", "question_id image text", answers=_LABEL),
    _known("vizwiz", "VizWiz's file of questions", "", "image question answerable", answers=_ANSWERS),
    _known("vizwiz", "VizWiz's file of questions", "", "image question", answers=_ANSWERS, where=_of_vizwiz),
    _known("gqa", "GQA's file of questions", "", "imageId question", answers=("answer",)),
    _known("", "GQA's file of scene graphs, without questions", "", "objects width height"),
    _known("", "A-OKVQA's file of questions", "", "question direct_answers"),
    _known("", "A-OKVQA's file of questions", "", "question difficult_direct_answer"),
    _known("", "Visual Genome's file of questions", "", "id qas"),
    _known("", "ChartQA's file of questions", "", "imgname query"),
    _known("", "OCR-VQA's file of questions", "", "imageURL questions"),
    _known("", "ScienceQA's file of questions", "", "question choices lecture"),
    _known("", "a file of conversations, as LLaVA is trained on", "", "conversations"),
)  # fmt: skip


def recognize(top: Any) -> KnownFile | None:
    """The kind of file that a top level is of, or None."""
    return next((known for known in KNOWN_FILES if _matches(top, known)), None)


def read_file_of(file: Path, expected: str, *datasets: str) -> Any:
    """The top level of a JSON file (of JSON lines: the list of them).

    Args:
        file: The file.
        expected: What the reader expects, for the message.
        datasets: The data sets whose files the reader takes.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not JSON, or known to be another data set's file; the message names that data set, or
            says that the file has no answers.
    """
    top = read_json_or_jsonl(file)
    refuse_others(top, file, expected, *datasets)
    return top


def refuse_others(top: Any, file: Path, expected: str, *datasets: str) -> None:
    """Raise ValueError if a top level is known to be another data set's (see `read_file_of`)."""
    known = recognize(top)
    if known is None or known.dataset in datasets:
        return
    reason = f"use the data set {known.dataset!r} for it" if known.dataset else "no data set reads such files"
    lacking = _lacks_answers(_records(top, known.under), known.answers)
    if lacking:
        reason = f"it {lacking}"
    raise ValueError(f"{file} is {known.description}, not {expected}: {reason}")


def read_questions(
    file: Path,
    whose: str,
    dataset: str,
    id_key: str,
    *,
    under: str = "data",
    question: str = "question",
    answer: str = "answers",
) -> list[tuple[str, Any]]:
    """The records of a file of questions, each with its name in error messages.

    Args:
        file: The file.
        whose: Whose file the reader expects, for messages, e.g. `DocVQA's`.
        dataset: The data set that the reader serves.
        id_key: Key of a record's id.
        under: Key of the list of records at the top level; empty if the top level is the list.
        question, answer: Keys of a record's question and answer.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is another data set's, holds no list of questions, or no answers.
    """
    top = read_file_of(file, whose, dataset)
    if not under and not isinstance(top, list):
        raise ValueError(f"{file} is not {whose}: no list of questions, but {describe_top_level(top)}")
    records = parse_list(top, under, file) if under else top
    if not records:
        raise ValueError(f"{file} has no records")
    if not any(isinstance(raw, dict) and question in raw for raw in records):
        what = describe_top_level(records)
        raise ValueError(f"{file} is not {whose}: no objects with {question!r}, but {what}")
    require_answers(records, file, answer)
    return [(label(raw, i, id_key), raw) for i, raw in enumerate(records)]


def _matches(top: Any, known: KnownFile) -> bool:
    if known.under and (not isinstance(top, dict) or (known.absent and known.absent in top)):
        return False
    if not any(known.keys <= raw.keys() for raw in _sample(_records(top, known.under))):
        return False
    return known.where is None or known.where(top)


def _records(top: Any, under: str) -> Sequence[Any]:
    """The records of a top level: those under a key of it, or itself; of an object its values."""
    found = top.get(under) if under else top
    if isinstance(found, dict):
        return list(found.values())
    return found if isinstance(found, list) else []


def _sample(records: Sequence[Any]) -> Iterator[dict[str, Any]]:
    return (raw for raw in islice(records, _SAMPLED) if isinstance(raw, dict))


def require_answers(records: Iterable[Any], file: Path, *keys: str) -> None:
    """Raise ValueError if no record has an answer, as in the published files of test sets.

    Args:
        records, file: The questions of the file, and its name.
        keys: Keys under which a record may hold its answer.
    """
    lacking = _lacks_answers(records, keys)
    if lacking:
        raise ValueError(f"{file} {lacking}")


def _lacks_answers(records: Iterable[Any], keys: Sequence[str]) -> str:
    """What to say of questions without any answer; empty if there is one, or no keys are given."""
    questions = [raw for raw in records if isinstance(raw, dict)]
    if not keys or not questions or any(raw.get(key) is not None for raw in questions for key in keys):
        return ""
    return (
        f"holds {len(questions):,} questions and no answers ({' or '.join(keys)}), as "
        "the files of test sets do: there is nothing to score against; use the validation or training set"
    )
