"""DeepStack: what pictures write into the stream behind the first layers, besides their embeddings.

`VLMInputs.image_embeds` of a model that has it hold all parts of an image token side by side: its embedding,
then what is added to the stream behind block 0, 1, ….
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities.slice import Slice

from hones_lens.model.inputs import VLMInputs


def written_by_pictures(encoded: VLMInputs, d_model: int) -> Float[Tensor, "batch pos layer d_model"]:
    """What pictures write at every position behind each of the first layers; zero at text."""
    assert encoded.image_embeds is not None
    embeds, mask = encoded.image_embeds, encoded.image_mask
    parts = embeds.reshape(len(embeds), -1, d_model)[:, 1:]
    nothing = embeds.new_zeros(*mask.shape, *parts.shape[1:])
    return nothing.masked_scatter(mask[..., None, None], parts)


class HasParts(Protocol):
    """The part of a cache that what pictures write is read from."""

    model: Any

    def __getitem__(self, key: str) -> Tensor:
        """An activation by the name of its hook."""
        ...

    def apply_ln_to_stack(
        self, residual_stack: Tensor, /, layer: int | None, mlp_input: bool, pos_slice: Any
    ) -> Tensor:
        """Components over the scale of the norm in front of a layer."""
        ...


def with_parts(
    cache: HasParts,
    stack: Float[Tensor, "component *shape"],
    labels: list[str],
    layer: int | None,
    mlp_input: bool,
    apply_ln: bool,
    pos_slice: Any,
    project_onto: Tensor | None = None,
) -> tuple[Float[Tensor, "more *shape"], list[str]]:
    """Components of the stream, and those that pictures write, each behind `{l}_mlp_out`, else last.

    Args:
        cache: Where they are read from.
        stack, labels: The others, and their names.
        layer, mlp_input, apply_ln, pos_slice, project_onto: As for `ActivationCache`'s own decompositions.
    """
    cfg = cache.model.cfg
    end = cfg.n_layers if layer in (None, -1) else layer
    layers = range(min(cfg.n_deepstack, end))
    if not layers:
        return stack, labels
    positions = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
    wrote = torch.stack([positions.apply(cache[f"blocks.{n}.hook_deepstack"], dim=-2) for n in layers])
    if apply_ln:
        wrote = cache.apply_ln_to_stack(wrote, layer=layer, mlp_input=mlp_input, pos_slice=positions)
    if project_onto is not None:
        wrote = wrote @ project_onto
    parts, names = list(stack), list(labels)
    for n, part in zip(layers, wrote, strict=True):
        place = names.index(f"{n}_mlp_out") + 1 if f"{n}_mlp_out" in names else len(names)
        parts.insert(place, part)
        names.insert(place, f"{n}_deepstack")
    return torch.stack(parts), names
