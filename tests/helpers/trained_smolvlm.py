"""A SmolVLM that learns the shapes world in minutes: 16 image tokens a picture, 2 layers of 4 heads."""

from __future__ import annotations

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil

from helpers import random_smolvlm
from hones_lens.app.tiny.train_tiny import Recipe
from hones_lens.data import IMAGE_SIZE
from hones_lens.model.families.smolvlm import SmolVLMPilProcessor
from hones_lens.model.pil_processor import PilProcessor

RECIPE = Recipe(steps=1000, naming_steps=0, batch=8, lr=2e-3, warmup=50, save_every=200)
TRAINING_SIDES = IMAGE_SIZE[:1]
_SIDE, _PATCH, _MERGE = 112, 14, 2
_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def build_processor() -> PilProcessor:
    """112 x 112 pixels, no tiles, squares of 2 x 2 patches."""
    tokenizer = random_smolvlm.make_tokenizer(1024)
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": _SIDE},
        max_image_size={"longest_edge": _SIDE},
        do_image_splitting=False,
        image_mean=_MEAN,
        image_std=_STD,
    )
    tokens = (_SIDE // _PATCH // _MERGE) ** 2
    return SmolVLMPilProcessor(images, tokenizer, tokenizer.chat_template, image_seq_len=tokens)


def build_model(processor: PilProcessor) -> SmolVLMForConditionalGeneration:
    """A freshly initialised model; seed torch before calling."""
    tokenizer = processor.tokenizer
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": _SIDE,
        "patch_size": _PATCH,
        "initializer_range": 0.05,
    }
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    config = SmolVLMConfig(
        text_config=text,
        vision_config=vision,
        scale_factor=_MERGE,
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    return SmolVLMForConditionalGeneration(config)
