"""Large tensors of results, in a safetensors file beside the JSON file that names it.

The rule is one, by size: a tensor of more than 65,536 numbers is written to `NAME.arrays.safetensors`, and
the JSON has `{"array": KEY}` in its place, and the file's name and SHA-256 under `arrays`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from hones_lens.results.files import replaced_atomically

MOST_IN_JSON = 65_536
_KEY = "array"
_files: Any = safetensors.torch  # its types are partly unknown
_aside: ContextVar[dict[str, Tensor] | None] = ContextVar("_aside", default=None)


@contextmanager
def arrays_aside() -> Generator[dict[str, Tensor]]:
    """Inside, `to_json` puts large tensors into the dictionary that this gives."""
    arrays: dict[str, Tensor] = {}
    token = _aside.set(arrays)
    try:
        yield arrays
    finally:
        _aside.reset(token)


def put_aside(tensor: Tensor) -> dict[str, str] | None:
    """The reference to a large tensor that has been put aside; None for one that goes into the JSON."""
    arrays = _aside.get()
    if arrays is None or tensor.numel() <= MOST_IN_JSON:
        return None
    key = str(len(arrays))
    arrays[key] = tensor.detach().cpu().contiguous()
    return {_KEY: key}


def write_arrays(file: Path, data: dict[str, Any], arrays: Mapping[str, Tensor]) -> None:
    """Write those of the arrays that `data` refers to beside a JSON file, and name their file in `data`."""
    used = set(_references(data))
    target = file.with_name(f"{file.stem}.arrays.safetensors")
    if not used:
        target.unlink(missing_ok=True)  # of an earlier, larger result
        return
    with replaced_atomically(target) as partial:
        try:
            _files.save_file({key: arrays[key].clone() for key in used}, partial)
        except SafetensorError as error:  # of the system: a full disk, say
            raise OSError(f"{target} can't be written: {error}") from error
        data["arrays"] = {"file": target.name, "sha256": _sha256(partial)}


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


def _resolved(value: Any, arrays: Mapping[str, Tensor]) -> Any:
    if _is_reference(value):
        return arrays[str(value[_KEY])]
    if isinstance(value, dict):
        return {key: _resolved(entry, arrays) for key, entry in cast("dict[str, Any]", value).items()}
    return value
