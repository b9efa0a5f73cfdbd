"""Gradients at activations, against the derivative of the final norm and unembedding."""

from __future__ import annotations

import pytest
import torch
from helpers import random_llava, random_qwen

from hones_lens.analysis.gradients import activation_gradients


@pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])
def test_the_gradient_of_a_logit_at_the_last_stream(made) -> None:
    _, model = made.make_pair()
    inputs, token = made.mixed_batch(model), 5
    top = model.cfg.n_layers - 1
    names = [f"blocks.{top}.hook_resid_post", f"blocks.{top}.hook_resid_mid"]
    found = activation_gradients(model, names, lambda: model(inputs)[:, -1, token].sum())
    assert list(found) == names[::-1], "in the order of the pass"
    x, gradient = found[names[0]]
    last = x[:, -1].double()
    scale = (last.pow(2).mean(-1, keepdim=True) + model.ln_final.eps).sqrt()
    direction = (model.ln_final.weight * model.W_U[:, token]).detach().double()
    along = (last @ direction)[:, None]
    expected = direction / scale - last * along / (last.shape[-1] * scale**3)
    torch.testing.assert_close(gradient[:, -1].double(), expected, atol=1e-5, rtol=1e-4)
    assert not gradient[:, :-1].any() and not x.requires_grad


def test_what_the_objective_does_not_read_has_no_gradient() -> None:
    _, model = random_llava.make_pair()
    inputs = random_llava.mixed_batch(model)
    weight = torch.ones((), requires_grad=True)

    def apart() -> torch.Tensor:
        model(inputs)
        return weight * 2

    ((_, gradient),) = activation_gradients(model, ["blocks.0.hook_mlp_out"], apart).values()
    assert gradient.shape[-1] == model.cfg.d_model and not gradient.any()
