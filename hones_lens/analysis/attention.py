"""Attention of heads from a query token, and image tokens that act as attention sinks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hones_lens.interventions import Box, Group, Hook, check_heads, group_name, token_mask
from hones_lens.model import HookedVLM, ModelInput, VLMInputs, takes_iterables, token_names
from hones_lens.results import Plottable

SINK_RATIO = 5.0  # times the median image token's attention from which a token counts as a sink
Source = int | Group
_SPACE = "▁"  # in the names of tokens


@dataclass(frozen=True, eq=False, repr=False)
class HeadAttention(Plottable):
    """Attention of some heads from a token of one row, or the mean over several tokens.

    `plot(pictures, **options)` draws it over the row's pictures; options: of `hones_lens.viz.attention_maps`.

    Attributes:
        model_name: Name of the model.
        heads: (layer, head) of each head.
        source: Description of the query token or token group.
        positions: Positions of the query tokens.
        weights: Attention to every position, on the CPU, [head pos].
        received: Mean attention to every position over all heads and layers, from the text behind the row's
            last image, [pos]; None where there is no such text, or no image.
        inputs: The row's prepared inputs.
    """

    model_name: str
    heads: tuple[tuple[int, int], ...]
    source: str
    positions: tuple[int, ...]
    weights: Float[Tensor, "head pos"]
    received: Float[Tensor, " pos"] | None
    inputs: VLMInputs

    @property
    def names(self) -> tuple[str, ...]:
        """Labels of the heads, such as `L1H3`."""
        return tuple(f"L{layer}H{head}" for layer, head in self.heads)

    @property
    def n_images(self) -> int:
        """Number of images in the row."""
        return len(self.inputs.grids[0]) if self.inputs.grids else 0

    def on_image(self, image: int = 0) -> Float[Tensor, "head rows columns"]:
        """Attention to each image token, on the image's grid in raster order; 0 where a cell has no token.

        Raises:
            IndexError: No such image.
            ValueError: The query tokens come before the image, and attention is causal.
        """
        mask = torch.zeros(self.weights.shape[1])
        mask[list(self.positions)] = 1.0
        maps = torch.stack([self._grid(weights, image) for weights in self.weights])
        first = int(self.inputs.image_positions(0, image)[0])
        if not mask[first:].any():
            raise ValueError(f"{self.source} comes before image {image} and sees nothing of it")
        return maps

    def sinks(self, image: int = 0, times: float = SINK_RATIO) -> Bool[Tensor, "rows columns"]:
        """Attention sinks: image tokens that receive much attention whatever the prompt asks.

        A sink's attention, averaged over all heads and layers and over the text after the image, is more
        than `times` that of the image's median token. Only text after the image counts, since it can attend
        to every image token. The object in a picture also draws more attention than the median: on
        tiny-llava up to 1.8 times as much.

        Raises:
            IndexError: No such image.
            ValueError: No text follows the images, or `times` is below 1.
        """
        if times < 1:
            raise ValueError(
                f"a sink has more than the median's attention: times must be at least 1, not {times}"
            )
        if self.received is None:
            raise ValueError("no text follows the row's images, so whom all look at is not known")
        received = self._grid(self.received, image)
        return received > times * received.median()

    def _grid(self, values: Tensor, image: int) -> Tensor:
        if not 0 <= image < self.n_images:
            raise IndexError(f"the row has {self.n_images} images; there is no image {image}")
        return self.inputs.heatmap(values, 0, image)

    def __str__(self) -> str:
        lines = [f"{self.model_name}: attention from {self.source}"]
        for i in range(self.n_images):
            shares = self.on_image(i).sum((1, 2)).tolist()
            entries = ", ".join(f"{name} {share:.3f}" for name, share in zip(self.names, shares, strict=True))
            lines.append(f"on image {i}: {entries}")
        return "\n".join(lines)


@takes_iterables
@torch.no_grad()
def head_attention(
    model: HookedVLM,
    model_input: ModelInput,
    heads: Iterable[Sequence[Any]],
    source: Source = "last",
    *,
    row: int = 0,
    hooks: Sequence[Hook] = (),
) -> HeadAttention:
    """Attention of heads from one token, or averaged over the tokens of a group.

    Args:
        model: The model.
        model_input: A batch.
        heads: (layer, head) pairs, or components as `HeadScores.top` returns them.
        source: The query: a position (negative counts from the end), a token group (see `token_mask`; the
            mean over its tokens), or a token as the tokenizer writes it, with or without its space marker.
        row: Row of the batch.
        hooks: Hooks of an intervention, active during the run.

    Raises:
        ValueError: No heads, one that the model does not have, a position that is padding or not there, a
            token that the row does not have or has several times, an empty group, or padding on the right.
        IndexError: No such row.
    """
    chosen = check_heads(model, heads)
    inputs = model.as_inputs(model_input)
    if not 0 <= row < len(inputs):
        raise IndexError(f"there are {len(inputs)} rows; there is no row {row}")
    if isinstance(source, Tensor):
        source = token_mask(inputs, source)[row : row + 1]
    row_inputs = inputs[row]
    row_inputs.require_left_padding("read attention")
    positions, name = _positions(model, row_inputs, source)
    text_after = _text_after_images(row_inputs)
    weights_by_layer: dict[int, Tensor] = {}
    received = torch.zeros(row_inputs.input_ids.shape[1], dtype=torch.float64)

    def make_reader(layer: int) -> Any:
        def read(pattern: Tensor, hook: object) -> None:
            weights_by_layer[layer] = pattern[0, :, positions].float().mean(1).cpu()
            if text_after:
                received.add_(pattern[0, :, text_after].double().mean((0, 1)).cpu())

        return read

    readers = [
        (f"blocks.{layer}.attn.hook_pattern", make_reader(layer)) for layer in range(model.cfg.n_layers)
    ]
    with model.hooks(fwd_hooks=[*hooks, *readers]):
        model(row_inputs, logits_to_keep=1)
    return HeadAttention(
        model_name=model.cfg.model_name,
        heads=chosen,
        source=name,
        positions=tuple(positions),
        weights=torch.stack([weights_by_layer[layer][head] for layer, head in chosen]),
        received=(received / model.cfg.n_layers).float() if text_after else None,
        inputs=row_inputs.to("cpu"),
    )


def _text_after_images(inputs: VLMInputs) -> list[int]:
    """Positions of the text after the last image token; the inputs have one row."""
    image = inputs.image_mask[0].nonzero()[:, 0].tolist()
    return list(range(image[-1] + 1, inputs.input_ids.shape[1])) if image else []


def _positions(model: HookedVLM, inputs: VLMInputs, source: Source) -> tuple[list[int], str]:
    """Positions of the query tokens, and their description; the inputs have one row."""
    tokens = token_names(model, inputs.input_ids[0].tolist())
    if isinstance(source, int):
        length, padding = len(tokens), int((inputs.attention_mask[0] == 0).sum())
        position = source + length if source < 0 else source
        if not padding <= position < length:
            raise ValueError(f"position {source} is not among the row's {padding} … {length - 1}")
        return [position], f"position {position}, {tokens[position]}"
    if isinstance(source, str) and source not in ("all", *inputs.token_groups):
        position = _token_position(source, tokens, inputs)
        return [position], f"position {position}, {tokens[position]}"
    positions = token_mask(inputs, source)[0].nonzero()[:, 0].tolist()
    if source == "last":
        return positions, f"the last token, {tokens[-1]}"
    name = str(source) if isinstance(source, Box) else group_name(source)
    return positions, f"{name}, mean over {len(positions)} tokens" if len(positions) > 1 else name


def _token_position(text: str, tokens: Sequence[str], inputs: VLMInputs) -> int:
    """Position of a token that occurs once in the row."""
    is_token = inputs.attention_mask[0].bool().tolist()
    positions = [
        i
        for i, (token, real) in enumerate(zip(tokens, is_token, strict=True))
        if real and text.replace(" ", _SPACE) in (token, token.lstrip(_SPACE))
    ]
    if not positions:
        groups = ", ".join(("all", *inputs.token_groups))
        raise ValueError(f"the row has no token {text!r}, nor is that a group; groups: {groups}")
    if len(positions) > 1:
        listing = ", ".join(map(str, positions[:8])) + (", …" if len(positions) > 8 else "")
        raise ValueError(f"the row has {len(positions)} tokens {text!r}, at {listing}: give a position")
    return positions[0]
