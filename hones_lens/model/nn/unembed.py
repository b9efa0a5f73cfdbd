"""The map from the residual stream to logits."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hones_lens.model.nn.linear import Linear, linear_in_float32
from hones_lens.model.nn.placed import PlacedLinear


class Unembedding(Protocol):
    """Interface of an unembedding.

    With an attribute `in_float32`, its logits may be asked for in float32 where its weights have fewer bits
    (see `HookedVLM.set_unembed_in_float32`).
    """

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding weights."""
        ...

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Bias; zeros where the model has none."""
        ...

    def tie(self, embed: nn.Embedding) -> None:
        """Share the weights of the token embedding, [d_vocab d_model]."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor:
        """Logits."""
        ...


class Unembed(nn.Module):
    """Logits of a normalised residual stream; there is no bias, so `b_U` is zeros.

    With `in_float32`, which is the default, the products of weights in bfloat16 or float16 are summed, and
    returned, in float32: logits rounded to 8 bits tie often.
    """

    def __init__(self, d_model: int, d_vocab: int):
        super().__init__()
        self.linear = Linear(d_model, d_vocab, bias=False)
        self.in_float32 = True

    def forward(self, x: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_vocab"]:
        """Logits."""
        if not self.in_float32 or x.dtype not in (torch.bfloat16, torch.float16):
            return self.linear(x)
        if isinstance(self.linear, PlacedLinear):
            return self.linear.run(linear_in_float32, x)
        return linear_in_float32(x, self.linear.weight)

    def tie(self, embed: nn.Embedding) -> None:
        """Share the weights of the token embedding."""
        self.linear.weight = embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding (a view)."""
        return self.linear.weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Zeros: the families here have no unembedding bias."""
        return self.linear.weight.new_zeros(self.linear.out_features)
