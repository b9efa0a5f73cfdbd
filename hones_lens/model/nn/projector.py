"""Maps from vision features to the decoder's width."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hones_lens.model.nn.hook_point import HookPoint
from hones_lens.model.nn.linear import Linear
from hones_lens.model.nn.norm import Norm
from hones_lens.model.typed import activation


class Projector(nn.Module):
    """Two linear layers from vision features to the decoder's width; `ln`: a norm in front of them."""

    def __init__(self, d_in: int, d_out: int, act: str, bias: bool, ln: Norm | None = None):
        super().__init__()
        self.hook_in = HookPoint()  # [image token features]
        self.linear_1 = Linear(d_in, d_out, bias=bias)
        self.ln = ln
        self.act = activation(act)
        self.linear_2 = Linear(d_out, d_out, bias=bias)
        self.hook_out = HookPoint()  # [image token d_model]

    def forward(
        self, features: Float[Tensor, "image token features"]
    ) -> Float[Tensor, "image token d_model"]:
        """Image embeddings, in raster order."""
        x = self.hook_in(features)
        x = x if self.ln is None else self.ln(x)
        return self.hook_out(self.linear_2(self.act(self.linear_1(x))))


class PoolingProjector(nn.Module):
    """The mean of each square of patches, normalised, and mapped to the decoder's width (Gemma 3).

    Args:
        d_vision: Width of a patch.
        merge: Side of a square in patches.
        d_out: Width of the decoder.
        ln: The norm of the means.
    """

    def __init__(self, d_vision: int, merge: int, d_out: int, ln: Norm):
        super().__init__()
        self.merge, self.ln = merge, ln
        self.hook_in = HookPoint()  # [image token d_vision], the means
        self.matrix = nn.Parameter(torch.empty(d_vision, d_out))
        self.hook_out = HookPoint()  # [image token d_model]

    def forward(self, patches: Float[Tensor, "image patch d_vision"]) -> Float[Tensor, "image token d_model"]:
        """Image embeddings, in raster order."""
        n, merge = int(patches.shape[1] ** 0.5) // self.merge, self.merge
        squares = patches.reshape(len(patches), n, merge, n, merge, patches.shape[-1])
        means = squares.mean((2, 4)).flatten(1, 2)
        return self.hook_out(self.ln(self.hook_in(means)) @ self.matrix)


class NewlineProjector(Projector):
    """A projector, and the embedding of the newline behind the rows of a grid, as wide as the decoder."""

    def __init__(self, d_in: int, d_out: int, act: str, bias: bool):
        super().__init__(d_in, d_out, act, bias)
        self.newline = nn.Parameter(torch.empty(d_out))
