"""Packed patches of images of many sizes: where they lie, and pictures cut into them (Qwen2-VL's format).

Hugging Face packs the patches of all images in a row, square by square of those that become one image token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hones_lens.model.nn.attention import Windows
from hones_lens.model.typed import to_list


class PatchLayout:
    """Where the patches of a batch of images lie, from each image's grid (rows, columns) of patches.

    Attributes:
        place: Patch in Hugging Face's packed order → index of the flattened [image patch], [n_patches].
        rows, columns: Place of every patch in its image, [image patch].
        real: False at padding, [image patch].
        squares: The patches of every image token, as such indices, [n_tokens merge²].
    """

    place: Tensor
    rows: Tensor
    columns: Tensor
    real: Tensor
    squares: Tensor

    def __init__(self, grids: Sequence[tuple[int, int]], merge: int, device: torch.device):
        longest = max(rows * columns for rows, columns in grids)
        shape = (len(grids), longest)
        rows_of, columns_of = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        real = torch.zeros(shape, dtype=torch.bool)
        place: list[Tensor] = []
        squares: list[Tensor] = []
        for i, (rows, columns) in enumerate(grids):
            raster = torch.arange(rows * columns).view(rows, columns)
            by_square = raster.view(rows // merge, merge, columns // merge, merge).transpose(1, 2)
            place.append(by_square.flatten() + i * longest)
            squares.append(place[-1].view(-1, merge * merge))
            rows_of[i, : rows * columns] = raster.flatten() // columns
            columns_of[i, : rows * columns] = raster.flatten() % columns
            real[i, : rows * columns] = True
        self.place, self.squares = torch.cat(place).to(device), torch.cat(squares).to(device)
        self.rows, self.columns, self.real = rows_of.to(device), columns_of.to(device), real.to(device)

    def windows(self, side: int) -> Windows:
        """Windows of `side` × `side` patches from each image's upper left corner, ragged at the edges."""
        across = int(self.columns.max()) // side + 1
        down = int(self.rows.max()) // side + 1
        image = torch.arange(len(self.rows), device=self.rows.device)[:, None]
        number = (image * down + self.rows // side) * across + self.columns // side
        flat, real = number.flatten(), self.real.flatten()
        patches = real.nonzero()[:, 0]
        patches = patches[flat[patches].sort(stable=True).indices]
        counts = torch.bincount(flat[patches])
        sizes: list[int] = to_list(counts[counts > 0])
        parts = list(torch.split(patches, sizes))
        members = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        filled = nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in parts], batch_first=True)
        alone = -1 - torch.arange(flat.numel(), device=flat.device)
        return Windows(torch.where(real, flat, alone).view_as(number), members, filled.bool())


@dataclass(frozen=True)
class PatchShape:
    """What a patch is.

    Attributes:
        merge: A square of so many by so many patches becomes one image token.
        channels, frames: Colours, and frames of video; of a still image the frames are alike.
        side: Pixels a side.
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
    for part, (_, rows, columns) in zip(torch.split(patches, to_list(grid_thw.prod(-1))), grids, strict=True):
        squares = (rows // merge, columns // merge, merge, merge)
        laid = part.view(*squares, -1, shape.frames, side, side)[..., 0, :, :]
        laid = laid.permute(4, 0, 2, 5, 1, 3, 6)
        pictures.append(laid.reshape(-1, rows * side, columns * side))
    return pictures


def pack_pictures(
    pictures: Sequence[Float[Tensor, "channel _ _"]], shape: PatchShape
) -> Float[Tensor, "n_patches values"]:
    """Pictures cut into patches; undoes `unpack_patches`."""
    merge, channels, frames, side = shape.merge, shape.channels, shape.frames, shape.side
    packed: list[Tensor] = []
    for picture in pictures:
        rows, columns = (n // side // merge for n in picture.shape[1:])
        laid = picture.reshape(channels, rows, merge, side, columns, merge, side)
        laid = laid.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :]
        laid = laid.expand(*laid.shape[:5], frames, side, side)
        packed.append(laid.reshape(-1, channels * frames * side**2))
    return torch.cat(packed)
