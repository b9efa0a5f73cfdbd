"""What PyTorch and transformers leave untyped, or type wrongly, with the types that it has."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from typing import Any, cast

from torch import Tensor, nn
from transformers.activations import ACT2FN

to_list: Callable[[Tensor], Any] = methodcaller("tolist")
"""A tensor as nested lists of numbers, as deep as it has axes; of one number, that number."""

_ACTIVATIONS = cast("dict[str, Callable[[Tensor], Tensor]]", ACT2FN)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """A function of transformers' activation table, e.g. `silu`."""
    return _ACTIVATIONS[name]


def activation_names() -> tuple[str, ...]:
    """The names in transformers' activation table."""
    return tuple(_ACTIVATIONS)


def bias_or_none(linear: nn.Linear) -> Tensor | None:
    """The bias of a linear layer, which PyTorch types as always there."""
    return cast("Tensor | None", linear.bias)


def bias_of(linear: nn.Linear) -> Tensor:
    """The bias of a linear layer; zeros where it has none."""
    bias = bias_or_none(linear)
    return linear.weight.new_zeros(linear.out_features) if bias is None else bias


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """All modules of a model by name, which PyTorch leaves untyped."""
    untyped: Any = model
    return list(untyped.named_modules(remove_duplicate=remove_duplicate))
