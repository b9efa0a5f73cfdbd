"""The HONES release's own configuration files, `llava_hones.yaml` and `qwen_hones.yaml`, as our options.

They have four sections: model, data, run and steering. Relative paths start at the folder above `configs/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def is_hones_config(data: Any) -> bool:
    """Whether a YAML's content has HONES's sections."""
    return isinstance(data, dict) and any(isinstance(data.get(section), dict) for section in SECTIONS)


def read_options(
    data: Mapping[str, Any], file: str | Path, dataset: str | None = None, steers: bool = False
) -> dict[str, Any]:
    """The options that a HONES configuration gives.

    Args:
        data: The content of the YAML.
        file: Where it lies; errors name it, and paths start at the folder above its `configs/`.
        dataset: Which of `data.datasets` to take; None for the file's main data.
        steers: Whether limits and all else are those of steering.

    Returns:
        Options of the command line by name. `outputs` is a folder and the task that the file means it for.

    Raises:
        ValueError: An unknown section or key (with the nearest valid one), a data set that the file does
            not have, or a protocol that is not HONES's; names the file.
    """
    _check_keys(data, file)
    root = _root(Path(file))
    model, run = data.get("model", {}), data.get("run", {})
    for section, fixed in _FIXED.items():
        for key, wanted in fixed.items():
            if data.get(section, {}).get(key, wanted) != wanted:
                value = data[section][key]
                raise ValueError(f"{file}: {section}.{key} is {value!r}; every stage here takes {wanted}")
    options = {
        "model": model.get("model_id") or model.get("name"),
        "dtype": _dtype(model.get("dtype", "auto"), file),
        "device_map": model.get("device_map"),
        "min_pixels": model.get("min_pixels"),
        "max_pixels": model.get("max_pixels"),
        "task": run.get("task"),
        "top_k": run.get("top_k_heads"),
        "ratio": run.get("top_neuron_ratio"),
        **_data_options(data, file, root, dataset),
    }
    if steers:
        options |= _steering_options(data.get("steering", {}), run.get("task"), root)
    if run.get("output_dir"):
        options["outputs"] = (_resolved(root, run["output_dir"]), run.get("task"))
    return {name: value for name, value in options.items() if value is not None}


def _check_keys(data: Mapping[str, Any], file: str | Path) -> None:
    for section, values in data.items():
        _check_known(section, SECTIONS, "section", file)
        for key in values or {}:
            _check_known(key, _KEYS[section], f"key {section}.", file)
    for name, entry in data.get("data", {}).get("datasets", {}).items():
        for key in entry:
            _check_known(key, _DATASET_KEYS, f"key data.datasets.{name}.", file)


def _check_known(key: str, valid: tuple[str, ...], what: str, file: str | Path) -> None:
    if key not in valid:
        hint = did_you_mean(key, valid) or f"; valid: {', '.join(valid)}"
        unknown = f"{what}{key}" if what.endswith(".") else f"{what} {key!r}"
        raise ValueError(f"{file}: unknown {unknown}{hint}")


def _root(file: Path) -> Path:
    folder = file.expanduser().resolve().parent
    return folder.parent if folder.name == "configs" else folder


def _resolved(root: Path, value: str | None) -> str | None:
    return None if value is None else str(root / Path(value).expanduser())


def _dtype(name: str, file: str | Path) -> str | None:
    if str(name).lower() not in _DTYPES:
        raise ValueError(f"{file}: model.dtype is {name!r}; valid: {', '.join(_DTYPES)}")
    return _DTYPES[str(name).lower()]


def _data_options(
    data: Mapping[str, Any], file: str | Path, root: Path, dataset: str | None
) -> dict[str, Any]:
    main = data.get("data", {})
    entry = main
    if dataset is not None:
        if dataset not in main.get("datasets", {}):
            known = ", ".join(main.get("datasets", {})) or "none"
            raise ValueError(f"{file}: data.datasets has no {dataset!r}; it has: {known}")
        entry = main["datasets"][dataset]
    limits = main if dataset is None else {**main, **entry}
    return {
        "dataset": dataset or "coco",
        "data_file": _resolved(root, entry.get("data_file")),
        "image_dir": _resolved(root, entry.get("image_dir")),
        "discovery_split": _resolved(root, main.get("discovery_split")) if dataset is None else None,
        "dev_split": _resolved(root, entry.get("dev_split") or entry.get("development_split")),
        "split": _resolved(root, entry.get("test_split")),
        "seed": main.get("seed"),
        "discovery_limit": main.get("discovery_limit"),
        "dev_limit": limits.get("dev_limit"),
        "limit": main.get("eval_limit") if limits.get("test_limit") is None else limits["test_limit"],
    }


def _steering_options(steering: Mapping[str, Any], task: str | None, root: Path) -> dict[str, Any]:
    banks = steering.get("neuron_banks") or {}
    options = {
        "methods": steering.get("methods"),
        "factors": steering.get("grid_amps"),
        "lr": None if steering.get("lr") is None else (float(steering["lr"]),),
        "epochs": None if steering.get("epochs") is None else (int(steering["epochs"]),),
        "accumulate": steering.get("grad_accum_steps"),
        "kl_weight": steering.get("beta_kl"),
        "l2_weight": steering.get("l2_weight"),
        "clamp": steering.get("clamp"),
        "negatives": steering.get("retrieval_train_negatives"),
        "k": steering.get("bank_topk"),
        "neurons": _resolved(root, banks.get(task)),
        "dev_limit": steering.get("dev_limit"),
        "limit": steering.get("test_limit"),
    }
    return {name: value for name, value in options.items() if value is not None}
