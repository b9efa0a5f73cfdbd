"""Layers whose weights rest elsewhere than activations: on another device, in the CPU's memory, or on disk.

Activations stay on one device, the model's, so that hooks, caches and results do too. A layer of these
fetches its weights when it runs (or, where they rest on a device that computes, sends its input to them), and
gives its output on the device of its input. Nothing of a layer is changed while it runs, so that several
threads may run it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hones_lens.model.nn.linear import linear
from hones_lens.model.typed import named_modules

Readers = Mapping[str, Callable[[], Tensor]]
"""Functions that read the parameters of a layer where they rest, by name."""


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in _OPERATORS)}


class CopiedWeight(Tensor):
    """A copy of a weight that rests elsewhere: edits of it or its views raise, for they would be lost."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func.__name__)
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.startswith("_"))
        if in_place and name != "requires_grad_" and isinstance(args[0], CopiedWeight):
            raise ValueError(
                "this weight is a copy of one that is offloaded or on another device, so an edit would be "
                "lost: load the model onto one device to edit its weights"
            )
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            result: Any = func(*args, **(kwargs or {}))
        if type(result) in (tuple, list):
            return type(result)([_as_copy(each, args) for each in result])
        return _as_copy(result, args)


def _as_copy(result: Any, args: tuple[Any, ...]) -> Any:
    """What a function gave, as a copy where it is a view of one."""
    if not isinstance(result, Tensor) or isinstance(result, CopiedWeight):
        return result
    storages = [a.untyped_storage().data_ptr() for a in args if isinstance(a, CopiedWeight)]
    return result.as_subclass(CopiedWeight) if result.untyped_storage().data_ptr() in storages else result


class _Placed(nn.Module):
    """The parameters of a layer, and where they rest.

    Args:
        like: The layer that this one stands for; its parameters are kept. Those on the meta device have a
            reader.
        home: The device of activations.
        readers: How the parameters are read that are not in memory, and those that are offloaded to the CPU.
    """

    def __init__(self, like: nn.Linear | nn.Embedding, home: torch.device, readers: Readers):
        nn.Module.__init__(self)
        self.home, self._readers = home, dict(readers)
        for name, value in vars(like).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.training = like.training
        self._parameters.update(like._parameters)

    def resting(self, name: str) -> Tensor | None:
        """A parameter where it rests; None where the layer has none of this name.

        Raises:
            ValueError: The parameter is to be trained, but is not in memory.
        """
        parameter = self._parameters[name]
        if parameter is None or not parameter.is_meta:
            return parameter
        if parameter.requires_grad:
            raise ValueError("weights that are offloaded can't be trained: load the model onto one device")
        return self._readers[name]().detach().to(parameter.dtype)

    def at_home(self, name: str) -> Tensor | None:
        """A parameter on the device of activations: itself if it rests there, else a copy."""
        resting = self.resting(name)
        if resting is None or (resting is self._parameters[name] and resting.device == self.home):
            return resting
        return resting.to(self.home).as_subclass(CopiedWeight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in self._parameters:
            value = self.resting(name)
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()


class PlacedLinear(_Placed, nn.Linear):
    """A linear layer. `weight` and `bias` give the values on the device of activations."""

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[out in]; a copy unless it rests on the device of activations."""
        weight = self.at_home("weight")
        assert weight is not None
        return weight

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[out], or None; a copy unless it rests on the device of activations."""
        return self.at_home("bias")

    def forward(self, input: Tensor) -> Tensor:
        """Computed where the weights are, if they are in the memory of an accelerator, else at home."""
        return self.run(linear, input)

    def run(self, function: Callable[[Tensor, Tensor, Tensor | None], Tensor], input: Tensor) -> Tensor:
        """`function(input, weight, bias)` in the place where `forward` computes, on the input's device."""
        weight, bias = self.resting("weight"), self.resting("bias")
        assert weight is not None
        place = self.home if weight.device.type == "cpu" else weight.device
        bias = None if bias is None else bias.to(place)
        return function(input.to(place), weight.to(place), bias).to(input.device)


class PlacedEmbedding(_Placed, nn.Embedding):
    """An embedding; rows are read where they rest, so that the table is not moved."""

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[row d]; a copy unless it rests on the device of activations."""
        weight = self.at_home("weight")
        assert weight is not None
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """The rows of these indices, on their device."""
        weight = self.resting("weight")
        assert weight is not None
        return F.embedding(input.to(weight.device), weight).to(input.device)


def place(model: nn.Module, home: torch.device, readers: Mapping[str, Callable[[], Tensor]]) -> None:
    """Replace every layer whose weights rest elsewhere by one that fetches them.

    Other parameters (norms, the vision tower's embeddings), which are small, are brought to the device of
    activations.

    Args:
        model: The model; parameters that are not in memory are on the meta device.
        home: The device of activations.
        readers: How those are read, by the parameter's name.
    """
    for path, module in named_modules(model):
        own = dict(module.named_parameters(recurse=False))
        if all(parameter.device == home for parameter in own.values()):
            continue
        of_layer = {n: readers[f"{path}.{n}"] for n, parameter in own.items() if parameter.is_meta}
        if isinstance(module, nn.Linear | nn.Embedding):
            kind = PlacedLinear if isinstance(module, nn.Linear) else PlacedEmbedding
            model.set_submodule(path, kind(module, home, of_layer))
            continue
        for name, parameter in own.items():
            value = of_layer[name]().to(parameter.dtype) if parameter.is_meta else parameter.detach()
            setattr(module, name, nn.Parameter(value.to(home), requires_grad=False))


def is_placed(model: nn.Module) -> bool:
    """Whether some layer's weights rest elsewhere than the model's activations."""
    return any(isinstance(module, _Placed) for _, module in named_modules(model))


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, read one at a time, so that no model is in memory twice."""

    def __init__(self, readers: Readers):
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self):
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def weights_of(model: nn.Module, remove_duplicate: bool = True) -> LazyTensors:
    """The parameters by name, with their values also where `named_parameters` gives meta tensors."""
    modules = dict(named_modules(model, remove_duplicate=False))
    readers: dict[str, Callable[[], Tensor]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        path, _, own = name.rpartition(".")
        module = modules[path]
        readers[name] = _reader(module, own) if isinstance(module, _Placed) else parameter.detach
    return LazyTensors(readers)


def _reader(module: _Placed, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        value = module.resting(name)
        assert value is not None
        return value.detach()

    return read
