"""Tiny random SmolVLMs and Idefics3s for tests, as `random_llava.py` has LLaVAs."""

from __future__ import annotations

from typing import Any

from PIL import Image
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from helpers import random_llava
from hones_lens import HookedVLM, VLMInputs
from hones_lens.app.tiny.tiny_tokenizer import build_llava_tokenizer
from hones_lens.model.families.idefics3 import Idefics3PilProcessor
from hones_lens.model.families.smolvlm import SmolVLMPilProcessor
from hones_lens.model.pil_processor import PilProcessor

PATCH = 7
SIZE = 28
MARKERS = (
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)
SIZES = ((40, 31), (70, 28), (28, 84))  # width, height; 2 tiles along the longer side: 2 x 2, 1 x 2, 2 x 1
CHAT = (
    "{% for message in messages %}{{ message['role'] | upper }}:"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% if message['content'][0]['type'] != 'image' %} {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_tokenizer(n_ctx: int = 512, markers: tuple[str, ...] = MARKERS) -> Any:
    """tiny-llava's tokenizer with SmolVLM's markers; without them they are spelled."""
    tokenizer = build_llava_tokenizer(n_ctx)
    tokenizer.add_tokens(list(markers), special_tokens=True)
    tokenizer.chat_template = CHAT
    return tokenizer


def make_processor(config: SmolVLMConfig | Idefics3Config) -> PilProcessor:
    """The processor that fits a config; `config.tiles` along a picture's longer side, 1: no splitting."""
    vision, tiles = config.vision_config, getattr(config, "tiles", 1)
    kind, pictures = (SmolVLMPilProcessor, SmolVLMImageProcessorPil)
    if config.model_type == "idefics3":
        kind, pictures = (Idefics3PilProcessor, Idefics3ImageProcessorPil)
    side = vision.image_size
    images = pictures(
        size={"longest_edge": tiles * side},
        max_image_size={"longest_edge": side},
        do_image_splitting=tiles > 1,
    )
    tokenizer = make_tokenizer(config.text_config.max_position_embeddings)
    tokens = (side // vision.patch_size // config.scale_factor) ** 2
    return kind(images, tokenizer, tokenizer.chat_template, image_seq_len=tokens)


def hugging_faces_processor(parts: PilProcessor) -> Idefics3Processor | SmolVLMProcessor:
    """Hugging Face's own processor of these parts; SmolVLM's without what needs torchvision and num2words."""
    seq_len = parts.settings["image_seq_len"]
    if isinstance(parts, Idefics3PilProcessor):
        template = parts.chat_template
        return Idefics3Processor(parts.image_processor, parts.tokenizer, seq_len, chat_template=template)
    processor = object.__new__(SmolVLMProcessor)
    processor.image_processor, processor.tokenizer = parts.image_processor, parts.tokenizer
    processor.video_processor, processor.chat_template = None, parts.chat_template
    processor.image_token, processor.image_seq_len = "<image>", seq_len
    processor.image_token_id = parts.tokenizer.convert_tokens_to_ids("<image>")
    processor.fake_image_token, processor.global_image_token = MARKERS[:2]
    processor.video_token = "<video>"
    return processor


def make_config(
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    kind: str = "smolvlm",
    tiles: int = 2,
    **top: Any,
) -> SmolVLMConfig | Idefics3Config:
    """A config of tiny sizes; arguments overrule them. `tiles` as in `make_processor`."""
    tokenizer = make_tokenizer()
    text_config = {
        "model_type": "llama",
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
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
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": SIZE,
        "patch_size": PATCH,
        "layer_norm_eps": 1e-3,
    }
    config = (Idefics3Config if kind == "idefics3" else SmolVLMConfig)(
        text_config={**text_config, **(text or {})},
        vision_config={**vision_config, **(vision or {})},
        image_token_id=tokenizer.image_token_id,
        **top,
    )
    config.tiles = tiles
    return config


def make_hf(
    config: SmolVLMConfig | Idefics3Config | None = None, seed: int = 0
) -> SmolVLMForConditionalGeneration | Idefics3ForConditionalGeneration:
    """A random Hugging Face model in eval mode."""
    config = config or make_config()
    idefics = isinstance(config, Idefics3Config)
    model = (Idefics3ForConditionalGeneration if idefics else SmolVLMForConditionalGeneration)(config).eval()
    random_llava.randomise(model, seed)
    return model


def make_pair(
    config: SmolVLMConfig | Idefics3Config | None = None, seed: int = 0
) -> tuple[SmolVLMForConditionalGeneration | Idefics3ForConditionalGeneration, HookedVLM]:
    """A random Hugging Face model, and the same model hooked."""
    hf_model = make_hf(config, seed)
    return hf_model, HookedVLM.from_hf(hf_model, make_processor(hf_model.config))


def make_images(seed: int = 0) -> list[Image.Image]:
    """Pictures of random pixels and of different odd sizes."""
    return [random_llava.make_images(1, seed + i, size)[0] for i, size in enumerate(SIZES)]


def mixed_batch(model: HookedVLM, answers: list[str] | None = None) -> VLMInputs:
    """Three rows of different lengths: one image, two images of other sizes, text alone."""
    return random_llava.batch_of(model, make_images(), answers)
