"""Into how many tiles Idefics3's image processor cuts a picture."""

from __future__ import annotations

from math import ceil
from typing import Any

_MOST = 4096  # pixels of a side, as Hugging Face's code has it


def n_tiles(processor: Any, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of tiles of a picture; (0, 0) where only the picture as a whole is read.

    The steps are those of the processor: resize, then stretch to whole tiles. Its own
    `get_number_of_image_patches` rounds otherwise where the size is no multiple of a tile.
    """
    if not processor.do_image_splitting:
        return (0, 0)
    if processor.do_resize:
        width, height = _resized(dict(processor.size), width, height)
    tile: int = dict(processor.max_image_size)["longest_edge"]
    ratio = width / height
    if width >= height:
        columns = ceil(width / tile)
        rows = ceil(int(columns * tile / ratio) / tile)
    else:
        rows = ceil(height / tile)
        columns = ceil(int(rows * tile * ratio) / tile)
    return (rows, columns) if max(rows, columns) > 1 else (0, 0)


def _resized(size: dict[str, Any], width: int, height: int) -> tuple[int, int]:
    longest = size.get("longest_edge")
    if not longest:
        return size["width"], size["height"]
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height and width > _MOST:
        width, height = _MOST, int(_MOST / ratio)
    elif height > width and height > _MOST:
        width, height = int(_MOST * ratio), _MOST
    return max(width, 1), max(height, 1)
