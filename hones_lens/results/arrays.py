"""Large arrays of results, in a safetensors file beside the JSON file that names it.

The rule is one, by size: where the tensors and the sequences of numbers of a result have more than 65,536
numbers together, those of over 1,024 are written to `NAME.arrays.safetensors`, and the JSON has
`{"array": KEY}` in their place, and the file's name and SHA-256 under `arrays`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hones_lens.results.files import as_list, nan_to_none, read_json, replaced_atomically, write_json

MOST_IN_JSON = 65_536  # numbers of a result
_MOST_OF_ONE = 1024  # numbers of an array that is never put aside
_KEY = "array"
_files: Any = safetensors.torch  # its types are partly unknown
Numbers = Tensor | Sequence[Any]
_aside: ContextVar[dict[str, Numbers] | None] = ContextVar("_aside", default=None)


@contextmanager
def arrays_aside() -> Generator[dict[str, Numbers]]:
    """Inside, `to_json` puts large arrays into the dictionary that this gives, for `write_arrays`."""
    arrays: dict[str, Numbers] = {}
    token = _aside.set(arrays)
    try:
        yield arrays
    finally:
        _aside.reset(token)


def save_json(file: str | Path, make: Callable[[], dict[str, Any]]) -> None:
    """Write a JSON file, and its large arrays beside it.

    Args:
        file: The JSON file.
        make: Gives its content, with tensors and sequences as `to_json` makes them.
    """
    with arrays_aside() as arrays:
        data = make()
    write_json(file, write_arrays(Path(file), data, arrays))


def load_json(file: str | Path, kind: str) -> dict[str, Any]:
    """Read what `save_json` wrote of one kind of result; the arrays beside it come as tensors.

    Raises:
        FileNotFoundError: The file, or the one beside it with its arrays.
        ValueError: Another kind of file, or arrays of another file.
    """
    return read_arrays(Path(file), read_json(file, kind))


def put_aside(numbers: Any) -> dict[str, str] | None:
    """The reference to a large tensor or sequence of numbers; None for what goes into the JSON."""
    arrays = _aside.get()
    if arrays is None or _count(numbers) <= _MOST_OF_ONE:
        return None
    key = str(len(arrays))
    arrays[key] = numbers.detach().cpu().contiguous() if isinstance(numbers, Tensor) else numbers
    return {_KEY: key}


def _count(value: Any) -> int:
    """How many numbers a tensor or sequence has; 0 of one that is not of numbers alone, or ragged."""
    if isinstance(value, Tensor):
        return value.numel()
    entries = cast("Sequence[Any]", value)
    if type(value) not in (tuple, list) or not entries:  # text; or a named tuple has fields of its own types
        return 0
    if type(entries[0]) in (int, float):
        return len(entries) if all(type(entry) in (int, float) for entry in entries) else 0
    counts = {_count(entry) for entry in entries}
    return len(entries) * counts.pop() if len(counts) == 1 else 0


def write_arrays(file: Path, data: dict[str, Any], arrays: Mapping[str, Numbers]) -> dict[str, Any]:
    """Write the arrays that `data` refers to beside a JSON file, if they are large together.

    Args:
        file: The JSON file.
        data: Its content, with references.
        arrays: What they refer to.

    Returns:
        The content to write, which names the arrays' file, or has the arrays in it.
    """
    used = set(_references(data))
    target = file.with_name(f"{file.stem}.arrays.safetensors")
    if sum(_count(arrays[key]) for key in used) <= MOST_IN_JSON:
        target.unlink(missing_ok=True)  # of an earlier, larger result
        return _resolved(data, {key: nested_list(arrays[key]) for key in used})
    with replaced_atomically(target) as partial:
        try:
            _files.save_file({key: _tensor(arrays[key]) for key in used}, partial)
        except SafetensorError as error:  # of the system: a full disk, say
            raise OSError(f"{target} can't be written: {error}") from error
        return {**data, "arrays": {"file": target.name, "sha256": _sha256(partial)}}


def _tensor(numbers: Numbers) -> Tensor:
    if isinstance(numbers, Tensor):
        return numbers.clone()
    array: Any = np.array(numbers)
    return torch.tensor(array if array.dtype.kind == "i" else array.astype(np.float64))


def nested_list(numbers: Numbers) -> Any:
    """A tensor or sequence as nested lists, with None for NaN in a tensor."""
    if isinstance(numbers, Tensor):
        return nan_to_none(as_list(numbers))
    return [
        nested_list(cast("Sequence[Any]", each)) if isinstance(each, tuple | list) else each
        for each in numbers
    ]


def read_arrays(file: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a JSON file, with its arrays in the references' places.

    Raises:
        FileNotFoundError: The file with the arrays is not there.
        ValueError: It is another one than the JSON file was written with, or lacks an array.
    """
    entry = data.get("arrays")
    if entry is None:
        return dict(data)
    source = file.with_name(Path(str(entry["file"])).name)
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not there: {file} has its arrays in it")
    if _sha256(source) != entry["sha256"]:
        raise ValueError(f"{source} is not the file that {file} was written with: its checksum is another")
    try:
        arrays = _files.load_file(source)
    except SafetensorError as error:
        raise ValueError(f"{source} can't be read: {error}") from error
    if missing := sorted(set(_references(data)) - set(arrays)):
        raise ValueError(f"{source} lacks the arrays {', '.join(missing)} of {file}")
    return {key: _resolved(value, arrays) for key, value in data.items() if key != "arrays"}


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and list(cast("dict[str, Any]", value)) == [_KEY]


def _references(value: Any) -> Iterator[str]:
    if _is_reference(value):
        yield str(value[_KEY])
    elif isinstance(value, Mapping):
        for entry in cast("Mapping[str, Any]", value).values():
            yield from _references(entry)
    elif isinstance(value, list):
        for entry in cast("list[Any]", value):
            if isinstance(entry, dict | list):
                yield from _references(entry)


def _resolved(value: Any, arrays: Mapping[str, Any]) -> Any:
    if _is_reference(value):
        return arrays[str(value[_KEY])]
    if isinstance(value, dict):
        return {key: _resolved(entry, arrays) for key, entry in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_resolved(entry, arrays) for entry in cast("list[Any]", value)]
    return value
