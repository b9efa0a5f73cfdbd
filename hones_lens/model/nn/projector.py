"""Maps from vision features to the decoder's width."""

from __future__ import annotations

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
