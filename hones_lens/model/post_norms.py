"""What heads and neurons add to the residual stream where a norm is behind attention or MLP (Gemma).

What a head (`z W_O`) or a neuron (`m_i W_out[i]`) writes is then normalised together with what the others of
its layer write. With the norm's scale held, its part of what is added is `weight ∘ written / scale`, and the
parts add up to `hook_attn_out` and `hook_mlp_out`; the scale is at `scale_hook`.
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from hones_lens.model.nn.norm import Norm

Part = Literal["attn", "mlp"]
PARTS: tuple[Part, ...] = ("attn", "mlp")
_NORMS = {"attn": "ln1_post", "mlp": "ln2_post"}


def post_norm(block: Any, part: Part) -> Norm | None:
    """The norm behind attention or MLP of a block; None where there is none."""
    return getattr(block, _NORMS[part], None)


def scale_hook(block: Any, layer: int, part: Part) -> str | None:
    """The hook of that norm's scale, [batch pos 1]; None without a norm."""
    return None if post_norm(block, part) is None else f"blocks.{layer}.{_NORMS[part]}.hook_scale"


def weighted(
    block: Any, part: Part, vectors: Float[Tensor, "*lead d_model"]
) -> Float[Tensor, "*lead d_model"]:
    """Vectors times that norm's weight: what is written as it is added, but for the scale.

    So too directions that what is written is read along: `⟨written, weight ∘ u⟩ / scale = ⟨added, u⟩`.
    """
    norm = post_norm(block, part)
    return vectors if norm is None else vectors * norm.weight.detach().to(vectors)
