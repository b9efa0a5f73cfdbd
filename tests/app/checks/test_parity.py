from __future__ import annotations

import pytest
import torch
from helpers import random_llava

from hones_lens.app.checks.parity import check_model


@pytest.fixture
def pair():
    theirs, ours = random_llava.make_pair()
    return ours, theirs


def _failed(checks):
    return [check.name for check in checks if not check.passed]


def test_a_faithful_model_passes(pair):
    checks = check_model(*pair, max_new_tokens=4)
    assert not _failed(checks) and len(checks) == 6


def test_a_wrong_weight_fails_parity(pair):
    ours, theirs = pair
    ours.blocks[1].attn.o.weight = torch.nn.Parameter(ours.blocks[1].attn.o.weight * 1.05)
    assert "logits equal Hugging Face's" in _failed(check_model(ours, theirs, max_new_tokens=2))


def test_a_dead_hook_is_found(pair):
    ours, theirs = pair
    ours.blocks[2].mlp.hook_post.forward = lambda x: x
    ours.blocks[2].mlp.hook_post.add_hook = lambda *args, **kwargs: None
    ours.hook_dict["blocks.2.mlp.hook_post"].register_forward_hook = None
    with pytest.raises(RuntimeError, match=r"blocks\.2\.mlp\.hook_post"):
        check_model(ours, theirs, max_new_tokens=2)


def test_patches_in_another_order_are_found(pair):
    ours, theirs = pair
    encoder = ours.vision_encoder
    conv = encoder.patch_embedding

    class Transposed(torch.nn.Module):
        def forward(self, pixels):
            return conv(pixels).transpose(2, 3)

    encoder.patch_embedding = Transposed()
    failed = _failed(check_model(ours, theirs, max_new_tokens=2))
    assert "patches lie where the picture has them" in failed
