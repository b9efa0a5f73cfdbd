"""Tiny random LLaVAs for tests: every parameter away from its default, so that a dropped one shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessorPil,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from hones_lens import HookedVLM, VLMInputs
from hones_lens.app.tiny.tiny_tokenizer import build_llava_tokenizer

PATCH = 7
SIZE = 28
QUESTIONS = (
    "what color is the circle?",
    "Question: how many shapes are there?\nAnswer the question.",
    "is it red?",
)


def make_processor(
    image_size: int = SIZE,
    patch_size: int = PATCH,
    strategy: str = "default",
    n_ctx: int = 512,
    tower: str = "clip_vision_model",
) -> LlavaProcessor:
    """A processor for pictures of `image_size` pixels; unlike tiny-llava's, it begins texts with <s>."""
    square = {"height": image_size, "width": image_size}
    pictures = SiglipImageProcessorPil(size=square)
    if tower == "clip_vision_model":
        pictures = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square)
    tokenizer = build_llava_tokenizer(n_ctx)
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(tower == "clip_vision_model"),
        chat_template=tokenizer.chat_template,
    )


def make_config(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, vip: bool = False, **top: Any
) -> LlavaConfig:
    """A LlavaConfig of tiny sizes; arguments overrule them, `model_type` the kind of a part."""
    tokenizer = build_llava_tokenizer(512)
    text_config = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    vision_config = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": SIZE,
        "patch_size": PATCH,
        "projection_dim": 24,
        "layer_norm_eps": 1e-3,
    }
    text_config = {"model_type": "llama", **text_config, **(text or {})}
    vision_config = {"model_type": "clip_vision_model", **vision_config, **(vision or {})}
    return (VipLlavaConfig if vip else LlavaConfig)(
        text_config=CONFIG_MAPPING[text_config["model_type"]](**text_config),
        vision_config=CONFIG_MAPPING[vision_config["model_type"]](**vision_config),
        image_token_index=tokenizer.image_token_id,
        **top,
    )


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter anew: matrices, biases, and norm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm_weight = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.4 * noise if norm_weight else 0.2 * noise)


def make_hf(config: LlavaConfig | None = None, seed: int = 0) -> LlavaForConditionalGeneration:
    """A random Hugging Face model in eval mode."""
    config = config or make_config()
    vip = isinstance(config, VipLlavaConfig)
    model = (VipLlavaForConditionalGeneration if vip else LlavaForConditionalGeneration)(config).eval()
    randomise(model, seed)
    return model


def processor_for(config: LlavaConfig) -> LlavaProcessor:
    """The processor that fits a config."""
    vision = config.vision_config
    return make_processor(
        vision.image_size,
        vision.patch_size,
        getattr(config, "vision_feature_select_strategy", "default"),
        config.text_config.max_position_embeddings,
        vision.model_type,
    )


def make_pair(
    config: LlavaConfig | None = None, seed: int = 0
) -> tuple[LlavaForConditionalGeneration, HookedVLM]:
    """A random Hugging Face model, and the same model hooked."""
    hf_model = make_hf(config, seed)
    return hf_model, HookedVLM.from_hf(hf_model, processor_for(hf_model.config))


def make_images(n: int, seed: int = 0, size: tuple[int, int] = (40, 31)) -> list[Image.Image]:
    """Pictures of random pixels; size is (width, height)."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(n)]


def mixed_batch(model: HookedVLM, answers: list[str] | None = None) -> VLMInputs:
    """Three rows of different lengths: one image, two images in a row, text alone."""
    return batch_of(model, make_images(3), answers)


def batch_of(model: HookedVLM, pictures: list[Image.Image], answers: list[str] | None = None) -> VLMInputs:
    """Three rows: the first of three pictures, the two others, and text alone."""
    one, two, three = pictures
    return model.prepare([one, [two, three], None], list(QUESTIONS), answers)


def largest_difference(a: torch.Tensor, b: torch.Tensor, inputs: VLMInputs) -> float:
    """Largest absolute difference at the positions that are not padding."""
    tokens = inputs.attention_mask.bool()
    return (a - b)[tokens].abs().max().item()


def relative_difference(a: torch.Tensor, b: torch.Tensor, inputs: VLMInputs) -> float:
    """`largest_difference` in units of the largest value of b, if that is above 1, as float32 rounds."""
    return largest_difference(a, b, inputs) / max(1.0, b[inputs.attention_mask.bool()].abs().max().item())


def rows_equal(a: VLMInputs, b: VLMInputs) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        else:
            assert value == other, name
