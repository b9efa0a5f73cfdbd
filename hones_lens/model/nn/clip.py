"""CLIP's vision tower, and the two-layer projector behind it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers.activations import ACT2FN

from hones_lens.model.config import VisionConfig
from hones_lens.model.nn.attention import Attention, AttentionContext
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.mlp import MLP
from hones_lens.model.nn.norm import LayerNorm


class ClipEncoder(nn.Module):
    """CLIP's vision transformer up to the highest feature layer; what lies above is not built."""

    def __init__(self, cfg: VisionConfig, act: str, eps: float):
        super().__init__()
        self.feature_layers = cfg.feature_layers
        tokens = cfg.patches_per_side**2 + 1
        self.class_embedding = nn.Parameter(torch.empty(cfg.d_model))
        self.patch_embedding = nn.Conv2d(3, cfg.d_model, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(tokens, cfg.d_model))
        self.hook_embed = HookPoint()  # [image token d_model], the class token first
        self.ln_pre = LayerNorm(cfg.d_model, eps)
        heads = (cfg.n_heads, cfg.n_heads, cfg.d_head)
        self.blocks = nn.ModuleList(
            Block(
                Attention(layer, cfg.d_model, *heads, qkv_bias=True, out_bias=True),
                MLP(cfg.d_model, cfg.d_mlp, act),
                LayerNorm(cfg.d_model, eps),
                LayerNorm(cfg.d_model, eps),
            )
            for layer in range(cfg.n_layers)
        )

    def forward(
        self, pixels: Float[Tensor, "image channel height width"]
    ) -> Float[Tensor, "image token features"]:
        """Hidden states of the feature layers side by side, class token first."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        start = self.class_embedding.expand(len(patches), 1, -1)
        resid = self.ln_pre(self.hook_embed(torch.cat((start, patches), dim=1) + self.position_embedding))
        states = [resid]
        for block in self.blocks:
            states.append(block(states[-1], AttentionContext()))
        return torch.cat([states[layer] for layer in self.feature_layers], dim=-1)


class Projector(nn.Module):
    """Two linear layers from vision features to the decoder's width."""

    def __init__(self, d_in: int, d_out: int, act: str, bias: bool):
        super().__init__()
        self.hook_in = HookPoint()  # [image token features]
        self.linear_1 = nn.Linear(d_in, d_out, bias=bias)
        self.act = ACT2FN[act]
        self.linear_2 = nn.Linear(d_out, d_out, bias=bias)
        self.hook_out = HookPoint()  # [image token d_model]

    def forward(
        self, features: Float[Tensor, "image token features"]
    ) -> Float[Tensor, "image token d_model"]:
        """Image embeddings, in raster order."""
        return self.hook_out(self.linear_2(self.act(self.linear_1(self.hook_in(features)))))
