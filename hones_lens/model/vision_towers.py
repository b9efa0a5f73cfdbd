"""Vision towers that several families share, read from Hugging Face's vision configs: CLIP, SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hones_lens.model.config import VisionConfig, require, require_integers
from hones_lens.model.nn.clip import ClipEncoder
from hones_lens.model.nn.siglip import SiglipEncoder
from hones_lens.model.typed import activation_names
from hones_lens.model.weights import WeightMap, parameters, vit_weights

# By `model_type`: whether the tower has a class token.
_CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False}


def tower_sizes(vision: Any, feature_layers: int | Sequence[int], select_strategy: str) -> VisionConfig:
    """The sizes of a tower of which some hidden states are read.

    Args:
        vision: Hugging Face's vision config.
        feature_layers: The hidden states; 0 is the input of the first block, −1 the output of the last.
        select_strategy: `default` leaves the first token out (CLIP's class token), `full` keeps all.

    Raises:
        ValueError: A value that the code does not handle; names the key.
    """
    sizes = vit_sizes(vision, tuple(_CLASS_TOKEN))
    layers = [feature_layers] if isinstance(feature_layers, int) else list(feature_layers)
    if not layers:
        raise ValueError("config.vision_feature_layer=[] is not handled; handled: one layer or more")
    n_states = vision.num_hidden_layers + 1
    for layer in layers:
        if not -n_states <= layer < n_states:
            raise ValueError(f"config.vision_feature_layer={layer} is outside the {n_states} hidden states")
    has_class_token, full = _CLASS_TOKEN[vision.model_type], select_strategy == "full"
    return replace(
        sizes,
        n_layers=max(layer % n_states for layer in layers),
        feature_layers=tuple(layer % n_states for layer in layers),
        has_class_token=has_class_token,
        keep_class_token=has_class_token and full,
        drop_first_patch=not has_class_token and not full,
    )


def vit_sizes(vision: Any, model_types: Sequence[str]) -> VisionConfig:
    """The sizes of a whole tower that is laid out as CLIP's and SigLIP's are, whose images have one size.

    Raises:
        ValueError: A value that the code does not handle, another `model_type`, say; names the key.
    """
    require("vision_config", vision, {"model_type": model_types, "num_channels": (3,)})
    require("vision_config", vision, {"hidden_act": activation_names(), "attention_dropout": (0, 0.0, None)})
    require_integers("vision_config", vision, ("image_size", "patch_size"))
    return VisionConfig(
        n_layers=vision.num_hidden_layers,
        n_heads=vision.num_attention_heads,
        d_model=vision.hidden_size,
        d_head=vision.hidden_size // vision.num_attention_heads,
        d_mlp=vision.intermediate_size,
        patch_size=vision.patch_size,
        image_size=vision.image_size,
        feature_layers=(vision.num_hidden_layers,),
    )


def vision_tower(vision: Any, cfg: VisionConfig) -> nn.Module:
    """The tower's modules, up to the highest hidden state that is read."""
    tower = ClipEncoder if cfg.has_class_token else SiglipEncoder
    return tower(cfg, vision.hidden_act, vision.layer_norm_eps)


def tower_weights(prefix: str, cfg: VisionConfig, hf_names: Sequence[str]) -> WeightMap:
    """Hugging Face name → ours, for a tower under this name; None drops what no feature layer reads."""
    names = parameters(
        {
            f"{prefix}.embeddings.patch_embedding": "vision_encoder.patch_embedding",
            f"{prefix}.pre_layrnorm": "vision_encoder.ln_pre",
        }
    )
    names |= vit_weights(f"{prefix}.encoder.layers", cfg.n_layers)
    names[f"{prefix}.embeddings.class_embedding"] = "vision_encoder.class_embedding"
    names[f"{prefix}.embeddings.position_embedding.weight"] = "vision_encoder.position_embedding"
    blocks = f"{prefix}.encoder.layers."
    above = (f"{prefix}.post_layernorm.", f"{prefix}.head.")
    for name in hf_names:
        is_above = name.startswith(blocks) and int(name[len(blocks) :].split(".")[0]) >= cfg.n_layers
        if is_above or name.startswith(above):
            names[name] = None
    return names
