"""The decoder's modules as a family passes them to `HookedVLM`, and those of LLaMA's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hones_lens.model.config import VLMConfig
from hones_lens.model.nn.attention import Attention
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.mlp import GatedMLP
from hones_lens.model.nn.norm import Norm, RMSNorm
from hones_lens.model.nn.rotary import Rotary
from hones_lens.model.nn.unembed import Unembed, Unembedding


@dataclass(frozen=True)
class Decoder:
    """All modules between token ids and logits; the family chooses their classes.

    Attributes:
        embed: Token embeddings.
        rotary: Rotation angles of all positions.
        blocks: From the lowest to the highest, with any norms and any feed-forward network.
        ln_final: The norm before the unembedding.
        unembed: From the normalised residual stream to logits.
        sliding_rotary: Rotation angles of the layers whose attention slides; None: the same.
        embed_scale: Factor on token embeddings, rounded to their type (Gemma); None: 1.
    """

    embed: nn.Embedding
    rotary: Rotary
    blocks: Sequence[Block]
    ln_final: Norm
    unembed: Unembedding
    sliding_rotary: Rotary | None = None
    embed_scale: float | None = None


def llama_decoder(
    cfg: VLMConfig,
    rotary: Rotary,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    sliding: Sequence[bool] = (),
    qk_norm: bool = False,
) -> Decoder:
    """RMSNorm before attention and before a gated MLP, as LLaMA, Mistral and Qwen2 have it.

    Args:
        cfg: Sizes.
        rotary: Rotation angles.
        qkv_bias, out_bias, mlp_bias: Where there are biases.
        sliding: For each layer whether its attention slides; default: nowhere.
        qk_norm: Whether each head's queries and keys have an RMSNorm, as in Qwen3.
    """
    heads = (cfg.n_heads, cfg.n_key_value_heads, cfg.d_head)
    slides = sliding or (False,) * cfg.n_layers
    return Decoder(
        embed=nn.Embedding(cfg.d_vocab, cfg.d_model),
        rotary=rotary,
        blocks=[
            Block(
                Attention(
                    layer,
                    cfg.d_model,
                    *heads,
                    qkv_bias,
                    out_bias,
                    sliding=slides[layer],
                    qk_norm=(RMSNorm(cfg.d_head, cfg.eps), RMSNorm(cfg.d_head, cfg.eps)) if qk_norm else None,
                ),
                GatedMLP(cfg.d_model, cfg.d_mlp, cfg.act_fn, mlp_bias),
                RMSNorm(cfg.d_model, cfg.eps),
                RMSNorm(cfg.d_model, cfg.eps),
                deepstack=layer < cfg.n_deepstack,
            )
            for layer in range(cfg.n_layers)
        ],
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab),
    )


def layer_index(layer: int | None, default: int, n_layers: int) -> int:
    """A layer as blocks are sliced by it, 0 … n_layers; negative ones count from the end.

    Raises:
        ValueError: A layer out of range.
    """
    if layer is None:
        return default
    index = layer + n_layers if layer < 0 else layer
    if not 0 <= index <= n_layers:
        raise ValueError(f"layer {layer} is not in 0 … {n_layers}")
    return index
