"""`Example`, the one record type that every data set yields and every task reads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

from PIL import Image

from hones_lens.model import open_image, require_choice

CACHED_BYTES = 512 * 2**20  # of pictures in memory: a dozen photographs of a phone
_BYTES_PER_PIXEL = 4  # as Pillow holds RGB


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
        return PICTURES.picture(self)


class PictureCache:
    """The pictures used last, so many bytes of them; one that is larger than that is not kept.

    Args:
        size: Most bytes.
    """

    def __init__(self, size: int):
        self.size, self.held = size, 0
        self._pictures: OrderedDict[Example, Image.Image] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        """How many pictures are held."""
        return len(self._pictures)

    def picture(self, example: Example) -> Image.Image:
        """The picture of an example, read if it is not held."""
        with self._lock:
            if (held := self._pictures.get(example)) is not None:
                self._pictures.move_to_end(example)
                return held
        picture = open_image(example.image_source.load(), f"the image of example {example.id}")
        with self._lock:
            if example not in self._pictures and _bytes_of(picture) <= self.size:
                self._pictures[example] = picture
                self.held += _bytes_of(picture)
                while self.held > self.size:
                    self.held -= _bytes_of(self._pictures.popitem(last=False)[1])
        return picture

    def clear(self) -> None:
        """Hold none."""
        with self._lock:
            self._pictures.clear()
            self.held = 0


def _bytes_of(picture: Image.Image) -> int:
    return picture.width * picture.height * _BYTES_PER_PIXEL


PICTURES = PictureCache(CACHED_BYTES)


def check_on_error(on_error: str) -> None:
    """Check what is to be done with records that can't be used.

    Raises:
        ValueError: Another word than `raise` or `skip`.
    """
    require_choice("on_error", on_error, ("raise", "skip"))
