"""Direct logit attribution and promoted tokens of a model with norms behind attention and MLP."""

from __future__ import annotations

import pytest
import torch
from helpers import random_gemma

from hones_lens import HookedVLM, VLMInputs
from hones_lens.analysis.logit_attribution import direct_logit_attribution
from hones_lens.analysis.vocabulary import promoted_tokens


@pytest.fixture(scope="module")
def case() -> tuple[HookedVLM, VLMInputs]:
    _, model = random_gemma.make_pair(seed=4)
    return model, random_gemma.mixed_batch(model)


@pytest.mark.parametrize("foils", [None, 9])
def test_heads_and_neurons_add_up_to_what_their_layers_add(
    case: tuple[HookedVLM, VLMInputs], foils: int | None
) -> None:
    model, inputs = case
    component, heads, neurons = (
        direct_logit_attribution(model, inputs, 5, foils, by=by).values
        for by in ("component", "head", "neuron")
    )
    torch.testing.assert_close(heads.sum(-1), component[:, 1::2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(neurons.sum(-1), component[:, 2::2], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        last = model(inputs)[:, -1]
    logit = last[:, 5] if foils is None else last[:, 5] - last[:, foils]
    total = component[:, 0] + heads.sum((-1, -2)) + neurons.sum((-1, -2))
    torch.testing.assert_close(total, logit, atol=1e-4, rtol=1e-4)


def test_a_heads_contribution_is_that_of_its_part_of_the_stream(case: tuple[HookedVLM, VLMInputs]) -> None:
    model, inputs = case
    found = direct_logit_attribution(model, inputs, 5, by="head").values
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        stack = cache.apply_ln_to_stack(cache.stack_head_results(), pos_slice=None)[:, :, -1]
        expected = stack @ model.tokens_to_residual_directions(5)
    torch.testing.assert_close(found.flatten(1).T, expected, atol=1e-5, rtol=1e-4)


def test_promoted_tokens_are_those_of_what_the_neuron_adds(case: tuple[HookedVLM, VLMInputs]) -> None:
    model, _ = case
    neurons = [(0, 3), (2, 11)]
    found = promoted_tokens(model, neurons, torch.tensor([1.0, -1.0]), 4)
    for i, (layer, index) in enumerate(neurons):
        block = model.blocks[layer]
        row = (1 - 2 * i) * block.mlp.W_out[index] * (1 + block.ln2_post.offset)
        logits = (row * (1 + model.ln_final.offset)) @ model.W_U
        top = (logits - logits.mean()).detach().topk(4)
        assert torch.equal(found.ids[i], top.indices)
        torch.testing.assert_close(found.logits[i], top.values, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_pattern_is_the_softmax_of_scores_over_the_configs_scalar(
    case: tuple[HookedVLM, VLMInputs],
) -> None:
    model, inputs = case
    _, cache = model.run_with_cache(inputs)
    q, k = cache["blocks.1.attn.hook_rot_q"], cache["blocks.1.attn.hook_rot_k"].repeat_interleave(2, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 13**0.5
    found = cache["blocks.1.attn.hook_attn_scores"]
    seen = found > -torch.inf
    torch.testing.assert_close(found[seen], scores[seen], atol=1e-5, rtol=1e-4)
    assert model.cfg.attn_scale == 13**0.5
