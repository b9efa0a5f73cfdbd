"""Activation patching against naive loops over Hugging Face's own model with PyTorch's hooks."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.activation_patching import (
    DIRECTIONS,
    FAMILIES,
    GROUPS,
    HEADS,
    KV_HEADS,
    LAYERS,
    NEURONS,
    TOLERANCE,
    changes,
    decoder_steps,
    hf_effect,
    twin_and_pairs,
)
from helpers.hf_twin import Twin
from helpers.patching_pairs import sides
from torch import Tensor

from hones_lens import VLMInputs
from hones_lens.interventions.token_groups import Box, token_mask


@pytest.mark.exhaustive
@FAMILIES
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("what", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_streams_by_layer_and_group(made: ModuleType, direction: str, what: str) -> None:
    twin, pairs = twin_and_pairs(made)
    found = changes(twin, pairs, what, direction=direction)
    assert found.shape == (LAYERS, len(GROUPS), 3)
    theirs = twin.seen(sides(pairs, direction)[1])
    for layer in range(LAYERS):
        for g, group in enumerate(GROUPS):
            mask = pairs.clean.token_groups[group]
            steps = decoder_steps(twin, theirs, layer, f"hook_{what}", mask, None)
            expected = hf_effect(twin, pairs, direction, steps)
            assert (found[layer, g] - expected).abs().max() <= TOLERANCE
    assert found.abs().amax((0, 2)).min() > 1e-3, "a group does nothing"


@pytest.mark.exhaustive
@FAMILIES
@pytest.mark.parametrize("what", ["z", "q", "k", "v"])
def test_heads_by_group(made: ModuleType, what: str) -> None:
    twin, pairs = twin_and_pairs(made)
    groups = ["all", "last"]
    found = changes(twin, pairs, what, groups=groups, direction="noise")
    n = HEADS if what in "zq" else KV_HEADS
    assert found.shape == (LAYERS, n, 2, 3)
    theirs = twin.seen(pairs.corrupted)
    for layer, head in np.ndindex(LAYERS, n):
        for g, group in enumerate(groups):
            mask = token_mask(pairs.clean, group)
            steps = decoder_steps(twin, theirs, layer, f"attn.hook_{what}", mask, head)
            expected = hf_effect(twin, pairs, "noise", steps)
            assert (found[layer, head, g] - expected).abs().max() <= TOLERANCE
    assert found[1:].abs().amax(-1).min() > 1e-7, "a head does nothing"


@FAMILIES
def test_neurons_alone_together_and_as_a_set(made: ModuleType) -> None:
    twin, pairs = twin_and_pairs(made)
    theirs, every = twin.seen(pairs.clean), token_mask(pairs.clean, "all")
    options = {"by": "all", "direction": "denoise"}
    alone = changes(twin, pairs, "neurons", units=NEURONS, **options)
    together = changes(twin, pairs, "neurons", **options)
    assert alone.shape == (LAYERS, 3, 3) and together.shape == (LAYERS, 3)
    for layer in range(LAYERS):
        steps = [decoder_steps(twin, theirs, layer, "mlp.hook_post", every, i) for i in (*NEURONS, None)]
        expected = torch.stack([hf_effect(twin, pairs, "denoise", each) for each in steps])
        assert (torch.cat((alone[layer], together[layer][None])) - expected).abs().max() <= TOLERANCE
    chosen = {"both": [(0, 7), (2, 39)], "one": [(1, 0)]}
    sets = changes(twin, pairs, "neurons", units=chosen, **options)
    for i, members in enumerate(chosen.values()):
        # Hugging Face's hooks in the order of the layers: each puts in what the clean run has there.
        steps = [s for n, j in members for s in decoder_steps(twin, theirs, n, "mlp.hook_post", every, j)]
        assert (sets[i] - hf_effect(twin, pairs, "denoise", steps)).abs().max() <= TOLERANCE
    one_by_one = changes(twin, pairs, "neurons", units=[(0, 7), (2, 39)], **options)
    assert torch.allclose(one_by_one, torch.stack([alone[0, 1], alone[2, 2]]), atol=2e-5)


@FAMILIES
def test_patterns_by_group_of_queries(made: ModuleType) -> None:
    twin, pairs = twin_and_pairs(made)
    found = changes(twin, pairs, "pattern", groups=["question"], direction="denoise")
    ours, theirs = twin.attentions(pairs.corrupted), twin.attentions(pairs.clean)
    queries = pairs.clean.token_groups["question"]
    for layer, head in np.ndindex(LAYERS, HEADS):
        pattern = ours[layer].clone()
        pattern[:, head][queries] = theirs[layer][:, head][queries]
        expected = hf_effect(twin, pairs, "denoise", twin.mix_by(layer, pattern))
        assert (found[layer, head, 0] - expected).abs().max() <= TOLERANCE
    assert found.abs().max() > 1e-3


LLAVA_PARTS = {"vision_z": "self_attn.out_proj", "vision_neurons": "mlp.fc2"}
QWEN_PARTS = {"vision_z": "attn.proj", "vision_neurons": "mlp.down_proj"}
TOWERS = {
    random_llava: ("model.vision_tower.encoder.layers", LLAVA_PARTS),
    random_qwen: ("model.visual.blocks", QWEN_PARTS),
}


def first_column(twin: Twin, inputs: VLMInputs) -> Tensor:
    """Patches of the first column of tokens of each row's first image, as Hugging Face's tower lays them."""
    longest = max(r * c for row in inputs.patch_grids for r, c in row)
    masks = []
    for grids in inputs.patch_grids:
        for place, (rows, columns) in enumerate(grids):
            mask = torch.zeros(longest, dtype=torch.bool)
            if place == 0:
                here = torch.arange(rows * columns) % columns < twin.model.cfg.vision.merge_size
                mask[: rows * columns] = here
            masks.append(mask)
    laid = torch.stack(masks)
    # The class token is in no box.
    return torch.nn.functional.pad(laid, (1, 0)) if twin.is_llava else twin.patches(inputs, laid)


@FAMILIES
@pytest.mark.parametrize("what", ["vision_z", "vision_neurons"])
def test_vision_heads_and_neurons(made: ModuleType, what: str) -> None:
    """All of an image, and a box on it: its first column of tokens."""
    twin, pairs = twin_and_pairs(made)
    cfg, inputs = twin.model.cfg.vision, pairs.clean
    units, groups = [0, 2], {"image": "image", "box": Box(5, 0, 5.5, 1000)}
    found = changes(twin, pairs, what, groups=groups, units=units, direction="noise")
    masks = first_column(twin, inputs)
    width = cfg.d_head if what == "vision_z" else 1
    for layer in range(cfg.n_layers):
        folder, names = TOWERS[made]
        path, kept = f"{folder}.{layer}.{names[what]}", []
        twin.run(pairs.corrupted, [(path, "input", lambda x, m, kept=kept: kept.append(x))])
        for u, unit in enumerate(units):
            mine = slice(unit * width, (unit + 1) * width)
            for g, mask in enumerate((torch.ones_like(masks), masks)):

                def change(x: Tensor, memory: object, mask=mask, mine=mine, theirs=kept[0]) -> Tensor:
                    x = x.clone()
                    x[..., mine] = torch.where(mask[..., None], theirs[..., mine], x[..., mine])
                    return x

                expected = hf_effect(twin, pairs, "noise", [(path, "input", change)])
                assert (found[layer, u, g] - expected).abs().max() <= TOLERANCE
    assert found[:, :, 1].abs().max() > 1e-5, "the box does nothing"
