"""One ranking's scores, and what Hugging Face's networks are given."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from helpers.hf_task_loops import (
    D_MLP,
    N_LAYERS,
    hf_input_hook,
    hf_layers,
    pair,
)
from hones_lens import HookedVLM
from hones_lens.data.examples import Example
from hones_lens.hones.attribution.attribute import load_ranking
from hones_lens.tasks.registry import load_task

SHAPE = (N_LAYERS, D_MLP)


def score(
    name: str, task: str, examples: Sequence[Example], model: HookedVLM | None = None, **options: Any
) -> Tensor:
    options = {"batch_size": 2, "progress": False, **options}
    return load_ranking(name)(model or pair()[1], load_task(task), list(examples), **options)


def looks(hf_model: Any, part: str, found: dict[int, Tensor]) -> ExitStack:
    """Keep what a part of every layer's network is given (`down_proj`: the neurons)."""
    stack = ExitStack()
    for layer, module in enumerate(hf_layers(hf_model)):

        def look(x: Tensor, layer: int = layer) -> None:
            found[layer] = x

        stack.enter_context(hf_input_hook(getattr(module.mlp, part), look))
    return stack
