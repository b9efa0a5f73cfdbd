"""Hooks belong to the thread or task that set them; what runs beside them is as without."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.hooked_pairs import Pair, hf_edited, trainable
from torch import Tensor

POST = "blocks.1.mlp.hook_post"
PATTERN = "blocks.2.attn.hook_pattern"
HF_POST = "model.language_model.layers.1.mlp.down_proj"
ROUNDS = 12


def scaled_by(factor: float) -> Callable[..., Tensor]:
    return lambda x, hook: x * factor


def hf_scaled_by(pair: Pair, factor: float) -> Tensor:
    with torch.no_grad(), hf_edited(pair.hf, HF_POST, "input", lambda x: x * factor):
        return pair.hf(**pair.inputs.to_hf()).logits


def in_a_thread(function: Callable[..., Any], *args: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(timeout=60)


def test_many_threads_with_hooks_and_without(gqa: Pair) -> None:
    """Each gets what Hugging Face's model gives under its own edit, whoever runs beside it."""
    factors = (1.0, 0.5, 2.0, 0.0)
    expected = {factor: hf_scaled_by(gqa, factor) for factor in factors}
    together = threading.Barrier(len(factors))

    def work(factor: float) -> list[Tensor]:
        together.wait(timeout=60)
        found: list[Tensor] = []
        for _ in range(ROUNDS):
            with torch.no_grad():
                if factor == 1:
                    found.append(gqa.model(gqa.inputs))
                elif factor == 2:
                    with gqa.model.hooks([(POST, scaled_by(factor))]):
                        found.append(gqa.model.run_with_cache(gqa.inputs, names_filter=[PATTERN])[0])
                else:
                    hooks = [(POST, scaled_by(factor))]
                    found.append(gqa.model.run_with_hooks(gqa.inputs, fwd_hooks=hooks))
        return found

    with ThreadPoolExecutor(len(factors)) as pool:
        found = dict(zip(factors, pool.map(work, factors), strict=True))
    for factor, logits in found.items():
        assert max(gqa.difference(each, expected[factor]) for each in logits) <= 5e-5, factor
    assert not gqa.model.list_hooks()


def test_a_plain_call_beside_hooks_is_the_same_to_the_bit(gqa: Pair) -> None:
    """Scores and pattern are not computed for another thread's hook, either."""
    model, inputs = gqa.model, gqa.inputs
    with torch.no_grad():
        clean = model(inputs)
        tokens = model.generate(inputs, 4, "tokens")
        with model.hooks([(POST, scaled_by(0.0)), (PATTERN, scaled_by(0.0))]):
            beside = in_a_thread(torch.no_grad()(model), inputs)
            assert torch.equal(in_a_thread(model.generate, inputs, 4, "tokens"), tokens)
            assert in_a_thread(model.hooked_names) == []
            assert set(model.hooked_names()) == {PATTERN, POST}
            hooked = model(inputs)
    assert torch.equal(beside, clean)
    assert gqa.difference(hooked, clean) > 0.01


def test_each_cache_is_of_its_own_run(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs
    rows = [inputs[row] for row in range(len(inputs))] * ROUNDS
    with torch.no_grad():
        expected = [model.run_with_cache(row)[1] for row in rows[: len(inputs)]]
        with ThreadPoolExecutor(3) as pool:
            caches = list(pool.map(lambda row: torch.no_grad()(model.run_with_cache)(row)[1], rows))
    for i, cache in enumerate(caches):
        for name, value in expected[i % len(inputs)].items():
            assert torch.equal(cache[name], value), name


def test_backward_hooks_of_two_threads(gqa: Pair) -> None:
    """A backward hook sees the gradients of its own thread's runs, whichever thread goes backward."""
    model, answered = gqa.model, gqa.answered
    seen: list[Tensor] = []
    needed = trainable(model.embed.weight)
    with needed, model.hooks(bwd_hooks=[(POST, lambda grad, hook: seen.append(grad))]):
        in_a_thread(lambda: model(answered, return_type="loss").backward())
        assert not seen
        loss = model(answered, return_type="loss")
        in_a_thread(loss.backward)  # as autograd does it on a GPU: in a thread of its own
    assert len(seen) == 1


def test_nested_blocks_of_several_threads_end_in_any_order(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs
    opened, may_close = threading.Event(), threading.Event()

    def other() -> Tensor:
        with torch.no_grad(), model.hooks([(POST, scaled_by(2.0))]):
            opened.set()
            assert may_close.wait(timeout=60)
            return model(inputs)

    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        with model.hooks([(POST, scaled_by(0.5))]):
            doubled = pool.submit(other)
            assert opened.wait(timeout=60)
            halved = model(inputs)
        may_close.set()  # the block that was opened later is still open, and keeps its hooks
        assert gqa.difference(doubled.result(timeout=60), hf_scaled_by(gqa, 2.0)) <= 5e-5
    assert gqa.difference(halved, hf_scaled_by(gqa, 0.5)) <= 5e-5
    assert not model.list_hooks()


def test_workers_started_inside_a_block_have_no_hooks_and_that_raises(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs
    with (
        pytest.raises(RuntimeError, match=rf"never did: {POST}; it ran in other threads only.*copy_context"),
        model.hooks([(POST, scaled_by(0.5))]),
    ):
        in_a_thread(model, inputs)


def test_hooks_go_along_with_their_context(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs
    expected = hf_scaled_by(gqa, 0.5)
    with model.hooks([(POST, scaled_by(0.5))]):
        context = contextvars.copy_context()
        assert gqa.difference(in_a_thread(context.run, model, inputs), expected) <= 5e-5


def test_tasks_of_asyncio_have_hooks_of_their_own(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs

    async def work(factor: float) -> Tensor:
        with model.hooks([(POST, scaled_by(factor))]):
            await asyncio.sleep(0)  # the other tasks open their blocks
            with torch.no_grad():
                return model(inputs)

    async def all_of_them() -> list[Tensor]:
        return await asyncio.gather(*map(work, (0.5, 2.0)))

    for factor, logits in zip((0.5, 2.0), asyncio.run(all_of_them()), strict=True):
        assert gqa.difference(logits, hf_scaled_by(gqa, factor)) <= 5e-5


def test_lasting_hooks_are_part_of_the_model_in_every_thread(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs
    try:
        model.add_hook(POST, scaled_by(0.5))
        assert gqa.difference(in_a_thread(model, inputs), hf_scaled_by(gqa, 0.5)) <= 5e-5
        model.run_with_hooks(inputs, fwd_hooks=[(POST, scaled_by(4.0))], reset_hooks_end=False)
        assert gqa.difference(in_a_thread(model, inputs), hf_scaled_by(gqa, 2.0)) <= 5e-5
    finally:
        model.reset_hooks()
    assert torch.equal(in_a_thread(model, inputs), model(inputs))
