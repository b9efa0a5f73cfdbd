"""Random models of several shapes, each hooked and as Hugging Face's own, with a batch of mixed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from helpers import random_llava, random_qwen
from hones_lens import HookedVLM, VLMInputs

SHAPES = {
    "gqa": {"text": {"num_key_value_heads": 2}, "vision_feature_layer": [1, -2]},
    "mha, head_dim set, class token kept": {
        "text": {"head_dim": 10, "num_hidden_layers": 2},
        "vision_feature_select_strategy": "full",
    },
}
BY_HEAD_PAIR = ("hook_attn_scores", "hook_pattern")
COSTLY = ("hook_result", "hook_q_input", "hook_k_input", "hook_v_input")


QWEN_SHAPES = {
    "qwen, gqa": {"vision": {"window_size": 3 * 14}},
    "qwen, mha, one window": {
        "text": {"num_key_value_heads": 4, "num_hidden_layers": 2},
        "vision": {"window_size": 400, "fullatt_block_indexes": [0, 2]},
    },
}


class Pair:
    def __init__(self, shape: str):
        made = random_llava if shape in SHAPES else random_qwen
        config = made.make_config(**{**SHAPES, **QWEN_SHAPES}[shape])
        self.hf, self.model = made.make_pair(config, seed=11)
        self.inputs = made.mixed_batch(self.model)
        self.answered = made.mixed_batch(self.model, ["red", "two", "no"])

    def difference(self, a: Tensor, b: Tensor) -> float:
        return random_llava.largest_difference(a, b, self.inputs)


def hooks_that_run(model: HookedVLM, inputs: VLMInputs) -> list[str]:
    """Names of all hooks that a pass of these inputs runs, for filters; a predicate would leave some out."""
    names = list(model.hook_dict)
    if inputs.pixel_values is None or inputs.image_embeds is not None:
        names = [name for name in names if not name.startswith("vision")]
    return [name for name in names if inputs.pixel_values is not None or name != "hook_image_embed"]


@contextmanager
def trainable(*weights: Tensor) -> Iterator[None]:
    """These weights need gradients within the block; those of a loaded model need none."""
    for weight in weights:
        assert not weight.requires_grad
        weight.requires_grad_()
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def noise_hook(size: float = 0.3) -> Callable:
    """Adds the same noise to the same hook at every call."""

    def hook(x: Tensor, hook) -> Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, hook.name)))
        return x + size * torch.randn(x.shape, generator=generator)

    return hook


def identity(x: Tensor, hook) -> Tensor:
    return x


@contextmanager
def hf_edited(hf, path: str, where: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    module = hf.get_submodule(path)

    def at_input(module, args, kwargs):
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    if where == "input":
        handle = module.register_forward_pre_hook(at_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(lambda module, args, out: edit(out))
    try:
        yield
    finally:
        handle.remove()
