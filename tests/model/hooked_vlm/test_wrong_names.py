"""Hooks and filters that are wrong are refused; lasting hooks and nested ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers.hooked_pairs import Pair, identity, noise_hook
from torch import Tensor

from hones_lens import HookedVLM, VLMInputs


def test_an_unknown_name_raises_and_names_the_nearest(model: HookedVLM, inputs: VLMInputs) -> None:
    wrong = "blocks.1.hook_resid_prre"
    nearest = rf"no hook '{wrong}'; nearest: .*blocks\.1\.hook_resid_pre"
    with pytest.raises(ValueError, match=nearest):
        model.run_with_hooks(inputs, fwd_hooks=[(wrong, identity)])
    with pytest.raises(ValueError, match=nearest):
        model.run_with_hooks(inputs, bwd_hooks=[(wrong, identity)], reset_hooks_end=False)
    with pytest.raises(ValueError, match=nearest), model.hooks([(wrong, identity)]):
        pass
    with pytest.raises(ValueError, match=nearest):
        model.add_hook(wrong, identity)
    for names_filter in (wrong, [wrong], ["blocks.1.hook_resid_pre", wrong]):
        with pytest.raises(ValueError, match=nearest):
            model.run_with_cache(inputs, names_filter=names_filter)
    with pytest.raises(ValueError, match=r"no hook 'blocks\.3\.hook_resid_pre'"):
        model.run_with_hooks(inputs, fwd_hooks=[("blocks.3.hook_resid_pre", identity)])
    assert not model.list_hooks()


def test_a_module_that_is_no_hook_raises(model: HookedVLM, inputs: VLMInputs) -> None:
    with pytest.raises(ValueError, match=r"no hook 'blocks\.1\.attn'"):
        model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn", identity)])


def test_a_filter_that_matches_nothing_raises(model: HookedVLM, inputs: VLMInputs) -> None:
    def nothing(name: str) -> bool:
        return "blocks.9." in name

    with pytest.raises(ValueError, match="matches no hook"):
        model.run_with_hooks(inputs, fwd_hooks=[(nothing, identity)])
    with pytest.raises(ValueError, match="matches no hook"):
        model.add_hook(nothing, identity)
    with pytest.raises(ValueError, match="matches no hook"):
        model.run_with_cache(inputs, names_filter=nothing)
    with pytest.raises(ValueError, match="filter is empty"):
        model.run_with_cache(inputs, names_filter=[])


def test_a_hook_that_never_ran_raises(gqa: Pair) -> None:
    model = gqa.model
    text = model.prepare(None, "is it red?")
    for name in ("vision_encoder.blocks.0.attn.hook_z", "hook_image_embed", "vision_projector.hook_out"):
        with pytest.raises(RuntimeError, match=f"never did: {name}"):
            model.run_with_hooks(text, fwd_hooks=[(name, identity)])
        with pytest.raises(RuntimeError, match=f"never did: {name}"):
            model.run_with_cache(text, names_filter=name)
    resid = model(text, stop_at_layer=1)
    with pytest.raises(RuntimeError, match=r"never did: blocks\.0\.hook_resid_post"):
        hooks = [("blocks.0.hook_resid_post", identity), ("blocks.1.hook_resid_post", identity)]
        model.run_with_hooks(resid, start_at_layer=1, inputs=text, fwd_hooks=hooks)
    assert not model.list_hooks()


def test_hooks_are_gone_after_an_exception(model: HookedVLM, inputs: VLMInputs) -> None:
    clean = model(inputs)

    def fails(x: Tensor, hook) -> Tensor:
        raise KeyError("the hook's own fault")

    with pytest.raises(KeyError, match="the hook's own fault"):
        model.run_with_hooks(
            inputs, fwd_hooks=[("blocks.0.hook_mlp_out", noise_hook()), ("blocks.1.attn.hook_pattern", fails)]
        )
    with (
        pytest.raises(KeyError, match="the hook's own fault"),
        model.hooks([("blocks.1.hook_mlp_out", fails)]),
    ):
        model.generate(inputs, 2, "tokens")
    assert not model.list_hooks()
    assert torch.equal(model(inputs), clean)


def test_hooks_of_a_with_block_nest(model: HookedVLM, inputs: VLMInputs) -> None:
    calls: Counter[str] = Counter()

    def count(x: Tensor, hook) -> None:
        calls[hook.name] += 1

    with model.hooks([("hook_embed", count)]):
        with model.hooks([("ln_final.hook_scale", count)]):
            model(inputs)
        model(inputs)
    model(inputs)
    assert calls == {"hook_embed": 2, "ln_final.hook_scale": 1}


def test_a_lasting_hook(model: HookedVLM, inputs: VLMInputs) -> None:
    calls: Counter[str] = Counter()
    model.add_hook(lambda name: name.endswith("hook_mlp_out") and name.startswith("blocks"), _counter(calls))
    try:
        model(inputs)
        model.run_with_hooks(inputs, fwd_hooks=[("hook_embed", identity)])
    finally:
        model.reset_hooks()
    model(inputs)
    assert calls == {f"blocks.{layer}.hook_mlp_out": 2 for layer in range(3)}


def _counter(calls: Counter[str]) -> Callable:
    def count(x: Tensor, hook) -> None:
        calls[hook.name] += 1

    return count
