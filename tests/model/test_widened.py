"""A model in few bits that computes in float32, against Hugging Face's with its weights in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from helpers import random_llava, random_qwen

from hones_lens import HookedVLM
from hones_lens.interventions import zero_neurons
from hones_lens.model import in_float32

FAMILIES = {"llava": random_llava, "qwen": random_qwen}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_hugging_faces_with_these_weights_in_float32(family: str, dtype: torch.dtype) -> None:
    made = FAMILIES[family]
    hf, model = made.make_pair()
    model.to(dtype)
    inputs = made.mixed_batch(model)
    wide = in_float32(model)
    for parameter in hf.parameters():  # and no buffer, such as the rotation's frequencies
        parameter.data = parameter.data.to(dtype).float()
    with torch.no_grad():
        expected = hf(**wide.as_inputs(inputs).to_hf()).logits
        logits, narrow = wide(inputs), model(inputs)
    real = inputs.attention_mask.bool()
    near = {"rtol": 1e-4, "atol": 2e-5 * float(expected.abs().max())}
    torch.testing.assert_close(logits[real], expected[real], **near)
    assert float((narrow.float() - expected)[real].abs().max()) > 1e-3  # what rounding does
    assert model.cfg.dtype == dtype and wide.cfg.dtype == torch.float32 and model.embed.weight.dtype == dtype
    shared = {p.data_ptr() for p in model.parameters() if p.ndim == 2 and p.shape[0] > 8}
    assert len(shared & {p.data_ptr() for p in wide.parameters()}) > 0.8 * len(shared)


def test_hooks_act_on_both_and_neither_changes_the_other() -> None:
    _, model = random_llava.make_pair()
    model.to(torch.bfloat16)
    inputs = random_llava.mixed_batch(model)
    with torch.no_grad():
        plain = in_float32(model)(inputs)
        with model.hooks(fwd_hooks=zero_neurons([(0, 1), (0, 2)])):
            hooked = in_float32(model)
        edited = hooked(inputs)
        clean = in_float32(model)
        with clean.hooks(fwd_hooks=zero_neurons([(0, 1), (0, 2)])):
            assert torch.equal(clean(inputs), edited)
        assert not torch.equal(plain, edited) and torch.equal(clean(inputs), plain)
    assert not model.hooked_names()


def test_offloaded_weights_are_read_where_they_rest(tmp_path: Path) -> None:
    hf, model = random_llava.make_pair()
    model.to(torch.bfloat16)
    inputs = random_llava.mixed_batch(model)
    disk_offload(hf.to(torch.bfloat16), str(tmp_path), execution_device=torch.device("cpu"))
    placed = HookedVLM.from_hf(hf, model.processor)
    with torch.no_grad():
        torch.testing.assert_close(in_float32(placed)(inputs), in_float32(model)(inputs))
