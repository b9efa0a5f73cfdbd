"""Dataclasses to JSON values, and back by the annotations of their fields."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import torch
from jaxtyping import AbstractArray
from torch import Tensor

from hones_lens.results.arrays import nested_list, put_aside
from hones_lens.results.files import as_list, none_to_nan


def to_json(value: Any) -> Any:
    """Convert a value to JSON: dataclasses to objects, tuples and tensors to lists, NaN in a tensor to null.

    Raises:
        TypeError: A value of another kind.
    """
    numbers: Any = value
    if isinstance(numbers, Tensor | tuple | list) and (reference := put_aside(numbers)) is not None:
        return reference
    if isinstance(value, Tensor):
        return nested_list(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value)
        return {key: to_json(entry) for key, entry in entries.items()}
    if isinstance(value, tuple | list):
        return [to_json(entry) for entry in cast("Sequence[Any]", value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} can't be written to JSON")


def from_json(annotation: Any, data: Any) -> Any:
    """Rebuild a value from JSON; the inverse of `to_json`.

    Tensors of floats are float64 on the CPU unless their annotation says otherwise. A field that the data
    lacks gets its default; keys that are not fields are ignored.

    Args:
        annotation: A dataclass or named tuple, a tensor (jaxtyping's included), tuple, mapping, or one of
            these or None; of anything else the data is returned as it is.
        data: The JSON value.

    Raises:
        ValueError: A field without a default is missing.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        not_none = [each for each in arguments if each is not types.NoneType]
        return data if data is None or len(not_none) != 1 else from_json(not_none[0], data)
    if origin is tuple:
        if isinstance(data, Tensor):
            return _tuples(as_list(data))
        if arguments[-1] is Ellipsis and arguments[0] in (float, int, str):
            return tuple(data)
        each = arguments[:1] * len(data) if arguments[-1] is Ellipsis else arguments
        return tuple(from_json(one, entry) for one, entry in zip(each, data, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: from_json(arguments[1], entry) for key, entry in data.items()}
    if not isinstance(annotation, type):
        return data
    wanted = cast("type[Any]", annotation)
    if issubclass(wanted, Tensor | AbstractArray):
        return torch.as_tensor(none_to_nan(data), dtype=_dtype(annotation))
    if is_dataclass(wanted):
        return _dataclass(wanted, data)
    if _is_named_tuple(wanted):
        entries = zip(_hints(wanted).values(), data, strict=False)  # the last may have defaults
        return wanted(*(from_json(hint, entry) for hint, entry in entries))
    return data


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, cast("list[Any]", value))) if isinstance(value, list) else value


def _is_named_tuple(kind: type[Any]) -> bool:
    return hasattr(kind, "_fields") and issubclass(kind, tuple)


def _dataclass(kind: type, data: Mapping[str, Any]) -> Any:
    hints = _hints(kind)
    values = {f.name: from_json(hints[f.name], data[f.name]) for f in fields(kind) if f.name in data}
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{kind.__name__} without {', '.join(missing)}")
    return kind(**values)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _dtype(annotation: Any) -> torch.dtype:
    names: tuple[str, ...] = getattr(annotation, "dtypes", ())
    if "int64" in names:
        return torch.int64
    return torch.float32 if names == ("float32",) else torch.float64
