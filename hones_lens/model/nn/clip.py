"""CLIP's vision tower, and the parts of it that other towers of its kind share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hones_lens.model.config import VisionConfig
from hones_lens.model.nn.attention import Attention
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.context import AttentionContext
from hones_lens.model.nn.hook_point import HookPoint
from hones_lens.model.nn.mlp import MLP
from hones_lens.model.nn.norm import LayerNorm


class ClipEncoder(nn.Module):
    """CLIP's vision transformer up to the highest feature layer; what lies above is not built.

    Args:
        cfg: Sizes of the tower, whose images have one size.
        act: A name of transformers' activation table, e.g. `quick_gelu`.
        eps: Of the norms.
    """

    def __init__(self, cfg: VisionConfig, act: str, eps: float):
        super().__init__()
        self.feature_layers = cfg.feature_layers
        tokens = cfg.patches_per_side**2 + 1
        self.class_embedding = nn.Parameter(torch.empty(cfg.d_model))
        self.patch_embedding = nn.Conv2d(3, cfg.d_model, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(tokens, cfg.d_model))
        self.hook_embed = HookPoint()  # [image token d_model], the class token first
        self.ln_pre = LayerNorm(cfg.d_model, eps)
        self.blocks = nn.ModuleList(vit_blocks(cfg, act, eps))

    def forward(
        self, pixels: Float[Tensor, "image channel height width"]
    ) -> Float[Tensor, "image token features"]:
        """Hidden states of the feature layers side by side, class token first."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        start = self.class_embedding.expand(len(patches), 1, -1)
        embeds = self.hook_embed(torch.cat((start, patches), dim=1) + self.position_embedding)
        return hidden_states(self.blocks, self.ln_pre(embeds), self.feature_layers)


def vit_blocks(cfg: VisionConfig, act: str, eps: float) -> list[Block]:
    """Blocks with LayerNorms, biases everywhere and a plain MLP, as CLIP and SigLIP have them."""
    heads = (cfg.n_heads, cfg.n_heads, cfg.d_head)
    return [
        Block(
            Attention(layer, cfg.d_model, *heads, qkv_bias=True, out_bias=True),
            MLP(cfg.d_model, cfg.d_mlp, act),
            LayerNorm(cfg.d_model, eps),
            LayerNorm(cfg.d_model, eps),
        )
        for layer in range(cfg.n_layers)
    ]


def hidden_states(
    blocks: nn.ModuleList, resid: Float[Tensor, "image token d_model"], layers: Sequence[int]
) -> Float[Tensor, "image token features"]:
    """Residual streams that enter these layers, side by side; `len(blocks)` is what leaves the last one."""
    states = [resid]
    for block in blocks:
        states.append(block(states[-1], AttentionContext()))
    return torch.cat([states[layer] for layer in layers], dim=-1)
