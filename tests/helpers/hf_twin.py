"""One random model twice: hooked, and as Hugging Face's own with PyTorch's hooks on its modules.

Nothing here uses the code under test: what is read and edited is what Hugging Face's modules pass on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from helpers import random_llava
from hones_lens import VLMInputs

Memory = dict[str, Any]
# A module's path, `input`, `output` or `keywords`, and what to do there; a returned tensor replaces it.
Step = tuple[str, str, Callable[[Any, Memory], Tensor | None]]
LAYERS = "model.language_model.layers"
DECODER = {
    "hook_resid_pre": ("", "input"),
    "hook_resid_post": ("", "output"),
    "hook_attn_out": ("self_attn.o_proj", "output"),
    "hook_mlp_out": ("mlp.down_proj", "output"),
    "attn.hook_q": ("self_attn.q_proj", "output"),
    "attn.hook_k": ("self_attn.k_proj", "output"),
    "attn.hook_v": ("self_attn.v_proj", "output"),
    "attn.hook_z": ("self_attn.o_proj", "input"),
    "mlp.hook_post": ("mlp.down_proj", "input"),
}


class Twin:
    """A Hugging Face model, and the same model hooked."""

    def __init__(self, made: ModuleType, seed: int = 11, **config: Any):
        self.made = made
        self.hf, self.model = made.make_pair(made.make_config(**config), seed)
        self.d_head = self.model.cfg.d_head

    @property
    def is_llava(self) -> bool:
        return self.made is random_llava

    def run(self, inputs: VLMInputs, steps: Sequence[Step] = (), **options: Any) -> Any:
        """Hugging Face's output, with these steps on the way."""
        self.hf.model.rope_deltas = None  # the Qwen keeps those of its last call
        with torch.no_grad(), hooked(self.hf, steps):
            return self.hf(**inputs.to_hf(), **options)

    def logits(self, inputs: VLMInputs, steps: Sequence[Step] = (), **options: Any) -> Tensor:
        return self.run(inputs, steps, **options).logits

    def attentions(self, inputs: VLMInputs) -> tuple[Tensor, ...]:
        """Patterns [batch head query key] of all layers."""
        self.hf.set_attn_implementation("eager")
        try:
            return self.run(inputs, output_attentions=True).attentions
        finally:
            self.hf.set_attn_implementation("sdpa")

    def seen(self, inputs: VLMInputs) -> dict[str, Tensor]:
        """What Hugging Face's decoder passes on, by our names; heads are [batch pos head d_head]."""
        kept: dict[str, Tensor] = {}
        steps: list[Step] = []
        for layer in range(self.model.cfg.n_layers):
            for name, (path, where) in DECODER.items():
                full = f"blocks.{layer}.{name}"
                steps.append((at(layer, path), where, lambda x, m, full=full: kept.update({full: x})))
        self.run(inputs, steps)
        for name, value in kept.items():
            if name[-2:] in ("_q", "_k", "_v", "_z"):
                kept[name] = value.unflatten(-1, (-1, self.d_head))
        for layer in range(self.model.cfg.n_layers):
            block = f"blocks.{layer}"
            kept[f"{block}.hook_resid_mid"] = kept[f"{block}.hook_resid_pre"] + kept[f"{block}.hook_attn_out"]
        return kept

    # -- edits -----------------------------------------------------------------------------------

    def edit(self, layer: int, name: str, change: Callable[[Tensor], Tensor]) -> list[Step]:
        """Change what is at a hook of the decoder: `change` gets and gives what that hook has."""
        if name == "hook_resid_mid":
            # No module reads it alone: attention is made to write what brings the stream there.
            return [
                (at(layer), "input", lambda x, m: m.update(pre=x)),
                (at(layer, "self_attn.o_proj"), "output", lambda x, m: change(m["pre"] + x) - m["pre"]),
            ]
        path, where = DECODER[name]
        heads = name[-2:] in ("_q", "_k", "_v", "_z")

        def changed(x: Tensor, memory: Memory) -> Tensor:
            return change(x.unflatten(-1, (-1, self.d_head))).flatten(2) if heads else change(x)

        return [(at(layer, path), where, changed)]

    def mix(self, layer: int, mixed: Callable[[Tensor], Tensor]) -> list[Step]:
        """z [batch pos head d_head] made anew from the values, [batch pos head d_head] by query head."""
        groups = self.model.cfg.n_heads // self.model.cfg.n_key_value_heads

        def keep(v: Tensor, memory: Memory) -> None:
            memory["v"] = v.unflatten(-1, (-1, self.d_head)).repeat_interleave(groups, dim=2)

        return [
            (at(layer, "self_attn.v_proj"), "output", keep),
            (at(layer, "self_attn.o_proj"), "input", lambda z, m: mixed(m["v"]).flatten(2)),
        ]

    def mix_by(self, layer: int, pattern: Tensor) -> list[Step]:
        """Values mixed by a pattern [batch head query key]."""
        return self.mix(layer, lambda v: torch.einsum("bhqk,bkhd->bqhd", pattern, v))

    def fork(self, layer: int, letter: str, head: int, change: Callable[[Tensor], Tensor]) -> list[Step]:
        """One head's queries, keys or values from a stream [batch pos d_model] of its own."""
        block = self.hf.get_submodule(at(layer))
        p = block.get_submodule(f"self_attn.{letter}_proj")
        rows = slice(head * self.d_head, (head + 1) * self.d_head)

        def forked(x: Tensor, memory: Memory) -> Tensor:
            stream = block.input_layernorm(change(memory["pre"]))
            x = x.clone()
            bias = None if p.bias is None else p.bias[rows]
            x[..., rows] = torch.nn.functional.linear(stream, p.weight[rows], bias)
            return x

        return [
            (at(layer), "input", lambda x, m: m.update(pre=x)),
            (at(layer, f"self_attn.{letter}_proj"), "output", forked),
        ]

    # -- the order of Qwen's patches -------------------------------------------------------------

    def patches(self, inputs: VLMInputs, x: Tensor, windows: bool = True) -> Tensor:
        """[image patch …] in raster order, as [patch …] in the order of Hugging Face's tower."""
        vision, thw = self.hf.config.vision_config, inputs.image_grid_thw
        assert thw is not None
        places = get_vision_position_ids(thw, vision.spatial_merge_size)
        image = torch.arange(len(thw)).repeat_interleave(thw.prod(-1))
        packed = x[image, places[:, 0] * thw[image, 2] + places[:, 1]]
        if not windows:
            return packed
        squares = packed.unflatten(0, (-1, vision.spatial_merge_size**2))
        return squares[self.token_order(inputs)].flatten(0, 1)

    def token_order(self, inputs: VLMInputs) -> Tensor:
        """Which image token, in raster order, is at each place of the tower's order."""
        vision = self.hf.config.vision_config
        sizes = (vision.spatial_merge_size, vision.window_size, vision.patch_size)
        return get_vision_window_index(inputs.image_grid_thw, *sizes)[0]


def at(layer: int, path: str = "") -> str:
    """The path of a module of one decoder layer."""
    return f"{LAYERS}.{layer}.{path}".rstrip(".")


@contextmanager
def hooked(hf: torch.nn.Module, steps: Sequence[Step]) -> Iterator[None]:
    """PyTorch's hooks for the runs inside the `with` block; the memory is theirs in common."""
    memory: Memory = {}
    handles = []
    for path, where, fn in steps:
        module = hf.get_submodule(path)
        if where == "output":
            handles.append(module.register_forward_hook(lambda _, args, out, fn=fn: fn(out, memory)))
        else:
            hook = _keywords if where == "keywords" else _input
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, fn=fn, hook=hook: hook(args, kwargs, fn, memory), with_kwargs=True
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keywords(args: tuple, kwargs: dict, fn: Callable, memory: Memory) -> None:
    fn(kwargs, memory)


def _input(args: tuple, kwargs: dict, fn: Callable, memory: Memory) -> tuple | None:
    new = fn(args[0] if args else kwargs["hidden_states"], memory)
    if new is None:
        return None
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})
