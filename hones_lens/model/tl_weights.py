"""The decoder's weights under TransformerLens's names. `HookedVLM` has these functions as methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from hones_lens.model.config import VLMConfig
from hones_lens.model.nn.norm import Norm
from hones_lens.model.nn.placed import LazyTensors
from hones_lens.model.nn.unembed import Unembedding
from hones_lens.model.post_norms import Part, post_norm

_STACKED = {"attn": ("W_Q", "b_Q", "W_O", "b_O"), "mlp": ("W_gate", "W_in", "b_in", "W_out", "b_out")}
_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
_BY_KEY_VALUE_HEAD = ("W_K", "b_K", "W_V", "b_V")


class HasDecoder(Protocol):
    """The part of a model that reading the decoder's weights needs."""

    blocks: Any  # nn.ModuleList of Block
    embed: nn.Embedding
    embed_scale: float | None
    ln_final: Norm
    unembed: Unembedding

    @property
    def cfg(self) -> VLMConfig:
        """Sizes of the decoder."""
        ...

    def to_single_token(self, text: str) -> int:
        """The id of text that is one token."""
        ...


class StackedWeight:
    """A weight of all layers, [layer …], stacked when it is read; an attribute of the model's class.

    Args:
        part: `attn` or `mlp`.
        name: The weight's name in there; AttributeError where the family has no such weight.
    """

    def __init__(self, part: str, name: str):
        self.part, self.name = part, name

    def __get__(self, model: HasDecoder, owner: type) -> Tensor:
        return _stack(model, self.part, self.name)


def _stack(model: HasDecoder, part: str, name: str) -> Tensor:
    return torch.stack([getattr(getattr(block, part), name) for block in model.blocks])


def token_embeddings(model: HasDecoder) -> Float[Tensor, "d_vocab d_model"]:
    """Embeddings of all tokens as they enter the stream."""
    weight = model.embed.weight
    return weight if model.embed_scale is None else weight * weight.new_tensor(model.embed_scale)


def by_query_head(weight: Tensor, n_heads: int, axis: int = 0) -> Tensor:
    """Weights of key-value heads, repeated for the query heads that share them (GQA)."""
    return weight.repeat_interleave(n_heads // weight.shape[axis], dim=axis)


def tl_parameters(model: HasDecoder) -> LazyTensors:
    """Weights by TransformerLens's names, keys and values by query head (for `SVDInterpreter`).

    Norms are not folded: `blocks.{l}.ln1.w`, `ln2.w` (with norms behind attention and MLP, `ln1_post.w` and
    `ln2_post.w` too) and `ln_final.w` are there.
    """
    readers: dict[str, Callable[[], Tensor]] = {
        "embed.W_E": lambda: token_embeddings(model),
        "unembed.W_U": lambda: model.unembed.W_U,
        "unembed.b_U": lambda: model.unembed.b_U,
        "ln_final.w": lambda: model.ln_final.weight,
    }
    for layer, block in enumerate(model.blocks):
        prefix = f"blocks.{layer}"
        for norm in (n for n in _NORMS if getattr(block, n, None) is not None):
            readers[f"{prefix}.{norm}.w"] = _reader(getattr(block, norm), "weight")
        for part, names in _STACKED.items():
            module = getattr(block, part)
            readers |= {
                f"{prefix}.{part}.{name}": _reader(module, name) for name in names if hasattr(module, name)
            }
        for name in _BY_KEY_VALUE_HEAD:
            readers[f"{prefix}.attn.{name}"] = _reader(block.attn, name, model.cfg.n_heads)
    return LazyTensors(readers)


def _reader(module: nn.Module, name: str, n_heads: int | None = None) -> Callable[[], Tensor]:
    if n_heads is None:
        return lambda: getattr(module, name)
    return lambda: by_query_head(getattr(module, name), n_heads)


def ov(model: HasDecoder) -> FactoredMatrix:
    """W_V W_O of every query head, [layer head d_model d_model]."""
    values = by_query_head(_stack(model, "attn", "W_V"), model.cfg.n_heads, axis=1)
    return FactoredMatrix(values, _stack(model, "attn", "W_O"))


def qk(model: HasDecoder) -> FactoredMatrix:
    """W_Q W_Kᵀ of every query head, [layer head d_model d_model], without biases and rotation.

    Where queries and keys have norms (QK-norm), with the weights of these: the scores are the products with
    it, each over the scales of both norms (`attn.q_norm.hook_scale`, `attn.k_norm.hook_scale`).
    """
    queries, keys = (_stack(model, "attn", name) for name in ("W_Q", "W_K"))
    queries, keys = (_with_norms(model, w, norm) for w, norm in ((queries, "q_norm"), (keys, "k_norm")))
    keys = by_query_head(keys, model.cfg.n_heads, axis=1)
    return FactoredMatrix(queries, keys.transpose(-2, -1))


def _with_norms(model: HasDecoder, weight: Tensor, name: str) -> Tensor:
    """Weights [layer head d_model d_head] times those of the norm behind them, if there is one."""
    norms: list[Norm | None] = [getattr(block.attn, name) for block in model.blocks]
    if all(norm is None for norm in norms):
        return weight
    ones = torch.ones_like(weight[0, 0, 0])
    return weight * torch.stack([ones if norm is None else norm.weight for norm in norms])[:, None, None]


def accumulated_bias(
    model: HasDecoder, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
) -> Float[Tensor, " d_model"]:
    """Sum of the output biases of all blocks below `layer` (and of its attention, if mlp_input).

    Raises:
        ValueError: A bias behind which there is a norm.
    """
    total = torch.zeros(model.cfg.d_model, device=model.cfg.device, dtype=model.cfg.dtype)
    for i, block in enumerate(model.blocks[: layer + mlp_input]):
        total = total + _added_bias(block, "attn", block.attn.b_O)
        if include_mlp_biases and i < layer:
            total = total + _added_bias(block, "mlp", block.mlp.b_out)
    return total


def _added_bias(block: Any, part: Part, bias: Tensor) -> Tensor:
    if post_norm(block, part) is not None and bool(bias.any()):
        raise ValueError(f"what the output bias of {part} adds depends on the scale of the norm behind it")
    return bias


def tokens_to_residual_directions(
    model: HasDecoder, tokens: str | int | Tensor
) -> Float[Tensor, "*shape d_model"]:
    """Directions whose dot product with `resid / ln_final scale` is the token's logit.

    The final norm's weight is folded in, since `ActivationCache.apply_ln_to_stack` divides by the scale
    and leaves out the weight. With a LayerNorm the residual stream is centred too, and the norm's bias adds
    a constant to each logit.
    """
    if isinstance(tokens, str):
        tokens = model.to_single_token(tokens)
    index = torch.as_tensor(tokens, device=model.cfg.device)
    directions = model.unembed.W_U.T[index]
    return (directions * model.ln_final.weight).to(directions.dtype)
