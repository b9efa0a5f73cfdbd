"""The HONES release's own configuration files, `llava_hones.yaml` and `qwen_hones.yaml`, as our options.

They have four sections: model, data, run and steering. Relative paths start at the folder above `configs/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hones_lens.model import did_you_mean

SECTIONS = ("model", "data", "run", "steering")
_DATASET_KEYS = ("name", "data_file", "image_dir", "dev_split", "test_split", "dev_limit", "test_limit")
_KEYS = {
    "model": ("name", "model_id", "dtype", "device_map", "min_pixels", "max_pixels"),
    "data": (
        *("data_file", "image_dir", "discovery_split", "dev_split", "development_split", "test_split"),
        *("discovery_limit", "dev_limit", "test_limit", "eval_limit", "seed", "datasets"),
    ),
    "run": (
        *("task", "output_dir", "top_k_heads", "top_neuron_ratio"),
        *("max_new_tokens", "retrieval_negatives", "ndcg_k"),
    ),
    "steering": (
        *("dataset", "output_dir", "dev_limit", "test_limit", "bank_topk", "methods", "always_eval_base"),
        *("fixed_amp", "grid_amps", "epochs", "lr", "grad_accum_steps", "beta_kl", "l2_weight", "clamp"),
        *("neuron_banks", "retrieval_train_negatives"),
    ),
}
# What every stage here does; another value would not be HONES's protocol.
_FIXED = {
    "run": {"max_new_tokens": 24, "retrieval_negatives": 49, "ndcg_k": 5},
    "steering": {"fixed_amp": 2.0, "always_eval_base": True},
}
_DTYPES = {"auto": None, "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_DTYPES |= {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


class Setting(NamedTuple):
    """A value of the file, and its key there, such as `run.task`."""

    key: str
    value: Any


def is_hones_config(data: Any) -> bool:
    """Whether a YAML's content has HONES's sections."""
    return isinstance(data, dict) and any(isinstance(data.get(section), dict) for section in SECTIONS)


def read_options(
    data: Mapping[str, Any], file: str | Path, dataset: Any = None, steers: bool = False
) -> dict[str, Setting]:
    """The options that a HONES configuration gives.

    Args:
        data: The content of the YAML.
        file: Where it lies; errors name it, and paths start at the folder above its `configs/`.
        dataset: Which of `data.datasets` to take, as it stands in the file or was typed; None for the file's
            main data.
        steers: Whether limits and all else are those of steering.

    Returns:
        Options of the command line by name. `outputs` is a folder and the task that the file means it for.

    Raises:
        ValueError: An unknown section or key (with the nearest valid one), a data set that the file does
            not have, a value where a section belongs, no path where one belongs, or a protocol that is not
            HONES's; names file and key.
    """
    _check_keys(data, file)
    for section, fixed in _FIXED.items():
        for key, wanted in fixed.items():
            if (value := _section(data, section).get(key, wanted)) != wanted:
                raise ValueError(f"{file}: {section}.{key} is {value!r}; every stage here takes {wanted}")
    read = _Reader(data, Path(file))
    dtype = read("model.dtype")
    options = {
        "model": read("model.model_id", "model.name"),
        "dtype": Setting("model.dtype", _dtype("auto" if dtype is None else dtype.value, file)),
        "device_map": read("model.device_map"),
        "min_pixels": read("model.min_pixels"),
        "max_pixels": read("model.max_pixels"),
        "task": read("run.task"),
        "top_k": read("run.top_k_heads"),
        "ratio": read("run.top_neuron_ratio"),
        **_data_options(read, file, dataset),
    }
    if steers:
        options |= {name: found for name, found in _steering_options(read).items() if found is not None}
    output, task = read.path("run.output_dir"), read("run.task")
    if output is not None:
        options["outputs"] = Setting(output.key, (output.value, None if task is None else task.value))
    return {name: found for name, found in options.items() if found is not None and found.value is not None}


class _Reader:
    """Reads values by their keys in the file, such as `data.datasets.gqa.data_file`."""

    def __init__(self, data: Mapping[str, Any], file: Path):
        self._data, self._file = data, file
        folder = file.expanduser().resolve().parent
        self._root = folder.parent if folder.name == "configs" else folder

    def __call__(self, *keys: str) -> Setting | None:
        """The first of these that has a value."""
        for key in keys:
            value: Any = self._data
            for part in key.split("."):
                value = (value or {}).get(part)
            if value is not None:
                return Setting(key, value)
        return None

    def path(self, *keys: str) -> Setting | None:
        """The first of these that has a value, which is a path."""
        found = self(*keys)
        if found is None:
            return None
        if not isinstance(found.value, str):
            raise ValueError(f"{self._file}: {found.key} is {found.value!r}, which is no path")
        return Setting(found.key, str(self._root / Path(found.value).expanduser()))


def _section(data: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A section; empty where there is none, or nothing in it."""
    found: Any = data
    for name in names:
        found = found.get(name) or {}
    return found


def _check_keys(data: Mapping[str, Any], file: str | Path) -> None:
    for section, values in data.items():
        _check_known(section, SECTIONS, "section", file)
        _check_section(section, values, file)
        for key in values or {}:
            _check_known(key, _KEYS[section], f"key {section}.", file)
    for key in ("data.datasets", "steering.neuron_banks"):
        section, name = key.split(".")
        _check_section(key, _section(data, section).get(name), file)
    for name, entry in _section(data, "data", "datasets").items():
        _check_section(f"data.datasets.{name}", entry, file)
        for key in entry or {}:
            _check_known(key, _DATASET_KEYS, f"key data.datasets.{name}.", file)


def _check_section(key: str, value: Any, file: str | Path) -> None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{file}: {key} is {value!r}, and not keys with their values")


def _check_known(key: Any, valid: tuple[str, ...], what: str, file: str | Path) -> None:
    if key not in valid:
        hint = did_you_mean(str(key), valid) or f"; valid: {', '.join(valid)}"
        unknown = f"{what}{key}" if what.endswith(".") else f"{what} {key!r}"
        raise ValueError(f"{file}: unknown {unknown}{hint}")


def _dtype(name: Any, file: str | Path) -> str | None:
    if str(name).lower() not in _DTYPES:
        raise ValueError(f"{file}: model.dtype is {name!r}; valid: {', '.join(_DTYPES)}")
    return _DTYPES[str(name).lower()]


def _data_options(read: _Reader, file: str | Path, dataset: Any) -> dict[str, Setting | None]:
    entry = "data"
    if dataset is not None:
        known, entry = read("data.datasets"), f"data.datasets.{dataset}"
        if known is None or dataset not in list(known.value):  # a list has no hash
            names = ", ".join(map(str, known.value)) if known is not None else "none"
            raise ValueError(f"{file}: data.datasets has no {dataset!r}; it has: {names}")
    return {
        "dataset": Setting("data.datasets", dataset or "coco"),
        "data_file": read.path(f"{entry}.data_file"),
        "image_dir": read.path(f"{entry}.image_dir"),
        "discovery_split": read.path("data.discovery_split") if dataset is None else None,
        "dev_split": read.path(f"{entry}.dev_split", f"{entry}.development_split"),
        "split": read.path(f"{entry}.test_split"),
        "seed": read("data.seed"),
        "discovery_limit": read("data.discovery_limit"),
        "dev_limit": read(f"{entry}.dev_limit", "data.dev_limit"),
        "limit": read(f"{entry}.test_limit", "data.test_limit", "data.eval_limit"),
    }


def _steering_options(read: _Reader) -> dict[str, Setting | None]:
    task = read("run.task")
    names = {"methods": "methods", "factors": "grid_amps", "lr": "lr", "epochs": "epochs"}
    names |= {"accumulate": "grad_accum_steps", "kl_weight": "beta_kl", "l2_weight": "l2_weight"}
    names |= {"clamp": "clamp", "negatives": "retrieval_train_negatives", "k": "bank_topk"}
    names |= {"dev_limit": "dev_limit", "limit": "test_limit"}
    options = {name: read(f"steering.{key}") for name, key in names.items()}
    return options | {"neurons": None if task is None else read.path(f"steering.neuron_banks.{task.value}")}
