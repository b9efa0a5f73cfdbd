"""Pairs on both families' random models, and patches on Hugging Face's own model with PyTorch's hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import pytest
import torch
from torch import Tensor

from helpers import random_llava, random_qwen
from helpers.hf_twin import Step, Twin
from helpers.patching_pairs import pictures, sides
from hones_lens.analysis.patching.activation import patch_activations
from hones_lens.analysis.patching.pairs import PatchPairs

TOLERANCE = 5e-5
LAYERS, HEADS, KV_HEADS = 3, 4, 2
NEURONS = (0, 7, 39)
DIRECTIONS = ("denoise", "noise")
GROUPS = ("image", "question", "last")


@cache
def twin_and_pairs(made: ModuleType) -> tuple[Twin, PatchPairs]:
    """A model with GQA, and pairs of three lengths; the pictures and one word of the text differ."""
    twin = Twin(made, seed=21, text={"num_key_value_heads": KV_HEADS})
    texts = [list(random_llava.QUESTIONS), [*random_llava.QUESTIONS[:2], "is it blue?"]]
    clean, corrupted = (
        twin.model.prepare(pictures(made, seed), text) for seed, text in zip((0, 50), texts, strict=True)
    )
    assert not clean.attention_mask.all() and clean.input_ids.shape == corrupted.input_ids.shape
    ends = (torch.tensor([5, 9, 60]), torch.tensor([7, 100, 3]))
    return twin, PatchPairs(clean, corrupted, *ends, ("a", "b", "c"))


FAMILIES = pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])


def difference(pairs: PatchPairs, logits: Tensor) -> Tensor:
    rows = zip(logits.double(), pairs.answer.tolist(), pairs.foil.tolist(), strict=True)
    return torch.stack([row[a] - row[b] for row, a, b in rows])


def hf_effect(twin: Twin, pairs: PatchPairs, direction: str, steps: list[Step]) -> Tensor:
    """What steps on Hugging Face's base run change, [pair]."""
    base, _ = sides(pairs, direction)
    patched, plain = (twin.logits(base, s)[:, -1] for s in (steps, []))
    return difference(pairs, patched) - difference(pairs, plain)


def put(theirs: Tensor, *index: object) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = theirs[index]
        return x

    return change


def decoder_steps(
    twin: Twin, theirs: dict, layer: int, hook: str, mask: Tensor, unit: int | None
) -> list[Step]:
    value = theirs[f"blocks.{layer}.{hook}"]
    index = (mask,) if unit is None else (mask, unit)
    return twin.edit(layer, hook, put(value, *index))


def changes(twin: Twin, pairs: PatchPairs, what: str, **options: object) -> Tensor:
    result = patch_activations(twin.model, pairs, what, by_pair=True, progress=False, **options)
    assert result.axes[0] == "pair" and result.labels["pair"] == pairs.ids
    return result.values.movedim(0, -1)
