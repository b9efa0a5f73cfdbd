"""Pictures that lie in files: opened when asked for, upright, RGB, with the blue box where one is due."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageDraw, ImageOps

from hones_lens.data.drawing import BOX_BLUE
from hones_lens.data.records import BadRecord, Box, Record

# What Pillow raises for files that are missing, cut short, no images, or far too large.
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_TURNED = range(5, 9)  # EXIF orientations that swap width and height


def clip_box(box: Box, size: tuple[int, int]) -> tuple[tuple[int, int, int, int], bool]:
    """The whole pixels that a box covers of a picture.

    Args:
        box: x, y, width, height in pixels.
        size: Width and height of the picture in pixels.

    Returns:
        (left, top, right, bottom), right and bottom exclusive; and whether the box crosses the border.

    Raises:
        BadRecord: The box lies wholly outside.
    """
    x, y, box_width, box_height = box
    width, height = size
    right, bottom = x + box_width, y + box_height
    if x >= width or y >= height or right <= 0 or bottom <= 0:
        raise BadRecord(f"bbox {list(box)} lies wholly outside the image of {width} × {height} pixels")
    crosses = x < 0 or y < 0 or right > width or bottom > height
    inside = (
        max(math.floor(x), 0),
        max(math.floor(y), 0),
        min(math.ceil(right), width),
        min(math.ceil(bottom), height),
    )
    return inside, crosses


def draw_box(image: Image.Image, inside: tuple[int, int, int, int]) -> None:
    """Draw the blue box around some pixels, in place.

    The line is 1/200 of the longer side, at least 2 pixels. It runs outside the box, so that it hides no
    text, except where the picture ends.
    """
    width, height = image.size
    line = max(2, round(max(width, height) / 200))
    left, top, right, bottom = inside
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

    The EXIF orientation is applied, as every viewer does: boxes and sizes are those of the upright
    picture. Transparent pixels are shown on white.

    Attributes:
        record: How errors name the record.
        file: Where it lies; with `content` only a name for errors.
        size: Width and height as annotated, in pixels; None if unknown.
        box: Where the blue box goes (x, y, width, height in pixels); None for none.
        content: The bytes of the file, where it does not lie on the disk.
    """

    record: str
    file: Path
    size: tuple[int, int] | None = None
    box: Box | None = None
    content: Callable[[], bytes] | None = None

    def load(self) -> Image.Image:
        """Open the picture (RGB) and draw its box.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Not an image, cut short, or of another size than annotated, so that the box would
                be in the wrong place. All name the record and the file.
        """
        image = _in_rgb(self._opened(), self._named)
        if self.box is not None:
            if self.size not in (None, image.size):
                raise ValueError(self._named(f"is {told(image.size)}, but annotated as {told(self.size)}"))
            try:
                draw_box(image, clip_box(self.box, image.size)[0])
            except BadRecord as error:
                raise ValueError(self._named(str(error))) from error
        return image

    def verify(self) -> tuple[tuple[int, int], bool]:
        """Read the whole file, and check it for damage, without making an example of it.

        Returns:
            Width and height of the upright picture; whether EXIF turned it.

        Raises:
            FileNotFoundError, ValueError: As `load`.
        """
        try:
            with Image.open(self._source()) as image:
                image.verify()  # checksums; the image must be opened anew afterwards
            with Image.open(self._source()) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
        except FileNotFoundError as error:
            raise FileNotFoundError(self._named("does not exist")) from error
        except _BROKEN as error:
            raise ValueError(self._named(f"can't be read as an image: {error}")) from error
        return self.load().size, turned

    def header_size(self) -> tuple[int, int]:
        """Width and height of the upright picture, read from the head of the file."""
        try:
            with Image.open(self._source()) as image:
                width, height = image.size
                turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        except _BROKEN as error:
            raise BadRecord(f"image {self.file} can't be read: {error}") from error
        return (height, width) if turned else (width, height)

    def _source(self) -> Path | io.BytesIO:
        return self.file if self.content is None else io.BytesIO(self.content())

    def _opened(self) -> Image.Image:
        try:
            with Image.open(self._source()) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except FileNotFoundError as error:
            raise FileNotFoundError(self._named("does not exist")) from error
        except _BROKEN as error:
            raise ValueError(self._named(f"can't be read as an image: {error}")) from error

    def _named(self, what: str) -> str:
        return f"record {self.record}: image {self.file} {what}"


def told(size: tuple[int, int] | None) -> str:
    """A size for people."""
    return "of unknown size" if size is None else f"{size[0]} × {size[1]} pixels"


def _in_rgb(image: Image.Image, named: Callable[[str], str]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(named(f"has pixels of mode {image.mode}: save it with 8 bits a channel"))
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        paper = Image.new("RGBA", shown.size, "white")
        return Image.alpha_composite(paper, shown).convert("RGB")
    return image.convert("RGB")


def find_picture(record: Record, folder: Path, must_exist: bool) -> Path:
    """Where the picture of a record lies.

    Raises:
        BadRecord: It must exist and does not; names what was looked for.
    """
    if record.content is not None:
        return Path(record.files[0])
    places = [folder / file for file in record.files]
    for place in places:
        if place.is_file():
            return place
    if must_exist:
        others = f" (nor {', '.join(record.files[1:])})" if record.files[1:] else ""
        raise BadRecord(f"its image {places[0]} does not exist{others}")
    return places[0]
