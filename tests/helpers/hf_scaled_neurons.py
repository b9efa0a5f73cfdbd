"""Neurons to steer, and Hugging Face's model with neurons scaled."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from helpers.hf_task_loops import D_MLP, hf_input_hook, hf_layers
from hones_lens.hones.steering.config import SteeringConfig

CHOSEN = [(1, 5), (2, 0), (1, 7), (2, 11), (2, 19)]
FAST = SteeringConfig(lr=0.05, epochs=2, accumulate=2)
QUIET: dict[str, Any] = {"progress": False}


def hf_scaled(hf_model: Any, factors: dict[tuple[int, int], Tensor]) -> ExitStack:
    """Hugging Face's model with what `down_proj` is given multiplied at these neurons."""
    stack = ExitStack()
    for layer, module in enumerate(hf_layers(hf_model)):
        row = torch.stack([factors.get((layer, i), torch.ones(())) for i in range(D_MLP)])
        stack.enter_context(hf_input_hook(module.mlp.down_proj, lambda x, row=row: x * row))
    return stack
