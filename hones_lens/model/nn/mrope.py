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

    Text counts on in all three. An image's tokens stay at one time; their rows and columns count from
    where the text before it ended, and text goes on behind the larger side. Padding is at 0.
    """
    out = torch.zeros(3, *inputs.input_ids.shape, dtype=torch.long)
    tokens: list[list[bool]] = to_list(inputs.attention_mask.bool())
    at_image: list[list[bool]] = to_list(inputs.image_mask)
    for row, grids in enumerate(inputs.grids):
        places = [i for i, token in enumerate(tokens[row]) if token]
        images, is_image = iter(grids), at_image[row]
        parts: list[Tensor] = []
        at = 0
        for image, run in groupby(places, key=is_image.__getitem__):
            length = len(list(run))
            if not image:
                parts.append(torch.arange(at, at + length).expand(3, -1))
                at += length
                continue
            while length:
                rows, columns = next(images)
                grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2).T
                parts.append(torch.cat((torch.zeros_like(grid[:1]), grid)) + at)
                at += max(rows, columns)
                length -= rows * columns
        out[:, row, places] = torch.cat(parts, dim=1)
    return out.to(inputs.input_ids.device)
