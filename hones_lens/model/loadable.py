"""What can't be hooked, refused by name before anything heavy is loaded: wrappers, quantised weights."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from hones_lens.model.dispatch import is_dispatched, offloaded_weights
from hones_lens.model.quantised import LIBRARY, can_dequantise, quantised_weights

_SHOWN = 3  # names in a message
# Files that old quantisation tools write beside the config.
_QUANTISED = ("quantize_config.json", "quant_config.json")
# Files of settings that hold a JSON object.
_JSON_OBJECTS = tuple(
    f"{name}.json"
    for name in (
        "config generation_config preprocessor_config processor_config chat_template tokenizer "
        "tokenizer_config special_tokens_map added_tokens vocab"
    ).split()
)
# Hooks that these libraries set for themselves compute nothing else.
_OWN_HOOKS = ("transformers.", "accelerate.")


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


# -- folders -------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Check the files of a checkpoint's folder, without reading a weight.

    Raises:
        ValueError: No config, an adapter instead of a model, or quantised weights.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"folder {str(folder)!r} holds an adapter (LoRA), not a model: load the base model with "
                "PEFT, call merge_and_unload(), and save that, or pass it to HookedVLM.from_hf"
            )
        raise ValueError(f"folder {str(folder)!r} has no config.json, so it is not a checkpoint")
    for name in _QUANTISED:
        if (folder / name).is_file():
            raise ValueError(_quantised(f"folder {str(folder)!r} (it has {name})", None))


def check_json_files(folder: Path) -> None:
    """Check that the settings beside a checkpoint's weights are JSON objects.

    Raises:
        ValueError: A file that is damaged or of another shape; names it.
    """
    for file in sorted(folder.glob("*.json")):
        if file.name in _JSON_OBJECTS or file.name.endswith(".index.json"):
            _json_object(file)


def _json_object(file: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object."""
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(data).__name__}, not an object")
    return cast("dict[str, Any]", data)


def check_shards(folder: Path) -> None:
    """Check that all files of weights are there.

    Raises:
        ValueError: An index whose files are not all there (counts and names them), no weights, or a damaged
            file.
    """
    for index in sorted(folder.glob("*.index.json")):
        places: Any = _json_object(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(n, str) for n in cast("Any", places).values()):
            raise ValueError(f"{index} is damaged: it has no weight_map of names of files")
        shards = set(cast("dict[str, str]", places).values())
        absent = sorted(name for name in shards if not (folder / name).is_file())
        if absent:
            raise ValueError(
                f"{index}: {len(absent)} of {len(shards)} files of weights are not there: {_listed(absent)}"
            )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ValueError(f"folder {str(folder)!r} has no weights (*.safetensors or *.bin)")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):  # reads the header, and compares it with the size of the file
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error


def check_config(name: str, config: Any) -> None:
    """Refuse the config of quantised weights, before transformers asks for the library that reads them.

    Raises:
        ValueError: Quantised weights; names the method.
    """
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        settings = getattr(part, "quantization_config", None)
        if settings and not (part is config and can_dequantise(settings)):
            raise ValueError(_quantised(f"checkpoint {name!r}", settings))


def _quantised(what: str, settings: Any) -> str:
    to_dict: Any = getattr(settings, "to_dict", None)
    values: Any = to_dict() if to_dict else settings or {}
    method: Any = values.get("quant_method") or (f"{values['bits']} bits" if values.get("bits") else None)
    method = f" ({getattr(method, 'value', method)})" if method else ""
    install = f", or install {LIBRARY}" if LIBRARY in method else ""
    return (
        f"{what} has quantised weights{method}, which have no rows to read or edit: load the original "
        f"checkpoint in float32, bfloat16 or float16, or dequantise it first (model.dequantize()){install}"
    )


# -- models in memory ----------------------------------------------------------------------------------------


def check_hf_model(hf_model: Any) -> None:
    """Check that a model in memory is Hugging Face's own, with its weights as they are computed with.

    Raises:
        TypeError: Not a Hugging Face model for generation, or one inside a wrapper; says how to get it out.
        ValueError: Adapters, hooks of the user, quantised or absent weights, several devices or dtypes.
    """
    _check_wrapper(hf_model)
    if not isinstance(hf_model, nn.Module) or not hasattr(hf_model, "config"):
        raise TypeError(f"a model of Hugging Face's transformers is needed, not {type(hf_model).__name__}")
    model: Any = hf_model
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None:
        raise TypeError(
            f"{type(hf_model).__name__} has no unembedding (lm_head): load it as a model for generation, "
            "e.g. by AutoModelForImageTextToText"
        )
    _check_adapters(hf_model)
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        settings = getattr(model.config, "quantization_config", None)
        if not can_dequantise(settings):
            raise ValueError(_quantised("the model", settings))
    _check_parameters(hf_model)
    _check_module_hooks(hf_model)


def _check_wrapper(model: Any) -> None:
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise TypeError("the model is compiled (torch.compile): give the original one, model._orig_mod")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(f"the model is inside {kind}: give the one it wraps, model.module")
    if hasattr(model, "peft_config") and hasattr(model, "base_model"):
        raise TypeError(
            f"the model is inside PEFT's {kind}: merge its adapters, model.merge_and_unload(), or "
            "leave them out, model.unload()"
        )


def _check_adapters(model: nn.Module) -> None:
    adapted = [name for name, _ in model.named_parameters() if ".lora_" in name or ".base_layer." in name]
    if adapted:
        raise ValueError(
            f"the model has adapters in its layers ({_listed(adapted)}): merge them first, e.g. by PEFT's "
            "merge_and_unload()"
        )


def _check_parameters(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    kept = offloaded_weights(model)
    absent = [name for name, p in parameters.items() if p.is_meta and name not in kept]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(parameters)} weights are not in memory, and accelerate does not keep "
            f"them elsewhere (they were never loaded): {_listed(absent)}; load the model by from_pretrained"
        )
    for name in quantised_weights(model):
        del parameters[name]
    integers = [name for name, p in parameters.items() if not p.is_floating_point()]
    if integers:
        raise ValueError(_quantised(f"the model (e.g. {_listed(integers)})", None))
    for what in ("dtype",) if is_dispatched(model) else ("device", "dtype"):
        places: dict[Any, list[str]] = {}
        for name, p in parameters.items():
            places.setdefault(getattr(p, what), []).append(name)
        if len(places) > 1:
            each = "; ".join(f"{place}: {_listed(names)}" for place, names in places.items())
            raise ValueError(f"the weights have more than one {what} ({each}): bring them to one")


def _check_module_hooks(model: Any) -> None:
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        for hook in hooks:
            source: str = hook.__module__
            if not f"{source}.".startswith(_OWN_HOOKS):
                raise ValueError(
                    f"the model has a hook of yours at {name or 'its top'} ({hook!r}), which is not taken "
                    "over: remove it, and set it on the hooked model"
                )
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            raise ValueError(f"the forward of {name or 'the model'} is replaced, which is not taken over")


def check_dtype(dtype: Any) -> None:
    """Refuse what is not a floating-point dtype, or `auto`.

    Raises:
        ValueError: Another dtype.
    """
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype, dtype)
    if dtype is None or dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    raise ValueError(f"dtype must be a floating-point dtype of torch, its name, or 'auto', not {dtype!r}")


def check_device(name: str | None) -> torch.device:
    """The device of that name; None for the GPU if there is one, else the CPU.

    Raises:
        ValueError: An unknown device, or one that is not there.
    """
    there = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name or there)
        if device.type == "meta":
            raise ValueError("it has no memory")
        torch.empty(1, device=device)
    except (RuntimeError, ValueError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {name!r} can't be used ({reason}); {there!r} can") from error
    return device


@contextmanager
def naming(name: str, part: str) -> Generator[None]:
    """Errors of the library that reads a checkpoint as ones that name the checkpoint and what was read.

    Raises:
        ValueError: Whatever was raised, except by the file system and by imports.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"the {part} of checkpoint {name!r} can't be read: {type(error).__name__}: {reason}"
        ) from error
