"""The same model computing in float32: what rounding to fewer bits moves can be measured against it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint as AnyHookPoint

from hones_lens.model.hooked_root import HookedRoot
from hones_lens.model.nn.hook_point import HookPoint, acting_functions
from hones_lens.model.nn.linear import linear_in_float32
from hones_lens.model.nn.placed import PlacedEmbedding, PlacedLinear
from hones_lens.model.typed import bias_or_none, named_modules

M = TypeVar("M", bound=HookedRoot)


class _WideLinear(nn.Module):
    """A linear layer whose weights are in float32 only while it runs, a part at a time."""

    def __init__(self, narrow: nn.Linear):
        super().__init__()
        self.narrow = narrow
        self.in_features, self.out_features = narrow.in_features, narrow.out_features

    @property
    def weight(self) -> Tensor:
        """[out in], a copy in float32."""
        return self.narrow.weight.detach().float()

    @property
    def bias(self) -> Tensor | None:
        """[out], or None; a copy in float32."""
        bias = bias_or_none(self.narrow)
        return None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """Computed in float32 in the place where the layer computes."""
        if isinstance(self.narrow, PlacedLinear):
            return self.narrow.run(linear_in_float32, x)
        return linear_in_float32(x, self.narrow.weight, self.narrow.bias)


class _WideEmbedding(nn.Module):
    """An embedding that gives its rows in float32."""

    def __init__(self, narrow: nn.Embedding):
        super().__init__()
        self.narrow = narrow

    @property
    def weight(self) -> Tensor:
        """[row d], a copy in float32."""
        return self.narrow.weight.detach().float()

    def forward(self, index: Tensor) -> Tensor:
        """The rows of these indices."""
        if isinstance(self.narrow, PlacedEmbedding):
            return self.narrow(index).float()
        return F.embedding(index, self.narrow.weight).float()


def in_float32(model: M) -> M:
    """A model with the same weights whose layers compute in float32.

    The weights of its linear layers and embeddings are those of the model, not copies, and are in float32 a
    part (64 MiB) at a time while a layer runs. Others (norms, the first layer of the vision tower), which
    are small, are copied. Forward hooks that act now act on it too.

    Args:
        model: A model of any type. It is left as it is.
    """
    known: dict[int, Any] = {}
    for _, module in named_modules(model):
        known |= {id(parameter): parameter for parameter in module.parameters(recurse=False)}
        if isinstance(module, HookPoint):
            known[id(module)] = _same_point(module)
        elif isinstance(module, AnyHookPoint):
            known[id(module)] = module
    shared = vars(model).items()
    known |= {id(value): value for name, value in shared if not name.startswith("_") and name not in _OWN}
    known[id(model._scopes)] = []  # pyright: ignore[reportPrivateUsage]
    wide = deepcopy(model, known)
    wide.cfg = replace(model.cfg, dtype=torch.float32)
    _widen(wide)
    wide.setup()
    return wide


_OWN = ("hook_dict", "mod_dict")  # what `setup` makes


def _same_point(point: HookPoint) -> HookPoint:
    """A hook point with the forward hooks that act at another now."""
    new = HookPoint()
    new.name, new.pos_dim = point.name, point.pos_dim
    for function in acting_functions(point):
        new.add_hook(function)
    return new


def _widen(model: HookedRoot) -> None:
    for path, module in named_modules(model):
        if isinstance(module, nn.Linear):
            model.set_submodule(path, _WideLinear(module))
        elif isinstance(module, nn.Embedding):
            model.set_submodule(path, _WideEmbedding(module))
        elif not isinstance(module, HookPoint):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
