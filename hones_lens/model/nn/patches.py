"""Packed patches of images of many sizes: their layout, and pictures cut into them (Qwen2-VL's format).

Hugging Face packs the patches of all images in a row, square by square of those that become one image token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hones_lens.model.nn.context import Windows
from hones_lens.model.typed import to_list


class PatchLayout:
    """Layout of the patches of a batch of images, from each image's grid (rows, columns) of patches.

    Attributes:
        padded_index: Index into the flattened [image patch] of each patch in Hugging Face's packed order,
            [n_patches].
        rows, columns: Row and column of every patch in its image, [image patch].
        is_patch: False at padding, [image patch].
        squares: The patches of every image token, as such indices, [n_tokens merge²].
    """

    padded_index: Tensor
    rows: Tensor
    columns: Tensor
    is_patch: Tensor
    squares: Tensor

    def __init__(self, grids: Sequence[tuple[int, int]], merge: int, device: torch.device):
        longest = max(rows * columns for rows, columns in grids)
        shape = (len(grids), longest)
        rows_of, columns_of = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        is_patch = torch.zeros(shape, dtype=torch.bool)
        padded_index: list[Tensor] = []
        squares: list[Tensor] = []
        for i, (rows, columns) in enumerate(grids):
            raster = torch.arange(rows * columns).view(rows, columns)
            by_square = raster.view(rows // merge, merge, columns // merge, merge).transpose(1, 2)
            padded_index.append(by_square.flatten() + i * longest)
            squares.append(padded_index[-1].view(-1, merge * merge))
            rows_of[i, : rows * columns] = raster.flatten() // columns
            columns_of[i, : rows * columns] = raster.flatten() % columns
            is_patch[i, : rows * columns] = True
        self.padded_index, self.squares = torch.cat(padded_index).to(device), torch.cat(squares).to(device)
        self.rows, self.columns = rows_of.to(device), columns_of.to(device)
        self.is_patch = is_patch.to(device)

    def windows(self, side: int) -> Windows:
        """Windows of `side` × `side` patches from each image's upper left corner, ragged at the edges.

        Windows, and the patches of each, are in raster order.
        """
        n_across = int(self.columns.max()) // side + 1
        window_ids = self.rows // side * n_across + self.columns // side
        members: list[Tensor] = []
        counts: list[int] = []
        for i, (ids, is_patch) in enumerate(zip(window_ids, self.is_patch, strict=True)):
            patches = is_patch.nonzero()[:, 0]
            patches = patches[ids[patches].sort(stable=True).indices]
            sizes = torch.bincount(ids[patches])
            windows = torch.split(patches + i * len(ids), to_list(sizes[sizes > 0]))
            counts.append(len(windows))
            members += windows
        padded = nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)
        by_image = nn.utils.rnn.pad_sequence(
            list(torch.split(padded, counts)), batch_first=True, padding_value=-1
        )
        return Windows(by_image.clamp(min=0), by_image >= 0)


@dataclass(frozen=True)
class PatchShape:
    """Shape of a patch.

    Attributes:
        merge: Side, in patches, of the square that becomes one image token.
        channels, frames: Number of colours, and of video frames; a still image repeats its frame.
        side: Side in pixels.
    """

    merge: int
    channels: int
    frames: int
    side: int


def unpack_patches(
    patches: Float[Tensor, "n_patches values"], grid_thw: Int[Tensor, "image 3"], shape: PatchShape
) -> list[Float[Tensor, "channel _ _"]]:
    """The pictures [channel height width] that these patches were cut from."""
    merge, side = shape.merge, shape.side
    grids: list[list[int]] = to_list(grid_thw)
    pictures: list[Tensor] = []
    for image_patches, (_, rows, columns) in zip(
        torch.split(patches, to_list(grid_thw.prod(-1))), grids, strict=True
    ):
        squares = (rows // merge, columns // merge, merge, merge)
        pixels = image_patches.view(*squares, -1, shape.frames, side, side)[..., 0, :, :]
        pixels = pixels.permute(4, 0, 2, 5, 1, 3, 6)
        pictures.append(pixels.reshape(-1, rows * side, columns * side))
    return pictures


def pack_pictures(
    pictures: Sequence[Float[Tensor, "channel _ _"]], shape: PatchShape
) -> Float[Tensor, "n_patches values"]:
    """Pictures cut into patches; the inverse of `unpack_patches`."""
    merge, channels, frames, side = shape.merge, shape.channels, shape.frames, shape.side
    packed: list[Tensor] = []
    for picture in pictures:
        rows, columns = (n // side // merge for n in picture.shape[1:])
        pixels = picture.reshape(channels, rows, merge, side, columns, merge, side)
        pixels = pixels.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :]
        pixels = pixels.expand(*pixels.shape[:5], frames, side, side)
        packed.append(pixels.reshape(-1, channels * frames * side**2))
    return torch.cat(packed)
