"""`Record`, what every file format is turned into, and the checks that a record must pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MAX_CHARACTERS = 4000  # of any one text; longer ones are no question, answer or caption
Box = tuple[float, float, float, float]


class BadRecord(ValueError):
    """A record that can't be used. The message says why, to be read after the record's name."""


class NotForTask(Exception):
    """A record that was never meant for the task, such as an image without a question: no fault."""


@dataclass(frozen=True)
class Record:
    """One annotation of one image, checked. Fields that its task does not read stay empty.

    Attributes:
        id: The data set's own id of the annotation, unique within a task.
        image_key: The data set's own id of the image. Splits are drawn over it.
        files: Where the picture may lie below the image folder; the first that exists is taken.
        size: Width and height in pixels as annotated; None where the file does not say.
        box: OCR: x, y, width and height in pixels of the upright picture.
        content: The bytes of the picture, where it does not lie in a file of its own.
    """

    id: str
    image_key: str
    files: tuple[str, ...]
    size: tuple[int, int] | None = None
    question: str = ""
    answers: tuple[str, ...] = ()
    text: str = ""
    box: Box | None = None
    references: tuple[str, ...] = ()
    kind: str = ""
    content: Callable[[], bytes] | None = None


class Row(NamedTuple):
    """A record as it lies in the file: how errors name it, and the function that checks it.

    `parse` raises BadRecord, or NotForTask.
    """

    label: str
    parse: Callable[[], Record]


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        name: As in `DATASETS`; ids of examples begin with it.
        tasks: The tasks that such files serve.
        rows: The rows of a file (or of a folder, where a set has several files) for a task. Raises
            ValueError, naming the file, where it is no file of this format.
        images_beside: Whether pictures lie beside the file where no image folder is given. If not,
            the annotations can be read without the pictures.
    """

    name: str
    tasks: tuple[str, ...]
    rows: Callable[[Path, str], Sequence[Row]]
    images_beside: bool = False


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """The value, which must be a JSON object."""
    if not isinstance(value, dict):
        raise BadRecord(f"{what} is {_told(value)}, not an object")
    return value


def label(raw: Any, index: int, *keys: str) -> str:
    """How errors name a record: its id, or its place in the file, counted from 1."""
    for key in keys:
        if isinstance(raw, dict) and _is_id(raw.get(key)):
            return str(raw[key])
    return f"number {index + 1}"


def identifier(raw: Mapping[str, Any], *keys: str) -> str:
    """The first of these keys that is there, which must hold a number or a text."""
    for key in keys:
        if raw.get(key) is not None:
            if not _is_id(raw[key]):
                raise BadRecord(f"{key} is {_told(raw[key])}, not an id")
            return str(raw[key]).strip()
    raise BadRecord(f"has no {' or '.join(keys)}")


def _is_id(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, str) and value.strip() != ""
    )


def text_of(value: Any, what: str) -> str:
    """A text without white space at its ends; it must be a string, not empty and not endless."""
    if value is None:
        raise BadRecord(f"has no {what}")
    if not isinstance(value, str):
        raise BadRecord(f"{what} is {_told(value)}, not text")
    if not value.strip():
        raise BadRecord(f"{what} is empty")
    if len(value) > MAX_CHARACTERS:
        raise BadRecord(f"{what} has {len(value):,} characters; at most {MAX_CHARACTERS:,} make sense")
    return value.strip()


def answers_of(value: Any) -> tuple[str, ...]:
    """The accepted answers. One of several may be empty (somebody gave none), but not all of them."""
    if value is None:
        raise BadRecord("has no answer")
    if not isinstance(value, list):
        return (text_of(value, "answer"),)
    for answer in value:
        if not isinstance(answer, str):
            raise BadRecord(f"answer is {_told(answer)}, not text")
        if answer.strip():
            text_of(answer, "answer")
    if not any(answer.strip() for answer in value):
        raise BadRecord("answer is empty" if value else "has no answer")
    return tuple(answer.strip() for answer in value)


def captions_of(value: Any) -> tuple[str, ...]:
    """Captions given as texts, or as objects with `caption` or `raw`."""
    if value is None or value == []:
        raise BadRecord("has no caption")
    if isinstance(value, str):
        return (text_of(value, "caption"),)
    if not isinstance(value, list):
        raise BadRecord(f"captions are {_told(value)}, not a list")
    found = [c.get("caption", c.get("raw")) if isinstance(c, dict) else c for c in value]
    return tuple(text_of(caption, "caption") for caption in found)


def box_of(value: Any) -> Box:
    """A box x, y, width, height of finite numbers, with an area."""
    if value is None:
        raise BadRecord("has no bbox")
    if not isinstance(value, list) or len(value) != 4:
        raise BadRecord(f"bbox is {_told(value)}, not [x, y, width, height]")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise BadRecord(f"bbox {value} holds {_told(number)}, not a number")
    if not all(math.isfinite(number) for number in value):
        raise BadRecord(f"bbox {value} holds a number that is not finite")
    x, y, width, height = map(float, value)
    if width <= 0 or height <= 0:
        raise BadRecord(f"bbox {value} has no area")
    return x, y, width, height


def size_of(raw: Mapping[str, Any], width: str = "width", height: str = "height") -> tuple[int, int] | None:
    """Width and height as annotated, or None where neither is there."""
    values = (raw.get(width), raw.get(height))
    if values == (None, None):
        return None
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadRecord(f"size of the image is {values[0]} × {values[1]}")
    return values  # pyright: ignore[reportReturnType]


def _told(value: Any) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{shown} ({type(value).__name__})"
