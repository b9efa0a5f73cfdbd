"""Positions in time, row and column (mRoPE, Qwen2-VL); `Rotary` with `sections` reads them."""

from __future__ import annotations

from itertools import groupby

import torch
from jaxtyping import Int
from torch import Tensor

from hones_lens.model.inputs import VLMInputs
from hones_lens.model.typed import to_list


def mrope_positions(inputs: VLMInputs) -> Int[Tensor, "3 batch pos"]:
    """Positions in time, row and column, as Qwen2-VL counts them.

    For text, all three increase by one per token. The tokens of an image share one time; their rows and
    columns count from the position after the preceding text, and the following text starts after the larger
    side. Padding is at 0.
    """
    out = torch.zeros(3, *inputs.input_ids.shape, dtype=torch.long)
    is_token: list[list[bool]] = to_list(inputs.attention_mask.bool())
    is_image_token: list[list[bool]] = to_list(inputs.image_mask)
    for row, grids in enumerate(inputs.grids):
        token_positions = [i for i, token in enumerate(is_token[row]) if token]
        images, is_image = iter(grids), is_image_token[row]
        position_chunks: list[Tensor] = []
        next_position = 0
        for image, run in groupby(token_positions, key=is_image.__getitem__):
            length = len(list(run))
            if not image:
                position_chunks.append(torch.arange(next_position, next_position + length).expand(3, -1))
                next_position += length
                continue
            while length:
                rows, columns = next(images)
                grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2).T
                position_chunks.append(torch.cat((torch.zeros_like(grid[:1]), grid)) + next_position)
                next_position += max(rows, columns)
                length -= rows * columns
        out[:, row, token_positions] = torch.cat(position_chunks, dim=1)
    return out.to(inputs.input_ids.device)
