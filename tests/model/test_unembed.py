"""Logits of models in few bits are in float32, a part of the weights at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from helpers import random_llava, random_qwen
from helpers.allocations import Allocations

from hones_lens import HookedVLM, load_examples, load_task
from hones_lens.engine import prompt_batches
from hones_lens.engine.speculation import near_tie
from hones_lens.engine.sweep import Sweep
from hones_lens.model.nn import linear as module
from hones_lens.model.nn.placed import PlacedLinear
from hones_lens.model.nn.unembed import Unembed

FAMILIES = {"llava": random_llava, "qwen": random_qwen}
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", HALVES)
def test_logits_are_the_float32_products_of_norm_and_weights_or_as_hugging_faces(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, model = FAMILIES[family].make_pair()
    hf.to(dtype)
    model.to(dtype)
    inputs = FAMILIES[family].mixed_batch(model)
    monkeypatch.setattr(module, "_CHUNK", 7 * model.cfg.d_model)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, names_filter="ln_final.hook_normalized")
        normalized = cache["ln_final.hook_normalized"] * model.ln_final.weight
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, (normalized.double() @ model.W_U.double()).float())
        rounded = logits.to(dtype)
        model.set_unembed_in_float32(False)
        own = model(inputs)
    assert own.dtype == dtype and model.cfg.unembed_in_float32 is False
    torch.testing.assert_close(own, rounded)
    assert len(rounded.unique()) < len(logits.unique())


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_nothing_changes(family: str) -> None:
    _, model = FAMILIES[family].make_pair()
    inputs = FAMILIES[family].mixed_batch(model)
    with torch.no_grad():
        wide = model(inputs)
        model.set_unembed_in_float32(False)
        assert torch.equal(model(inputs), wide)


def test_gradients_are_those_of_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 5 * 8)
    unembed = Unembed(8, 23).bfloat16()
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    towards = torch.randn(2, 3, 23)
    (unembed(x) * towards).sum().backward()
    found = x.grad, unembed.linear.weight.grad
    x.grad = unembed.linear.weight.grad = None
    ((x.float() @ unembed.linear.weight.float().T) * towards).sum().backward()
    for grad, expected in zip(found, (x.grad, unembed.linear.weight.grad), strict=True):
        assert grad is not None and grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad, expected, atol=1e-2, rtol=1e-2)


def test_no_whole_copy_of_the_weights_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 2**14)
    unembed = Unembed(256, 4096).bfloat16().requires_grad_(False)
    x = torch.randn(2, 256, dtype=torch.bfloat16, requires_grad=True)
    with Allocations() as made:
        loss = unembed(x).sum()
    assert made.live < 200_000  # the logits; a copy of the weights in float32 has 4 MB
    with made:
        loss.backward()
    assert made.largest <= 4 * 2**14 and made.peak < 500_000


def test_weights_that_rest_elsewhere_give_the_same_logits(tmp_path: Path) -> None:
    hf, model = random_llava.make_pair()
    hf.bfloat16()
    model.bfloat16()
    placed = HookedVLM.from_hf(
        disk_offload(hf, tmp_path, execution_device=torch.device("cpu")), model.processor
    )
    assert isinstance(placed.unembed.linear, PlacedLinear)
    inputs = random_llava.mixed_batch(model)
    with torch.no_grad():
        expected = model(inputs)
        assert expected.dtype == torch.float32 and torch.equal(placed(inputs), expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_candidates_of_a_ranking_do_not_tie_in_bfloat16(name: str) -> None:
    model = HookedVLM.from_pretrained(name, "cpu", "bfloat16")
    task, examples = load_task("retrieval"), load_examples("shapes", "retrieval", "test", limit=2)
    distinct = []
    for wide in (True, False):
        model.set_unembed_in_float32(wide)
        found = [
            *(
                Sweep(model, [[]]).predictions(task, batch)[0]
                for batch in prompt_batches(model, task, examples, 2)
            )
        ]
        distinct.append([len(set(margins)) for rows in found for margins in rows])
    assert distinct[0] == [50, 50] and max(distinct[1]) < 50


def test_rounding_decides_within_a_step_of_the_type_at_the_size_of_the_logit() -> None:
    largest = torch.tensor([0.5, 20.0, -20.0])
    for dtype, bits in ((torch.float32, 23), (torch.float16, 10), (torch.bfloat16, 7)):
        steps = torch.tensor([max(1e-4, math.ldexp(abs(x), -bits)) for x in largest.tolist()])
        assert near_tie(steps * 0.99, largest, dtype).all()
        assert not near_tie(steps * 1.01, largest, dtype).any()
