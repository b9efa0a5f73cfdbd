"""`Record`, the common form of all file formats, and the parsers that check its fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MAX_CHARACTERS = 4000  # of a question, answer, caption or text
Box = tuple[float, float, float, float]


class BadRecord(ValueError):
    """A record that can't be used. The message gives the reason and follows the record's name."""


class BadBox(BadRecord):
    """A box that can't be drawn: not four finite numbers, of no area, or wholly outside its image."""


class NotForTask(Exception):
    """A record that is not meant for the task, such as an image without a question. This is no error."""


@dataclass(frozen=True)
class Record:
    """One annotation of one image, checked. Fields that its task does not read stay empty.

    Attributes:
        id: The data set's own id of the annotation, unique within a task.
        image_key: The data set's own id of the image. Splits are drawn over it.
        files: Possible paths of the picture, relative to the image folder; the first that exists is used.
        size: Annotated width and height in pixels; None if not annotated.
        box: OCR: x, y, width and height in pixels of the upright picture.
        content: Returns the bytes of the picture if it is not in a file of its own.
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
    """A raw record of a file.

    Attributes:
        label: Name of the record in error messages.
        parse: Checks and converts the record; raises BadRecord or NotForTask.
    """

    label: str
    parse: Callable[[], Record]


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        name: Name of the data set in `DATASETS`; ids of examples begin with it.
        tasks: The tasks that such files have records for.
        rows: Returns the rows of a file (or of a folder, if a data set has several files) for a task.
            Raises ValueError, naming the file, if it is not of this format.
        images_beside: Whether pictures must exist beside the file if no image folder is given. If False,
            the annotations can be read without the pictures.
        leaves_out_bad_boxes: Whether a record with a bad box is left out with a warning that names it,
            whatever `on_error`: the official file holds some, and nobody else can mend it.
    """

    name: str
    tasks: tuple[str, ...]
    rows: Callable[[Path, str], Sequence[Row]]
    images_beside: bool = False
    leaves_out_bad_boxes: bool = False


def parse_object(value: Any, field: str) -> Mapping[str, Any]:
    """The value, which must be a JSON object; else raises BadRecord, as all parsers here do."""
    if not isinstance(value, dict):
        raise BadRecord(f"{field} is {_describe(value)}, not an object")
    return value


def label(raw: Any, index: int, *keys: str) -> str:
    """The name of a record in error messages: its id, or its position in the file, counted from 1."""
    for key in keys:
        if isinstance(raw, dict) and _is_id(raw.get(key)):
            return str(raw[key])
    return f"number {index + 1}"


def parse_id(raw: Mapping[str, Any], *keys: str) -> str:
    """The value of the first of these keys that is present; it must be an integer or a non-empty string."""
    for key in keys:
        if raw.get(key) is not None:
            if not _is_id(raw[key]):
                raise BadRecord(f"{key} is {_describe(raw[key])}, not an id")
            return str(raw[key]).strip()
    raise BadRecord(f"has no {' or '.join(keys)}")


def _is_id(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, str) and value.strip() != ""
    )


def parse_text(value: Any, field: str) -> str:
    """The stripped text; it must be a string, not empty, and at most `MAX_CHARACTERS` long."""
    if value is None:
        raise BadRecord(f"has no {field}")
    if not isinstance(value, str):
        raise BadRecord(f"{field} is {_describe(value)}, not text")
    if not value.strip():
        raise BadRecord(f"{field} is empty")
    if len(value) > MAX_CHARACTERS:
        raise BadRecord(f"{field} has {len(value):,} characters; at most {MAX_CHARACTERS:,} make sense")
    return value.strip()


def parse_answers(value: Any) -> tuple[str, ...]:
    """The accepted answers. Some may be empty (an annotator gave none), but not all of them."""
    if value is None:
        raise BadRecord("has no answer")
    if not isinstance(value, list):
        return (parse_text(value, "answer"),)
    for answer in value:
        if not isinstance(answer, str):
            raise BadRecord(f"answer is {_describe(answer)}, not text")
        if answer.strip():
            parse_text(answer, "answer")
    if not any(answer.strip() for answer in value):
        raise BadRecord("answer is empty" if value else "has no answer")
    return tuple(answer.strip() for answer in value)


def parse_captions(value: Any) -> tuple[str, ...]:
    """Captions given as strings, or as objects with `caption` or `raw`."""
    if value is None or value == []:
        raise BadRecord("has no caption")
    if isinstance(value, str):
        return (parse_text(value, "caption"),)
    if not isinstance(value, list):
        raise BadRecord(f"captions are {_describe(value)}, not a list")
    texts = [c.get("caption", c.get("raw")) if isinstance(c, dict) else c for c in value]
    return tuple(parse_text(caption, "caption") for caption in texts)


def parse_box(value: Any) -> Box:
    """A box (x, y, width, height) of finite numbers and positive area."""
    if value is None:
        raise BadBox("has no bbox")
    if not isinstance(value, list) or len(value) != 4:
        raise BadBox(f"bbox is {_describe(value)}, not [x, y, width, height]")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise BadBox(f"bbox {value} holds {_describe(number)}, not a number")
    if not all(math.isfinite(number) for number in value):
        raise BadBox(f"bbox {value} holds a number that is not finite")
    x, y, width, height = map(float, value)
    if width <= 0 or height <= 0:
        raise BadBox(f"bbox {value} has no area")
    return x, y, width, height


def parse_size(
    raw: Mapping[str, Any], width: str = "width", height: str = "height"
) -> tuple[int, int] | None:
    """Annotated width and height in pixels, or None if both are missing."""
    values = (raw.get(width), raw.get(height))
    if values == (None, None):
        return None
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadRecord(f"size of the image is {values[0]} × {values[1]}")
    return values  # pyright: ignore[reportReturnType]


def _describe(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"
