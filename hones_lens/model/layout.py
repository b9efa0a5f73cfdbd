"""Where the cells of an image's grid lie among its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class ImageLayout:
    """The tokens of a grid in order: `leading`, its rows with `row_end` behind each, `trailing`.

    A picture that is cut into tiles has several grids, each an image of its row.

    Attributes:
        leading: Tokens before the first cell, such as a class token.
        missing: How many of the first cells have no token.
        row_end: Tokens behind each row of the grid (newline).
        trailing: Tokens behind the last row.
        picture: The picture that the grid shows, among those of its row; None: as many pictures as grids.
        entries: How many entries the vision tower's activations, and the pixels, have of it.
        patches: Rows and columns of patches of the vision tower; None: as many as cells.
        tile: Rows and columns of patches of each entry, where several make up the grid.
        across: How many of these entries lie side by side.
        cut: Rows at the top and columns at the left of the entries, put together, that are not of the grid.
    """

    leading: int = 0
    missing: int = 0
    row_end: int = 0
    trailing: int = 0
    picture: int | None = None
    entries: int = 1
    patches: tuple[int, int] | None = None
    tile: tuple[int, int] | None = None
    across: int = 1
    cut: tuple[int, int] = (0, 0)

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> ImageLayout:
        """The layout whose fields (`dataclasses.asdict`) were written as JSON, which has no tuples."""
        read: dict[str, Any] = dict(fields)
        for name in ("patches", "tile", "cut"):
            if (sizes := read.get(name)) is not None:
                read[name] = tuple(sizes)
        return cls(**read)

    def n_tokens(self, grid: tuple[int, int]) -> int:
        """How many tokens a grid of so many rows and columns has in all."""
        rows, columns = grid
        return self.leading + rows * (columns + self.row_end) - self.missing + self.trailing

    def cells(self, grid: tuple[int, int]) -> Int[Tensor, "rows columns"]:
        """The number of each cell's token among those of the grid; −1 where it has none."""
        rows, columns = grid
        row_starts = torch.arange(rows)[:, None] * (columns + self.row_end)
        numbers = row_starts + torch.arange(columns) - self.missing
        return torch.where(numbers < 0, -1, numbers + self.leading)

    def newlines(self, grid: tuple[int, int]) -> Bool[Tensor, " token"]:
        """Which of the grid's tokens stand behind its rows, or behind the last."""
        rows, columns = grid
        row = torch.arange(columns + self.row_end) >= columns
        of_rows = row.repeat(rows)[self.missing :]
        return torch.cat(
            (
                torch.zeros(self.leading, dtype=torch.bool),
                of_rows,
                torch.ones(self.trailing, dtype=torch.bool),
            )
        )

    def patch_places(self, grid: tuple[int, int]) -> Int[Tensor, "rows columns"]:
        """Where each patch of the grid is among those of all of its entries, in the tower's order."""
        rows, columns = self.patches or grid
        if self.tile is None:
            return torch.arange(rows * columns).view(rows, columns)
        high, wide = self.tile
        row, column = torch.arange(rows)[:, None] + self.cut[0], torch.arange(columns) + self.cut[1]
        entry = row // high * self.across + column // wide
        return entry * high * wide + row % high * wide + column % wide


PLAIN = ImageLayout()
