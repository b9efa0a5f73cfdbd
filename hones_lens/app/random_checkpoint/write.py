"""A random checkpoint in the layout of the Hugging Face Hub, written shard by shard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from hones_lens.app.random_checkpoint.processors import build_processor
from hones_lens.model import known_config, known_settings

SHARD_GB = 2.0


def write_random_checkpoint(
    name: str,
    folder: str | Path,
    *,
    scale: str = "counts",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    shard_gb: float = SHARD_GB,
) -> Path:
    """Write a checkpoint of a known model with random weights, one shard after the other.

    Memory holds one shard at a time.

    It has config, generation config, tokenizer, chat template and image processor, and weights by the names
    they have on the Hub; Hugging Face's `from_pretrained` reads it. The config is written last: a folder that
    an interruption left has none, and is no checkpoint.

    Args:
        name: A known model.
        folder: Where to; new or empty.
        scale: "true", or "counts" (see `known_config`).
        dtype: Type of the weights.
        seed: Of the weights. The same seed gives the same files.
        tokenizer: Folder of a tokenizer with the true vocabulary (see `build_processor`).
        shard_gb: Largest shard, in GB (10^9 bytes); a larger weight has a shard of its own.

    Raises:
        ValueError: An unknown name or scale, or a tokenizer that is not the model's.
        FileExistsError: The folder holds something already.
        OSError: The disk has not enough room; says how much is needed.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already: choose a new or empty folder")
    settings, config = known_settings(name), known_config(name, scale)
    processor = build_processor(settings, config, tokenizer)
    shards = _shards(_hub_shapes(config), shard_gb * 1e9, dtype.itemsize)
    folder.mkdir(parents=True, exist_ok=True)
    total = dtype.itemsize * sum(shape.numel() for shard in shards for shape in shard.values())
    _check_room(folder, total)
    generator, index = torch.Generator().manual_seed(seed), dict[str, str]()
    for number, shard in enumerate(shards, 1):
        file = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        _write_shard(shard, folder / file, dtype, generator)
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        written = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    processor.save_pretrained(folder)
    text = config.text_config
    special = {key: getattr(text, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)
    config.dtype = dtype
    config.save_pretrained(folder)
    return folder


def _hub_shapes(config: Any) -> dict[str, torch.Size]:
    """Names on the Hub and shapes of all weights; of tied ones the first alone."""
    auto: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config)
    config.architectures = [type(model).__name__]
    weights: dict[str, Tensor] = model.state_dict()
    if config.text_config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    shapes = {key: weight.shape for key, weight in revert_weight_conversion(model, weights).items()}
    tower = "vision_tower."  # Hugging Face has since dropped a level that the files on the Hub have
    return {key.replace(tower, f"{tower}vision_model.", 1): shape for key, shape in shapes.items()}


def _shards(shapes: dict[str, torch.Size], most: float, item_bytes: int) -> list[dict[str, torch.Size]]:
    shards, size = [dict[str, torch.Size]()], 0
    for key, shape in shapes.items():
        n_bytes = shape.numel() * item_bytes
        if shards[-1] and size + n_bytes > most:
            shards.append({})
            size = 0
        shards[-1][key] = shape
        size += n_bytes
    return shards


def _write_shard(
    shapes: dict[str, torch.Size], file: Path, dtype: torch.dtype, generator: torch.Generator
) -> None:
    # in a function of its own: its weights are gone before those of the next shard are made
    weights = {key: _weight(key, shape, dtype, generator) for key, shape in shapes.items()}
    save_file(weights, file, metadata={"format": "pt"})


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: {needed / 1e9:.1f} GB of weights, but {free / 1e9:.1f} GB are free on this disk"
        )


def _weight(key: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers that keep streams near 1: by 1/√(inputs) for matrices, around 1 for norms."""
    values = torch.empty(shape, dtype=dtype).normal_(generator=generator)
    if "embed_tokens" in key or ("_embedding" in key and "patch" not in key):
        return values
    if len(shape) == 1:
        values.mul_(0.1)
        return values.add_(1) if key.endswith("weight") else values
    return values.mul_((shape.numel() / shape[0]) ** -0.5)
