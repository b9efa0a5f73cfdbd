"""What passes keep in memory, in bytes of tensors."""

from __future__ import annotations

import pytest
import torch
from helpers.allocations import Allocations
from helpers.hooked_pairs import Pair

from hones_lens import HookedVLM


def test_a_pass_keeps_no_graph_where_nothing_needs_gradients(pair: Pair) -> None:
    """Outside `no_grad` it allocates what it does inside, to the byte, and keeps its logits alone."""
    model, inputs = pair.model, pair.inputs
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad(), Allocations() as without:
        expected = model(inputs)
    with Allocations() as outside:
        logits = model(inputs)
    assert torch.equal(logits, expected) and not logits.requires_grad
    assert outside.peak == without.peak > 0
    assert outside.live == logits.untyped_storage().nbytes()


@pytest.mark.parametrize("trained", [False, True])
def test_generation_keeps_no_graph(pair: Pair, trained: bool) -> None:
    """Not even of a model whose weights need gradients: it allocates what it does under `no_grad`."""
    model, peaks = pair.model.requires_grad_(trained), []
    try:
        for grad in (False, True):
            with torch.set_grad_enabled(grad), Allocations() as made:
                tokens = model.generate(pair.inputs, max_new_tokens=3, return_type="tokens")
            assert not tokens.requires_grad and made.live == tokens.untyped_storage().nbytes()
            peaks.append(made.peak)
    finally:
        model.requires_grad_(False)
    assert peaks[0] == peaks[1] > 0


def test_backward_hooks_record_from_the_lowest_on(gqa: Pair) -> None:
    """Gradients of two hooks' values need what lies above the lower one, and no weight's."""
    model, answered, names = gqa.model, gqa.answered, ["blocks.1.mlp.hook_post", "blocks.2.hook_resid_pre"]
    peaks = []
    for lowest in (names, ["hook_text_embed", *names]):
        with Allocations() as allocated:
            _, cache = model.run_with_cache(answered, names_filter=lowest, incl_bwd=True, return_type="loss")
        peaks.append(allocated.peak)
        assert cache[names[0] + "_grad"].any() and all(p.grad is None for p in model.parameters())
    assert peaks[0] < 0.9 * peaks[1]


BROAD = {
    "decoder": (lambda name: name.startswith("blocks."), "attn.hook_q_input, .* attn.hook_result; "),
    "all": (lambda name: True, "vision … attn.hook_attn_scores, .* attn.hook_result; "),
    "patterns": (lambda name: name.endswith("hook_pattern"), "2 costly hooks .*: vision … attn.hook_pattern"),
}


@pytest.mark.parametrize("kind", BROAD)
def test_broad_predicates_leave_costly_hooks_out(gqa: Pair, kind: str) -> None:
    model, (predicate, message) = gqa.model, BROAD[kind]
    _, default = model.run_with_cache(gqa.inputs)
    with pytest.warns(UserWarning, match=message), torch.no_grad(), Allocations() as broad:
        _, cache = model.run_with_cache(gqa.inputs, names_filter=predicate)
    expected = [name for name in default if predicate(name)]
    assert list(cache) == expected
    with torch.no_grad(), Allocations() as named:
        model.run_with_cache(gqa.inputs, names_filter=expected)
    assert broad.peak == named.peak


def test_predicates_of_costly_hooks_alone_have_them(model: HookedVLM, gqa: Pair) -> None:
    for end in ("hook_result", "_input"):
        _, cache = model.run_with_cache(gqa.inputs, names_filter=lambda name, end=end: name.endswith(end))
        assert list(cache) == [name for name in model.hook_dict if name.endswith(end)]
    seen = []
    model.run_with_hooks(gqa.inputs, fwd_hooks=[(lambda name: True, lambda x, hook: seen.append(hook.name))])
    assert set(seen) == set(model.hook_dict)  # hooks are at all that their predicate selects
