"""Tiny random LLaVA-NeXTs and LLaVA-OneVisions for tests, as `random_llava.py` has LLaVAs."""

from __future__ import annotations

from typing import Any

from PIL import Image
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
)

from helpers import random_llava
from hones_lens import HookedVLM, VLMInputs
from hones_lens.app.tiny.tiny_tokenizer import build_llava_tokenizer
from hones_lens.model.families.llava_next import LlavaNextPilProcessor
from hones_lens.model.families.llava_onevision import LlavaOnevisionPilProcessor
from hones_lens.model.pil_processor import PilProcessor

SIZE = 21  # of a tile; its patches are 7 pixels wide
SIZES = ((40, 31), (70, 28), (28, 84))  # width, height of pictures
SIGLIP = {"model_type": "siglip_vision_model"}


def pinpoints(side: int) -> list[list[int]]:
    """Sizes (height, width) to which pictures are brought: as LLaVA-NeXT's, of 2 to 4 tiles."""
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]


def make_config(
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    kind: str = "llava_next",
    **top: Any,
) -> LlavaNextConfig | LlavaOnevisionConfig:
    """A config of tiny sizes; arguments overrule them, `model_type` the kind of a part."""
    onevision = kind == "llava_onevision"
    if onevision:
        text, vision = {"model_type": "qwen2", **(text or {})}, {**SIGLIP, **(vision or {})}
    parts = random_llava.make_config(text, {"image_size": SIZE, **(vision or {})})
    side, siglip = parts.vision_config.image_size, parts.vision_config.model_type != "clip_vision_model"
    given = {
        "image_grid_pinpoints": pinpoints(side),
        "vision_feature_select_strategy": "full" if siglip else "default",
    }
    if onevision:
        given |= {
            "vision_aspect_ratio": "anyres_max_1",
            "video_token_index": parts.text_config.vocab_size - 1,
        }
    return (LlavaOnevisionConfig if onevision else LlavaNextConfig)(
        text_config=parts.text_config,
        vision_config=parts.vision_config,
        image_token_index=parts.image_token_index,
        **given | top,
    )


def make_processor(config: LlavaNextConfig | LlavaOnevisionConfig) -> PilProcessor:
    """The processor that fits a config."""
    vision = config.vision_config
    if isinstance(config, LlavaOnevisionConfig):
        return _onevision_processor(config)
    square = {"height": vision.image_size, "width": vision.image_size}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": vision.image_size},
        crop_size=square,
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    tokenizer = _tokenizer(config)
    settings = {
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(vision.model_type == "clip_vision_model"),
        "image_token": "<image>",
    }
    return LlavaNextPilProcessor(images, tokenizer, tokenizer.chat_template, **settings)


def _tokenizer(config: Any) -> Any:
    tokenizer = build_llava_tokenizer(config.text_config.max_position_embeddings)
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    return tokenizer


def _onevision_processor(config: LlavaOnevisionConfig) -> PilProcessor:
    vision, tokenizer = config.vision_config, _tokenizer(config)
    images = LlavaOnevisionImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    settings = {
        "num_image_tokens": (vision.image_size // vision.patch_size) ** 2,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "image_token": "<image>",
        "video_token": "<video>",
        "vision_aspect_ratio": config.vision_aspect_ratio,
    }
    return LlavaOnevisionPilProcessor(images, tokenizer, tokenizer.chat_template, **settings)


def hugging_faces_processor(parts: PilProcessor) -> LlavaNextProcessor | LlavaOnevisionProcessor:
    """Hugging Face's own processor of these parts; OneVision's without the video processor."""
    template = parts.chat_template
    if isinstance(parts, LlavaOnevisionPilProcessor):
        processor = object.__new__(LlavaOnevisionProcessor)
        processor.image_processor, processor.tokenizer = parts.image_processor, parts.tokenizer
        processor.video_processor, processor.chat_template = None, template
        for name, value in parts.settings.items():
            setattr(processor, name, value)
        processor.image_token_id = parts.tokenizer.convert_tokens_to_ids("<image>")
        processor.video_token_id = -1
        return processor
    return LlavaNextProcessor(
        parts.image_processor, parts.tokenizer, chat_template=template, **parts.settings
    )


def make_hf(config: Any = None, seed: int = 0) -> Any:
    """A random Hugging Face model in eval mode."""
    config = config or make_config()
    onevision = isinstance(config, LlavaOnevisionConfig)
    model = (LlavaOnevisionForConditionalGeneration if onevision else LlavaNextForConditionalGeneration)(
        config
    )
    model.eval()
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
