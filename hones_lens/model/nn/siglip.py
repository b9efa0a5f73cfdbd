"""SigLIP's vision tower: CLIP's without a class token and without a norm in front of the blocks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hones_lens.model.config import VisionConfig
from hones_lens.model.nn.clip import hidden_states, vit_blocks
from hones_lens.model.nn.hook_point import HookPoint
from hones_lens.model.nn.norm import LayerNorm


class SiglipEncoder(nn.Module):
    """SigLIP's vision transformer up to the highest feature layer; what lies above is not built.

    Args:
        cfg: Sizes of the tower, whose images have one size; pixels that fill no patch are not read.
        act: A name of transformers' activation table, e.g. `gelu_pytorch_tanh`.
        eps: Of the norms.
    """

    def __init__(self, cfg: VisionConfig, act: str, eps: float):
        super().__init__()
        self.feature_layers = cfg.feature_layers
        self.patch_embedding = nn.Conv2d(3, cfg.d_model, cfg.patch_size, stride=cfg.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(cfg.patches_per_side**2, cfg.d_model))
        self.hook_embed = HookPoint()  # [image token d_model]
        self.blocks = nn.ModuleList(vit_blocks(cfg, act, eps))

    def forward(
        self, pixels: Float[Tensor, "image channel height width"]
    ) -> Float[Tensor, "image token features"]:
        """Hidden states of the feature layers side by side."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        embeds = self.hook_embed(patches + self.positions(pixels))
        return hidden_states(self.blocks, embeds, self.feature_layers)

    def positions(self, pixels: Tensor) -> Float[Tensor, "token d_model"]:
        """The position embedding of each patch of these pictures."""
        return self.position_embedding


class NormedSiglip(SiglipEncoder):
    """SigLIP's vision transformer with the norm behind its blocks, as Gemma 3 and Idefics3 read it."""

    def __init__(self, cfg: VisionConfig, act: str, eps: float):
        super().__init__(cfg, act, eps)
        self.ln_post = LayerNorm(cfg.d_model, eps)

    def forward(
        self, pixels: Float[Tensor, "image channel height width"]
    ) -> Float[Tensor, "image token d_model"]:
        """The normalised stream above the last block, patches in raster order."""
        return self.ln_post(super().forward(pixels))
