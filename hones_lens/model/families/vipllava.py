"""ViP-LLaVA: LLaVA with several feature layers, and a layer norm in front of the projector."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from hones_lens.model.config import VLMConfig
from hones_lens.model.llava_like import LlavaLike, llava_config
from hones_lens.model.nn.norm import LayerNorm
from hones_lens.model.nn.projector import Projector


class HookedVipLlava(LlavaLike):
    """`VipLlavaForConditionalGeneration`, hooked."""

    family = "vipllava"
    projector_weights: ClassVar[dict[str, str]] = LlavaLike.projector_weights | {
        "model.multi_modal_projector.projector_layernorm": "vision_projector.ln"
    }

    @classmethod
    def read_config(cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> VLMConfig:
        """A `VipLlavaConfig` as ours; it has no strategy, its code leaves the first token out."""
        return llava_config(hf_config, name, device, dtype, "default")

    @classmethod
    def projector(cls, hf_config: Any, cfg: VLMConfig) -> nn.Module:
        """As LLaVA's, behind a norm."""
        d_in = cfg.vision.d_model * len(cfg.vision.feature_layers)
        norm = LayerNorm(d_in, hf_config.projector_layernorm_eps)
        return Projector(d_in, cfg.d_model, hf_config.projector_hidden_act, bias=True, ln=norm)
