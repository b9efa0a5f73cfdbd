"""Heads, neurons and layers by name or number: read, and checked against the model."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any

from hones_lens.model import HookedVLM, takes_iterables

# Heads: names ("L18H29"), pairs (layer, head) or components; or words, "L18H29,L3H1".
Heads = str | Sequence[Any]
# Layers: numbers, ranges and words; or words, "10-20,25" (both ends are in it).
Layers = int | str | Sequence[Any]

_NAME = re.compile(r"L?(\d+)(?:\.|([HN]))(\d+)", re.IGNORECASE)
_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


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
        ValueError: Either is out of range, e.g. `neuron L3N20 does not exist: 3 layers of 20 neurons, L0N0
            to L2N19`.
    """
    if not (0 <= layer < n_layers and 0 <= index < per_layer):
        letter = "N" if kind == "neuron" else "H"
        prefix = f"{source}: " if source else ""
        raise ValueError(
            f"{prefix}{kind} L{layer}{letter}{index} does not exist: {n_layers} layers of {per_layer} "
            f"{kind}s, L0{letter}0 to L{n_layers - 1}{letter}{per_layer - 1}"
        )


@takes_iterables
def check_indices(kind: str, numbers: Sequence[int], count: int) -> list[int]:
    """The numbers of layers or components of one kind, after checking that each exists.

    Raises:
        ValueError: No numbers, one twice, or one that is not in 0 … count - 1.
    """
    chosen = [int(n) for n in numbers]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"{kind}s {chosen}: give at least one, and each once")
    for n in chosen:
        if not 0 <= n < count:
            raise ValueError(f"{kind} {n} is not in 0 … {count - 1}")
    return chosen


@takes_iterables
def check_heads(model: HookedVLM, heads: Iterable[Sequence[Any]]) -> tuple[tuple[int, int], ...]:
    """The heads as (layer, head) tuples, after checking that each exists.

    Raises:
        ValueError: No heads, or one that the model does not have.
    """
    chosen = tuple(as_component(head, "H") for head in as_words(heads))
    if not chosen:
        raise ValueError("no heads to look at")
    for layer, head in chosen:
        check_component("head", layer, head, model.cfg.n_layers, model.cfg.n_heads)
    return chosen


def as_words(given: Any) -> list[Any]:
    """`"a,b"` as its words; anything else as a list."""
    if isinstance(given, str):
        return [word.strip() for word in given.split(",") if word.strip()]
    return list(given)


def as_component(given: Any, letter: str = "") -> tuple[int, int]:
    """A head or neuron as (layer, index): of its name (`L18H29`, `L3N20`, `18.29`), a pair, a component.

    Args:
        given: The component.
        letter: `H` or `N` where a name has to be that of a head or of a neuron.

    Raises:
        ValueError: It can't be read as one.
    """
    if isinstance(given, str):
        found = _NAME.fullmatch(given.strip())
        if found and (found[2] or letter).upper() == (letter or found[2] or "").upper():
            return int(found[1]), int(found[3])
    else:
        try:
            return operator.index(given[0]), operator.index(given[1])
        except (TypeError, IndexError, KeyError):
            pass
    example = {"H": "head: L18H29", "N": "neuron: L18N29"}.get(letter, "component: L18H29, L18N29")
    raise ValueError(f"{given!r} is no name of a {example}, 18.29 and (18, 29) are")


@takes_iterables
def layer_numbers(layers: Layers) -> list[int]:
    """The numbers of layers: of numbers, ranges, and words such as `"10-20,25"`, which include both ends.

    Raises:
        ValueError: A word that is neither a number nor a range from below upwards.
    """
    numbers: list[int] = []
    for part in [layers] if isinstance(layers, int) else as_words(layers):
        if isinstance(part, str):
            found = _RANGE.fullmatch(part.strip())
            first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
            if first > last:
                raise ValueError(f"{part!r} is no layer or range of layers such as 25 or 10-20")
            numbers += range(first, last + 1)
        elif isinstance(part, range):
            numbers += part
        else:
            numbers.append(operator.index(part))
    return numbers


@takes_iterables
def choose_layers(layers: Layers | None, n_layers: int) -> list[int]:
    """The layers that are asked for, from the lowest; None: all.

    Raises:
        ValueError: None at all, one twice, or one that is not there; names it and the valid range.
    """
    if layers is None:
        return list(range(n_layers))
    return sorted(check_indices("layer", layer_numbers(layers), n_layers))


@takes_iterables
def choose_heads(
    model: HookedVLM, heads: Heads | None = None, layers: Layers | None = None
) -> list[tuple[int, int]]:
    """The decoder heads that are asked for as (layer, head), in order; None: all, or all of these layers.

    Raises:
        ValueError: No heads, one twice, one that the model does not have, or, where layers are given too,
            one outside of them; names it and the valid range.
    """
    chosen_layers = choose_layers(layers, model.cfg.n_layers)
    if heads is None:
        return [(layer, head) for layer in chosen_layers for head in range(model.cfg.n_heads)]
    chosen = check_heads(model, heads)
    if len(set(chosen)) < len(chosen):
        twice = next(head for head in chosen if chosen.count(head) > 1)
        raise ValueError(f"head L{twice[0]}H{twice[1]} is given twice")
    for layer, head in chosen:
        if layer not in chosen_layers:
            raise ValueError(f"head L{layer}H{head} is not in the layers {join_numbers(chosen_layers)}")
    return sorted(chosen)


@takes_iterables
def join_numbers(numbers: Sequence[int]) -> str:
    """Numbers in a row as ranges: `0-3, 7`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
