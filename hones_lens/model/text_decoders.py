"""Decoders of the families, read from Hugging Face's text configs: LLaMA, Mistral, Qwen2."""

from __future__ import annotations

from typing import Any

import torch

from hones_lens.model.config import VLMConfig, require, special_ids
from hones_lens.model.nn.decoder import Decoder, llama_decoder
from hones_lens.model.nn.rotary import STATIC_ROPE_TYPES, Rotary, rotary_frequencies
from hones_lens.model.typed import activation_names

# By `model_type`: the keys that the decoder reads, or that must have these values.
_HANDLED: dict[str, dict[str, tuple[object, ...]]] = {
    "llama": {
        "attention_bias": (False, True),
        "mlp_bias": (False, True),
        "pretraining_tp": (1, None),
        "sliding_window": (None,),
    },
    "mistral": {"attention_bias": (None, False), "layer_types": (None,)},
    "qwen2": {"attention_bias": (None, True)},
}
_ATTENTION_KINDS = ("full_attention", "sliding_attention")


def decoder_sizes(text: Any) -> dict[str, Any]:
    """The fields of `VLMConfig` that a text config gives.

    Raises:
        ValueError: A value that the code does not handle; names the key.
    """
    require("text_config", text, {"model_type": tuple(_HANDLED)})
    require("text_config", text, {"hidden_act": activation_names(), "attention_dropout": (0, 0.0, None)})
    require("text_config", text, _HANDLED[text.model_type])
    for kind in getattr(text, "layer_types", None) or ():
        if kind not in _ATTENTION_KINDS:
            raise ValueError(f"text_config.layer_types has {kind!r}; handled: {', '.join(_ATTENTION_KINDS)}")
    if text.num_attention_heads % text.num_key_value_heads:
        raise ValueError(
            f"text_config.num_key_value_heads={text.num_key_value_heads} does not divide the "
            f"{text.num_attention_heads} heads"
        )
    eos, pad = special_ids(text)
    return {
        "n_layers": text.num_hidden_layers,
        "n_heads": text.num_attention_heads,
        "n_key_value_heads": text.num_key_value_heads,
        "d_model": text.hidden_size,
        "d_head": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "d_mlp": text.intermediate_size,
        "d_vocab": text.vocab_size,
        "n_ctx": text.max_position_embeddings,
        "act_fn": text.hidden_act,
        "eps": text.rms_norm_eps,
        "eos_token_ids": eos,
        "pad_token_id": pad,
        "sliding_window": text.sliding_window if any(_slides(text)) else None,
    }


def text_decoder(text: Any, cfg: VLMConfig) -> Decoder:
    """The decoder's modules; made on the meta device, but for the rotary frequencies."""
    frequencies, scaling = rotary_frequencies(text, cfg.d_head, (*STATIC_ROPE_TYPES, "dynamic"))
    limit = cfg.n_ctx if text.rope_parameters["rope_type"] == "dynamic" else None
    attention_bias = bool(getattr(text, "attention_bias", False))
    rotary = Rotary(frequencies.to(cfg.device), scaling, limit=limit)
    with torch.device("meta"):
        return llama_decoder(
            cfg,
            rotary,
            qkv_bias=attention_bias or text.model_type == "qwen2",
            out_bias=attention_bias and text.model_type == "llama",
            mlp_bias=bool(getattr(text, "mlp_bias", False)),
            sliding=_slides(text),
        )


def _slides(text: Any) -> tuple[bool, ...]:
    """Whether the attention of each layer slides."""
    if getattr(text, "sliding_window", None) is None:
        return (False,) * text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return tuple(kind == "sliding_attention" for kind in kinds)
