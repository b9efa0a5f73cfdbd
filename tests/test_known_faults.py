"""The eight faults of other hooked vision–language models, each a test here that a model with it fails.

`test_each_test_sees_its_fault` builds every fault into the model and expects the test to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hf_twin import Twin
from torch import Tensor
from transformer_lens import ActivationCache, patching

from hones_lens.model.hooked_vlm import HookedVLM
from hones_lens.model.inputs import VLMInputs
from hones_lens.model.nn.attention import Attention
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.context import AttentionContext

TOLERANCE = 5e-5


class Case(Twin):
    """GQA in both; Qwen's tower has several windows in all blocks but one."""

    def __init__(self, name: str):
        vision = {"vision": {"window_size": 42, "depth": 2}} if name == "qwen" else {}
        made = random_qwen if name == "qwen" else random_llava
        super().__init__(made, seed=2, text={"num_key_value_heads": 2}, **vision)
        self.inputs: VLMInputs = made.mixed_batch(self.model)
        self.real = self.inputs.attention_mask.bool()
        self.clean = self.logits(self.inputs)

    def far(self, a: Tensor, b: Tensor) -> float:
        return random_llava.largest_difference(a, b, self.inputs)

    def vision_at(self, layer: int, llava: str, qwen: str) -> str:
        return (
            f"model.vision_tower.encoder.layers.{layer}.{llava}"
            if self.is_llava
            else f"model.visual.blocks.{layer}.{qwen}"
        ).rstrip(".")


@pytest.fixture(scope="module", params=["llava", "qwen"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# -- the eight -----------------------------------------------------------------------------------


def test_patching_never_runs_without_the_picture(case: Case) -> None:
    """Tokens alone are refused, not run as text; bound to the pictures they give what patching them gives."""
    tokens, last = case.inputs.input_ids, case.inputs.input_ids.shape[1] - 1
    mirrored = replace(case.inputs, pixel_values=case.inputs.pixel_values.flip(-1))
    clean = case.model.run_with_cache(mirrored)[1]

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 11] - logits[0, -1, 12]

    def patch(model) -> Tensor:
        return patching.get_act_patch_attn_head_out_all_pos(model, tokens, clean, metric)

    with pytest.raises(ValueError, match="image tokens in input_ids, but pixel_values hold 0 images"):
        patch(case.model)
    found = patch(case.model.bind(case.inputs))
    z = case.seen(mirrored)["blocks.1.attn.hook_z"]

    def by_hand(x: Tensor) -> Tensor:
        return torch.cat((x[:, :, :2], z[:, :, 2:3], x[:, :, 3:]), dim=2)

    expected = metric(case.logits(case.inputs, case.edit(1, "attn.hook_z", by_hand)))
    assert (found[1, 2] - expected).abs() <= TOLERANCE
    assert (expected - metric(case.clean)).abs() > 1e-3 and last > 0


@pytest.mark.parametrize("gradients", [False, True])
def test_an_edit_at_resid_mid_reaches_the_skip_path(case: Case, gradients: bool) -> None:
    added = torch.linspace(-1, 1, 32)
    for layer in (0, 2):
        expected = case.logits(case.inputs, case.edit(layer, "hook_resid_mid", lambda x: x + added))
        with torch.set_grad_enabled(gradients):
            hooks = [(f"blocks.{layer}.hook_resid_mid", lambda x, hook: x + added)]
            found = case.model.run_with_hooks(case.inputs, fwd_hooks=hooks)
        assert case.far(found, expected) <= TOLERANCE
        assert case.far(expected, case.clean) > 1e-2


def test_the_pattern_can_be_written_and_the_scores_are_scores(case: Case) -> None:
    """An edited pattern mixes the values; scores are the pattern's logarithm but for a constant a row."""
    theirs = case.attentions(case.inputs)[1]
    edited = theirs.flip(1)
    found = case.model.run_with_hooks(
        case.inputs, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: edited)]
    )
    expected = case.logits(case.inputs, case.mix_by(1, edited))
    assert case.far(found, expected) <= TOLERANCE and case.far(expected, case.clean) > 1e-2
    scores = case.model.run_with_cache(case.inputs)[1]["attn_scores", 1]
    seen = case.real[:, None, :, None] & (theirs > 1e-30)
    log = (scores - scores.logsumexp(-1, keepdim=True))[seen]
    torch.testing.assert_close(log, theirs.log()[seen], atol=2e-4, rtol=1e-4)
    assert scores[case.real[:, None, :, None] & (theirs == 0)].isneginf().all()


def test_start_at_layer_skips_the_blocks_and_keeps_the_positions(case: Case) -> None:
    """From a stream that Hugging Face's model computed, to Hugging Face's logits."""
    ran: list[int] = []
    resid = case.seen(case.inputs)["blocks.2.hook_resid_pre"]
    handles = [
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(case.model.blocks)
    ]
    try:
        found = case.model(resid, start_at_layer=2, inputs=case.inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert case.far(found, case.clean) <= TOLERANCE
    assert ran == [2]


def test_generation_without_a_cache_keeps_the_picture(case: Case) -> None:
    case.hf.model.rope_deltas = None
    given = case.inputs.to_hf()
    expected = case.hf.generate(**given, max_new_tokens=6, do_sample=False)[:, given["input_ids"].shape[1] :]
    found = case.model.generate(case.inputs, 6, "tokens", use_kv_cache=False)
    assert torch.equal(found, expected)


def test_vision_tokens_are_in_raster_order(case: Case) -> None:
    """Of every block, and of what the decoder reads; the first patches by their pixels."""
    theirs: dict[int, Tensor] = {}
    block = [case.vision_at(layer, "", "") for layer in (0, 1)]
    case.run(
        case.inputs,
        [(path, "output", lambda x, m, i=i: theirs.update({i: x})) for i, path in enumerate(block)],
    )
    _, cache = case.model.run_with_cache(case.inputs)
    for layer in (0, 1):
        ours = cache[f"vision_encoder.blocks.{layer}.hook_resid_post"]
        ours = ours if case.is_llava else case.patches(case.inputs, ours)
        torch.testing.assert_close(ours, theirs[layer], atol=TOLERANCE, rtol=1e-5)
    streams = case.seen(case.inputs)["blocks.0.hook_resid_pre"][case.inputs.image_mask]
    torch.testing.assert_close(
        cache["vision_projector.hook_out"].flatten(0, -2), streams, atol=TOLERANCE, rtol=1e-5
    )


def test_every_vision_head_can_be_reached(case: Case) -> None:
    """One head of one block at a time, zeroed."""
    cfg = case.model.cfg.vision
    for layer, head in ((0, 0), (1, 2)):
        rows = slice(head * cfg.d_head, (head + 1) * cfg.d_head)

        def theirs(z: Tensor, memory: dict, rows: slice = rows) -> Tensor:
            z = z.clone()
            z[..., rows] = 0
            return z

        def ours(z: Tensor, hook, head: int = head) -> Tensor:
            z[:, :, head] = 0
            return z

        path = case.vision_at(layer, "self_attn.out_proj", "attn.proj")
        expected = case.logits(case.inputs, [(path, "input", theirs)])
        name = f"vision_encoder.blocks.{layer}.attn.hook_z"
        found = case.model.run_with_hooks(case.inputs, fwd_hooks=[(name, ours)])
        assert case.far(found, expected) <= TOLERANCE
        assert case.far(expected, case.clean) > 1e-3


def test_hook_embed_is_after_the_merge(case: Case) -> None:
    """It holds what enters Hugging Face's first layer, pictures too, and an edit there reaches it."""
    entered = case.seen(case.inputs)["blocks.0.hook_resid_pre"]
    embed = case.model.run_with_cache(case.inputs, names_filter="hook_embed")[1]["hook_embed"]
    torch.testing.assert_close(embed[case.real], entered[case.real], atol=TOLERANCE, rtol=1e-5)
    at_pictures = case.inputs.image_mask[..., None]

    def dimmed(x: Tensor) -> Tensor:
        return torch.where(at_pictures, x / 2, x)

    found = case.model.run_with_hooks(case.inputs, fwd_hooks=[("hook_embed", lambda x, hook: dimmed(x))])
    expected = case.logits(case.inputs, case.edit(0, "hook_resid_pre", dimmed))
    assert case.far(found, expected) <= TOLERANCE
    assert case.far(expected, case.clean) > 1e-2


# -- the eight, built in -------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def patching_as_text(case: Case, patch: Patch) -> None:
    """Image tokens without pixels run as text."""
    known = type(case.model).locate_images

    def unchecked(self: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        if inputs.pixel_values is not None:
            return known(self, inputs)
        counted = inputs.attention_mask.cumsum(-1) - 1
        positions = counted if case.is_llava else counted.expand(3, -1, -1)
        nothing = torch.zeros_like(inputs.input_ids).bool()
        return replace(inputs, image_mask_or_none=nothing, position_ids=positions)

    patch.setattr(type(case.model), "locate_images", unchecked)


def no_skip_path(case: Case, patch: Patch) -> None:
    """Only the neurons read the edited stream."""

    def after_attention(self: Block, pre: Tensor, attn_out: Tensor, context: AttentionContext) -> Tensor:
        mid = pre + self.hook_attn_out(attn_out)
        return self.after_mlp(mid, self.mlp(self.ln2(self.hook_resid_mid(mid))), context)

    patch.setattr(Block, "after_attention", after_attention)


def read_only_pattern(case: Case, patch: Patch) -> None:
    """Values are mixed by the pattern that was there before the hook."""
    known = Attention._attend

    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        known(self, q, k, v, context)
        hooks, self.hook_pattern._forward_hooks = self.hook_pattern._forward_hooks, {}
        try:
            return known(self, q, k, v, context)
        finally:
            self.hook_pattern._forward_hooks = hooks

    patch.setattr(Attention, "_attend", attend)


def scores_are_the_pattern(case: Case, patch: Patch) -> None:
    """The hook of the scores is given what the softmax made of them."""
    _changed_cache(case, patch, "attn_scores", lambda x: x.softmax(-1))


def all_blocks_run(case: Case, patch: Patch) -> None:
    """Every block runs, and the stream given is put in at its layer."""
    known = HookedVLM.run_blocks

    def run(self: HookedVLM, resid: Tensor, context: AttentionContext, first: int = 0, last=None) -> Tensor:
        known(self, resid, context, 0, first)
        return known(self, resid, context, first, last)

    patch.setattr(HookedVLM, "run_blocks", run)


def flat_positions(case: Case, patch: Patch) -> None:
    """Positions count tokens, as in text."""
    if case.is_llava:
        pytest.skip("LLaVA's positions count tokens")

    def positions(self: HookedVLM, inputs: VLMInputs) -> Tensor:
        return (inputs.attention_mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)

    patch.setattr(type(case.model), "positions", positions)


def forgotten_picture(case: Case, patch: Patch) -> None:
    """After the first token the sequence is embedded anew, as text."""
    known = HookedVLM.next_token_logits

    def forget(self: HookedVLM, inputs: VLMInputs, said: Tensor, kv_cache) -> Tensor:
        if said.shape[1]:
            inputs = replace(inputs, pixel_values=None)
        return known(self, inputs, said, kv_cache)

    patch.setattr(HookedVLM, "next_token_logits", forget)


def window_order(case: Case, patch: Patch) -> None:
    """Tokens of the tower come in another order than they lie on the picture."""
    _changed_cache(case, patch, "vision_encoder", lambda x: x.flip(1))


def order_of_image_tokens(case: Case, patch: Patch) -> None:
    """The same of what the projector gives."""
    _changed_cache(case, patch, "vision_projector.hook_out", lambda x: x.flip(-2))


def vision_heads_out_of_reach(case: Case, patch: Patch) -> None:
    """What a hook makes of a vision head is not read."""
    known = Attention.write

    def write(self: Attention, z: Tensor) -> Tensor:
        if "vision" in self.hook_z.name:
            self.hook_z(z.clone())
            return self.o(z.flatten(2))
        return known(self, z)

    patch.setattr(Attention, "write", write)


def embed_before_the_merge(case: Case, patch: Patch) -> None:
    """The hook sees text, and image tokens as words."""

    def merged(self: HookedVLM, encoded: VLMInputs) -> Tensor:
        embeds = self.hook_embed(self.hook_text_embed(self.embed(encoded.input_ids)))
        if encoded.image_embeds is None:
            return embeds
        images = self.hook_image_embed(encoded.image_embeds)
        return embeds.masked_scatter(encoded.image_mask[..., None], images)

    patch.setattr(HookedVLM, "_merged", merged)


def _changed_cache(case: Case, patch: Patch, part: str, change: Callable[[Tensor], Tensor]) -> None:
    known = HookedVLM.run_with_cache

    def changed(self: HookedVLM, *args, **options) -> tuple[Tensor, ActivationCache]:
        out, cache = known(self, *args, **options)
        found = {name: change(x) if part in name and x.ndim > 1 else x for name, x in cache.items()}
        return out, ActivationCache(found, self)

    patch.setattr(HookedVLM, "run_with_cache", changed)


FAULTS = {
    patching_as_text: test_patching_never_runs_without_the_picture,
    no_skip_path: lambda case: test_an_edit_at_resid_mid_reaches_the_skip_path(case, False),
    read_only_pattern: test_the_pattern_can_be_written_and_the_scores_are_scores,
    scores_are_the_pattern: test_the_pattern_can_be_written_and_the_scores_are_scores,
    all_blocks_run: test_start_at_layer_skips_the_blocks_and_keeps_the_positions,
    flat_positions: test_start_at_layer_skips_the_blocks_and_keeps_the_positions,
    forgotten_picture: test_generation_without_a_cache_keeps_the_picture,
    window_order: test_vision_tokens_are_in_raster_order,
    order_of_image_tokens: test_vision_tokens_are_in_raster_order,
    vision_heads_out_of_reach: test_every_vision_head_can_be_reached,
    embed_before_the_merge: test_hook_embed_is_after_the_merge,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_each_test_sees_its_fault(case: Case, fault: Callable, monkeypatch: Patch) -> None:
    FAULTS[fault](case)
    fault(case, monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        FAULTS[fault](case)
