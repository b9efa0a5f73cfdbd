"""`Example`, the one record type that every data set yields and every task reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from PIL import Image

_PICTURES_HELD = 256  # the latest; thousands of photographs would fill the memory


class ImageSource(Protocol):
    """Anything that can make the image of an example when it is asked for."""

    def load(self) -> Image.Image:
        """Return the picture as a PIL image in mode RGB; raise naming the file if it can't."""
        ...


@dataclass(frozen=True, eq=False)
class Example:
    """One record of one task. Fields that its task does not read stay empty.

    Attributes:
        id: Unique within a data set and task; errors name it.
        image_source: Makes `image` when it is first asked for.
        question: VQA: the question.
        answers: VQA: accepted answers (one, or the ten of the official sets).
        text: OCR: what the blue box holds.
        references: Caption: reference sentences.
        candidates: Retrieval: captions to rank, the positive among them.
        positive: Retrieval: index of the true caption in `candidates`.
        kind: A label to break results down by (in the shapes world the kind of question).
        facts: What a data set knows beyond that (in the shapes world the scene).
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


@lru_cache(maxsize=_PICTURES_HELD)
def _image_of(example: Example) -> Image.Image:
    return example.image_source.load()
