"""The decoder's weights as TransformerLens's FactoredMatrix and SVDInterpreter read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from transformer_lens import FactoredMatrix

if TYPE_CHECKING:
    from hones_lens.model.hooked_vlm import HookedVLM


class NamedWeights(Mapping[str, Tensor]):
    """Tensors by name, made when they are read, so that a large model is not copied."""

    def __init__(self, made: Mapping[str, Callable[[], Tensor]]):
        self._made = dict(made)

    def __getitem__(self, name: str) -> Tensor:
        return self._made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def by_query_head(weight: Tensor, n_heads: int, axis: int = 0) -> Tensor:
    """Weights of key-value heads, repeated for the query heads that share them (GQA)."""
    return weight.repeat_interleave(n_heads // weight.shape[axis], dim=axis)


def tl_parameters(model: HookedVLM) -> NamedWeights:
    """Weights by TransformerLens's names; `W_K`, `W_V` and their biases are [head …], by query head.

    Norms are not folded: `blocks.{l}.ln1.w`, `ln2.w` and `ln_final.w` are there.
    """
    made: dict[str, Callable[[], Tensor]] = {
        "embed.W_E": lambda: model.W_E,
        "unembed.W_U": lambda: model.W_U,
        "unembed.b_U": lambda: model.b_U,
        "ln_final.w": lambda: model.ln_final.weight,
    }
    n_heads = model.cfg.n_heads
    for layer, block in enumerate(model.blocks):
        at = f"blocks.{layer}"
        for norm in ("ln1", "ln2"):
            made[f"{at}.{norm}.w"] = lambda block=block, norm=norm: getattr(block, norm).weight
        for name in ("W_Q", "b_Q", "W_O", "b_O"):
            made[f"{at}.attn.{name}"] = lambda block=block, name=name: getattr(block.attn, name)
        for name in ("W_K", "b_K", "W_V", "b_V"):
            made[f"{at}.attn.{name}"] = lambda block=block, name=name: by_query_head(
                getattr(block.attn, name), n_heads
            )
        for name in ("W_gate", "W_in", "W_out", "b_out"):
            made[f"{at}.mlp.{name}"] = lambda block=block, name=name: getattr(block.mlp, name)
    return NamedWeights(made)


def ov(model: HookedVLM) -> FactoredMatrix:
    """W_V W_O of every query head, [layer head d_model d_model]: what a head writes for what it reads."""
    return FactoredMatrix(by_query_head(model.W_V, model.cfg.n_heads, axis=1), model.W_O)


def qk(model: HookedVLM) -> FactoredMatrix:
    """W_Q W_Kᵀ of every query head, [layer head d_model d_model], without biases and rotation."""
    keys = by_query_head(model.W_K, model.cfg.n_heads, axis=1)
    return FactoredMatrix(model.W_Q, keys.transpose(-2, -1))
