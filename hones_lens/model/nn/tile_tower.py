"""Idefics3's vision tower for tiles of one size, and the pixel shuffle behind it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hones_lens.model.config import VisionConfig
from hones_lens.model.nn.hook_point import HookPoint
from hones_lens.model.nn.linear import Linear
from hones_lens.model.nn.siglip import NormedSiglip


class TileEncoder(NormedSiglip):
    """SigLIP's vision transformer of tiles, with positions by bucket and a norm behind the blocks."""

    def __init__(self, cfg: VisionConfig, act: str, eps: float):
        super().__init__(cfg, act, eps)
        self.side = cfg.patches_per_side

    def positions(self, pixels: Tensor) -> Float[Tensor, "patch d_model"]:
        """The position embedding of each patch's bucket."""
        return self.position_embedding[bucketed_positions(self.side, pixels)]


def bucketed_positions(side: int, pixels: Tensor) -> Int[Tensor, " patch"]:
    """The number of the position of each patch of a whole tile, in raster order.

    As Hugging Face computes them in float32 on the pixels' device: where rounding puts two patches into one
    bucket, both have one position there, and here.
    """
    device = pixels.device
    boundaries = torch.arange(1 / side, 1.0, 1 / side, device=device)
    step = 1.0 / torch.tensor(side, device=device)
    fractions = torch.arange(side, device=device, dtype=torch.float32) * step
    buckets = torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True)
    return (buckets[:, None] * side + buckets).flatten()


class PixelShuffle(nn.Module):
    """The patches of each square side by side, mapped to the decoder's width.

    Args:
        d_vision: Width of a patch.
        merge: Side of a square in patches.
        d_out: Width of the decoder.
    """

    def __init__(self, d_vision: int, merge: int, d_out: int):
        super().__init__()
        self.merge = merge
        self.hook_in = HookPoint()  # [tile token merge² · d_vision]
        self.linear = Linear(d_vision * merge**2, d_out, bias=False)
        self.hook_out = HookPoint()  # [tile token d_model]

    def forward(self, patches: Float[Tensor, "tile patch d_vision"]) -> Float[Tensor, "tile token d_model"]:
        """Embeddings of the squares, in raster order."""
        n, merge = int(patches.shape[1] ** 0.5) // self.merge, self.merge
        squares = patches.reshape(len(patches), n, merge, n, merge, patches.shape[-1]).transpose(2, 3)
        squares = squares.reshape(len(patches), n * n, -1)
        return self.hook_out(self.linear(self.hook_in(squares)))
