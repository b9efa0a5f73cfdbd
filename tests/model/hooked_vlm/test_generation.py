"""Generation and loss under hooks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import random_llava
from helpers.hooked_pairs import Pair, hf_edited
from torch import Tensor

from hones_lens import HookedVLM, VLMInputs


def without_head(x: Tensor, hook) -> Tensor:
    x = x.clone()
    x[:, :, 1] = 0
    return x


GENERATION_HOOKS = {
    "head": [("blocks.1.attn.hook_z", without_head)],
    "pattern": [("blocks.0.attn.hook_pattern", lambda x, hook: x.square() * 3)],
    "residual": [("blocks.0.hook_resid_mid", lambda x, hook: x + torch.linspace(-1, 1, 32))],
    "embeddings": [("hook_text_embed", lambda x, hook: x * 1.5), ("hook_embed", lambda x, hook: x.flip(-1))],
    "keys": [("blocks.1.attn.hook_rot_k", lambda x, hook: x.flip(-1))],
    "neurons and image": [
        (lambda name: name.endswith("mlp.hook_post"), lambda x, hook: x * torch.linspace(0, 2, x.shape[-1])),
        ("hook_image_embed", lambda x, hook: x.flip(1)),
    ],
}


@pytest.mark.parametrize("kind", GENERATION_HOOKS)
def test_generation_under_hooks_is_the_naive_loop(gqa: Pair, kind: str) -> None:
    model, inputs, hooks = gqa.model, gqa.inputs, GENERATION_HOOKS[kind]
    n = 5
    free = model.generate(inputs, n, "tokens")
    tokens = inputs.input_ids[:, :0]
    with torch.no_grad():
        for _ in range(n):
            logits = model.run_with_hooks(inputs.extended(tokens), fwd_hooks=hooks)
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    assert not torch.isin(tokens, torch.tensor(model.cfg.eos_token_ids)).any()
    assert not torch.equal(tokens, free), "the hook is too weak to show"
    for use_kv_cache in (True, False):
        with model.hooks(hooks):
            assert torch.equal(model.generate(inputs, n, "tokens", use_kv_cache), tokens)


def test_generation_under_hooks_is_that_of_hf(gqa: Pair) -> None:
    def zeroed(z: Tensor) -> Tensor:
        z = z.clone()
        z[..., 8:16] = 0
        return z

    with hf_edited(gqa.hf, "model.language_model.layers.1.self_attn.o_proj", "input", zeroed):
        expected = gqa.hf.generate(**gqa.inputs.to_hf(), max_new_tokens=6, do_sample=False)
    with gqa.model.hooks([("blocks.1.attn.hook_z", without_head)]):
        actual = gqa.model.generate(gqa.inputs, 6, "tokens")
    assert torch.equal(actual, expected[:, gqa.inputs.input_ids.shape[1] :])


def test_hooks_are_called_at_every_step(model: HookedVLM, inputs: VLMInputs) -> None:
    widths: list[int] = []
    with model.hooks([("blocks.1.attn.hook_z", lambda x, hook: widths.append(x.shape[1]))]):
        assert model.generate(inputs, 4, "tokens").shape == (3, 4)
    n = inputs.input_ids.shape[1]
    assert widths == [n, 1, 1, 1]
    widths.clear()
    with model.hooks([("blocks.1.attn.hook_z", lambda x, hook: widths.append(x.shape[1]))]):
        model.generate(inputs, 4, "tokens", use_kv_cache=False)
    assert widths == [n, n + 1, n + 2, n + 3]


def test_loss_is_that_of_the_hooked_logits(model: HookedVLM) -> None:
    answered = random_llava.mixed_batch(model, ["red", "two", "no"])
    hooks = [("blocks.1.attn.hook_z", without_head)]
    with torch.no_grad():
        logits = model.run_with_hooks(answered, fwd_hooks=hooks)
        loss = model.run_with_hooks(answered, fwd_hooks=hooks, return_type="loss")
    asked = answered.answer_mask[:, 1:]
    expected = F.nll_loss(logits[:, :-1][asked].log_softmax(-1), answered.input_ids[:, 1:][asked])
    torch.testing.assert_close(loss, expected)
