"""Neurons' scores of a model with norms behind attention and MLP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_gemma, random_llava
from helpers.hf_task_loops import plain_examples
from torch import Tensor

from hones_lens import HookedVLM, engine
from hones_lens.engine import answer_batches, layer_steps
from hones_lens.hones.attribution.gradients import integrated_gradients
from hones_lens.hones.attribution.neurons import target_directions, write_in
from hones_lens.interventions import replace_with_other_heads_mean
from hones_lens.model.answers import Answer
from hones_lens.tasks.registry import load_task


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return random_gemma.make_pair(seed=6)[1]


def batch_of(model: HookedVLM, answers: bool) -> engine.Batch:
    (batch,) = answer_batches(model, load_task("vqa"), list(plain_examples("vqa", 2)), 2, answers=answers)
    return batch


@pytest.mark.parametrize("apply_ln", [False, True])
@pytest.mark.parametrize("hooks", [[], [replace_with_other_heads_mean(0, 1)]], ids=["clean", "changed"])
def test_write_ins_add_up_to_what_the_mlps_add_along_the_direction(
    model: HookedVLM, hooks: list[Any], apply_ln: bool
) -> None:
    batch = batch_of(model, answers=False)
    directions = target_directions(model, load_task("vqa"), batch.examples, apply_ln=apply_ln)
    found = write_in(model, batch, directions, hooks, apply_ln)
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(batch.inputs)
    for layer in range(model.cfg.n_layers):
        added = (cache["mlp_out", layer][:, -1] * directions).sum(-1)
        if apply_ln:
            added = added / cache["ln_final.hook_scale"][:, -1, 0]
        torch.testing.assert_close(found[:, layer].sum(-1), added, atol=1e-5, rtol=1e-4)
    m, block = cache["post", 1][:, -1], model.blocks[1]
    rows = block.mlp.W_out * (1 + block.ln2_post.offset)
    one = m * (directions @ rows.T) / cache["blocks.1.ln2_post.hook_scale"][:, -1]
    if apply_ln:
        one = one / cache["ln_final.hook_scale"][:, -1]
    torch.testing.assert_close(found[:, 1], one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_integrated_gradients_are_the_sum_over_steps(model: HookedVLM, positions: str) -> None:
    """By hooks that put the scaled neurons into the whole model."""
    inputs = model.prepare(random_llava.make_images(1), ["is it red?"], ["yes it is"])
    answer, steps = Answer.of(inputs), 3
    where = torch.ones_like(inputs.attention_mask, dtype=torch.bool)
    if positions == "last":
        where = torch.zeros_like(where)
        where[:, int(answer.positions[0])] = True
    for step in layer_steps(model, inputs):
        name, expected = f"blocks.{step.layer}.mlp.hook_post", torch.zeros(model.cfg.d_mlp).double()
        for k in range(1, steps + 1):
            m = torch.where(where[..., None], k / steps * step.neurons, step.neurons).requires_grad_()

            def put(x: Tensor, hook: object, m: Tensor = m) -> Tensor:
                return m

            with model.hooks(fwd_hooks=[(name, put)]):
                log_prob = answer.log_probs(model(inputs, logits_to_keep=answer.positions)).sum()
            (gradient,) = torch.autograd.grad(log_prob.double().exp(), m)
            expected += ((step.neurons * gradient)[where]).sum(0).double() / steps
        found = integrated_gradients(model, inputs, step, steps=steps, positions=positions, batch_size=2)
        scale = float(expected.abs().max())
        assert scale > 0 and float((found - expected).abs().max()) < 1e-4 * scale
