"""How every part of the package reads a picture: a file, a PIL image or an array, upright and in RGB.

The pixels are those of Hugging Face's `transformers.image_utils.load_image`: the EXIF orientation applied,
the first frame of an animation, PIL's conversion to RGB. Two kinds of pictures differ on purpose, because
that function loses what is on them:

- Transparent pixels lie on white, as on a page; `load_image` shows the colour that is hidden under them.
- More than 8 bits in a single channel (16-bit greys, integers, floats) raise; `load_image` cuts at 255, which
  makes nearly every pixel of such a picture white.

Nothing here knows a model: the readers of data sets share this file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageOps

# Raised by Pillow for files that are truncated, damaged, not images, or far too large; its AVIF decoder
# raises RuntimeError.
_UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)
_NO_LISTS: tuple[type, ...] = (bytes, Mapping)  # though they have items
_ADDRESSES = ("http://", "https://", "data:")
_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


@runtime_checkable
class PixelArray(Protocol):
    """A NumPy array or a torch tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        ...

    @property
    def dtype(self) -> Any:
        """Type of the values."""
        ...

    def __array__(self) -> Any:
        """The values as a NumPy array."""
        ...


PictureLike = Image.Image | str | Path | PixelArray
Pictures = PictureLike | Iterable[PictureLike] | None


def is_picture(value: Any) -> bool:
    """Whether a value stands for one picture, not several: a PIL image, a path, an array of 2 or 3 axes."""
    if isinstance(value, (Image.Image, str, Path)):
        return True
    return isinstance(value, PixelArray) and len(value.shape) in (0, 2, 3)


def listed(pictures: Any) -> list[Any]:
    """One picture or several as a list; what is neither becomes an entry that `open_image` refuses."""
    if is_picture(pictures) or isinstance(pictures, _NO_LISTS) or not hasattr(pictures, "__iter__"):
        return [pictures]
    return list(pictures)


def open_images(pictures: Pictures, of: str = "") -> list[Image.Image]:
    """The pictures of one prompt, as `open_image` reads them.

    Args:
        pictures: A picture, several of them (also as an array with a first axis of images), or None.
        of: Whose pictures they are, for messages, such as ` of prompt 3`.

    Raises:
        FileNotFoundError, ValueError, TypeError: As `open_image`.
    """
    given = [] if pictures is None else listed(pictures)
    return [open_image(picture, f"image {i}{of}") for i, picture in enumerate(given)]


def open_image(picture: PictureLike, name: str = "the image") -> Image.Image:
    """The picture upright, in RGB, read now.

    Args:
        picture: A PIL image, the path of a file, or a uint8 array [height width], [height width channel] or
            [channel height width] of 1, 3 or 4 channels (grey, RGB, RGBA).
        name: What messages call a picture that is not a file.

    Raises:
        FileNotFoundError: No such file; names it.
        ValueError: Not an image, a damaged one, more than 8 bits a channel, or another array.
        TypeError: Neither image, path nor array.
    """
    if isinstance(picture, (str, Path)):
        if str(picture).startswith(_ADDRESSES):
            raise ValueError(f"image {str(picture)[:80]!r} is an address, which is not fetched: give a file")
        return read_image(Path(picture), f"image {str(picture)!r}")
    image: Any = _from_array(picture, name) if isinstance(picture, PixelArray) else picture
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise TypeError(f"{name} is of type {kind}: give a PIL image, a path or a uint8 array")
    with _errors_naming(name):
        upright = ImageOps.exif_transpose(image)
    return _in_rgb(upright, name)


def read_image(
    source: Path | Callable[[], bytes], name: str, most_megapixels: float | None = None
) -> Image.Image:
    """A picture from a file, or from what returns the content of one: upright, in RGB.

    Args:
        source: The file, or the function.
        name: What messages call it.
        most_megapixels: A larger picture is refused, and not decoded; None: only one that Pillow refuses.

    Raises:
        FileNotFoundError, ValueError: As `open_image`; or a picture that is too large.
    """
    with opened_image(source, name) as image:
        width, height = image.size
        too_large = most_megapixels is not None and width * height > most_megapixels * 1e6
        upright = None if too_large else ImageOps.exif_transpose(image)
    if upright is None:
        raise ValueError(
            f"{name} is of {width} × {height} pixels, more than {most_megapixels:g} megapixels "
            "(allow_large_pictures=True or --allow-large-pictures reads it all the same)"
        )
    return _in_rgb(upright, name)


@contextmanager
def opened_image(source: Path | Callable[[], bytes], name: str) -> Generator[Image.Image]:
    """Open a picture as it is stored; errors, also those of the block, name it.

    Raises:
        FileNotFoundError, ValueError: As `open_image`.
    """
    with _errors_naming(name):
        if isinstance(source, Path) and source.is_dir():
            raise IsADirectoryError
        opened = source if isinstance(source, Path) else io.BytesIO(source())
        if (opened.stat().st_size if isinstance(opened, Path) else opened.getbuffer().nbytes) == 0:
            raise ValueError("it is empty")
        with Image.open(opened) as image:
            yield image


@contextmanager
def _errors_naming(name: str) -> Generator[None]:
    """Errors of Pillow and of the file system as those that `open_image` promises."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} does not exist") from error
    except IsADirectoryError as error:
        raise FileNotFoundError(f"{name} does not exist as a file: it is a folder") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} can't be read as an image: it is in no format that Pillow knows") from error
    except _UNREADABLE as error:
        raise ValueError(f"{name} can't be read as an image: {error}") from error


def _in_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"{name} has pixels of mode {image.mode}: save it with 8 bits a channel")
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: it is {image.width} × {image.height}")
    with _errors_naming(name):
        if not image.has_transparency_data:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
    background = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(background, rgba).convert("RGB")


def _from_array(pixels: PixelArray, name: str) -> Image.Image:
    """A uint8 array or tensor as a PIL image."""
    shape, kind = tuple(pixels.shape), str(pixels.dtype).removeprefix("torch.")
    if kind != "uint8":
        raise ValueError(f"{name} is an array of {kind}: give uint8 pixels, 0 to 255")
    if 0 in shape:
        raise ValueError(f"{name} has no pixels: it is an array of {list(shape)}")
    channels_first, channels_last = (len(shape) == 3 and shape[end] in _CHANNELS for end in (0, -1))
    if channels_first and channels_last:
        raise ValueError(f"{name} is an array of {list(shape)}: its channels may come first or last")
    if len(shape) != 2 and not channels_first and not channels_last:
        raise ValueError(
            f"{name} is an array of {list(shape)}: give [height, width], [height, width, channel] or "
            "[channel, height, width] with 1, 3 or 4 channels"
        )
    on_cpu: Any = getattr(pixels, "cpu", lambda: pixels)()  # tensors may lie on a GPU
    values = np.asarray(on_cpu)
    if channels_first:
        values = np.moveaxis(values, 0, -1)
    if values.shape[-1] == 1 and len(shape) == 3:
        values = values[..., 0]
    return Image.fromarray(np.ascontiguousarray(values))
