"""Hooks that keep activations: what `HookedVLM.run_with_cache` puts into an ActivationCache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.slice import Slice

from hones_lens.model.hook_names import HookFunction

_BY_HEAD_PAIR = ("hook_attn_scores", "hook_pattern")


def keeping_hooks(
    store: dict[str, Tensor],
    device: torch.device | str | None,
    pos_slice: Any,
    remove_batch_dim: bool,
) -> tuple[HookFunction, HookFunction]:
    """A forward hook that stores detached activations by name, and a backward one for `*_grad`.

    Args:
        store: Where they go.
        device: Where to keep them; None leaves them where they are.
        pos_slice: Positions of the decoder's activations to keep.
        remove_batch_dim: Drop the decoder's batch axis, and the vision tower's image axis where
            it is 1.

    Raises:
        ValueError: When run: a batch to drop that is larger than 1.
    """
    cut = Slice.unwrap(pos_slice)

    def keep(tensor: Tensor, name: str, suffix: str) -> None:
        kept = tensor.detach().to(device)
        decoder = not name.startswith("vision") and name != "hook_image_embed"
        if decoder:
            kept = cut.apply(kept, dim=-2 if name.endswith(_BY_HEAD_PAIR) else 1)
        if remove_batch_dim and decoder and kept.shape[0] != 1:
            raise ValueError(f"can't remove the batch axis of {name}: its size is {kept.shape[0]}")
        store[name + suffix] = kept[0] if remove_batch_dim and kept.shape[0] == 1 else kept

    def forward_hook(tensor: Tensor, hook: HookPoint) -> None:
        keep(tensor, str(hook.name), "")

    def backward_hook(tensor: Tensor, hook: HookPoint) -> None:
        keep(tensor, str(hook.name), "_grad")

    return forward_hook, backward_hook
