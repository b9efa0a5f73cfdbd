"""The images of a batch: how many tokens each has, where, and maps on its grid."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from hones_lens.model.layout import PLAIN, ImageLayout
from hones_lens.model.typed import to_list


class ImageGrids:
    """The part of `VLMInputs` that knows the images; its fields are described there."""

    input_ids: Tensor
    image_grid_thw: Tensor | None
    grids: tuple[tuple[tuple[int, int], ...], ...]
    layouts: tuple[tuple[ImageLayout, ...], ...]

    @property
    def image_mask(self) -> Tensor:
        """True at image tokens, [batch pos]."""
        raise NotImplementedError

    @property
    def image_tokens(self) -> tuple[tuple[int, ...], ...]:
        """Number of tokens of every image, by row; no images where no model has located any."""
        return tuple(
            tuple(self.layout(row, i).n_tokens(grid) for i, grid in enumerate(grids))
            for row, grids in enumerate(self.grids or ((),) * len(self.input_ids))
        )

    def layout(self, row: int, image: int) -> ImageLayout:
        """How the tokens of an image lie around its grid."""
        return self.layouts[row][image] if self.layouts else PLAIN

    def picture_of(self, row: int, image: int) -> int:
        """Which of its row's pictures an image shows: itself, but where a picture has several grids."""
        picture = self.layout(row, image).picture
        return image if picture is None else picture

    def n_pictures(self, row: int) -> int:
        """How many pictures a row has."""
        n_images = len(self.grids[row]) if self.grids else 0
        return len({self.picture_of(row, image) for image in range(n_images)})

    @property
    def tower_entries(self) -> tuple[tuple[int, ...], ...]:
        """By row, how many entries of the vision tower's activations each image has."""
        return tuple(
            tuple(self.layout(row, i).entries for i in range(len(grids)))
            for row, grids in enumerate(self.grids or ((),) * len(self.input_ids))
        )

    @property
    def tower_patches(self) -> tuple[tuple[int, ...], ...]:
        """By row, how many patches each entry of the vision tower's activations has."""
        return tuple(
            tuple(
                prod(self.layout(row, i).tile or patches)
                for i, patches in enumerate(grids)
                for _ in range(self.layout(row, i).entries)
            )
            for row, grids in enumerate(self.patch_grids or ((),) * len(self.input_ids))
        )

    @property
    def newline_mask(self) -> Tensor:
        """True at image tokens that stand behind the rows of a grid, or behind the last, [batch pos]."""
        mask = torch.zeros_like(self.image_mask)
        for row, layouts in enumerate(self.layouts):
            for i, layout in enumerate(layouts):
                newlines = layout.newlines(self.grids[row][i])
                positions = self.image_positions(row, i)
                mask[row, positions[newlines.to(positions.device)]] = True
        return mask

    def image_positions(self, row: int, image: int) -> Tensor:
        """The positions of an image's tokens, its grid's and others, [token].

        Raises:
            IndexError: No such row or image.
        """
        if row >= len(self.grids) or image >= len(self.grids[row]):
            n_images = len(self.grids[row]) if row < len(self.grids) else 0
            raise IndexError(f"row {row} has {n_images} images; there is no image {image}")
        of_row = self.image_mask[row].nonzero()[:, 0]
        return torch.split(of_row, list(self.image_tokens[row]))[image]

    def cell_positions(self, row: int, image: int) -> Tensor:
        """The position of each cell of an image's grid, [rows columns]; −1 where a cell has no token.

        Raises:
            IndexError: No such row or image.
        """
        positions = self.image_positions(row, image)
        cells = self.layout(row, image).cells(self.grids[row][image]).to(positions.device)
        return torch.where(cells < 0, -1, positions[cells])

    @property
    def patch_grids(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """As `grids`, in patches of the vision tower: larger if the tower merges patches into tokens."""
        if self.image_grid_thw is None:
            return tuple(
                tuple(self.layout(row, i).patches or grid for i, grid in enumerate(grids))
                for row, grids in enumerate(self.grids)
            )
        sizes: Iterator[list[int]] = iter(to_list(self.image_grid_thw[:, 1:]))
        return tuple(tuple((r, c) for r, c in (next(sizes) for _ in row)) for row in self.grids)

    def heatmap(
        self,
        values: Tensor,
        row: int = 0,
        image: int = 0,
        *,
        pixels: tuple[int, int] | None = None,
    ) -> Tensor:
        """Arrange values on the grid of one image, in raster order.

        Args:
            values: One value per position [pos], per token of that image [n_tokens], per patch
                of it [n_patches] (padding up to the batch's largest image may follow), or, of an image of
                several tiles, per patch of each, as the vision tower has them [n_tiles n_patches]. A number
                that fits several is the first of these.
            row, image: Row, and index of the image in it.
            pixels: Enlarge to this (height, width) by bilinear interpolation, each value at the centre of its
                cell.

        Returns:
            [rows columns], or [height width]; detached. 0 at a cell that has no token (see `cell_positions`).

        Raises:
            IndexError: No such row or image.
            ValueError: Another number of values.
        """
        positions = self.image_positions(row, image)
        if values.shape == self.input_ids.shape[1:]:
            values = values[positions.to(values.device)]
        layout, grid, patches = self.layout(row, image), self.grids[row][image], self.patch_grids[row][image]
        n_patches = patches[0] * patches[1]
        longest = max(r * c for row_grids in self.patch_grids for r, c in row_grids)
        if values.shape == positions.shape:
            cells = layout.cells(grid).to(values.device)
            values = torch.where(cells < 0, 0, values[cells]) if bool((cells < 0).any()) else values[cells]
        elif values.shape in ((n_patches,), (longest,)):
            grid, values = patches, values[:n_patches]
        elif layout.tile and values.shape == (layout.entries, prod(layout.tile)):
            grid, values = patches, values.flatten()[layout.patch_places(patches).to(values.device)]
        else:
            raise ValueError(
                f"{tuple(values.shape)} values fit neither the {self.input_ids.shape[1]} positions "
                f"nor the {len(positions)} tokens of image {image}"
            )
        grid_values = values.detach().reshape(grid)
        if pixels is None:
            return grid_values
        return F.interpolate(grid_values[None, None].float(), size=pixels, mode="bilinear")[0, 0]
