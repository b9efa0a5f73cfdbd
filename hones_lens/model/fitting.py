"""Whether the weights of a checkpoint fit into memory, known before one of them is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hones_lens.model.memory import free_bytes

_HALF = 2  # bytes of a weight whose type is not known beforehand, the fewest that it has
_ROOM = 0.8  # of a device's free memory that weights may fill if activations shall have some too


class Need:
    """The memory that a model's weights need.

    Args:
        name: The checkpoint, for messages.
        hf_model: Its model without values.
        dtype: What it is loaded as; `auto`: the checkpoint's own type.
        place: Its folder, if it is in one.
    """

    def __init__(self, name: str, hf_model: Any, dtype: Any, place: str):
        self.name = name
        self.n_weights = sum(parameter.numel() for parameter in hf_model.parameters())
        self.dtype = _own_dtype(hf_model.config, Path(place)) if dtype == "auto" else _as_dtype(dtype)

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return self.n_weights * (_HALF if self.dtype is None else self.dtype.itemsize)

    def fits(self, device: torch.device) -> bool:
        """Whether a device holds the weights, with some room for activations."""
        return self.bytes <= _ROOM * free_bytes(device)

    def check(self, device: torch.device) -> None:
        """Check that a device, and the machine's memory that weights are read into, can hold the weights.

        Raises:
            ValueError: They can't; says how much is needed and free, and which options would help.
        """
        for where in dict.fromkeys((torch.device("cpu"), device)):
            free = free_bytes(where)
            if self.bytes > free:
                there = "this machine" if where.type == "cpu" else str(where)
                raise ValueError(
                    f"the weights of {self.name!r} need {_size(self.bytes)} in {self._kind()}, but {there} "
                    f"has {_size(free)} free: {self._advice()}"
                )

    def _kind(self) -> str:
        return "16 bits" if self.dtype is None else str(self.dtype).removeprefix("torch.")

    def _advice(self) -> str:
        ways = "lay them over GPUs, memory and disk by --device-map auto (device_map='auto')"
        if self.bytes <= _HALF * self.n_weights:
            return ways
        half = f"load them by --dtype bfloat16 (dtype='bfloat16': {_size(_HALF * self.n_weights)})"
        return f"{half}, or {ways}"


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _own_dtype(config: Any, folder: Path) -> torch.dtype | None:
    """The type that `auto` stands for: the config's, or that of the folder's first weights."""
    if config.dtype is not None:
        return _as_dtype(config.dtype)
    for file in sorted(folder.glob("*.safetensors")):
        opened: Any = safe_open(file, "pt")
        with opened as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                return weights.get_slice(name)[:0].dtype
    return None


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"
