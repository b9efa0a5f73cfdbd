"""Shared by all logit lenses: the residual stream after every layer, and its logits.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hones_lens.interventions import Hook, resid_hook
from hones_lens.model import HookedVLM, VLMInputs, takes_iterables

_CHUNK = 64  # positions whose logits are in memory at the same time


def layer_names(model: HookedVLM) -> tuple[Any, ...]:
    """Labels of the entries of `residual_streams`: `embed`, then each layer's number."""
    return ("embed", *range(model.cfg.n_layers))


@takes_iterables
@torch.no_grad()
def residual_streams(
    model: HookedVLM, inputs: VLMInputs, mask: Bool[Tensor, "batch pos"], hooks: Sequence[Hook] = ()
) -> Float[Tensor, "layer place d_model"]:
    """The residual stream at the positions of a mask: before block 0, then after each block.

    Args:
        model: The model.
        inputs: A prepared batch.
        mask: Positions to keep; axis `place` of the result lists them row by row.
        hooks: Hooks of an intervention, active during the run.
    """
    names = [resid_hook(0, "pre"), *(resid_hook(layer) for layer in range(model.cfg.n_layers))]
    kept: dict[str, Tensor] = {}

    def keep(resid: Tensor, hook: Any) -> None:
        kept[hook.name] = resid[mask.to(resid.device)]

    with model.hooks(fwd_hooks=[*hooks, *((name, keep) for name in names)]):
        model(inputs, logits_to_keep=1)
    return torch.stack([kept[name] for name in names])


@torch.no_grad()
def lens_logits(model: HookedVLM, stream: Float[Tensor, "place d_model"]) -> Iterator[Tensor]:
    """Logit-lens logits `unembed(ln_final(stream))`, in chunks of places, [chunk d_vocab]."""
    for part in stream.split(_CHUNK):
        yield model.unembed(model.ln_final(part)).float()


@torch.no_grad()
def summed_logits(
    model: HookedVLM,
    stream: Float[Tensor, "layer place d_model"],
    weights: Float[Tensor, " place"] | None = None,
) -> Float[Tensor, "layer d_vocab"]:
    """Weighted sum of the logit-lens logits over the places, float64 on the CPU; default weights are 1."""
    sums = torch.zeros(len(stream), model.cfg.d_vocab, dtype=torch.float64)
    share = torch.ones(stream.shape[1]) if weights is None else weights
    share = share.to(stream.device, torch.float64)
    for layer, places in enumerate(stream):
        at = 0
        for logits in lens_logits(model, places):
            sums[layer] += (share[at : at + len(logits)] @ logits.double()).cpu()
            at += len(logits)
    return sums


@torch.no_grad()
def token_logits(
    model: HookedVLM, stream: Float[Tensor, "place d_model"], ids: Sequence[int]
) -> Float[Tensor, "place id"]:
    """Logit-lens logits of the given token ids at every place, float64 on the CPU."""
    return torch.cat([logits[:, list(ids)].double().cpu() for logits in lens_logits(model, stream)])
