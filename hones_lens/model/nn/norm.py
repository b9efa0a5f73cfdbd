"""RMSNorm and LayerNorm with their scale and normalised output hooked."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hones_lens.model.nn.hook_point import HookPoint


class Norm(Protocol):
    """Interface of a norm of the residual stream.

    Attributes:
        eps: Added under the root.
    """

    eps: float

    @property
    def weight(self) -> Tensor:
        """Factor on the normalised stream, [d]."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor:
        """Normalise the last axis."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 as Hugging Face's LLaMA does.

    Hooks: `hook_scale` [..., 1] is sqrt(mean(x²) + eps); `hook_normalized` [..., d] is x / scale,
    before the weight.
    """

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps
        self.hook_scale = HookPoint()  # [batch pos 1]
        self.hook_normalized = HookPoint()  # [batch pos d]

    def forward(self, x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        """Normalise the last axis."""
        x_float = x.float()
        scale = self.hook_scale((x_float.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.weight * self.hook_normalized((x_float / scale).to(x.dtype))


class OffsetRMSNorm(nn.Module):
    """Root-mean-square norm whose weight is `1 + offset`, as Gemma's; rounded once, behind the weight.

    Hooks as of `RMSNorm`; `hook_normalized` is in float32.
    """

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(d))
        self.eps = eps
        self.hook_scale = HookPoint()  # [batch pos 1]
        self.hook_normalized = HookPoint()  # [batch pos d]

    @property
    def weight(self) -> Float[Tensor, " d"]:
        """Factor on the normalised stream, in float32 (no view: the checkpoint has `offset`)."""
        return 1.0 + self.offset.float()

    def forward(self, x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        """Normalise the last axis."""
        x_float = x.float()
        scale = self.hook_scale((x_float.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return (self.weight * self.hook_normalized(x_float / scale)).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with bias, as CLIP's vision tower uses it.

    Hooks: `hook_scale` [..., 1] is the standard deviation; `hook_normalized` [..., d] is the centred
    input over it, before weight and bias.
    """

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))
        self.eps = eps
        self.hook_scale = HookPoint()  # [image token 1]
        self.hook_normalized = HookPoint()  # [image token d]

    def forward(self, x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        """Normalise the last axis."""
        x_float = x.float()
        centred = x_float - x_float.mean(-1, keepdim=True)
        scale = self.hook_scale((centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized((centred / scale).to(x.dtype)) * self.weight + self.bias
