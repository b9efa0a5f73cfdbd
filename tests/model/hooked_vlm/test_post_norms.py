"""Where a norm is behind attention and MLP, what a cache says heads and neurons add is what is added."""

from __future__ import annotations

import pytest
import torch
from helpers import random_gemma
from torch import Tensor

from hones_lens import HookedVLM
from hones_lens.model.caching import VLMCache


@pytest.fixture(scope="module")
def case() -> tuple[HookedVLM, VLMCache]:
    _, model = random_gemma.make_pair(seed=3)
    with torch.no_grad():
        return model, model.run_with_cache(random_gemma.mixed_batch(model))[1]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("positions", [None, -1, (2, 9)])
def test_heads_add_up_to_what_attention_adds(case: tuple[HookedVLM, VLMCache], positions) -> None:
    _, cache = case
    heads, labels = cache.stack_head_results(3, return_labels=True, pos_slice=positions)
    taken = {None: slice(None), -1: -1, (2, 9): slice(2, 9)}[positions]
    assert labels[:5] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]
    for layer in range(3):
        close(heads[4 * layer : 4 * layer + 4].sum(0), cache[f"blocks.{layer}.hook_attn_out"][:, taken])
    whole = cache.stack_head_results(2, incl_remainder=True, pos_slice=positions).sum(0)
    close(whole, cache["blocks.1.hook_resid_post"][:, taken])


def test_a_heads_part_is_what_the_norm_makes_of_its_result_at_that_scale(
    case: tuple[HookedVLM, VLMCache],
) -> None:
    model, cache = case
    norm, attn = model.blocks[1].ln1_post, model.blocks[1].attn
    written = torch.einsum("bpd,dm->bpm", cache["blocks.1.attn.hook_z"][:, :, 2], attn.W_O[2])
    expected = written / cache["blocks.1.ln1_post.hook_scale"] * (1 + norm.offset)
    close(cache.stack_head_results(3)[6], expected)
    kept = model.run_with_cache(random_gemma.mixed_batch(model), names_filter="blocks.1.attn.hook_result")[1]
    close(kept["blocks.1.attn.hook_result"][:, :, 2], written)


@pytest.mark.parametrize("positions", [None, -1])
def test_neurons_add_up_to_what_the_mlp_adds(case: tuple[HookedVLM, VLMCache], positions) -> None:
    model, cache = case
    taken = slice(None) if positions is None else positions
    neurons = cache.stack_neuron_results(3, pos_slice=positions)
    n, onto = model.cfg.d_mlp, torch.randn(model.cfg.d_model, 2, generator=torch.Generator().manual_seed(0))
    for layer in range(3):
        added = cache[f"blocks.{layer}.hook_mlp_out"][:, taken]
        close(neurons[n * layer : n * layer + n].sum(0), added)
        close(cache.get_neuron_results(layer, None, positions, onto).sum(-2), added @ onto)
        close(cache.get_neuron_results(layer, None, positions, onto[:, 0]).sum(-1), added @ onto[:, 0])
    close(
        cache.stack_neuron_results(3, positions, slice(1, 4), project_output_onto=onto)[4],
        neurons[n + 2] @ onto,
    )
    both = [
        cache.stack_neuron_results(3, positions, slice(1, 4), apply_ln=True, incl_remainder=True, **given)
        for given in ({}, {"project_output_onto": onto})
    ]
    close(both[1], both[0] @ onto)


@pytest.mark.parametrize("neurons", [False, True])
def test_the_full_decomposition_adds_up_to_the_stream(
    case: tuple[HookedVLM, VLMCache], neurons: bool
) -> None:
    model, cache = case
    parts, labels = cache.get_full_resid_decomposition(expand_neurons=neurons, return_labels=True)
    assert len(labels) == len(parts) == 3 * 4 + 3 * (model.cfg.d_mlp if neurons else 1) + 2
    close(parts.sum(0), cache["blocks.2.hook_resid_post"])
    close(cache.decompose_resid().sum(0), cache["blocks.2.hook_resid_post"])
    logits = model(random_gemma.mixed_batch(model))
    token = torch.full(logits.shape[:2], 7)
    directions = model.tokens_to_residual_directions(token)
    close(torch.einsum("cbpd,bpd->bp", cache.apply_ln_to_stack(parts), directions), logits[..., 7])


def test_without_the_scale_they_raise(case: tuple[HookedVLM, VLMCache]) -> None:
    model, _ = case
    names = [name for name in model.hook_dict if name.endswith(("hook_z", "mlp.hook_post"))]
    _, cache = model.run_with_cache(random_gemma.mixed_batch(model), names_filter=names)
    with pytest.raises(KeyError, match=r"blocks\.0\.ln1_post\.hook_scale is not in this cache"):
        cache.stack_head_results(1)
    with pytest.raises(KeyError, match=r"blocks\.1\.ln2_post\.hook_scale is not in this cache"):
        cache.get_neuron_results(1)


def test_a_bias_before_a_norm_is_no_constant_of_the_stream() -> None:
    _, model = random_gemma.make_pair(seed=3)
    assert not bool(model.accumulated_bias(3).any())
    model.blocks[1].mlp.down.bias = torch.nn.Parameter(torch.ones(model.cfg.d_model))
    assert not bool(model.accumulated_bias(1, mlp_input=True).any())
    with pytest.raises(ValueError, match="the output bias of mlp adds depends on the scale"):
        model.accumulated_bias(2)


def test_weights_of_all_four_norms_are_named(case: tuple[HookedVLM, VLMCache]) -> None:
    model, _ = case
    named = model.tl_parameters()
    for norm in ("ln1", "ln1_post", "ln2", "ln2_post"):
        assert torch.equal(named[f"blocks.2.{norm}.w"], 1 + getattr(model.blocks[2], norm).offset)
    assert torch.equal(named["embed.W_E"], model.W_E)
    assert torch.equal(model.W_E, model.embed.weight * model.cfg.d_model**0.5)
