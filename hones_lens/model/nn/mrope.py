"""Positions in time, row and column (mRoPE, Qwen2-VL); `Rotary` with `sections` reads them."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from hones_lens.model.inputs import VLMInputs
from hones_lens.model.positions import text_positions
from hones_lens.model.typed import to_list


def mrope_positions(inputs: VLMInputs) -> Int[Tensor, "3 batch pos"]:
    """Positions in time, row and column, as Qwen2-VL counts them.

    For text, all three increase by one per token. The tokens of an image share one time; their rows and
    columns count from the position after the preceding text, and the following text starts after the larger
    side. Padding is at 0. What the mask hides between two tokens is not counted; in a batch of text alone it
    is, as in Hugging Face's `forward`.
    """
    grids = [(row, grid) for row, row_grids in enumerate(inputs.grids) for grid in row_grids]
    if not grids:
        return text_positions(inputs).repeat(3, 1, 1)
    tokens, image_mask = inputs.attention_mask.bool(), inputs.image_mask
    n_text = (tokens & ~image_mask).cumsum(-1)
    rows, columns = image_mask.nonzero(as_tuple=True)
    sizes = torch.tensor([height * width for _, (height, width) in grids])
    first = (sizes.cumsum(0) - sizes).to(rows.device)  # of each image, among all image tokens
    text_before: list[int] = to_list(n_text[rows[first], columns[first]])
    starts: list[int] = []
    in_row, before = -1, 0
    for (row, grid), n in zip(grids, text_before, strict=True):
        before = before if row == in_row else 0
        starts.append(n + before)
        in_row, before = row, before + max(grid)
    steps = torch.zeros_like(n_text)
    steps[rows[first], columns[first]] = torch.tensor([max(grid) for _, grid in grids], device=rows.device)
    positions = (n_text - 1 + steps.cumsum(-1)).masked_fill(~tokens, 0).repeat(3, 1, 1)
    of_images = [_grid_positions(*grid) + start for (_, grid), start in zip(grids, starts, strict=True)]
    positions[:, rows, columns] = torch.cat(of_images, dim=1).to(rows.device)
    return positions


@lru_cache(maxsize=256)
def _grid_positions(height: int, width: int) -> Int[Tensor, "3 token"]:
    """Time (0), row and column of an image's tokens in raster order."""
    rows, columns = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2).T
    return torch.stack((torch.zeros_like(rows), rows, columns))
