"""Tiny random models whose tokenizers are the true ones of LLaMA, Mistral, Llama 3 and Qwen."""

from __future__ import annotations

from functools import cache

from tokenizers import processors
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedModel

from helpers import random_llava, random_qwen, real_tokenizers
from hones_lens import HookedVLM
from hones_lens.model.qwen_like import QwenProcessor


@cache
def llava() -> tuple[PreTrainedModel, HookedVLM]:
    """Hugging Face's and our LLaVA with LLaMA's vocabulary; `fresh_llava` makes others, to be changed."""
    return fresh_llava("llama")


@cache
def qwen() -> tuple[PreTrainedModel, HookedVLM]:
    """Hugging Face's and our Qwen2.5-VL with Qwen's vocabulary; `fresh_qwen` makes others, to be changed."""
    return fresh_qwen()


def fresh_llava(vocabulary: str) -> tuple[PreTrainedModel, HookedVLM]:
    """Hugging Face's and our LLaVA with the vocabulary of LLaMA, Mistral or Llama 3."""
    tokenizer = real_tokenizers.fresh(vocabulary)
    if vocabulary == "llama3":  # the package leaves out that Meta's tokenizer begins each text with BOS
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", special_tokens=[bos]
        )
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    size = random_llava.SIZE
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        tokenizer=tokenizer,
        patch_size=random_llava.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=random_llava.build_llava_tokenizer(512).chat_template,
    )
    config = random_llava.make_config({"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    config.image_token_index = tokenizer.image_token_id
    hf = random_llava.make_hf(config)
    return hf, HookedVLM.from_hf(hf, processor)


def fresh_qwen() -> tuple[PreTrainedModel, HookedVLM]:
    """Hugging Face's and our Qwen2.5-VL with Qwen's vocabulary."""
    tokenizer = real_tokenizers.fresh("qwen")
    config = random_qwen.make_config({"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    for name, token in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    made = random_qwen.make_processor(config)
    tokenizer.chat_template = made.tokenizer.chat_template
    processor = QwenProcessor(made.image_processor, tokenizer, tokenizer.chat_template)
    hf = random_qwen.make_hf(config)
    return hf, HookedVLM.from_hf(hf, processor)
