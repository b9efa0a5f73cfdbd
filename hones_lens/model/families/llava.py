"""LLaVA: a CLIP or SigLIP vision tower, a two-layer projector, and a LLaMA, Mistral or Qwen2 decoder."""

from __future__ import annotations

from hones_lens.model.llava_like import LlavaLike


class HookedLlava(LlavaLike):
    """`LlavaForConditionalGeneration`, hooked."""

    family = "llava"
