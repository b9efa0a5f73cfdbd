"""Bytes of the tensors that a block of code makes, counted as torch makes them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the storages that operations return and that are still alive.

    Attributes:
        live: Bytes now.
        peak: The most so far.
        largest: Bytes of the largest storage so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _key(x) not in given and _key(x) not in self._known:
                storage = x.untyped_storage()
                self._known[_key(x)] = weakref.finalize(storage, self._freed, _key(x), storage.nbytes())
                self.live += storage.nbytes()
                self.peak, self.largest = max(self.peak, self.live), max(self.largest, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata
