"""Qwen3-VL (dense): QK-norm, interleaved mRoPE, and pictures that write into the first layers (DeepStack)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from hones_lens.model.config import VisionConfig, VLMConfig, require
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.clip import vit_blocks
from hones_lens.model.nn.decoder import Decoder, llama_decoder
from hones_lens.model.nn.norm import LayerNorm
from hones_lens.model.nn.patch_tower import PatchMerger, PatchTower
from hones_lens.model.nn.rotary import Rotary
from hones_lens.model.qwen_like import VISION_EPS, VISION_THETA, QwenLike
from hones_lens.model.weights import WeightMap, parameters

_MERGER = {"norm": "ln", "linear_fc1": "linear_1", "linear_fc2": "linear_2"}


class HookedQwen3VL(QwenLike):
    """`Qwen3VLForConditionalGeneration`, hooked."""

    family = "qwen3_vl"
    text_type = "qwen3_vl_text"
    vision_type = "qwen3_vl_vision"
    sections_take_turns = True
    tower_weights: ClassVar[dict[str, tuple[str, ...]]] = {
        "norm1": ("ln1",),
        "attn.qkv": ("attn.q", "attn.k", "attn.v"),
        "attn.proj": ("attn.o",),
        "norm2": ("ln2",),
        "mlp.linear_fc1": ("mlp.up",),
        "mlp.linear_fc2": ("mlp.down",),
    }
    merger_weights: ClassVar[dict[str, str]] = {
        f"model.visual.merger.{theirs}": f"vision_projector.{ours}" for theirs, ours in _MERGER.items()
    }
    default_chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    @classmethod
    def head_width(cls, text: Any) -> int:
        """Width of a head of the decoder, which the config says."""
        return text.head_dim

    @classmethod
    def _check(cls, hf_config: Any, d_head: int) -> None:
        super()._check(hf_config, d_head)
        text = hf_config.text_config
        require("text_config", text, {"attention_bias": (False, True)})
        for kind in getattr(text, "layer_types", None) or ():
            if kind != "full_attention":
                raise ValueError(f"text_config.layer_types has {kind!r}; handled: full_attention")
        if text.rope_parameters.get("mrope_interleaved", True) is not True:
            raise ValueError("text_config.mrope_interleaved=False is not handled; handled: True")

    @classmethod
    def tower_sizes(cls, vision: Any, d_model: int) -> VisionConfig:
        """The tower's sizes, from Hugging Face's config; raises ValueError for what is not handled."""
        require("vision_config", vision, {"out_hidden_size": (d_model,)})
        indexes = tuple(vision.deepstack_visual_indexes)
        if list(indexes) != sorted(set(indexes)) or any(not 0 <= i < vision.depth for i in indexes):
            raise ValueError(
                f"vision_config.deepstack_visual_indexes={indexes} is not handled; handled: rising numbers "
                f"of the {vision.depth} blocks"
            )
        return VisionConfig(
            n_layers=vision.depth,
            n_heads=vision.num_heads,
            d_model=vision.hidden_size,
            d_head=vision.hidden_size // vision.num_heads,
            d_mlp=vision.intermediate_size,
            patch_size=vision.patch_size,
            image_size=None,
            feature_layers=(vision.depth, *(i + 1 for i in indexes)),
            merge_size=vision.spatial_merge_size,
        )

    @classmethod
    def tower_blocks(cls, cfg: VisionConfig, act: str) -> list[Block]:
        """Blocks with LayerNorms, biases everywhere and a plain MLP."""
        return vit_blocks(cfg, act, VISION_EPS)

    @classmethod
    def tower(cls, vision: Any, cfg: VLMConfig) -> PatchTower:
        """The vision tower, with learned positions besides the rotary ones."""
        blocks, positions = cls.tower_blocks(cfg.vision, vision.hidden_act), vision.num_position_embeddings
        shape = cls.patch_shape(vision)
        return PatchTower(cfg.vision, shape, blocks, VISION_THETA, bias=True, positions=positions)

    @classmethod
    def merger(cls, cfg: VLMConfig) -> PatchMerger:
        """The merger of the last patches, and those of DeepStack, which normalise whole squares."""
        width, merge = cfg.vision.d_model, cfg.vision.merge_size
        deepstack = [
            PatchMerger(width, merge, cfg.d_model, LayerNorm(width * merge**2, VISION_EPS), norm_squares=True)
            for _ in range(cfg.n_deepstack)
        ]
        norm = LayerNorm(width, VISION_EPS)
        return PatchMerger(width, merge, cfg.d_model, norm, deepstack=deepstack)

    @classmethod
    def decoder(cls, text: Any, cfg: VLMConfig, rotary: Rotary) -> Decoder:
        """The decoder's modules; raises ValueError where pictures write behind more layers than there are."""
        if cfg.n_deepstack > cfg.n_layers:
            raise ValueError(
                f"vision_config.deepstack_visual_indexes has {cfg.n_deepstack} blocks, the decoder "
                f"{cfg.n_layers}: not handled"
            )
        bias = text.attention_bias
        return llama_decoder(cfg, rotary, qkv_bias=bias, out_bias=bias, qk_norm=True)

    @classmethod
    def weight_map(cls, cfg: VLMConfig, hf_names: Sequence[str]) -> WeightMap:
        """Hugging Face name → ours."""
        further = {
            f"model.visual.deepstack_merger_list.{i}.{theirs}": f"vision_projector.deepstack.{i}.{ours}"
            for i in range(cfg.n_deepstack)
            for theirs, ours in _MERGER.items()
        }
        names: WeightMap = parameters(further)
        names["model.visual.pos_embed.weight"] = "vision_encoder.position_embedding"
        return super().weight_map(cfg, hf_names) | {name: names[name] for name in hf_names if name in names}
