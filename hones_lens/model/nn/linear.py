"""Linear layers, also where the processor has no instructions for numbers of 16 bits.

There PyTorch's products in bfloat16 or float16 are several times slower than in float32, so those of many
rows are computed in float32, of a part of the weights at a time. They are rounded once, at the end.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 2**24  # elements of the weights that are in float32 at a time: 64 MiB
_FEWEST_ROWS = 8  # of fewer a product is as fast as its weights are read
_SMALLEST = 2**18  # elements of weights; others take no time


class Linear(nn.Linear):
    """A linear layer; of weights in 16 bits as fast as the processor can."""

    def forward(self, input: Tensor) -> Tensor:
        """`input weightᵀ + bias`, of the input's type."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weightᵀ + bias`, of the type of x."""
    many = weight.numel() >= _SMALLEST and x.numel() >= _FEWEST_ROWS * x.shape[-1]
    if not many or x.device.type != "cpu" or x.dtype != weight.dtype or not _is_slow(x.dtype):
        return F.linear(x, weight, bias)
    return linear_in_float32(x, weight, bias).to(x.dtype)


@cache
def _is_slow(dtype: torch.dtype) -> bool:
    """Whether this processor has no instructions for products of a type of 16 bits."""
    operations: Any = torch.ops.mkldnn
    if dtype is torch.bfloat16:
        return not operations._is_mkldnn_bf16_supported()
    return dtype is torch.float16 and not operations._is_mkldnn_fp16_supported()


def linear_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weightᵀ + bias` in float32, whatever the types."""
    function: Any = _LinearInFloat32  # PyTorch leaves `apply` untyped
    out = function.apply(x, weight)
    return out if bias is None else out + bias.float()


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
