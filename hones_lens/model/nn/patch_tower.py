"""A vision tower over packed patches of images of many sizes, and the patch mergers behind it."""

from __future__ import annotations

import itertools
import math
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
        bias: Whether the patch embedding has one.
        positions: Of how many patches, in a square, there are learned position embeddings, between which
            those of a picture's patches lie; None: there are none.
    """

    blocks: nn.ModuleList
    position_embedding: nn.Parameter | None

    def __init__(
        self,
        cfg: VisionConfig,
        shape: PatchShape,
        blocks: Sequence[Block],
        theta: float,
        *,
        bias: bool = False,
        positions: int | None = None,
    ):
        super().__init__()
        self.cfg, self.shape, self.theta = cfg, shape, theta
        kernel = (shape.frames, shape.side, shape.side)
        self.patch_embedding = nn.Conv3d(shape.channels, cfg.d_model, kernel, stride=kernel, bias=bias)
        self.position_embedding = None
        if positions is not None:
            self.position_embedding = nn.Parameter(torch.empty(positions, cfg.d_model))
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
    ) -> Float[Tensor, "image patch features"]:
        """The residual streams of `cfg.feature_layers`, side by side."""
        packed = F.linear(pixels, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        resid = packed.new_zeros(layout.is_patch.numel(), self.cfg.d_model)
        resid = resid.index_copy(0, layout.padded_index, packed).view(*layout.is_patch.shape, -1)
        if self.position_embedding is not None:
            resid = resid + grid_positions(self.position_embedding, layout).to(resid.dtype)
        resid = self.hook_embed(resid)
        cos, sin = grid_rotation(layout, self.cfg.d_head, self.theta)
        mask = None if bool(layout.is_patch.all()) else layout.is_patch[:, None, None]
        whole = windowed = AttentionContext(cos, sin, mask)
        if (side := self.window_side) is not None:
            windowed = AttentionContext(cos, sin, windows=layout.windows(side))
        states = {0: resid}
        for layer, block in enumerate(self.blocks):
            resid = block(resid, whole if layer in self.cfg.full_attention_layers else windowed)
            if layer + 1 in self.cfg.feature_layers:
                states[layer + 1] = resid
        return torch.cat([states[layer] for layer in self.cfg.feature_layers], dim=-1)


def grid_positions(
    table: Float[Tensor, "n d_model"], layout: PatchLayout
) -> Float[Tensor, "image patch d_model"]:
    """Position embeddings of all patches, between those of a square (bilinear, corner on corner).

    They are 0 at padding.

    Args:
        table: The embeddings of the square, row by row; what lies behind the largest square is not read.
        layout: The patches of each image.
    """
    side = math.isqrt(len(table))
    embeds = torch.zeros((), device=table.device)
    axes: list[list[tuple[Tensor, Tensor]]] = []
    for at in (layout.rows, layout.columns):
        last = at.amax(1, keepdim=True).clamp(min=1)
        place = at.float() * (side - 1) / last
        low = place.long()
        share = place - low
        axes.append([(low, 1 - share), ((low + 1).clamp(max=side - 1), share)])
    for (row, by_row), (column, by_column) in itertools.product(*axes):
        embeds = embeds + table[row * side + column] * (by_row * by_column)[..., None]
    return embeds * layout.is_patch[..., None]


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
    """Normalises patches, concatenates each square of them, and maps it to the decoder's width.

    Args:
        d_vision: Width of the tower.
        merge: Side of a square, in patches.
        d_out: The decoder's width.
        ln: The norm.
        norm_squares: Whether it is one of squares, behind the concatenation.
        deepstack: Mergers of further features, which lie behind those of this one.
    """

    def __init__(
        self,
        d_vision: int,
        merge: int,
        d_out: int,
        ln: Norm,
        *,
        norm_squares: bool = False,
        deepstack: Sequence[PatchMerger] = (),
    ):
        super().__init__()
        self.d_vision, self.norm_squares = d_vision, norm_squares
        self.ln = ln
        self.hook_in = HookPoint()  # [image_token merge² · d_vision], raster order, image after image
        self.linear_1 = Linear(d_vision * merge**2, d_vision * merge**2)
        self.linear_2 = Linear(d_vision * merge**2, d_out)
        self.hook_out = HookPoint()  # [image_token d_model]
        self.deepstack = nn.ModuleList(deepstack)

    def forward(
        self, features: Float[Tensor, "image patch features"], layout: PatchLayout
    ) -> Float[Tensor, "image_token parts"]:
        """Image embeddings, in raster order, image after image; those of all mergers side by side."""
        patches, *others = torch.split(features, self.d_vision, dim=-1)
        patches = patches if self.norm_squares else self.ln(patches)
        squares = patches.flatten(0, 1)[layout.squares].flatten(1)
        squares = self.ln(squares) if self.norm_squares else squares
        embeds = self.hook_out(self.linear_2(F.gelu(self.linear_1(self.hook_in(squares)))))
        further = [merge(other, layout) for merge, other in zip(self.deepstack, others, strict=True)]
        return torch.cat((embeds, *further), dim=-1)
