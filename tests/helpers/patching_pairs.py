"""Pairs of pictures on tiny random models of either family, and patching in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from helpers import random_llava
from hones_lens import HookedVLM, VLMInputs
from hones_lens.analysis.patching.pairs import PatchPairs

LAYERS, HEADS, KV_HEADS, D_MLP = 3, 4, 2, 40
Hook = tuple[str, Callable]


@cache
def model_and_pairs(made: ModuleType) -> tuple[HookedVLM, PatchPairs]:
    """A model with GQA, and pairs of three lengths: one picture, two, one; the corrupted ones are others."""
    model: HookedVLM = made.make_pair(made.make_config(text={"num_key_value_heads": KV_HEADS}), seed=21)[1]
    clean, corrupted = (
        model.with_image_embeds(model.prepare(pictures(made, seed), list(random_llava.QUESTIONS)))
        for seed in (0, 50)
    )
    return model, PatchPairs(
        clean, corrupted, torch.tensor([5, 9, 60]), torch.tensor([7, 100, 3]), ("a", "b", "c")
    )


def pictures(made: ModuleType, seed: int) -> list:
    one, two, three = made.make_images(3, seed) if made is random_llava else made.make_images(seed)
    return [one, [two, three], two]


def sides(pairs: PatchPairs, direction: str) -> tuple[VLMInputs, VLMInputs]:
    """Base and source."""
    return (pairs.clean, pairs.corrupted) if direction == "noise" else (pairs.corrupted, pairs.clean)


@torch.no_grad()
def difference(model: HookedVLM, pairs: PatchPairs, inputs: VLMInputs, hooks: list[Hook]) -> Tensor:
    """Logit of the answer minus that of the foil under hooks, [pair], in float64."""
    last = model.run_with_hooks(inputs, fwd_hooks=hooks)[:, -1].double()
    return torch.stack([row[a] - row[b] for row, a, b in zip(last, pairs.answer, pairs.foil, strict=True)])


@torch.no_grad()
def effect(model: HookedVLM, pairs: PatchPairs, direction: str, hooks: list[Hook]) -> Tensor:
    """What hooks on the base run change, [pair]."""
    base, _ = sides(pairs, direction)
    return difference(model, pairs, base, hooks) - difference(model, pairs, base, [])


@torch.no_grad()
def cached(model: HookedVLM, inputs: VLMInputs, name: str) -> Tensor:
    return model.run_with_cache(inputs, names_filter=name)[1][name]


def put(name: str, value: Tensor, at: tuple) -> Hook:
    """Another run's activation at an index, e.g. `[:, :, head]`."""

    def hook_fn(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        x[at] = value[at]
        return x

    return name, hook_fn
