"""Qwen2.5-VL: windows of attention in most blocks of its tower, whose blocks are like the decoder's."""

from __future__ import annotations

from typing import Any, ClassVar

from hones_lens.model.config import VisionConfig, VLMConfig, require
from hones_lens.model.nn.attention import Attention
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.mlp import GatedMLP
from hones_lens.model.nn.norm import RMSNorm
from hones_lens.model.nn.patch_tower import PatchMerger
from hones_lens.model.qwen_like import VISION_EPS, QwenLike


class HookedQwen2_5_VL(QwenLike):
    """`Qwen2_5_VLForConditionalGeneration`, hooked."""

    family = "qwen2_5_vl"
    text_type = "qwen2_5_vl_text"
    vision_type = "qwen2_5_vl_vision"
    tower_weights: ClassVar[dict[str, tuple[str, ...]]] = {
        "norm1": ("ln1",),
        "attn.qkv": ("attn.q", "attn.k", "attn.v"),
        "attn.proj": ("attn.o",),
        "norm2": ("ln2",),
        "mlp.gate_proj": ("mlp.gate",),
        "mlp.up_proj": ("mlp.up",),
        "mlp.down_proj": ("mlp.down",),
    }

    @classmethod
    def tower_sizes(cls, vision: Any, d_model: int) -> VisionConfig:
        """The tower's sizes, from Hugging Face's config; raises ValueError for what is not handled."""
        require("vision_config", vision, {"out_hidden_size": (d_model,)})
        if vision.window_size < vision.patch_size * vision.spatial_merge_size:
            raise ValueError(f"vision_config.window_size={vision.window_size} is smaller than an image token")
        full_attention = tuple(vision.fullatt_block_indexes)
        if any(not 0 <= layer < vision.depth for layer in full_attention):
            raise ValueError(
                f"vision_config.fullatt_block_indexes={full_attention} is outside the {vision.depth} blocks"
            )
        return VisionConfig(
            n_layers=vision.depth,
            n_heads=vision.num_heads,
            d_model=vision.hidden_size,
            d_head=vision.hidden_size // vision.num_heads,
            d_mlp=vision.intermediate_size,
            patch_size=vision.patch_size,
            image_size=None,
            feature_layers=(vision.depth,),
            merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            full_attention_layers=full_attention,
        )

    @classmethod
    def tower_blocks(cls, cfg: VisionConfig, act: str) -> list[Block]:
        """Blocks with RMSNorm and a gated MLP with biases, as in the decoder."""
        heads = (cfg.n_heads, cfg.n_heads, cfg.d_head)
        return [
            Block(
                Attention(layer, cfg.d_model, *heads, qkv_bias=True, out_bias=True),
                GatedMLP(cfg.d_model, cfg.d_mlp, act, bias=True),
                RMSNorm(cfg.d_model, VISION_EPS),
                RMSNorm(cfg.d_model, VISION_EPS),
            )
            for layer in range(cfg.n_layers)
        ]

    @classmethod
    def merger(cls, cfg: VLMConfig) -> PatchMerger:
        """What maps the patches to image embeddings."""
        width = cfg.vision.d_model
        return PatchMerger(width, cfg.vision.merge_size, cfg.d_model, RMSNorm(width, VISION_EPS))
