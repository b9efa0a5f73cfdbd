"""Pictures in files: opened lazily, upright, in RGB, with the blue box around the text where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict

from PIL import ExifTags, Image, ImageDraw, ImageOps

from hones_lens.data.drawing import BOX_BLUE
from hones_lens.data.records import BadBox, BadRecord, Box, Record
from hones_lens.model import opened_image, read_image

MOST_MEGAPIXELS = 64  # of a picture of a data set, unless larger ones are allowed
_TURNS = range(2, 9)  # EXIF orientations that turn or mirror a picture
_SWAPS_SIDES = range(5, 9)  # those that swap width and height


class PictureKeywords(TypedDict, total=False):
    """Keywords that lift a bound on the pictures of a data set; see `ImageFolder`."""

    allow_outside: bool
    allow_large_pictures: bool


@dataclass(frozen=True)
class ImageFolder:
    """Where the pictures of a data set are, and which of them are read.

    Attributes:
        path: The folder.
        must_exist: Whether the pictures must exist.
        allow_outside: Also those that lie outside the folder: named by `..`, by an absolute path, or by a
            link that leads out of it.
        allow_large_pictures: Also those of more than `MOST_MEGAPIXELS`.
    """

    path: Path
    must_exist: bool = True
    allow_outside: bool = False
    allow_large_pictures: bool = False

    @cached_property
    def _root(self) -> Path:
        return self.path.resolve()

    def holds(self, path: Path) -> bool:
        """Whether a picture may be read from there."""
        return self.allow_outside or path.resolve().is_relative_to(self._root)

    @property
    def most_megapixels(self) -> float | None:
        """A larger picture is refused; None: any size."""
        return None if self.allow_large_pictures else MOST_MEGAPIXELS


def clip_box(box: Box, size: tuple[int, int]) -> tuple[tuple[int, int, int, int], bool]:
    """Round a box outwards to whole pixels and clip it to the picture.

    Args:
        box: x, y, width, height in pixels.
        size: Width and height of the picture in pixels.

    Returns:
        (left, top, right, bottom), right and bottom exclusive; and whether the box crosses the border.

    Raises:
        BadBox: The box lies wholly outside the picture.
    """
    x, y, box_width, box_height = box
    width, height = size
    right, bottom = x + box_width, y + box_height
    if x >= width or y >= height or right <= 0 or bottom <= 0:
        raise BadBox(f"bbox {list(box)} lies wholly outside the image of {width} × {height} pixels")
    crosses = x < 0 or y < 0 or right > width or bottom > height
    pixel_box = (
        max(math.floor(x), 0),
        max(math.floor(y), 0),
        min(math.ceil(right), width),
        min(math.ceil(bottom), height),
    )
    return pixel_box, crosses


def draw_box(image: Image.Image, pixel_box: tuple[int, int, int, int]) -> None:
    """Draw the blue box around a region (left, top, right, bottom) of the picture, in place.

    The line width is 1/200 of the longer side, at least 2 pixels. The line runs outside the region, so that
    it hides no text, except at the border of the picture.
    """
    width, height = image.size
    line = max(2, round(max(width, height) / 200))
    left, top, right, bottom = pixel_box
    outer = (
        max(left - line, 0),
        max(top - line, 0),
        min(right + line, width) - 1,
        min(bottom + line, height) - 1,
    )
    ImageDraw.Draw(image).rectangle(outer, outline=BOX_BLUE, width=line)


@dataclass(frozen=True)
class Picture:
    """The picture of one record (an `ImageSource`).

    Read as `HookedVLM.prepare` reads pictures. The EXIF orientation is applied: boxes and sizes are those of
    the upright picture.

    Attributes:
        record: Name of the record in error messages.
        file: Path of the picture; if `content` is given, only a name for error messages.
        size: Width and height as annotated, in pixels; None if unknown.
        box: The blue box to draw (x, y, width, height in pixels); None for none.
        content: Returns the bytes of the picture if it is not a file on disk.
        most_megapixels: A larger picture is refused; None: any size.
    """

    record: str
    file: Path
    size: tuple[int, int] | None = None
    box: Box | None = None
    content: Callable[[], bytes] | None = None
    most_megapixels: float | None = MOST_MEGAPIXELS

    def load(self) -> Image.Image:
        """Open the picture (RGB) and draw its box.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Not an image, truncated, too large, of more than 8 bits a channel, or of another size
                than annotated, so that the box would be in the wrong position. Messages name the record and
                the file.
        """
        image = read_image(self._source, self._describe(), self.most_megapixels)
        if self.box is not None:
            if self.size not in (None, image.size):
                raise ValueError(
                    self._describe(f"is {format_size(image.size)}, but annotated as {format_size(self.size)}")
                )
            try:
                draw_box(image, clip_box(self.box, image.size)[0])
            except BadRecord as error:
                raise ValueError(self._describe(str(error))) from error
        return image

    def verify(self) -> tuple[tuple[int, int], bool]:
        """Decode the whole file and check it for damage.

        Returns:
            Width and height of the upright picture; whether EXIF turned it.

        Raises:
            FileNotFoundError, ValueError: As `load`.
        """
        with opened_image(self._source, self._describe()) as image:
            image.verify()  # checksums; afterwards the image must be opened again
        with opened_image(self._source, self._describe()) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNS
        return self.load().size, turned

    def header_size(self) -> tuple[int, int]:
        """Width and height of the upright picture, read from the header of the file."""
        try:
            with opened_image(self._source, f"image {self.file}") as image:
                if image.format == "TIFF":  # newer versions of Pillow have swapped its sides already
                    return ImageOps.exif_transpose(image).size
                width, height = image.size
                turned = image.getexif().get(ExifTags.Base.Orientation) in _SWAPS_SIDES
        except (FileNotFoundError, ValueError) as error:
            raise BadRecord(str(error)) from error
        return (height, width) if turned else (width, height)

    @property
    def _source(self) -> Path | Callable[[], bytes]:
        return self.content or self.file

    def _describe(self, problem: str = "") -> str:
        return f"record {self.record}: image {self.file} {problem}".rstrip()


def format_size(size: tuple[int, int] | None) -> str:
    """A size in words, for messages."""
    return "of unknown size" if size is None else f"{size[0]} × {size[1]} pixels"


def find_picture_file(record: Record, folder: ImageFolder) -> Path:
    """The path of a record's picture: the first candidate in `record.files` that exists.

    Raises:
        BadRecord: The picture must exist and does not (the message lists the paths tried); or it lies outside
            the folder, and that is not allowed.
    """
    if record.content is not None:
        return Path(record.files[0])
    paths = [folder.path / file for file in record.files]
    inside = [path for path in paths if folder.holds(path)]
    for path in inside:
        if path.is_file():
            return path
    if len(inside) < len(paths):
        outside = next(path for path in paths if path not in inside)
        raise BadRecord(
            f"its image {outside} lies outside the folder of images {folder.path} "
            "(allow_outside=True or --allow-outside reads it all the same)"
        )
    if folder.must_exist:
        others = f" (nor {', '.join(record.files[1:])})" if record.files[1:] else ""
        raise BadRecord(f"its image {paths[0]} does not exist{others}")
    return paths[0]
