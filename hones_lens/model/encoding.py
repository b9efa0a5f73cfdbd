"""Images of many rows encoded with bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from hones_lens.model.config import VLMConfig
from hones_lens.model.deepstack import written_by_pictures
from hones_lens.model.inputs import VLMInputs
from hones_lens.model.memory import Allowance
from hones_lens.model.nn.context import AttentionContext


class EncodesImages(Protocol):
    """The part of a model that encoding images needs."""

    @property
    def cfg(self) -> VLMConfig:
        """Sizes and device of the vision tower."""
        ...

    def encode_images(self, inputs: VLMInputs) -> Tensor:
        """Embeddings of all images' tokens."""
        ...

    def hooked_names(self) -> list[str]:
        """Names of the hook points where hooks act."""
        ...

    def note_skipped(self, part: str, why: str) -> None:
        """Tell the hooks of this context why a part of the model does not run."""
        ...


class Rotates(EncodesImages, Protocol):
    """The part of a model that what blocks read of tokens needs."""

    def rotations(self, inputs: VLMInputs) -> AttentionContext:
        """The rotations of all tokens."""
        ...


def encoded(model: EncodesImages, inputs: VLMInputs) -> VLMInputs:
    """The same inputs with `image_embeds`, if they have pictures; for one run, with its gradients."""
    if inputs.pixel_values is None:
        model.note_skipped("vision", "the inputs have no pictures")
        return inputs
    if inputs.image_embeds is None:
        return replace(inputs, image_embeds=model.encode_images(inputs))
    model.note_skipped(
        "vision", "the pictures were encoded before (image_embeds), so the vision tower did not run"
    )
    return inputs


def token_context(model: Rotates, inputs: VLMInputs, first: int = 0) -> AttentionContext:
    """What blocks from `first` on read besides the stream, without masks (see `attention_context`)."""
    context = model.rotations(inputs)
    if first >= model.cfg.n_deepstack or inputs.pixel_values is None:
        return context
    known = encoded(model, inputs) if inputs.image_embeds is None else inputs
    return replace(context, deepstack=written_by_pictures(known, model.cfg.d_model).to(model.cfg.dtype))


@torch.no_grad()
def with_image_embeds(model: EncodesImages, inputs: VLMInputs) -> VLMInputs:
    """The same inputs with `image_embeds`: later runs skip the vision tower, and so its hooks.

    As many rows at a time as memory has room for; all at once while the vision tower has hooks, which see
    every image.
    """
    if inputs.pixel_values is None or inputs.image_embeds is not None:
        return inputs
    hooked = any(name.startswith("vision") for name in model.hooked_names())
    if hooked or len(inputs.grids) != len(inputs):
        return replace(inputs, image_embeds=model.encode_images(inputs))
    patches = inputs.tower_patches
    allowance = Allowance(model.cfg.device)
    most_patches = int(allowance.bytes // bytes_per_patch(model.cfg))
    parts = allowance.in_parts(
        [row for row, images in enumerate(patches) if images],
        lambda rest: _fitting([patches[row] for row in rest], most_patches),
        lambda rows: model.encode_images(inputs if len(rows) == len(inputs) else inputs[rows]),
    )
    return replace(inputs, image_embeds=torch.cat([embeds for _, embeds in parts]))


def bytes_per_patch(cfg: VLMConfig) -> int:
    """What a patch takes in a block of the vision tower: streams, heads, neurons."""
    vision = cfg.vision
    width = 6 * vision.d_model + 3 * vision.n_heads * vision.d_head + 6 * vision.d_mlp
    return width * torch.finfo(cfg.dtype).bits // 8


def _fitting(rows: Sequence[Sequence[int]], most: int) -> int:
    """How many of these rows have at most so many patches together, each image padded to the longest."""
    images = longest = 0
    for n, row in enumerate(rows):
        images, longest = images + len(row), max(longest, *row)
        if images * longest > most:
            return n
    return len(rows)
