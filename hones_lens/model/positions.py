"""Positions of tokens and kinds of tokens, as inputs give them or as they are counted."""

from __future__ import annotations

from collections.abc import Mapping

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


def require_token_types(mapping: Mapping[str, Tensor | None]) -> None:
    """Check that pictures come with `token_type_ids`, for a model whose image tokens see each other by them.

    Raises:
        ValueError: They do not; Hugging Face's model would treat the picture as text.
    """
    if mapping.get("pixel_values") is not None and mapping.get("token_type_ids") is None:
        raise ValueError(
            "pixel_values without token_type_ids: this model's image tokens see each other where "
            "token_type_ids are 1, and Hugging Face's processor returns them"
        )


def check_token_types(
    inputs: VLMInputs, image_mask: Bool[Tensor, "batch pos"], name: str = "mm_token_type_ids"
) -> None:
    """Check that `mm_token_type_ids` (1 at image tokens) mark the image tokens of `input_ids`.

    Args:
        inputs: The inputs.
        image_mask: Their image tokens.
        name: The name of the field, `mm_token_type_ids` or `token_type_ids`.

    Raises:
        ValueError: They mark others; names the row.
    """
    if (given := getattr(inputs, name)) is None:
        return
    types = torch.as_tensor(given, device=image_mask.device)
    if types.shape != image_mask.shape:
        raise ValueError(f"{name} {list(types.shape)} do not fit input_ids {list(image_mask.shape)}")
    different: list[int] = to_list((types != image_mask).any(-1).nonzero()[:, 0])
    if different:
        row = different[0]
        raise ValueError(
            f"row {row}: {name} mark {int((types[row] == 1).sum())} image tokens, input_ids have "
            f"{int(image_mask[row].sum())}, not all in the same places"
        )
