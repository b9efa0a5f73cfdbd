"""Known models without their weights: their sizes are in `model_configs/`, so nothing is asked of the Hub."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from hones_lens.model.choices import require_choice
from hones_lens.model.config import ModelSettings, all_settings, checkpoint_path, find_settings
from hones_lens.model.families import load_family
from hones_lens.model.hooked_vlm import HookedVLM
from hones_lens.model.loadable import check_config, check_folder, naming
from hones_lens.model.names import did_you_mean

SCALES = ("true", "counts")
_D_HEAD = 4  # of the scale "counts"; rotary positions of rows and columns in a picture need four


def known_settings(name: str) -> ModelSettings:
    """Settings of a known model, by name, alias or Hub id.

    Raises:
        ValueError: An unknown name; lists the known ones.
    """
    settings = find_settings(name)
    if settings is None:
        known = list(all_settings())
        raise ValueError(f"unknown model {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}")
    return settings


def known_config(name: str, scale: str = "true") -> Any:
    """Hugging Face's config of a known model, from `model_configs/` or from the shipped checkpoint.

    Args:
        name: Name, alias or Hub id of a known model.
        scale: "true", or "counts": layers, heads, neurons, image tokens and words as they are, but heads that
            are 4 wide, and streams as wide as their heads together.

    Raises:
        ValueError: An unknown name or scale, or a model whose sizes `model_configs/` does not hold.
    """
    require_choice("scale", scale, SCALES)
    settings = known_settings(name)
    auto: Any = AutoConfig
    if settings.config is None and settings.checkpoint is None:
        raise ValueError(f"the sizes of {name!r} are not known: its file in model_configs/ has no 'config'")
    if settings.config is None:
        config = auto.from_pretrained(checkpoint_path(str(settings.checkpoint)))
    else:
        values = deepcopy(dict(settings.config))
        config = auto.for_model(values.pop("model_type"), **values)
    if scale == "counts":
        _narrow(config)
    return config


def model_without_weights(name: str, dtype: torch.dtype | None = None) -> HookedVLM:
    """A model that has sizes and no weights: they lie on PyTorch's meta device, and nothing is read of them.

    Nothing is asked of the Hub. It has no processor, and can't run.

    Args:
        name: A known model, or the folder of a checkpoint.
        dtype: Type of the weights; default: bfloat16, or the config's for a folder.

    Raises:
        ValueError: Neither of the two.
    """
    if find_settings(name) is None and Path(name).is_dir():
        check_folder(Path(name))
        auto: Any = AutoConfig
        with naming(name, "config"):
            config = auto.from_pretrained(name, trust_remote_code=False)
        check_config(name, config)
        kind = dtype or getattr(config, "dtype", None) or torch.bfloat16
        model_name = name
    else:
        config, kind, model_name = known_config(name), dtype or torch.bfloat16, known_settings(name).name
    family: Any = load_family(config.model_type)
    model: HookedVLM = family.from_config(config, model_name, torch.device("cpu"), kind)
    model.cfg = replace(model.cfg, dtype=kind)
    return model


def processor_options_of(name: str) -> tuple[str, ...]:
    """Options of the picture processor of a model by name, as for `load_model`; no weights are read.

    Raises:
        OSError, ValueError: No such model, or its config can't be read.
    """
    settings = find_settings(name)
    if settings is not None and (settings.config is not None or settings.checkpoint is not None):
        config = known_config(name)
    else:
        auto: Any = AutoConfig
        with naming(name, "config"):
            config = auto.from_pretrained(settings.hub_id if settings else name, trust_remote_code=False)
        check_config(name, config)
    return load_family(config.model_type).processor_options


def _narrow(config: Any) -> None:
    text, vision = config.text_config, config.vision_config
    text.hidden_size = _D_HEAD * text.num_attention_heads
    if getattr(text, "head_dim", None) is not None:
        text.head_dim = _D_HEAD
    width = _D_HEAD * getattr(vision, "num_attention_heads", getattr(vision, "num_heads", 0))
    if getattr(vision, "embed_dim", None) is not None:  # `hidden_size` is then the decoder's
        vision.mlp_ratio = vision.embed_dim * vision.mlp_ratio // width
        vision.embed_dim, vision.hidden_size = width, text.hidden_size
    else:
        vision.hidden_size = width
    if getattr(vision, "out_hidden_size", None) is not None:
        vision.out_hidden_size = text.hidden_size
    if "mrope_section" in text.rope_parameters:
        text.rope_parameters["mrope_section"] = [0, _D_HEAD // 4, _D_HEAD // 4]
