"""Tokens grouped into cells: each image is one cell, and so is each stretch of text that is left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.interventions import Group, Hook, check_heads, token_mask
from hones_lens.model import HookedVLM, ModelInput, VLMInputs, require_choice, takes_iterables, token_names
from hones_lens.results import Plottable

MOST_CELLS = 200
FOLDS = ("sum", "mean", "max")


@dataclass(frozen=True, eq=False)
class Cells:
    """The tokens of one row grouped into cells, in order; padding belongs to no cell.

    Attributes:
        names: Label of each cell: its token, `[image 0: 8 × 8]`, or `[12 tokens]`.
        spans: Positions of each cell's tokens.
        images: Index of the image that a cell holds; None for text.
        inputs: The row's prepared inputs.
    """

    names: tuple[str, ...]
    spans: tuple[tuple[int, ...], ...]
    images: tuple[int | None, ...]
    inputs: VLMInputs

    def __len__(self) -> int:
        return len(self.names)

    def fold(self, values: Float[Tensor, "*lead pos"], how: str = "sum") -> Float[Tensor, "*lead cell"]:
        """Reduce values by position to one value per cell.

        Args:
            values: One value per position.
            how: `sum`, `mean` or `max` over a cell's tokens.

        Raises:
            ValueError: An unknown `how`, or another number of values than of positions.
        """
        require_choice("fold", how, FOLDS)
        n_positions = self.inputs.input_ids.shape[1]
        if values.shape[-1] != n_positions:
            raise ValueError(f"{values.shape[-1]} values for {n_positions} positions")
        by_cell = [values[..., list(span)] for span in self.spans]
        reduced = [part.amax(-1) if how == "max" else getattr(part, how)(-1) for part in by_cell]
        return torch.stack(reduced, dim=-1)

    def pattern(self, pattern: Float[Tensor, "*lead query key"]) -> Float[Tensor, "*lead cell cell"]:
        """Attention between cells: summed over keys, averaged over queries, so that rows still sum to 1."""
        by_key = self.fold(pattern, "sum")
        return self.fold(by_key.transpose(-1, -2), "mean").transpose(-1, -2)

    def patches(
        self, pattern: Float[Tensor, "*lead query key"], image: int
    ) -> Float[Tensor, "*lead cell rows columns"]:
        """Attention from each cell to each token of an image's grid, averaged over the cell's queries."""
        positions = self.inputs.cell_positions(0, image)
        by_cell = self.fold(pattern[..., positions.flatten()].transpose(-1, -2), "mean").transpose(-1, -2)
        return by_cell.unflatten(-1, positions.shape).masked_fill(positions < 0, 0.0)


def fold_tokens(
    model: HookedVLM, model_input: ModelInput, keep: Group = "text", *, row: int = 0, most: int = MOST_CELLS
) -> Cells:
    """Group a row's tokens into cells: one per image, per kept token, and per stretch of other text.

    Args:
        model: The model.
        model_input: A batch.
        keep: Group of text tokens that stay cells of their own; images are always folded.
        row: Row of the batch.
        most: Largest allowed number of cells.

    Raises:
        ValueError: More cells than that; an empty or unknown group; a row padded on the right.
        IndexError: No such row.
    """
    inputs = model.as_inputs(model_input)
    if not 0 <= row < len(inputs):
        raise IndexError(f"there are {len(inputs)} rows; there is no row {row}")
    if isinstance(keep, Tensor):
        keep = token_mask(inputs, keep)[row : row + 1]
    row_inputs = inputs[row]
    row_inputs.require_left_padding("fold tokens")
    kept = token_mask(row_inputs, keep)[0].tolist()
    starts = _image_spans(row_inputs)
    tokens = token_names(model, row_inputs.input_ids[0].tolist())
    names, spans, images = [], [], []
    position = int((row_inputs.attention_mask[0] == 0).sum())
    while position < len(tokens):
        image, end = None, position + 1
        if position in starts:
            image, end = starts[position]
        elif not kept[position]:
            while end < len(tokens) and not kept[end] and end not in starts:
                end += 1
        names.append(_cell_name(tokens[position], image, end - position, row_inputs, kept[position]))
        spans.append(tuple(range(position, end)))
        images.append(image)
        position = end
    if len(names) > most:
        raise ValueError(
            f"{len(names)} cells, more than {most}: fold text by keeping less of it, e.g. keep='question'"
        )
    return Cells(tuple(names), tuple(spans), tuple(images), row_inputs.to("cpu"))


def _image_spans(inputs: VLMInputs) -> dict[int, tuple[int, int]]:
    """By an image's first position: its index and the position after it; the inputs have one row."""
    spans: dict[int, tuple[int, int]] = {}
    for image in range(len(inputs.grids[0]) if inputs.grids else 0):
        image_positions: list[int] = inputs.image_positions(0, image).tolist()
        if image_positions[-1] - image_positions[0] != len(image_positions) - 1:
            raise ValueError(f"the tokens of image {image} do not lie side by side")
        spans[image_positions[0]] = (image, image_positions[-1] + 1)
    return spans


def _cell_name(token: str, image: int | None, n: int, inputs: VLMInputs, kept: bool) -> str:
    if image is not None:
        rows, columns = inputs.grids[0][image]
        return f"[image {image}: {rows} × {columns}]"
    return token if kept else f"[{n} token{'s' if n > 1 else ''}]"


@dataclass(frozen=True, eq=False, repr=False)
class FoldedAttention(Plottable):
    """Attention of some heads between cells, and from cells to patches.

    `plot(**options)` draws a map of query by key for each head; options: of `hones_lens.viz.cell_patterns`.

    Attributes:
        model_name: Name of the model.
        heads: (layer, head) of each head.
        cells: The cells.
        pattern: `Cells.pattern` of each head, on the CPU, [head cell cell].
        patches: `Cells.patches` of each head, for each image, [head cell rows columns].
    """

    model_name: str
    heads: tuple[tuple[int, int], ...]
    cells: Cells
    pattern: Float[Tensor, "head query key"]
    patches: tuple[Tensor, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Labels of the heads, such as `L1H3`."""
        return tuple(f"L{layer}H{head}" for layer, head in self.heads)

    def __str__(self) -> str:
        return f"{self.model_name}: attention of {', '.join(self.names)} between {len(self.cells)} cells"


@takes_iterables
@torch.no_grad()
def folded_attention(
    model: HookedVLM,
    model_input: ModelInput,
    heads: Iterable[Sequence[Any]],
    keep: Group = "text",
    *,
    row: int = 0,
    most: int = MOST_CELLS,
    hooks: Sequence[Hook] = (),
) -> FoldedAttention:
    """Attention patterns between cells, reduced layer by layer, so that no full pattern is kept.

    Args:
        model: The model.
        model_input: A batch.
        heads: (layer, head) pairs, or components as `HeadScores.top` returns them.
        keep, row, most: As for `fold_tokens`.
        hooks: Hooks of an intervention, active during the run.

    Raises:
        ValueError: No heads, one that the model does not have; and as `fold_tokens`.
    """
    chosen = check_heads(model, heads)
    inputs = model.as_inputs(model_input)
    cells = fold_tokens(model, inputs, keep, row=row, most=most)
    images = [image for image in cells.images if image is not None]
    folded: dict[tuple[int, int], tuple[Tensor, list[Tensor]]] = {}

    def make_reader(layer: int) -> Any:
        def read(pattern: Tensor, hook: object) -> None:
            for head_layer, head in chosen:
                if head_layer == layer:
                    weights = pattern[0, head].float().cpu()
                    folded[head_layer, head] = (
                        cells.pattern(weights),
                        [cells.patches(weights, image) for image in images],
                    )

        return read

    readers = [
        (f"blocks.{head_layer}.attn.hook_pattern", make_reader(head_layer))
        for head_layer in sorted({head_layer for head_layer, _ in chosen})
    ]
    with model.hooks(fwd_hooks=[*hooks, *readers]):
        model(inputs[row], logits_to_keep=1)
    return FoldedAttention(
        model_name=model.cfg.model_name,
        heads=chosen,
        cells=cells,
        pattern=torch.stack([folded[head][0] for head in chosen]),
        patches=tuple(torch.stack([folded[head][1][i] for head in chosen]) for i in range(len(images))),
    )
