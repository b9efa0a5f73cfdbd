"""Tiny random Gemma 3s for tests, as `random_llava.py` has LLaVAs."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    SiglipVisionConfig,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from helpers import random_llava
from hones_lens import HookedVLM, VLMInputs
from hones_lens.app.tiny.tiny_tokenizer import build_gemma_tokenizer
from hones_lens.model.families.gemma3 import Gemma3PilProcessor

PATCH = 7
SIZE = 28
SIZES = ((40, 31), (70, 28), (28, 84))  # width, height


def make_processor(config: Gemma3Config) -> Gemma3PilProcessor:
    """The processor that fits a config."""
    side = config.vision_config.image_size
    tokenizer = build_gemma_tokenizer(config.text_config.max_position_embeddings)
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    return Gemma3PilProcessor(
        images, tokenizer, tokenizer.chat_template, image_seq_length=config.mm_tokens_per_image
    )


def hugging_faces_processor(parts: Gemma3PilProcessor) -> Gemma3Processor:
    """Hugging Face's own processor of these parts."""
    seq_length = parts.settings["image_seq_length"]
    return Gemma3Processor(parts.image_processor, parts.tokenizer, parts.chat_template, seq_length)


def make_config(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **top: Any
) -> Gemma3Config:
    """A config of tiny sizes; arguments overrule them."""
    tokenizer = build_gemma_tokenizer(512)
    text_config = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-3,
        "query_pre_attn_scalar": 13,
        "sliding_window": 11,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0},
        },
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
    }
    vision_config = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": SIZE,
        "patch_size": PATCH,
        "layer_norm_eps": 1e-3,
        "vision_use_head": False,
    }
    top = {"mm_tokens_per_image": 4, **top}
    names = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
    ids = {f"{name}_token_index": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    return Gemma3Config(
        text_config=Gemma3TextConfig(**{**text_config, **(text or {})}),
        vision_config=SiglipVisionConfig(**{**vision_config, **(vision or {})}),
        **ids,
        **top,
    )


def make_hf(config: Gemma3Config | None = None, seed: int = 0) -> Gemma3ForConditionalGeneration:
    """A random Hugging Face model in eval mode."""
    model = Gemma3ForConditionalGeneration(config or make_config()).eval()
    random_llava.randomise(model, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Gemma3RMSNorm):
                module.weight -= 1  # the factor is 1 + weight
    return model


def make_pair(
    config: Gemma3Config | None = None, seed: int = 0
) -> tuple[Gemma3ForConditionalGeneration, HookedVLM]:
    """A random Hugging Face model, and the same model hooked."""
    hf_model = make_hf(config, seed)
    return hf_model, HookedVLM.from_hf(hf_model, make_processor(hf_model.config))


def make_images(seed: int = 0) -> list[Image.Image]:
    """Pictures of random pixels and of different odd sizes."""
    return [random_llava.make_images(1, seed + i, size)[0] for i, size in enumerate(SIZES)]


def mixed_batch(model: HookedVLM, answers: list[str] | None = None) -> VLMInputs:
    """Three rows of different lengths: one image, two images of other sizes, text alone."""
    return random_llava.batch_of(model, make_images(), answers)
