"""How accelerate has laid a Hugging Face model over devices, the CPU's memory and the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from hones_lens.model.choices import require_choice
from hones_lens.model.names import did_you_mean
from hones_lens.model.typed import named_modules

DeviceMap = str | Mapping[str, int | str]
"""A way to lay a model over devices, or the device of each part by Hugging Face's names of modules."""

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_RESTING = ("cpu", "disk", "meta")  # where weights of a device map rest; they are computed with elsewhere


def check_device_map(device: str | None, device_map: DeviceMap | None) -> tuple[str | None, DeviceMap | None]:
    """Device and device map as they are loaded with: at most one of the two is given.

    Args:
        device: A device; `auto` is a device map.
        device_map: One of `DEVICE_MAPS`, a device for the whole model, or devices by module.

    Raises:
        ValueError: Both, or an unknown device map.
    """
    if device == "auto":
        device, device_map = None, device_map or "auto"
    if device_map is None:
        return device, None
    if device is not None:
        raise ValueError(f"device {device!r} and device_map {device_map!r} are both given: give one of them")
    if isinstance(device_map, str) and device_map.partition(":")[0] in ("cpu", "cuda", "mps", "xpu"):
        return device_map, None
    if isinstance(device_map, str):
        require_choice("device_map", device_map, DEVICE_MAPS)
    return None, device_map if isinstance(device_map, str) else dict(device_map)


def require_accelerate() -> None:
    """Raise ImportError where accelerate, which lays models out, is not installed."""
    if find_spec("accelerate") is None:
        raise ImportError("a device_map needs accelerate: pip install 'hones_lens[accelerate]'")


def check_parts(device_map: DeviceMap | None, hf_model: nn.Module) -> None:
    """Check that a device map by modules names each part of a model, and nothing else.

    Raises:
        ValueError: An unknown module, or weights that no entry covers; names them.
    """
    if device_map is None or isinstance(device_map, str):
        return
    modules = [name for name, _ in named_modules(hf_model)]
    for part in device_map:
        if part not in modules:
            hint = did_you_mean(part, modules)
            raise ValueError(f"device_map: the model has no module {part!r}{hint}")
    for name, _ in hf_model.named_parameters():
        if not any(part == "" or name.startswith(f"{part}.") for part in device_map):
            raise ValueError(f"device_map leaves out {name}; an entry '' stands for all that is not named")


def is_dispatched(hf_model: nn.Module) -> bool:
    """Whether accelerate brings weights and inputs of this model together."""
    return any(True for _, module in named_modules(hf_model) for _ in _hooks(module))


def home_device(hf_model: Any) -> torch.device:
    """The device where a model's input and output lie: the first that computes."""
    hooks = [hook for _, module in named_modules(hf_model) for hook in _hooks(module)]
    if not hooks:
        return hf_model.device
    places: dict[str, Any] = getattr(hf_model, "hf_device_map", None) or {}
    used = [place for place in places.values() if place not in _RESTING]
    used += [hook.execution_device for hook in hooks if hook.execution_device is not None]
    return torch.device("cuda", used[0]) if isinstance(used[0], int) else torch.device(used[0])


def offloaded_weights(hf_model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """How the weights are read that are on the meta device, but that accelerate keeps elsewhere, by name."""
    readers: dict[str, Callable[[], Tensor]] = {}
    modules = dict(named_modules(hf_model))
    for name, parameter in hf_model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta:
            continue
        path = name
        while path and name not in readers:
            path = path.rpartition(".")[0]
            own = name[len(path) + 1 :] if path else name
            for hook in _hooks(modules[path]):
                kept = getattr(hook, "weights_map", None)
                if kept is not None and own in kept:
                    readers[name] = _reader(kept, own)
                    break
    return readers


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate at a module, several in a row too, that know where its weights are."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        if hasattr(each, "execution_device"):
            yield each


def _reader(kept: Any, name: str) -> Callable[[], Tensor]:
    return lambda: kept[name]
