"""Scales of neurons and heads written into the weights, so that `save_pretrained` keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hones_lens.interventions.components import check_component, check_heads
from hones_lens.model import HookedVLM, takes_iterables, to_list

Factor = float | Sequence[float] | Tensor


@takes_iterables
@torch.no_grad()
def fold_neuron_scales(model: HookedVLM, neurons: Iterable[tuple[int, int]], factor: Factor) -> None:
    """Multiply what neurons write by factors, in the weights: row i of `W_out` ← factor × row i.

    The model then computes what it did with `m_i ← factor × m_i` at all positions (HONES eq. H5; 0 masks, eq.
    H4), but for rounding; `hook_post` still holds the unscaled neuron. The weights are changed in place, also
    for a Hugging Face model in memory that shares them.

    Args:
        model: The model.
        neurons: (layer, index) of each.
        factor: One for all, or one for each.

    Raises:
        ValueError: No neurons, a neuron twice, one that the model does not have, another number of factors
            than of neurons, or one that is not finite.
    """
    chosen = [(int(layer), int(index)) for layer, index in neurons]
    for layer, index in chosen:
        check_component("neuron", layer, index, model.cfg.n_layers, model.cfg.d_mlp)
    for (layer, index), value in zip(chosen, _factors("neuron", chosen, factor), strict=True):
        model.blocks[layer].mlp.W_out[index] *= value


@takes_iterables
@torch.no_grad()
def fold_head_scales(model: HookedVLM, heads: Iterable[tuple[int, int]], factor: Factor) -> None:
    """Multiply what heads write by factors, in the weights: head h of `W_O` ← factor × head h.

    As `fold_neuron_scales`, for `hook_z` (see `scale_heads`); 0 ablates.

    Raises:
        ValueError: No heads, a head twice, one that the model does not have, another number of factors than
            of heads, or one that is not finite.
    """
    chosen = [(int(layer), int(head)) for layer, head in heads]
    check_heads(model, chosen)
    for (layer, head), value in zip(chosen, _factors("head", chosen, factor), strict=True):
        model.blocks[layer].attn.W_O[head] *= value


def _factors(kind: str, chosen: Sequence[tuple[int, int]], factor: Factor) -> list[float]:
    if not chosen:
        raise ValueError(f"no {kind}s to scale")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"a {kind} occurs twice")
    factors = torch.as_tensor(factor, dtype=torch.float64).flatten()
    if factors.numel() == 1:
        factors = factors.expand(len(chosen))
    if len(factors) != len(chosen):
        raise ValueError(f"{len(factors)} factors for {len(chosen)} {kind}s")
    if not bool(factors.isfinite().all()):
        raise ValueError(f"factors of {kind}s must be finite")
    return to_list(factors)
