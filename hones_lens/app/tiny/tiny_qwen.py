"""What is Qwen2.5-VL's own in training `tiny-qwen2.5-vl`: configuration and processor."""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from hones_lens.app.tiny.tiny_tokenizer import build_qwen_tokenizer
from hones_lens.app.tiny.train_tiny import Recipe
from hones_lens.data import IMAGE_SIDES
from hones_lens.model import QwenProcessor

RECIPE = Recipe(
    steps=4200, naming_steps=2500, frozen_steps=300, shape_steps=3600, ocr_share=1.0, one_size_steps=2000
)
DATASETS = ("shapes", "shapes-varied")  # what the card measures it on
TRAINING_SIDES = IMAGE_SIDES
_N_CTX = 1024
_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def build_processor() -> QwenProcessor:
    """The processor of tiny-qwen2.5-vl: patches of 14 pixels, 2 x 2 of them a token, 4 to 64 tokens."""
    tokenizer = build_qwen_tokenizer(_N_CTX)
    images = Qwen2VLImageProcessorPil(
        min_pixels=56 * 56, max_pixels=224 * 224, image_mean=_MEAN, image_std=_STD
    )
    return QwenProcessor(images, tokenizer, tokenizer.chat_template)


def build_model(processor: QwenProcessor) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised tiny-qwen2.5-vl (2.2 M parameters); seed torch before calling."""
    tokenizer = processor.tokenizer
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 128,
        "initializer_range": 0.05,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": _N_CTX,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
