"""The map from the residual stream to logits."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float
from torch import Tensor, nn


class Unembedding(Protocol):
    """Interface of an unembedding."""

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
    """Logits of a normalised residual stream; there is no bias, so `b_U` is zeros."""

    def __init__(self, d_model: int, d_vocab: int):
        super().__init__()
        self.linear = nn.Linear(d_model, d_vocab, bias=False)

    def forward(self, x: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_vocab"]:
        """Logits."""
        return self.linear(x)

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
