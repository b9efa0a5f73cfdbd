"""Hooks that store the activations for `HookedVLM.run_with_cache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.slice import Slice

from hones_lens.model.hook_names import HookFunction

_BY_HEAD_PAIR = ("hook_attn_scores", "hook_pattern")


def caching_hooks(
    store: dict[str, Tensor],
    device: torch.device | str | None,
    pos_slice: Any,
    remove_batch_dim: bool,
) -> tuple[HookFunction, HookFunction]:
    """A forward hook that stores detached activations by name, and a backward one for `*_grad`.

    Args:
        store: Filled with the activations.
        device: Device of the stored activations; None leaves them where they are.
        pos_slice: Positions of the decoder's activations to keep.
        remove_batch_dim: Drop the decoder's batch axis, and the vision tower's image axis where
            it is 1.

    Raises:
        ValueError: When run: a batch to drop that is larger than 1.
    """
    pos_slicer = Slice.unwrap(pos_slice)

    def store_activation(tensor: Tensor, name: str, suffix: str) -> None:
        activation = tensor.detach().to(device)
        in_decoder = not name.startswith("vision") and name != "hook_image_embed"
        if in_decoder:
            activation = pos_slicer.apply(activation, dim=-2 if name.endswith(_BY_HEAD_PAIR) else 1)
        if remove_batch_dim and in_decoder and activation.shape[0] != 1:
            raise ValueError(f"can't remove the batch axis of {name}: its size is {activation.shape[0]}")
        store[name + suffix] = activation[0] if remove_batch_dim and activation.shape[0] == 1 else activation

    def forward_hook(tensor: Tensor, hook: HookPoint) -> None:
        store_activation(tensor, str(hook.name), "")

    def backward_hook(tensor: Tensor, hook: HookPoint) -> None:
        store_activation(tensor, str(hook.name), "_grad")

    return forward_hook, backward_hook
