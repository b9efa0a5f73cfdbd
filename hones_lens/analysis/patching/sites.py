"""What can be patched: kinds of activations, their heads or neurons, and the positions of token groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.interventions import (
    Group,
    Heads,
    Layers,
    as_component,
    as_words,
    check_indices,
    join_numbers,
    layer_numbers,
    named_groups,
)
from hones_lens.model import HookedVLM, VLMConfig, VLMInputs, require_choice, takes_iterables

BY = ("group", "position", "all")
# Heads or neurons: `each`, `together`, the same of every layer, (layer, index)s, or sets of these by name.
Units = str | Sequence[int] | Sequence[tuple[int, int]] | Mapping[str, Sequence[tuple[int, int]]]
# What one patch puts in: of each layer some units, or all (None).
Target = tuple[tuple[int, tuple[int, ...] | None], ...]


@dataclass(frozen=True)
class PatchSite:
    """A kind of activation.

    Attributes:
        what: Name of the site.
        hook: Name of its hook point within a layer.
        unit: Name of its components, such as `head`; None where it has none.
        unit_axis, position_axis: Axes of components and positions in the activation.
        count: Number of components in a layer.
        vision: Whether the site is in the vision tower instead of the decoder.
        layers: How many of the first layers have it, where not all do.
    """

    what: str
    hook: str
    unit: str | None = None
    unit_axis: int = 2
    position_axis: int = 1
    count: Callable[[VLMConfig], int] = lambda cfg: 1
    vision: bool = False
    layers: Callable[[VLMConfig], int] | None = None

    def name(self, layer: int) -> str:
        """Full name of the hook point in a layer."""
        return ("vision_encoder." if self.vision else "") + f"blocks.{layer}.{self.hook}"

    def n_layers(self, cfg: VLMConfig) -> int:
        """Number of layers that have this site."""
        if self.layers is not None:
            return self.layers(cfg)
        return cfg.vision.n_layers if self.vision else cfg.n_layers

    def by_unit(self, x: Bool[Tensor, "row *rest"]) -> Bool[Tensor, "row pos unit"]:
        """Whether any entry is true, by position and unit."""
        if x.ndim == 3:
            return x.any(-1, keepdim=True) if self.unit is None else x
        return x.movedim((self.position_axis, self.unit_axis), (1, 2)).flatten(3).any(-1)

    def broadcast_mask(self, chosen: Bool[Tensor, "row pos unit"]) -> Bool[Tensor, "row *rest"]:
        """A mask over positions and units, reshaped to broadcast over the activation."""
        if self.unit in (None, "neuron"):
            return chosen
        return chosen[..., None].movedim((1, 2), (self.position_axis, self.unit_axis))


def _decoder_sites() -> list[PatchSite]:
    heads, kv_heads = (lambda cfg: cfg.n_heads), (lambda cfg: cfg.n_key_value_heads)
    streams = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    return [
        *(PatchSite(name, f"hook_{name}") for name in streams),
        *(PatchSite(name, f"attn.hook_{name}", "head", count=heads) for name in ("z", "q")),
        *(PatchSite(name, f"attn.hook_{name}", "kv_head", count=kv_heads) for name in ("k", "v")),
        PatchSite("pattern", "attn.hook_pattern", "head", unit_axis=1, position_axis=2, count=heads),
        PatchSite("neurons", "mlp.hook_post", "neuron", count=lambda cfg: cfg.d_mlp),
        PatchSite("deepstack", "hook_deepstack", layers=lambda cfg: cfg.n_deepstack),
    ]


SITES = {
    site.what: site
    for site in (
        *_decoder_sites(),
        PatchSite("vision_z", "attn.hook_z", "head", count=lambda cfg: cfg.vision.n_heads, vision=True),
        PatchSite(
            "vision_neurons", "mlp.hook_post", "neuron", count=lambda cfg: cfg.vision.d_mlp, vision=True
        ),
    )
}


def as_patch_site(what: str) -> PatchSite:
    """The activation of that name.

    Raises:
        ValueError: An unknown name.
    """
    require_choice("activation", what, SITES)
    return SITES[what]


@dataclass(frozen=True)
class Targets:
    """The patches to run, and the layout of their results.

    Attributes:
        cells: The patches, in the order of `shape`.
        axes, shape: Axes and shape of the results.
        labels: Labels by axis, for axes whose entries are not simply numbered.
    """

    cells: tuple[Target, ...]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    labels: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """The layers that are patched, sorted, without duplicates."""
        return sorted({layer for cell in self.cells for layer, _ in cell})

    def layout(
        self, by: str, positions: Sequence[str]
    ) -> tuple[tuple[int, ...], tuple[str, ...], dict[str, tuple[Any, ...]]]:
        """Shape, axes and labels of results by target and, unless `by` is `all`, by position."""
        if by == "all":
            return self.shape, self.axes, dict(self.labels)
        return (*self.shape, len(positions)), (*self.axes, by), self.labels | {by: tuple(positions)}


@takes_iterables
def targets_of(
    site: PatchSite, cfg: VLMConfig, layers: Layers | None = None, units: Units | None = None
) -> Targets:
    """What to patch, one after the other.

    Args:
        site: The activation.
        cfg: The model's.
        layers: Which layers, as numbers, ranges or words (`"10-20"`, both ends in it); default: all.
        units: `each` head or neuron alone, all of a layer `together`, some of them by their index, one at a
            time, pairs (layer, index), one at a time, or named sets of such pairs, each set at once.
            Default: heads each alone, neurons together.

    Raises:
        ValueError: A layer or unit that is not there or given twice, units of what has none, layers
            beside units that say theirs, or what no layer of the model has.
    """
    if not site.n_layers(cfg):
        raise ValueError(f"no layer of {cfg.model_name} has {site.what}")
    if units is None:
        units = "each" if site.unit in ("head", "kv_head") else "together"
    if isinstance(units, str):
        require_choice("units", units, ("each", "together"), "numbers, (layer, number)s or sets")
    if site.unit is None and units != "together":
        raise ValueError(f"{site.what} has no heads or neurons to choose from")
    named = isinstance(units, Mapping)
    if named or (not isinstance(units, str) and len(units) and not isinstance(units[0], int)):
        if layers is not None:
            raise ValueError("units that say their layers leave no layers to choose")
        return _targets_of_units(site, cfg, units)
    numbers = range(site.n_layers(cfg)) if layers is None else layer_numbers(layers)
    chosen = check_indices("layer", numbers, site.n_layers(cfg))
    labels = {} if layers is None else {"layer": tuple(chosen)}
    if units == "together":
        cells = tuple(((layer, None),) for layer in chosen)
        return Targets(cells, ("layer",), (len(chosen),), labels)
    assert site.unit is not None
    count = site.count(cfg)
    of_a_layer: Any = range(count) if isinstance(units, str) else units
    chosen_units = check_indices(site.unit, of_a_layer, count)
    labels |= {} if isinstance(units, str) else {site.unit: tuple(chosen_units)}
    cells = tuple(((layer, (unit,)),) for layer in chosen for unit in chosen_units)
    return Targets(cells, ("layer", site.unit), (len(chosen), len(chosen_units)), labels)


def heads_as_units(
    site: PatchSite, heads: Heads | None, layers: Layers | None, units: Units | None
) -> tuple[Layers | None, Units | None]:
    """Layers and units for `targets_of`; heads that are asked for become the units.

    Raises:
        ValueError: Heads of what has none, beside units, or outside of the layers.
    """
    if heads is None:
        return layers, units
    if site.unit not in ("head", "kv_head"):
        raise ValueError(f"{site.what} has no heads to choose from")
    if units is not None:
        raise ValueError("heads and units are two ways to say the same: give one")
    chosen = [as_component(head, "H") for head in as_words(heads)]
    within = None if layers is None else layer_numbers(layers)
    for layer, head in chosen:
        if within is not None and layer not in within:
            raise ValueError(f"head L{layer}H{head} is not in the layers {join_numbers(within)}")
    return None, chosen


def _targets_of_units(site: PatchSite, cfg: VLMConfig, units: Any) -> Targets:
    """Targets for pairs (layer, index), one at a time or in named sets."""
    assert site.unit is not None
    sets = units if isinstance(units, Mapping) else {f"L{p[0]}.{p[1]}": [p] for p in units}
    if len(sets) < len(units) or not sets:
        raise ValueError(f"no {site.unit}s, or one that is given twice")
    cells = []
    for pairs in sets.values():
        by_layer: dict[int, list[int]] = {}
        for layer, index in ((int(pair[0]), int(pair[1])) for pair in pairs):
            by_layer.setdefault(layer, []).append(index)
        check_indices("layer", list(by_layer), site.n_layers(cfg))
        cells.append(
            tuple(
                (n, tuple(check_indices(site.unit, by_layer[n], site.count(cfg)))) for n in sorted(by_layer)
            )
        )
    axis = "set" if isinstance(units, Mapping) else site.unit
    return Targets(tuple(cells), (axis,), (len(cells),), {axis: tuple(sets)})


# -- positions ---------------------------------------------------------------------------------------


@takes_iterables
def positions_of(
    model: HookedVLM,
    pairs: PatchPairs,
    site: PatchSite,
    by: str,
    groups: Mapping[str, Group] | Sequence[Group] | None,
) -> dict[str, Bool[Tensor, "pair pos"]]:
    """Masks of the positions that are patched together, by label.

    Raises:
        ValueError: An unknown `by`, groups where there is nothing to choose, a group that is empty in a
            pair, or pairs whose positions are not the same tokens.
    """
    require_choice("by", by, BY)
    if groups is not None and by != "group":
        raise ValueError(f"groups are for by='group', not {by!r}")
    tokens = pairs.clean.attention_mask.bool()
    if by == "all":
        return {"all": tokens}
    if by == "position":
        if site.vision:
            raise ValueError(f"{site.what} has patches, not tokens: patch by group (a Box) or all of them")
        labels = position_labels(model, pairs)
        each = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        return {label: mask.expand_as(tokens) for label, mask in zip(labels, each, strict=True)}
    if groups is None:
        question = "question" if "question" in pairs.clean.token_groups else "text"
        groups = ["image"] if site.vision else ["image", question, "last"]
    return named_groups(pairs.clean, groups if isinstance(groups, Mapping) else list(groups))


def position_labels(model: HookedVLM, pairs: PatchPairs) -> tuple[str, ...]:
    """Label of each position, the same in all pairs: its number and its token.

    Image tokens are called by their row and column, a token that is corrupted by both tokens.

    Raises:
        ValueError: Pairs of different lengths or with different tokens.
    """
    clean, corrupted = pairs.clean, pairs.corrupted
    if not bool(clean.attention_mask.all()):
        raise ValueError("by='position' needs pairs of one length: patch by group")
    for inputs in (clean, corrupted):
        other = (inputs.input_ids != inputs.input_ids[:1]).nonzero()
        if len(other) or len(set(clean.grids)) > 1:
            row, at = other[0].tolist() if len(other) else (1, 0)
            raise ValueError(
                f"pairs {pairs.ids[0]!r} and {pairs.ids[row]!r} have different tokens at position {at}: "
                "by='position' needs pairs of one prompt; patch by group"
            )
    before, after = (model.to_str_tokens(inputs.input_ids[0]) for inputs in (clean, corrupted))
    names = [a if a == b else f"{a}→{b}" for a, b in zip(before, after, strict=True)]
    for image in range(len(clean.grids[0])):
        which = f"image {image}" if len(clean.grids[0]) > 1 else "image"
        for position in clean.image_positions(0, image).tolist():
            names[position] = f"{which} class" if clean.layout(0, image).leading else f"{which} newline"
        for row, columns in enumerate(clean.cell_positions(0, image).tolist()):
            for column, position in enumerate(columns):
                names[position] = f"{which} {row},{column}"
    return tuple(f"{i} {name}" for i, name in enumerate(names))


def vision_mask(
    inputs: VLMInputs, mask: Bool[Tensor, "batch pos"], width: int, group: str
) -> Bool[Tensor, "image token"]:
    """A mask over the decoder's positions as one over the tokens of the vision tower.

    A patch is included where the cell is that it lies in. Tower tokens of no cell (a class token, padding)
    are included where the whole image is.

    Args:
        inputs: A prepared batch.
        mask: Mask over the positions of the inputs.
        width: Number of tower tokens per image, or tile.
        group: Name of the mask, for error messages.

    Raises:
        ValueError: A row without an image token in the mask, newlines aside.
    """
    lead, masks = width - max(n for row in inputs.tower_patches for n in row), list[Tensor]()
    for row, grids in enumerate(inputs.grids):
        if not bool(mask[row][inputs.image_mask[row] & ~inputs.newline_mask[row]].any()):
            raise ValueError(
                f"token group {group!r} has no image token in row {row}, and the vision tower no other"
            )
        for image in range(len(grids)):
            positions, layout = inputs.cell_positions(row, image), inputs.layout(row, image)
            cells = mask[row][positions] & (positions >= 0)
            patch_grid = inputs.patch_grids[row][image]
            of_entry = prod(layout.tile or patch_grid)
            out = torch.full((layout.entries, width), bool(cells.all()), dtype=torch.bool, device=mask.device)
            patches = out[:, lead : lead + of_entry].clone().flatten()
            patches[layout.patch_places(patch_grid).to(mask.device)] = _enlarged(cells, patch_grid)
            out[:, lead : lead + of_entry] = patches.view(layout.entries, of_entry)
            masks.append(out)
    return torch.cat(masks)


def _enlarged(cells: Bool[Tensor, "rows columns"], grid: tuple[int, int]) -> Bool[Tensor, "_ _"]:
    """The cell that each patch of a finer grid lies in."""
    for axis, n in enumerate(grid):
        centres = 2 * torch.arange(n, device=cells.device) + 1
        cells = cells.index_select(axis, centres * cells.shape[axis] // (2 * n))
    return cells
