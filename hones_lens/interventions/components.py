"""Checks that a model has the heads or neurons that are given by layer and index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hones_lens.model import HookedVLM, takes_iterables


def check_component(
    kind: str, layer: int, index: int, n_layers: int, per_layer: int, source: str = ""
) -> None:
    """Check that a head or neuron exists.

    Args:
        kind: `head`, `key-value head` or `neuron`.
        layer, index: The component.
        n_layers, per_layer: Number of layers, and of components of that kind in each.
        source: Where the component was named, for the error, e.g. a file.

    Raises:
        ValueError: Either is out of range, e.g. `neuron L3N20 does not exist: 3 layers of 20 neurons`.
    """
    if not (0 <= layer < n_layers and 0 <= index < per_layer):
        name = f"{kind} L{layer}{'N' if kind == 'neuron' else 'H'}{index}"
        prefix = f"{source}: " if source else ""
        raise ValueError(f"{prefix}{name} does not exist: {n_layers} layers of {per_layer} {kind}s")


@takes_iterables
def check_heads(model: HookedVLM, heads: Iterable[Sequence[Any]]) -> tuple[tuple[int, int], ...]:
    """The heads as (layer, head) tuples, after checking that each exists.

    Raises:
        ValueError: No heads, or one that the model does not have.
    """
    chosen = tuple((int(head[0]), int(head[1])) for head in heads)
    if not chosen:
        raise ValueError("no heads to look at")
    for layer, head in chosen:
        check_component("head", layer, head, model.cfg.n_layers, model.cfg.n_heads)
    return chosen
