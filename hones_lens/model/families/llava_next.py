"""LLaVA-NeXT (LLaVA-1.6): LLaVA with pictures of any resolution, cut into tiles."""

from __future__ import annotations

from transformers import LlavaNextImageProcessorPil

from hones_lens.model.anyres_like import AnyResLike, AnyResPilProcessor


class LlavaNextPilProcessor(AnyResPilProcessor):
    """Tokenizer and PIL image processor of a LLaVA-NeXT checkpoint."""

    pictures = LlavaNextImageProcessorPil
    processor_class = "LlavaNextProcessor"


class HookedLlavaNext(AnyResLike):
    """`LlavaNextForConditionalGeneration`, hooked."""

    family = "llava_next"
    processor_class = LlavaNextPilProcessor
