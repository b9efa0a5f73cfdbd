"""Components and their ranking, and JSON files that are written atomically."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

as_list: Callable[[Tensor], Any] = methodcaller("tolist")  # PyTorch types it as a list of unknowns


# Not as annotations of a class: there `index` would be said to override the method of tuples.
class Component(NamedTuple("Component", [("layer", int), ("index", int), ("score", float)])):
    """A head or a neuron with its score."""

    __slots__ = ()


def ranked(scores: Tensor, k: int, positive_only: bool = False) -> list[Component]:
    """The k largest entries of scores [layer, index]; ties are ordered by layer, then index.

    Raises:
        ValueError: k below 1, or a score that is NaN.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if bool(torch.isnan(scores).any()):
        layer, index = (int(place) for place in torch.nonzero(torch.isnan(scores))[0])
        raise ValueError(f"the score of layer {layer}, index {index} is NaN")
    n_columns, flat = scores.shape[1], scores.flatten()
    order = largest(flat, k)
    values = cast("list[float]", as_list(flat[order]))
    components = [Component(*divmod(i, n_columns), value) for i, value in zip(order, values, strict=True)]
    return [c for c in components if c.score > 0] if positive_only else components


def largest(values: Tensor, k: int) -> list[int]:
    """Where the k largest of some values [n] are, the largest first; equal ones in their order.

    Faster than sorting them all: a model has half a million neurons.
    """
    if k < len(values):
        candidates = (values >= values.topk(k).values[-1]).nonzero()[:, 0]
    else:
        candidates = torch.arange(len(values), device=values.device)
    order = values[candidates].argsort(descending=True, stable=True)[:k]
    return cast("list[int]", as_list(candidates[order]))


@contextmanager
def replaced_atomically(file: str | Path) -> Generator[Path]:
    """The path of a new file to write, which then takes the place of another: complete or not at all.

    Its name is unique, so that several processes may write the same file; its content is on the disk before
    it takes the place.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        with naming(file):
            yield partial
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def naming(file: str | Path) -> Generator[None]:
    """Errors of the system inside that name no file (a full disk) are raised with the name of this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, f"can't be written: {error.strerror}", str(file)) from error


def write_json(file: str | Path, data: Any) -> None:
    """Write JSON atomically: the file is complete or not written at all.

    Raises:
        ValueError: A number that JSON can't represent (NaN, infinity).
    """
    text = json.dumps(data, allow_nan=False, indent=1) + "\n"
    with replaced_atomically(file) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(file: str | Path, kind: str) -> dict[str, Any]:
    """Read a result file of one kind.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not JSON, or another kind of result; names the file.
    """
    try:
        data: Any = json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    fields = cast("dict[str, Any]", data) if isinstance(data, dict) else {"kind": type(data).__name__}
    if not isinstance(data, dict) or fields.get("kind") != kind:
        raise ValueError(f"{file} holds {fields.get('kind')!r}, not {kind!r}")
    return fields


def nan_to_none(value: Any) -> Any:
    """Nested lists with None for NaN, which JSON can't represent."""
    if isinstance(value, list):
        return [nan_to_none(v) for v in cast("list[Any]", value)]
    return None if isinstance(value, float) and math.isnan(value) else value


def none_to_nan(value: Any) -> Any:
    """Nested lists with NaN for None."""
    if isinstance(value, list):
        return [none_to_nan(v) for v in cast("list[Any]", value)]
    return math.nan if value is None else value


def round_floats(value: Any, digits: int = 9) -> Any:
    """Nested lists with floats rounded to significant digits, so that files stay small."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else value
    if isinstance(value, list):
        return [round_floats(v, digits) for v in cast("list[Any]", value)]
    return value
