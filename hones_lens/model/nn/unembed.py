"""The map from the residual stream to logits."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hones_lens.model.nn.placed import PlacedLinear

_CHUNK = 2**24  # elements of the weights that are in float32 at a time: 64 MiB


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


def _linear_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    assert bias is None
    function: Any = _LinearInFloat32  # PyTorch leaves `apply` untyped
    return function.apply(x, weight)


class _LinearInFloat32(torch.autograd.Function):
    """`x Wᵀ` in float32; of the weights a part at a time is in float32, also for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide = x.float()
        out = wide.new_empty(*x.shape[:-1], len(weight))
        for rows in _row_slices(weight):
            out[..., rows] = F.linear(wide, weight[rows].float())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        grad_x = torch.zeros(x.shape, device=x.device) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for rows in _row_slices(weight):
            if grad_x is not None:
                grad_x += grad[..., rows] @ weight[rows].float()
            if grad_weight is not None:
                grad_weight[rows] = (grad[..., rows].flatten(0, -2).T @ x.float().flatten(0, -2)).to(
                    weight.dtype
                )
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight


def _row_slices(weight: Tensor) -> list[slice]:
    step = max(1, _CHUNK // weight.shape[1])
    return [slice(start, start + step) for start in range(0, len(weight), step)]


class Unembed(nn.Module):
    """Logits of a normalised residual stream; there is no bias, so `b_U` is zeros.

    With `in_float32`, which is the default, the products of weights in bfloat16 or float16 are summed, and
    returned, in float32: logits rounded to 8 bits tie often.
    """

    def __init__(self, d_model: int, d_vocab: int):
        super().__init__()
        self.linear = nn.Linear(d_model, d_vocab, bias=False)
        self.in_float32 = True

    def forward(self, x: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_vocab"]:
        """Logits."""
        if not self.in_float32 or x.dtype not in (torch.bfloat16, torch.float16):
            return self.linear(x)
        if isinstance(self.linear, PlacedLinear):
            return self.linear.run(_linear_in_float32, x)
        return _linear_in_float32(x, self.linear.weight)

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
