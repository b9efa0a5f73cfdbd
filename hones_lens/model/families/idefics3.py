"""Idefics3, and the first SmolVLM, whose checkpoints have its model type."""

from __future__ import annotations

from transformers import Idefics3ImageProcessorPil

from hones_lens.model.idefics_like import IdeficsLike
from hones_lens.model.pil_processor import PilProcessor


class Idefics3PilProcessor(PilProcessor):
    """Tokenizer and PIL image processor of an Idefics3 checkpoint."""

    pictures = Idefics3ImageProcessorPil
    processor_class = "Idefics3Processor"


class HookedIdefics3(IdeficsLike):
    """`Idefics3ForConditionalGeneration`, hooked."""

    family = "idefics3"
    processor_class = Idefics3PilProcessor
