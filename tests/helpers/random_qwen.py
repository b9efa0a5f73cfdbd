"""Tiny random Qwen-VLs for tests, as `random_llava.py` has LLaVAs."""

from __future__ import annotations

from typing import Any

from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

from helpers import random_llava
from hones_lens import HookedVLM, VLMInputs
from hones_lens.app.tiny.tiny_tokenizer import build_qwen_tokenizer
from hones_lens.model.qwen_like import QwenProcessor

PATCH = 7
KINDS = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
SIZES = ((40, 31), (70, 28), (28, 84))  # width, height: grids of tokens (2, 3), (2, 5), (6, 2)


def make_processor(config: Any) -> QwenProcessor:
    """The processor that fits a config; pictures become 4 to 40 tokens."""
    tokenizer = build_qwen_tokenizer(config.text_config.max_position_embeddings)
    vision = config.vision_config
    token = (vision.patch_size * vision.spatial_merge_size) ** 2
    images = Qwen2VLImageProcessorPil(
        min_pixels=4 * token,
        max_pixels=40 * token,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    )
    return QwenProcessor(images, tokenizer, tokenizer.chat_template)


def hugging_faces_processor(parts: QwenProcessor) -> Qwen2_5_VLProcessor:
    """Hugging Face's own processor of these parts, without the video processor that needs torchvision."""
    processor = object.__new__(Qwen2_5_VLProcessor)
    processor.image_processor, processor.tokenizer = parts.image_processor, parts.tokenizer
    processor.video_processor, processor.chat_template = None, parts.chat_template
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    for kind in ("image", "video"):
        token_id = parts.tokenizer.convert_tokens_to_ids(getattr(processor, f"{kind}_token"))
        setattr(processor, f"{kind}_token_id", token_id)
    return processor


def make_config(
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    kind: str = "qwen2_5_vl",
    **top: Any,
) -> Any:
    """A config of tiny sizes, of Qwen2.5-VL or another of `KINDS`; arguments overrule them."""
    tokenizer = build_qwen_tokenizer(512)
    text_config = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    vision_config = {
        "depth": 3,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_heads": 3,
        "patch_size": PATCH,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
        "out_hidden_size": (text or {}).get("hidden_size", 32),
    }
    if kind == "qwen2_vl":
        width = (text or {}).get("hidden_size", 32)
        vision_config = {"depth": 3, "embed_dim": 24, "hidden_size": width, "mlp_ratio": 2, "num_heads": 3}
        vision_config["patch_size"] = PATCH
    if kind == "qwen3_vl":
        text_config["head_dim"] = 8
        vision_config |= {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]}
        del vision_config["window_size"], vision_config["fullatt_block_indexes"]
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    return KINDS[kind][0](
        text_config={**text_config, **(text or {})},
        vision_config={**vision_config, **(vision or {})},
        **ids,
        **top,
    )


def make_hf(config: Any = None, seed: int = 0) -> Any:
    """A random Hugging Face model in eval mode."""
    config = config or make_config()
    model: Any = KINDS[config.model_type][1](config).eval()
    random_llava.randomise(model, seed)
    return model


def make_pair(config: Any = None, seed: int = 0) -> tuple[Any, HookedVLM]:
    """A random Hugging Face model, and the same model hooked."""
    hf_model = make_hf(config, seed)
    return hf_model, HookedVLM.from_hf(hf_model, make_processor(hf_model.config))


def make_images(seed: int = 0) -> list[Image.Image]:
    """Pictures of random pixels and of different odd sizes."""
    return [random_llava.make_images(1, seed + i, size)[0] for i, size in enumerate(SIZES)]


def mixed_batch(model: HookedVLM, answers: list[str] | None = None) -> VLMInputs:
    """Three rows of different lengths: one image, two images of other sizes, text alone."""
    return random_llava.batch_of(model, make_images(), answers)
