"""Weights that bitsandbytes keeps in 8 or 4 bits, which are dequantised whenever a layer runs or is read."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from hones_lens.model.typed import named_modules

LIBRARY = "bitsandbytes"


def can_dequantise(settings: Any) -> bool:
    """Whether a `quantization_config` is of bitsandbytes, and that is installed."""
    to_dict: Any = getattr(settings, "to_dict", None)
    values: Any = to_dict() if to_dict else settings or {}
    method = values.get("quant_method")
    return getattr(method, "value", method) == LIBRARY and find_spec(LIBRARY) is not None


def is_quantised(config: Any) -> bool:
    """Whether a Hugging Face config is that of quantised weights."""
    return bool(getattr(config, "quantization_config", None))


def without_quantisation(config: Any) -> Any:
    """The config of the same model with weights that are not quantised."""
    if not is_quantised(config):
        return config
    plain = deepcopy(config)
    del plain.quantization_config
    return plain


def quantised_weights(hf_model: nn.Module) -> dict[str, tuple[torch.Size, Callable[[], Tensor]]]:
    """Shape [out in] of the weights that bitsandbytes has quantised, and how they are read, by name.

    Raises:
        ValueError: Weights that can't be read any more; names the layer.
    """
    found: dict[str, tuple[torch.Size, Callable[[], Tensor]]] = {}
    for name, module in named_modules(hf_model):
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and type(weight).__name__ in ("Int8Params", "Params4bit"):
            shape = torch.Size((module.out_features, module.in_features))
            found[f"{name}.weight"] = (shape, _reader(name, module))
    return found


def _reader(name: str, layer: Any) -> Callable[[], Tensor]:
    """How the weights [out in] of a layer are read, as they are now.

    The first pass of the layer itself on a CPU lays its 4-bit weights out anew and rounds their scales; what
    is kept here is what was before.
    """
    weight = layer.weight
    if type(weight).__name__ == "Int8Params":
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB
        return lambda: weight.data.float() * (scale.float() / 127)[:, None]
    bits: Any = import_module("bitsandbytes.functional")
    data, state = weight.data, copy(weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"the 4-bit weights of {name} were laid out anew by a pass on the CPU, and can't be read any "
            "more: load the model again, and hook it before it runs"
        )
    return lambda: bits.dequantize_4bit(data, state)
