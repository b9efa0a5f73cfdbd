"""What decides the numbers of a run: hashes of the model, of the examples, and of the package's own code.

Two runs whose hashes are equal have the same weights bit by bit, the same settings of model, tokenizer,
processor and generation, and the same examples with the same pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hones_lens.data import Example
from hones_lens.model import HookedVLM, weights_of
from hones_lens.tasks import Task

_CHUNK = 2**24  # bytes of a tensor that are hashed at a time, and copied where they are not on the CPU
# Where a checkpoint lies and which version wrote it; what type it is loaded as is a setting of the run.
_DECIDES_NOTHING = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype")
_SAID_ELSEWHERE = ("device", "model_name")  # settings of their own
_STATE_OF_TOKENIZER = ("truncation", "padding")  # set anew by every call
_BESIDE_THE_RULES = (
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "model_max_length",
    "padding_side",
)


def weights_hash(model: nn.Module) -> str:
    """A hash of every parameter's name, shape, type and all its elements, by their bits."""
    return _tensors_hash(weights_of(model))


def buffers_hash(model: nn.Module) -> str:
    """The same of the buffers, such as rotary frequencies."""
    return _tensors_hash(dict(model.named_buffers()))


def _tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()  # processors have instructions for it: the fastest one here
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        for chunk in _chunks(tensor.detach()):
            digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def _chunks(tensor: Tensor) -> Iterable[Tensor]:
    """The elements in order, a bounded number of bytes at a time."""
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if not rows.numel():
        return
    bytes_per_row = rows.numel() // len(rows) * rows.element_size()
    if bytes_per_row > _CHUNK and rows.ndim > 1:
        for row in rows:
            yield from _chunks(row)
        return
    yield from rows.split(max(1, _CHUNK // bytes_per_row))


def model_identity(model: HookedVLM) -> dict[str, str]:
    """What of a model decides numbers: hashes of its weights, buffers and settings, and its decoding.

    Keys: `weights`, `buffers`, `config` (Hugging Face's and ours), `tokenizer`, `chat_template`,
    `processor`, `generation_config`, `decoding`.
    """
    source, processor = model.hf_source, model.processor
    tokenizer = getattr(processor, "tokenizer", None)
    cfg = {name: value for name, value in asdict(model.cfg).items() if name not in _SAID_ELSEWHERE}
    return {
        "weights": weights_hash(model),
        "buffers": buffers_hash(model),
        "config": json_hash([cfg, None if source is None else _settings(source.config)]),
        "tokenizer": json_hash(None if tokenizer is None else _tokenizer(tokenizer)),
        "chat_template": json_hash(
            [getattr(part, "chat_template", None) for part in (processor, tokenizer)],
        ),
        "processor": json_hash(_processor(processor)),
        "generation_config": json_hash(None if source is None else _settings(source.generation_config)),
        "decoding": str(model.decoding),
    }


def _settings(config: Any) -> Any:
    return None if config is None else config.to_dict()


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    return {
        "class": type(tokenizer).__name__,
        "rules": {name: value for name, value in rules.items() if name not in _STATE_OF_TOKENIZER},
        "special": tokenizer.special_tokens_map,
        **{name: getattr(tokenizer, name, None) for name in _BESIDE_THE_RULES},
    }


def _processor(processor: Any) -> dict[str, Any]:
    """Settings of the processor and of the processor of pictures that is in it."""
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    held = {} if processor is None else vars(processor)
    own = {name: value for name, value in held.items() if isinstance(value, plain)}
    pictures = getattr(processor, "image_processor", None)
    own.pop("chat_template", None)
    return {"class": type(processor).__name__, "own": own, "pictures": _settings(pictures)}


def examples_hash(task: Task, examples: Sequence[Example]) -> str:
    """A hash of all that the examples hold: their fields, prompts, targets, sizes of pictures, pixels.

    Where a picture lies is left out: a data set may be moved.
    """
    digest = hashlib.blake2b(digest_size=12)
    for example in examples:
        held = {f.name: getattr(example, f.name) for f in fields(example) if f.name != "image_source"}
        held["facts"] = {name: fact for name, fact in held["facts"].items() if name != "file"}
        told = [list(task.prompts(example)), task.target(example)]
        digest.update(json_hash([held, told, example.image.mode, example.image.size]).encode())
        digest.update(example.image.tobytes())
    return digest.hexdigest()


def json_hash(data: Any) -> str:
    """A hash of values as JSON, keys in order; where a checkpoint lies and what wrote it are left out."""
    text = json.dumps(_plain(data), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _plain(value: Any) -> Any:
    """JSON values; each type that JSON lacks as a text that is the same in every process."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items() if key not in _DECIDES_NOTHING}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_plain(v), sort_keys=True) for v in value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, Tensor):
        return _tensors_hash({"": value})
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


@cache
def code_hash() -> str:
    """A hash of the package's own source files."""
    root = Path(__file__).parents[2]
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
