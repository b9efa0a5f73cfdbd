"""Processors of known models, made without a download; special tokens have their true ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor, Qwen2VLImageProcessorPil

from hones_lens.app.tiny.tiny_tokenizer import (
    ONEVISION_SPECIAL,
    QWEN3_CHAT,
    SMOLVLM_MARKERS,
    build_gemma_tokenizer,
    build_llava_tokenizer,
    build_onevision_tokenizer,
    build_qwen_tokenizer,
    build_smolvlm_tokenizer,
)
from hones_lens.model import ModelSettings, QwenProcessor, checkpoint_path, load_family

LLAVA_IDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
_QWEN_TOKENS = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad"
)
QWEN_IDS = {f"<|{name}|>": 151643 + i for i, name in enumerate(_QWEN_TOKENS.split())}
ONEVISION_IDS = {token: 151643 + i for i, token in enumerate(ONEVISION_SPECIAL)}
SMOLVLM_IDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2} | {
    token: 49152 + i for i, token in enumerate(SMOLVLM_MARKERS[:-1])
}
SMOLVLM_IDS["<end_of_utterance>"] = 49279
GEMMA_IDS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4} | {
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
    "<start_of_image>": 255999,
    "<end_of_image>": 256000,
    "<image_soft_token>": 262144,
}
# By family, where they are others than those of the tokenizer and the image processor by themselves.
_TEMPLATES = {"qwen3_vl": QWEN3_CHAT}
_NORMALISED = {"qwen3_vl": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}}


def build_processor(settings: ModelSettings, config: Any, tokenizer: str | Path | None = None) -> Any:
    """The processor of a known model.

    Args:
        settings: The model's settings.
        config: Hugging Face's config.
        tokenizer: Folder of a tokenizer with the true vocabulary; default: one whose vocabulary has the true
            size and special tokens, the words of the shapes world, letters for all others, and fillers.

    Raises:
        ValueError: A tokenizer whose special tokens have other ids than the config says.
    """
    if settings.images is None:
        return load_family(settings.family).processor_class.from_pretrained(
            checkpoint_path(str(settings.checkpoint))
        )
    auto: Any = AutoTokenizer
    build, ids = {
        "gemma3": (build_gemma_tokenizer, GEMMA_IDS),
        "llava": (build_llava_tokenizer, LLAVA_IDS),
        "llava_next": (build_llava_tokenizer, LLAVA_IDS),
        "llava_onevision": (build_onevision_tokenizer, ONEVISION_IDS),
        "qwen2_vl": (build_qwen_tokenizer, QWEN_IDS),
        "qwen2_5_vl": (build_qwen_tokenizer, QWEN_IDS),
        "qwen3_vl": (build_qwen_tokenizer, QWEN_IDS),
        "idefics3": (build_smolvlm_tokenizer, SMOLVLM_IDS),
        "smolvlm": (build_smolvlm_tokenizer, SMOLVLM_IDS),
    }[settings.family]
    made = build(config.text_config.max_position_embeddings, ids)
    template = made.chat_template = _TEMPLATES.get(settings.family, made.chat_template)
    if tokenizer is not None:
        made = auto.from_pretrained(tokenizer)
        _check_ids(made, ids, tokenizer)
        made.chat_template = made.chat_template or template
    if settings.family == "llava":
        return _llava(settings.images["side"], made, config)
    if settings.family == "gemma3":
        return _gemma(settings.images["side"], made, config)
    if hasattr(config, "image_grid_pinpoints"):
        return _of_any_resolution(settings, made, config)
    if "longest_edge" in settings.images:
        return _of_tiles(settings, made, config)
    options: dict[str, Any] = {**settings.images, **_NORMALISED.get(settings.family, {})}
    pictures = Qwen2VLImageProcessorPil(patch_size=config.vision_config.patch_size, **options)
    return QwenProcessor(pictures, made, made.chat_template)


def _llava(side: int, tokenizer: Any, config: Any) -> LlavaProcessor:
    tokenizer.image_token, tokenizer.image_token_id = "<image>", LLAVA_IDS["<image>"]
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def _gemma(side: int, tokenizer: Any, config: Any) -> Any:
    parts: Any = load_family("gemma3").processor_class
    pictures = parts.pictures(size={"height": side, "width": side})
    return parts(pictures, tokenizer, tokenizer.chat_template, image_seq_length=config.mm_tokens_per_image)


def _of_any_resolution(settings: ModelSettings, tokenizer: Any, config: Any) -> Any:
    assert settings.images is not None
    parts: Any = load_family(settings.family).processor_class
    side, vision = settings.images["side"], config.vision_config
    square, resolutions = {"height": side, "width": side}, config.image_grid_pinpoints
    tokenizer.image_token, tokenizer.image_token_id = "<image>", config.image_token_index
    options: dict[str, Any] = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    if hasattr(config, "vision_aspect_ratio"):
        pictures = parts.pictures(size=square, image_grid_pinpoints=resolutions)
        options["num_image_tokens"] = (side // vision.patch_size) ** 2
        options["vision_aspect_ratio"] = config.vision_aspect_ratio
    else:
        edge = {"shortest_edge": side}
        pictures = parts.pictures(size=edge, crop_size=square, image_grid_pinpoints=resolutions)
        options |= {"patch_size": vision.patch_size, "num_additional_image_tokens": 1}
    return parts(pictures, tokenizer, tokenizer.chat_template, **options)


def _of_tiles(settings: ModelSettings, tokenizer: Any, config: Any) -> Any:
    assert settings.images is not None
    parts: Any = load_family(settings.family).processor_class
    side, vision = settings.images["side"], config.vision_config
    pictures = parts.pictures(
        size={"longest_edge": settings.images["longest_edge"]}, max_image_size={"longest_edge": side}
    )
    tokens = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
    return parts(pictures, tokenizer, tokenizer.chat_template, image_seq_len=tokens)


def _check_ids(tokenizer: Any, ids: dict[str, int], folder: str | Path) -> None:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    wrong = [
        f"{token} {vocabulary.get(token)}, not {i}" for token, i in ids.items() if vocabulary.get(token) != i
    ]
    if wrong:
        raise ValueError(f"{folder}: special tokens have other ids than the model's: {'; '.join(wrong[:5])}")
