"""Rotary position embedding (RoPE), with one stream of positions or several (mRoPE)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Rotary(nn.Module):
    """Cosines and sines of the rotation angles, from frequencies that do not depend on the length.

    Args:
        inv_freq: Radians per position, [d_head / 2].
        scaling: Factor on cosine and sine (1 but for YaRN).
        sections: Where positions come in streams: how many frequencies in a row read stream 0, 1, 2,
            and 0 again where there are more (mRoPE of Qwen2-VL, `mrope_section`). None: one stream.
        limit: How many positions these frequencies hold for; None: any number.
        interleaved: The sections take turns from the first frequency on (0, 1, 2, 0, …), as long as they have
            frequencies; stream 0 has all others (Qwen3-VL, `mrope_interleaved`).
    """

    inv_freq: Tensor

    def __init__(
        self,
        inv_freq: Float[Tensor, " half"],
        scaling: float = 1.0,
        sections: Sequence[int] | None = None,
        limit: int | None = None,
        interleaved: bool = False,
    ):
        super().__init__()
        self.limit = limit
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.scaling = scaling
        self.streams = None
        if sections is not None and interleaved:
            self.streams = [i % 3 if i // 3 < sections[i % 3] else 0 for i in range(sum(sections))]
        elif sections is not None:
            self.streams = [i % 3 for i, width in enumerate(sections) for _ in range(width)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # Frequencies stay float32 when the model is cast: rounded ones would blur far positions.
        exact = self.inv_freq
        parent: Any = super()  # PyTorch leaves it untyped
        moved = parent._apply(fn, recurse)
        self.inv_freq = exact.to(self.inv_freq.device)
        return moved

    def forward(
        self, positions: Int[Tensor, "*streams_batch pos"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "*batch pos d_head"], Float[Tensor, "*batch pos d_head"]]:
        """Cosine and sine for every position; angles are computed in float32.

        Args:
            positions: [batch pos], or with `sections` [3 batch pos].
            dtype: Of the result.

        Raises:
            ValueError: A position beyond `limit`.
        """
        if self.limit is not None and positions.numel() and (last := int(positions.max())) >= self.limit:
            raise ValueError(
                f"position {last} is beyond the {self.limit} of the checkpoint, where the angles of its "
                "rope_type='dynamic' depend on the length of the sequence: not handled"
            )
        steps = positions[..., None] if self.streams is None else positions[self.streams].movedim(0, -1)
        angles = steps.float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)


def rotary_frequencies(
    hf_config: Any,
    d_head: int,
    handled: Sequence[str] = STATIC_ROPE_TYPES,
    layer_type: str | None = None,
) -> tuple[Tensor, float]:
    """Frequencies [d_head / 2] and scaling that a Hugging Face text config asks for.

    Args:
        hf_config: The text config.
        d_head: Width of a head.
        handled: The rope types that are handled.
        layer_type: Of the layers, where the config has parameters for each type of them.

    Raises:
        ValueError: A rope type that is not handled. (Those of `dynamic` are the default ones up to the length
            that the checkpoint was made for: give `Rotary` that limit.)
    """
    parameters = hf_config.rope_parameters
    by_type: dict[str, str] = {} if layer_type is None else {"layer_type": layer_type}
    if layer_type is not None:
        parameters = parameters[layer_type]
    rope_type = parameters["rope_type"]
    if rope_type not in handled:
        raise ValueError(f"config value rope_type={rope_type!r} is not handled; handled: {handled}")
    if rope_type in ("default", "dynamic"):
        steps = torch.arange(0, d_head, 2, dtype=torch.float) / d_head
        return 1.0 / parameters["rope_theta"] ** steps, 1.0
    return ROPE_INIT_FUNCTIONS[rope_type](hf_config, **by_type)


def rotate(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "batch pos d_head"],
    sin: Float[Tensor, "batch pos d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """Rotate each pair (i, i + d_head/2) of every head by its position's angle.

    The products are taken in the wider of the two types; the result has that of `x`.
    """
    low, high = x.chunk(2, dim=-1)
    rotated = torch.cat((-high, low), dim=-1)
    return (x * cos[:, :, None] + rotated * sin[:, :, None]).to(x.dtype)
