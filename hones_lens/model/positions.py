"""Positions of tokens and kinds of tokens, as inputs give them or as they are counted."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hones_lens.model.inputs import VLMInputs
from hones_lens.model.typed import to_list


def text_positions(inputs: VLMInputs) -> Int[Tensor, "batch pos"]:
    """Positions counted from each row's first token; what the mask hides is at 0.

    As Hugging Face's `forward`, whose positions count what the mask hides between two tokens (rotary
    positions are relative, so where the count begins does not matter).
    """
    tokens = inputs.attention_mask.bool()
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return (places - tokens.int().argmax(-1, keepdim=True)).masked_fill(~tokens, 0)


def expand_positions(given: Tensor, inputs: VLMInputs, axes: int) -> Tensor:
    """Positions that a user gave, for every row and axis: [batch pos], or [axes batch pos] for several axes.

    Raises:
        ValueError: They don't fit the tokens; names both shapes.
    """
    given = torch.as_tensor(given, device=inputs.input_ids.device)
    rows, n = inputs.input_ids.shape
    fits = given.shape[-2:] in ((rows, n), (1, n)) and given.shape[:-2] in ((), (axes,) if axes > 1 else ())
    if not fits:
        wanted = "[batch, pos]" if axes == 1 else f"[batch, pos] or [{axes}, batch, pos]"
        raise ValueError(
            f"position_ids are {list(given.shape)}; this model reads {wanted}, here batch {rows} and pos {n}"
        )
    return given.expand(*((axes,) if axes > 1 else ()), rows, n)


def check_token_types(inputs: VLMInputs, image_mask: Bool[Tensor, "batch pos"]) -> None:
    """Check that `mm_token_type_ids` (1 at image tokens) mark the image tokens of `input_ids`.

    Raises:
        ValueError: They mark others; names the row.
    """
    if inputs.mm_token_type_ids is None:
        return
    types = torch.as_tensor(inputs.mm_token_type_ids, device=image_mask.device)
    if types.shape != image_mask.shape:
        raise ValueError(
            f"mm_token_type_ids {list(types.shape)} do not fit input_ids {list(image_mask.shape)}"
        )
    different: list[int] = to_list((types != image_mask).any(-1).nonzero()[:, 0])
    if different:
        row = different[0]
        raise ValueError(
            f"row {row}: mm_token_type_ids mark {int((types[row] == 1).sum())} image tokens, input_ids have "
            f"{int(image_mask[row].sum())}, not all in the same places"
        )
