"""How LLaVA-NeXT and LLaVA-OneVision cut a picture into tiles, and which patches of them are kept."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import image_processing_utils
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next import modeling_llava_next

from hones_lens.model.config import VisionConfig
from hones_lens.model.inputs import Region
from hones_lens.model.layout import ImageLayout

_CUTTING: Any = image_processing_utils
_PACKING: Any = modeling_llava_next
_POOLED_FROM = 1.1  # times as long a side as the most tiles have, as Hugging Face's code has it


@dataclass(frozen=True)
class Tiling:
    """The tiles of one picture, put together, and the patches of it that are no padding.

    Attributes:
        size: Height and width of the picture.
        tile: Side of a tile in pixels.
        patch: Side of a patch in pixels.
        tiles: Rows and columns of tiles.
        cut: Rows of patches that are left out at the top, and columns at the left.
        patches: Rows and columns of patches that are kept.
        grid: Rows and columns of image tokens, newlines aside; fewer than patches where these are pooled.
    """

    size: tuple[int, int]
    tile: int
    patch: int
    tiles: tuple[int, int]
    cut: tuple[int, int]
    patches: tuple[int, int]
    grid: tuple[int, int]

    @property
    def n_tiles(self) -> int:
        """How many tiles there are."""
        return self.tiles[0] * self.tiles[1]

    def layout(self, picture: int) -> ImageLayout:
        """The layout of the grid of the tiles, a newline behind each row."""
        side = self.tile // self.patch
        return ImageLayout(
            row_end=1,
            picture=picture,
            entries=self.n_tiles,
            patches=None if self.patches == self.grid else self.patches,
            tile=(side, side),
            across=self.tiles[1],
            cut=self.cut,
        )

    def region(self) -> Region:
        """What the kept patches show, in pixels of the picture; half a patch of padding may be among it.

        Exact at its sides; within it as if all patches were equally far apart, which they are not where a
        tile is no whole number of patches: pixels at the right and at the bottom of each tile are not read.
        """
        height, width = self.size
        target = (self.tiles[0] * self.tile, self.tiles[1] * self.tile)
        picture = np.broadcast_to(np.uint8(0), (3, height, width))
        resized: tuple[int, int] = _CUTTING.get_patch_output_size(picture, target, ChannelDimension.FIRST)
        (top, bottom), (left, right) = (
            tuple(
                (pixel - (target[axis] - resized[axis]) // 2) * self.size[axis] / resized[axis]
                for pixel in (self._edge(first), self._edge(first + self.patches[axis] - 1) + self.patch)
            )
            for axis, first in enumerate(self.cut)
        )
        return (left, top, right, bottom)

    def _edge(self, patch: int) -> int:
        """The first pixel of a patch, by its number along a side of the tiles."""
        tile, within = divmod(patch, self.tile // self.patch)
        return tile * self.tile + within * self.patch

    def stitched(self, tiles: Float[Tensor, "tile channel side side"]) -> Float[Tensor, "channel _ _"]:
        """The pixels of the kept patches."""
        return self._put_together(tiles)[:, *self._kept]

    def with_stitched(
        self, tiles: Float[Tensor, "tile channel side side"], picture: Float[Tensor, "channel _ _"]
    ) -> Float[Tensor, "tile channel side side"]:
        """The tiles with other pixels of the kept patches; the inverse of `stitched`."""
        whole, out = self._put_together(tiles).clone(), tiles.clone()
        whole[:, *self._kept] = picture
        read, rows = whole.shape[1] // self.tiles[0], self.tiles[0]
        out[..., :read, :read] = rearrange(
            whole, "c (row y) (column x) -> (row column) c y x", row=rows, y=read, x=read
        )
        return out

    def _put_together(self, tiles: Float[Tensor, "tile channel side side"]) -> Float[Tensor, "channel _ _"]:
        """All pixels of the tiles that fill a patch."""
        read = self.tile // self.patch * self.patch
        of_tiles = tiles[..., :read, :read]
        return rearrange(of_tiles, "(row column) c y x -> c (row y) (column x)", row=self.tiles[0])

    @property
    def _kept(self) -> tuple[slice, slice]:
        rows, columns = (
            slice(first * self.patch, (first + n) * self.patch)
            for first, n in zip(self.cut, self.patches, strict=True)
        )
        return rows, columns


def tiling_of(size: tuple[int, int], vision: VisionConfig) -> Tiling:
    """How a picture of this height and width is cut, by Hugging Face's own functions.

    Raises:
        ValueError: A picture so narrow that no row or column of patches is left of it.
    """
    assert vision.image_size is not None
    resolutions = [list(resolution) for resolution in vision.tile_sizes]
    best: tuple[int, int] = _CUTTING.select_best_resolution(size, resolutions)
    side, tiles = vision.patches_per_side, (best[0] // vision.image_size, best[1] // vision.image_size)
    whole = torch.arange(tiles[0] * side * tiles[1] * side).view(1, tiles[0] * side, tiles[1] * side)
    kept: Tensor = _PACKING.unpad_image(whole, size)[0]
    if kept.numel() == 0:
        raise ValueError(
            f"a picture of {size[1]} × {size[0]} pixels is so narrow that no row of patches is left of it"
        )
    rows, columns = kept.shape
    return Tiling(
        size=size,
        tile=vision.image_size,
        patch=vision.patch_size,
        tiles=tiles,
        cut=divmod(int(kept[0, 0]), tiles[1] * side),
        patches=(rows, columns),
        grid=_pooled((rows, columns), side, vision.most_tiles),
    )


def _pooled(patches: tuple[int, int], side: int, most_tiles: int | None) -> tuple[int, int]:
    """The grid of tokens of so many patches."""
    if most_tiles is None:
        return patches
    rows, columns = patches
    ratio = sqrt(rows * columns / (most_tiles * side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > _POOLED_FROM else patches
