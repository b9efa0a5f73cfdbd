"""Tells the JSON files of known data sets apart; a reader refuses the file of another one by its name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hones_lens.data.reading import read_json_or_jsonl

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
    """

    dataset: str
    description: str
    under: str
    keys: frozenset[str]
    absent: str = ""


def _known(dataset: str, description: str, under: str, keys: str, absent: str = "") -> KnownFile:
    return KnownFile(dataset, description, under, frozenset(keys.split()), absent)


# The first that matches counts.
KNOWN_FILES = (
    _known("cocotext", "COCO-Text's file", "anns", "image_id utf8_string"),
    _known("cocotext", "COCO-Text's file", "anns", "image_id legibility"),
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
    _known("docvqa", "DocVQA's file of questions", "data", "questionId question image"),
    _known("textvqa", "TextVQA's file of questions", "data", "image_id question"),
    _known("pope", "POPE's file of questions", "", "image text label"),
    _known("vizwiz", "VizWiz's file of questions", "", "image question answerable"),
    _known("gqa", "GQA's file of questions", "", "imageId question"),
    _known("", "GQA's file of scene graphs, without questions", "", "objects width height"),
    _known("", "A-OKVQA's file of questions", "", "question direct_answers"),
    _known("", "A-OKVQA's file of questions", "", "question difficult_direct_answer"),
    _known("", "Visual Genome's file of questions", "", "id qas"),
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
        ValueError: Not JSON, or known to be another data set's file; the message names that data set.
    """
    top = read_json_or_jsonl(file)
    known = recognize(top)
    if known is None or known.dataset in datasets:
        return top
    reader = f"use the data set {known.dataset!r} for it" if known.dataset else "no data set reads such files"
    raise ValueError(f"{file} is {known.description}, not {expected}: {reader}")


def _matches(top: Any, known: KnownFile) -> bool:
    if known.under:
        if not isinstance(top, dict) or (known.absent and known.absent in top):
            return False
        top = top.get(known.under)
    return any(known.keys <= raw.keys() for raw in _sample(top))


def _sample(records: Any) -> Iterator[dict[str, Any]]:
    values: Iterable[Any] = ()
    if isinstance(records, dict):
        values = records.values()
    elif isinstance(records, list):
        values = records
    return (raw for raw in islice(values, _SAMPLED) if isinstance(raw, dict))


def require_answers(records: Iterable[Any], file: Path, *keys: str) -> None:
    """Raise ValueError if no record has an answer, as in the published files of test sets.

    Args:
        records, file: The questions of the file, and its name.
        keys: Keys under which a record may hold its answer.
    """
    questions = [raw for raw in records if isinstance(raw, dict)]
    if questions and not any(raw.get(key) is not None for raw in questions for key in keys):
        raise ValueError(
            f"{file} holds {len(questions):,} questions and no answers ({' or '.join(keys)}), as "
            "the files of test sets do: there is nothing to score against; use the validation or training set"
        )
