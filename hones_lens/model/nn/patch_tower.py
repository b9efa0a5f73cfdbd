"""A vision tower over packed patches of images of many sizes, and the patch merger behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hones_lens.model.config import VisionConfig
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.context import AttentionContext
from hones_lens.model.nn.hook_point import HookPoint
from hones_lens.model.nn.linear import Linear
from hones_lens.model.nn.norm import Norm
from hones_lens.model.nn.patches import PatchLayout, PatchShape


class PatchTower(nn.Module):
    """A vision transformer with 2-D rotary positions and, in some blocks, windows of attention.

    Images keep their own size, so the blocks see a padded batch: [image patch …], patches in raster order,
    padding behind them.

    Args:
        cfg: Sizes; `window_size` None for attention over the whole image in every block.
        shape: Shape of a patch.
        blocks: From the lowest to the highest.
        theta: Base of the rotary frequencies.
    """

    blocks: nn.ModuleList

    def __init__(self, cfg: VisionConfig, shape: PatchShape, blocks: Sequence[Block], theta: float):
        super().__init__()
        self.cfg, self.shape, self.theta = cfg, shape, theta
        kernel = (shape.frames, shape.side, shape.side)
        self.patch_embedding = nn.Conv3d(shape.channels, cfg.d_model, kernel, stride=kernel, bias=False)
        self.hook_embed = HookPoint()  # [image patch d_model]
        self.blocks = nn.ModuleList(blocks)

    @property
    def window_side(self) -> int | None:
        """Side of a window in patches, a multiple of an image token's; None without windows."""
        if self.cfg.window_size is None:
            return None
        return self.cfg.window_size // self.cfg.patch_size // self.cfg.merge_size * self.cfg.merge_size

    def forward(
        self, pixels: Float[Tensor, "n_patches values"], layout: PatchLayout
    ) -> Float[Tensor, "image patch d_model"]:
        """The residual stream above the last block."""
        packed = F.linear(pixels, self.patch_embedding.weight.flatten(1))
        resid = packed.new_zeros(layout.is_patch.numel(), self.cfg.d_model)
        resid = resid.index_copy(0, layout.padded_index, packed).view(*layout.is_patch.shape, -1)
        resid = self.hook_embed(resid)
        cos, sin = grid_rotation(layout, self.cfg.d_head, self.theta)
        mask = None if bool(layout.is_patch.all()) else layout.is_patch[:, None, None]
        whole = windowed = AttentionContext(cos, sin, mask)
        if (side := self.window_side) is not None:
            windowed = AttentionContext(cos, sin, windows=layout.windows(side))
        for layer, block in enumerate(self.blocks):
            resid = block(resid, whole if layer in self.cfg.full_attention_layers else windowed)
        return resid


def grid_rotation(
    layout: PatchLayout, d_head: int, theta: float
) -> tuple[Float[Tensor, "image patch d_head"], Float[Tensor, "image patch d_head"]]:
    """Cosine and sine in float32: half the frequencies turn by a patch's row, half by its column."""
    half = d_head // 2
    steps = torch.arange(0, half, 2, dtype=torch.float, device=layout.rows.device) / half
    frequencies = 1.0 / theta**steps
    by_axis = [p[..., None].float() * frequencies for p in (layout.rows, layout.columns)]
    angles = torch.cat(by_axis * 2, dim=-1)
    return angles.cos(), angles.sin()


class PatchMerger(nn.Module):
    """Normalises patches, concatenates each square of them, and maps it to the decoder's width."""

    def __init__(self, d_vision: int, merge: int, d_out: int, ln: Norm):
        super().__init__()
        self.ln = ln
        self.hook_in = HookPoint()  # [image_token merge² · d_vision], raster order, image after image
        self.linear_1 = Linear(d_vision * merge**2, d_vision * merge**2)
        self.linear_2 = Linear(d_vision * merge**2, d_out)
        self.hook_out = HookPoint()  # [image_token d_model]

    def forward(
        self, patches: Float[Tensor, "image patch d_vision"], layout: PatchLayout
    ) -> Float[Tensor, "image_token d_model"]:
        """Image embeddings, in raster order, image after image."""
        squares = self.ln(patches).flatten(0, 1)[layout.squares].flatten(1)
        return self.hook_out(self.linear_2(F.gelu(self.linear_1(self.hook_in(squares)))))
