"""What is LLaVA's own in training `tiny-llava`: configuration and processor."""

from __future__ import annotations

from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from hones_lens.app.tiny.tiny_tokenizer import build_llava_tokenizer
from hones_lens.app.tiny.train_tiny import Recipe
from hones_lens.data import IMAGE_SIZE

RECIPE = Recipe(steps=5000, naming_steps=1500, frozen_steps=1500, neuron_price=4e-3)
DATASETS = ("shapes",)  # what the card measures it on
TRAINING_SIDES = IMAGE_SIZE[:1]
_IMAGE_TOKENS = 64
_N_CTX = 1024
_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def build_processor() -> LlavaProcessor:
    """The processor of tiny-llava: 112 x 112 pixels, 14-pixel patches, 64 image tokens."""
    side = {"height": 112, "width": 112}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 112}, crop_size=side, image_mean=_MEAN, image_std=_STD
        ),
        tokenizer=build_llava_tokenizer(_N_CTX),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=build_llava_tokenizer(_N_CTX).chat_template,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A freshly initialised tiny-llava (1.8 M parameters); seed torch before calling."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
        projection_dim=128,
        initializer_range=0.05,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=_N_CTX,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=_IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)
