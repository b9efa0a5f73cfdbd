"""Small pictures in every mode, format and EXIF orientation that data sets and users bring."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (60, 40)  # upright
ORIENTATION = 0x0112


def photograph() -> Image.Image:
    """A picture with no symmetry, in smooth colours, which formats with losses keep."""
    x, y = np.meshgrid(np.linspace(0, 255, SIZE[0]), np.linspace(0, 255, SIZE[1]))
    return Image.fromarray(np.stack([x, y, 255 - 0.6 * x], -1).astype(np.uint8))


def exif(orientation: int) -> Image.Exif:
    """EXIF data with an orientation."""
    data = Image.Exif()
    data[ORIENTATION] = orientation
    return data


def save_png_of_16_bits(path: Path, pixels: np.ndarray) -> None:
    """Write uint16 pixels [height width channel] (3 channels), which Pillow reads and does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def _saved_as(name: str, mode: str = "RGB", **options: object) -> tuple[str, Callable[[Path], None]]:
    return name, lambda path: photograph().convert(mode).save(path, **options)


def _animation(path: Path) -> None:
    frames = [photograph(), photograph().transpose(Image.Transpose.ROTATE_180)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _sixteen_bits_of_colour(path: Path) -> None:
    save_png_of_16_bits(path, np.asarray(photograph()).astype(np.uint16) * 251)


def _palette_with_an_unused_transparent_colour(path: Path) -> None:
    photograph().quantize(16).save(path, transparency=200)


# Name -> file name and what writes it. Nothing in them is see-through: all are as Hugging Face reads them.
OPAQUE: dict[str, tuple[str, Callable[[Path], None]]] = {
    **{f"orientation {o}": _saved_as("a.jpg", exif=exif(o)) for o in range(10)},
    "turned PNG": _saved_as("a.png", exif=exif(6)),
    "turned TIFF": _saved_as("a.tiff", exif=exif(6)),
    "turned WebP": _saved_as("a.webp", exif=exif(8)),
    "grey": _saved_as("a.png", "L"),
    "black and white": _saved_as("a.png", "1"),
    "grey with full opacity": _saved_as("a.png", "LA"),
    "colour with full opacity": _saved_as("a.png", "RGBA"),
    "palette": _saved_as("a.png", "P"),
    "palette of a GIF": _saved_as("a.gif", "P"),
    "CMYK JPEG": _saved_as("a.jpg", "CMYK"),
    "CMYK TIFF": _saved_as("a.tiff", "CMYK"),
    "animated GIF": ("a.gif", _animation),
    "animated WebP": ("a.webp", _animation),
    "16 bits of colour": ("a.png", _sixteen_bits_of_colour),
    "palette with an unused transparent colour": ("a.png", _palette_with_an_unused_transparent_colour),
}


def write(name: str, folder: Path) -> Path:
    """Write one of `OPAQUE`; the path of the file."""
    file, save = OPAQUE[name]
    save(folder / file)
    return folder / file


def half_transparent(mode: str) -> Image.Image:
    """A picture (RGBA, LA, P or RGB) that is see-through on its left half, where a dark colour is hidden."""
    picture = photograph().convert("L" if mode == "LA" else "RGB")
    width, height = picture.size
    dark = (7, 7, 7) if picture.mode == "RGB" else 7
    picture.paste(dark, (0, 0, width // 2, height))
    if mode in ("RGBA", "LA"):
        alpha = Image.new("L", picture.size, 255)
        alpha.paste(0, (0, 0, width // 2, height))
        picture.putalpha(alpha)
        return picture
    if mode == "P":
        picture = picture.quantize(16)
        picture.info["transparency"] = picture.getpixel((0, 0))
    else:
        picture.info["transparency"] = dark
    return picture
