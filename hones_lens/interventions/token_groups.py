"""Token groups: the positions that a name, a box on the picture or a mask selects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from hones_lens.model import VLMInputs, did_you_mean, takes_iterables, to_list


@dataclass(frozen=True)
class Box:
    """A rectangle on a picture, in the picture's own pixels, the origin at its top left.

    Attributes:
        left, top, right, bottom: The sides; right and bottom are the first pixels outside.
        image: Index of the image in its row; each tile of a picture, and its whole, is one.
        outside: Select the image tokens that the rectangle does not touch, instead of those that it does.
    """

    left: float
    top: float
    right: float
    bottom: float
    image: int = 0
    outside: bool = False

    def __str__(self) -> str:
        sides = f"box {self.left:g},{self.top:g} – {self.right:g},{self.bottom:g}"
        return f"outside {sides}" if self.outside else sides


Group = str | Box | Tensor


def token_mask(inputs: VLMInputs, group: Group) -> Bool[Tensor, "batch pos"]:
    """The positions of a group.

    Args:
        inputs: From `prepare` or `model.as_inputs`.
        group: `all` (every token), a name in `inputs.token_groups` (`image`, `text`, `question`, `last`,
            `answer`; `newline`, of families that write newlines into pictures), a `Box`: the image tokens
            whose cells it touches, or a mask [batch pos].

    Raises:
        ValueError: An unknown name, a box outside of a picture, a mask of another shape, or a group that is
            empty in a row; names the row.
    """
    if isinstance(group, Box):
        mask = torch.stack([_box_mask(inputs, row, group) for row in range(len(inputs))])
    elif isinstance(group, str):
        groups = {"all": inputs.attention_mask.bool(), **inputs.token_groups}
        if group not in groups:
            raise ValueError(
                f"unknown token group {group!r}; valid: {', '.join(groups)}, a Box or a mask"
                f"{did_you_mean(group, groups)}"
            )
        mask = groups[group]
    else:
        mask = torch.as_tensor(group)
        if mask.dtype != torch.bool or mask.shape != inputs.input_ids.shape:
            raise ValueError(
                f"a mask of {mask.dtype} {tuple(mask.shape)} for inputs of the shape "
                f"{tuple(inputs.input_ids.shape)}; give booleans [batch pos]"
            )
        mask = mask.to(inputs.input_ids.device)
    empty: list[int] = to_list((~mask.any(-1)).nonzero()[:, 0])
    if empty:
        raise ValueError(f"token group {group_name(group)!r} is empty in row {empty[0]}")
    return mask


def _touched(cells: int, start: float, end: float) -> Tensor:
    """Mask of the cells along one side that overlap [start, end], given as fractions of the side, [cells].

    A box that ends on a cell's edge, up to rounding, does not reach into the next cell.
    """
    edges = torch.arange(cells + 1, dtype=torch.float64)
    return (edges[:-1] + 1e-6 < end * cells) & (edges[1:] - 1e-6 > start * cells)


def _box_mask(inputs: VLMInputs, row: int, box: Box) -> Tensor:
    """Mask [pos] of one row; a cell counts as touched if the box covers any of its area."""
    if len(inputs.regions) != len(inputs):
        raise ValueError("where pictures lie is not known of these inputs: make them with model.prepare")
    if box.image >= len(inputs.regions[row]):
        raise ValueError(f"row {row} has {len(inputs.regions[row])} images; there is no image {box.image}")
    left, top, right, bottom = inputs.regions[row][box.image]
    if not (box.left < box.right and box.top < box.bottom):
        raise ValueError(f"{box} has no area")
    if box.left >= right or box.right <= left or box.top >= bottom or box.bottom <= top:
        visible = f"{left:g},{top:g} – {right:g},{bottom:g}"
        raise ValueError(f"{box} is outside of what the model sees of the image of row {row}, {visible}")
    rows, columns = inputs.grids[row][box.image]
    touched_y = _touched(rows, (box.top - top) / (bottom - top), (box.bottom - top) / (bottom - top))
    touched_x = _touched(columns, (box.left - left) / (right - left), (box.right - left) / (right - left))
    touched = (touched_y[:, None] & touched_x).flatten()
    if box.outside:
        touched = ~touched
    mask = torch.zeros_like(inputs.image_mask[row])
    positions = inputs.cell_positions(row, box.image).flatten()
    has_token = positions >= 0
    mask[positions[has_token]] = touched.to(mask.device)[has_token]
    return mask


def group_name(group: Group) -> str:
    """The name of a group in results."""
    return "mask" if isinstance(group, Tensor) else str(group)


@takes_iterables
def named_groups(
    inputs: VLMInputs, groups: Mapping[str, Group] | list[Group] | tuple[Group, ...]
) -> dict[str, Tensor]:
    """Masks [batch pos] by name; groups of a list are named by `group_name`.

    Raises:
        ValueError: No groups, or two of one name; and as `token_mask`.
    """
    groups_by_name = dict(groups) if isinstance(groups, Mapping) else {group_name(g): g for g in groups}
    if not groups_by_name or len(groups_by_name) < len(groups):
        raise ValueError("no token groups" if not groups else "two token groups have one name")
    return {name: token_mask(inputs, group) for name, group in groups_by_name.items()}
