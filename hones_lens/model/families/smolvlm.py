"""SmolVLM (the second, which reads video too; that is refused here)."""

from __future__ import annotations

from transformers import SmolVLMImageProcessorPil

from hones_lens.model.idefics_like import IdeficsLike
from hones_lens.model.pil_processor import PilProcessor


class SmolVLMPilProcessor(PilProcessor):
    """Tokenizer and PIL image processor of a SmolVLM checkpoint."""

    pictures = SmolVLMImageProcessorPil
    processor_class = "SmolVLMProcessor"


class HookedSmolVLM(IdeficsLike):
    """`SmolVLMForConditionalGeneration`, hooked."""

    family = "smolvlm"
    processor_class = SmolVLMPilProcessor
