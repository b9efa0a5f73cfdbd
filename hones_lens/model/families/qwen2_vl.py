"""Qwen2-VL: attention over whole pictures in its tower, whose blocks are like CLIP's."""

from __future__ import annotations

from typing import Any, ClassVar

from hones_lens.model.config import VisionConfig, VLMConfig
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.clip import vit_blocks
from hones_lens.model.nn.norm import LayerNorm
from hones_lens.model.nn.patch_tower import PatchMerger
from hones_lens.model.qwen_like import VISION_EPS, QwenLike


class HookedQwen2VL(QwenLike):
    """`Qwen2VLForConditionalGeneration`, hooked."""

    family = "qwen2_vl"
    text_type = "qwen2_vl_text"
    vision_type = "qwen2_vl_vision"
    tower_weights: ClassVar[dict[str, tuple[str, ...]]] = {
        "norm1": ("ln1",),
        "attn.qkv": ("attn.q", "attn.k", "attn.v"),
        "attn.proj": ("attn.o",),
        "norm2": ("ln2",),
        "mlp.fc1": ("mlp.up",),
        "mlp.fc2": ("mlp.down",),
    }

    @classmethod
    def tower_sizes(cls, vision: Any, d_model: int) -> VisionConfig:
        """The tower's sizes; Hugging Face's `hidden_size` is the decoder's width, `embed_dim` the tower's."""
        if vision.hidden_size != d_model:
            raise ValueError(
                f"vision_config.hidden_size={vision.hidden_size!r} is not handled; handled: {d_model}, the "
                "decoder's"
            )
        return VisionConfig(
            n_layers=vision.depth,
            n_heads=vision.num_heads,
            d_model=vision.embed_dim,
            d_head=vision.embed_dim // vision.num_heads,
            d_mlp=int(vision.embed_dim * vision.mlp_ratio),
            patch_size=vision.patch_size,
            image_size=None,
            feature_layers=(vision.depth,),
            merge_size=vision.spatial_merge_size,
        )

    @classmethod
    def tower_blocks(cls, cfg: VisionConfig, act: str) -> list[Block]:
        """Blocks with LayerNorms, biases everywhere and a plain MLP."""
        return vit_blocks(cfg, act, VISION_EPS)

    @classmethod
    def merger(cls, cfg: VLMConfig) -> PatchMerger:
        """What maps the patches to image embeddings."""
        width = cfg.vision.d_model
        return PatchMerger(width, cfg.vision.merge_size, cfg.d_model, LayerNorm(width, VISION_EPS))
