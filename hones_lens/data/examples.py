"""`Example`, the one record type that every data set yields and every task reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from PIL import Image

from hones_lens.model import open_image

_CACHED_IMAGES = 256  # most recently used; thousands of photographs would not fit in memory


class ImageSource(Protocol):
    """Loads the image of an example on first access."""

    def load(self) -> Image.Image:
        """Return the picture as a PIL image in mode RGB; errors name the file."""
        ...


@dataclass(frozen=True, eq=False)
class Example:
    """One record of one task. Fields that its task does not read stay empty.

    Attributes:
        id: Unique within a data set and task; error messages name it.
        image_source: Loads `image` on first access.
        question: VQA: the question.
        answers: VQA: accepted answers (one, or the ten of the official sets).
        text: OCR: the text inside the blue box.
        references: Caption: reference sentences.
        candidates: Retrieval: captions to rank, the positive among them.
        positive: Retrieval: index of the true caption in `candidates`.
        kind: A label to break results down by (in the shapes world the kind of question).
        facts: Further metadata of the data set (in the shapes world the scene).
    """

    id: str
    image_source: ImageSource
    question: str = ""
    answers: tuple[str, ...] = ()
    text: str = ""
    references: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    positive: int = -1
    kind: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def image(self) -> Image.Image:
        """The picture (PIL, RGB), with the blue box drawn where the task needs one."""
        return _image_of(self)


@lru_cache(maxsize=_CACHED_IMAGES)
def _image_of(example: Example) -> Image.Image:
    return open_image(example.image_source.load(), f"the image of example {example.id}")


def check_on_error(on_error: str) -> None:
    """Check what is to be done with records that can't be used.

    Raises:
        ValueError: Another word than `raise` or `skip`.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
