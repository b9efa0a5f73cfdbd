"""Products of 16-bit weights in float32, where the processor has no instructions for theirs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.allocations import Allocations

from hones_lens.model.nn import linear as module
from hones_lens.model.nn.linear import Linear

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_slow", lambda dtype: dtype in HALVES)
    monkeypatch.setattr(module, "_CHUNK", 100 * 512)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_the_exact_ones_rounded(slow: None, dtype: torch.dtype, bias: bool) -> None:
    layer = Linear(512, 640, bias=bias).to(dtype)
    x = torch.randn(3, 5, 512).to(dtype).requires_grad_()
    towards = torch.randn(3, 5, 640).to(dtype)
    parameters = [x, *layer.parameters()]
    out = layer(x)
    found = torch.autograd.grad(out, parameters, towards)
    wide = [p.detach().double().requires_grad_() for p in parameters]
    exact = F.linear(*wide)
    expected = torch.autograd.grad(exact, wide, towards.double())
    half_step = torch.finfo(dtype).eps  # of values near 1; rounding is by half of it at most
    for value, true in zip((out, *found), (exact, *expected), strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), true, rtol=0.51 * half_step, atol=1e-4)


def test_only_many_rows_of_large_weights_are_widened(slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    widened = list[tuple[int, ...]]()

    def note(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        widened.append((*x.shape, *weight.shape))
        return F.linear(x.float(), weight.float())

    monkeypatch.setattr(module, "linear_in_float32", note)
    large, small = Linear(512, 512).bfloat16(), Linear(512, 511).bfloat16()
    for layer in (large, small):
        for rows in (7, 8):
            layer(torch.randn(1, rows, 512, dtype=torch.bfloat16))
    Linear(512, 512)(torch.randn(1, 8, 512))
    assert widened == [(1, 8, 512, 512, 512)]
    monkeypatch.setattr(module, "_is_slow", lambda dtype: False)
    large(torch.randn(1, 8, 512, dtype=torch.bfloat16))
    assert len(widened) == 1


def test_no_whole_copy_of_the_weights_is_made(slow: None) -> None:
    layer = Linear(512, 2048, bias=False).bfloat16().requires_grad_(False)
    x = torch.randn(8, 512, dtype=torch.bfloat16)
    with Allocations() as made:
        layer(x)
    assert made.peak < 1_000_000  # a copy of the weights in float32 has 4 MB


def test_a_processor_that_has_the_instructions_is_not_slow() -> None:
    assert module._is_slow(torch.bfloat16) is not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert module._is_slow(torch.float32) is False
