"""Edits at the hooks that are no module's input or output, held against Hugging Face's model edited by hand.

`test_hooks.py` and `families/test_qwen2_5_vl.py` hold the plain ones: q, k, v, z, neurons, what is
written, the stream between blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hf_twin import Memory, Step, Twin, at
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import rotate_half

TOLERANCE = 5e-5
CLIP = "model.vision_tower.encoder.layers"
VISUAL = "model.visual"


class Case(Twin):
    """GQA in both; LLaVA reads two of its tower's layers, Qwen has windows and a block without."""

    def __init__(self, name: str):
        vision = {"vision": {"window_size": 42}} if name == "qwen" else {"vision_feature_layer": [1, -1]}
        super().__init__(
            random_qwen if name == "qwen" else random_llava, seed=2, text={"num_key_value_heads": 2}, **vision
        )
        self.inputs = self.made.mixed_batch(self.model)
        self.clean = self.logits(self.inputs)
        self.d_vision = self.model.cfg.vision.d_head

    def check(
        self, name: str, ours: Callable[[Tensor], Tensor], steps: list[Step], **options: Tensor
    ) -> None:
        """Equal logits, which the edit has changed; with gradients, the same ones."""
        hooks = [(name, lambda x, hook: ours(x))]
        expected = self.logits(self.inputs, steps, **options)
        with torch.no_grad():
            found = self.model.run_with_hooks(self.inputs, fwd_hooks=hooks)
        with_gradients = self.model.run_with_hooks(self.inputs, fwd_hooks=hooks)
        assert random_llava.largest_difference(expected, self.clean, self.inputs) >= 1e-3, name
        assert random_llava.largest_difference(found, expected, self.inputs) <= TOLERANCE, name
        assert random_llava.largest_difference(with_gradients, expected, self.inputs) <= TOLERANCE, name

    def noise(self, *shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

    @property
    def positions(self) -> tuple[int, int]:
        rows, n = self.inputs.input_ids.shape
        return rows, n

    def blocks(self) -> str:
        return CLIP if self.is_llava else f"{VISUAL}.blocks"


@pytest.fixture(scope="module", params=["llava", "qwen"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def qwen() -> Case:
    return Case("qwen")


# -- the decoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hook_resid_mid", "attn.hook_z", "mlp.hook_post"])
@pytest.mark.parametrize("layer", [0, 2])
def test_one_entry_set(case: Case, name: str, layer: int) -> None:
    """As researchers edit: one head, one neuron or the stream at one position is set to a value."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        if name == "hook_resid_mid":
            x[:, -2] = 0.5
        else:
            x[:, :, 3] = 0.5
        return x

    case.check(f"blocks.{layer}.{name}", change, case.edit(layer, name, change))


@pytest.mark.parametrize("letter", ["q", "k"])
def test_rotated_queries_and_keys(case: Case, letter: str) -> None:
    """What is added behind the rotation is added before it, turned back by Hugging Face's angles."""
    heads = 4 if letter == "q" else 2
    added = case.noise(*case.positions, heads, case.d_head)

    def turned_back(x: Tensor, memory: Memory) -> Tensor:
        cos, sin = (part[:, :, None] for part in memory["angles"])
        return x + (added * cos - rotate_half(added) * sin).flatten(2)

    steps: list[Step] = [
        (at(1, "self_attn"), "keywords", lambda kw, m: m.update(angles=kw["position_embeddings"])),
        (at(1, f"self_attn.{letter}_proj"), "output", turned_back),
    ]
    # Hugging Face's LLaVA would count padding too, which changes the angles, though no logits.
    options = {"position_ids": case.inputs.attention_mask.cumsum(-1) - 1} if case.is_llava else {}
    case.check(f"blocks.1.attn.hook_rot_{letter}", lambda x: x + added, steps, **options)


def test_the_pattern_set(case: Case) -> None:
    """To attention of any kind to any token, those behind a query too."""
    rows, n = case.positions
    pattern = torch.rand(rows, 4, n, n, generator=torch.Generator().manual_seed(0)).softmax(-1)
    pattern = pattern * case.inputs.attention_mask[:, None, None]
    case.check("blocks.1.attn.hook_pattern", lambda x: pattern.clone(), case.mix_by(1, pattern))


def test_one_edge_of_the_pattern_cut(case: Case) -> None:
    """In place, and only for one head: the rest is Hugging Face's own pattern."""

    def cut(x: Tensor) -> Tensor:
        x[:, 2, -3:, -8:-4] = 0
        return x

    pattern = cut(case.attentions(case.inputs)[1].clone())
    case.check("blocks.1.attn.hook_pattern", cut, case.mix_by(1, pattern))


def test_scores_are_scores(case: Case) -> None:
    """What is added to a score multiplies the pattern by its exponential; the mask stays."""
    rows, n = case.positions
    added = case.noise(rows, 4, n, n)
    pattern = case.attentions(case.inputs)[1] * (3 * added).exp()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    case.check("blocks.1.attn.hook_attn_scores", lambda x: x + 3 * added, case.mix_by(1, pattern))


def test_the_result_of_one_head(case: Case) -> None:
    added = case.noise(32)

    def one_head(x: Tensor) -> Tensor:
        x[:, :, 1] += added
        return x

    case.check("blocks.1.attn.hook_result", one_head, case.edit(1, "hook_attn_out", lambda x: x + added))


@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_the_stream_that_one_head_reads(case: Case, letter: str) -> None:
    added = case.noise(32)

    def one_head(x: Tensor) -> Tensor:
        x[:, :, 1] += added
        return x

    steps = case.fork(1, letter, 1, lambda x: x + added)
    case.check(f"blocks.1.attn.hook_{letter}_input", one_head, steps)


def test_the_merged_embedding(case: Case) -> None:
    added = case.noise(*case.positions, 32)
    case.check("hook_embed", lambda x: x + added, case.edit(0, "hook_resid_pre", lambda x: x + added))


def test_the_text_embedding(case: Case) -> None:
    """What it has at image tokens is replaced by the images."""
    added = case.noise(*case.positions, 32)
    path = "model.language_model.embed_tokens"
    case.check("hook_text_embed", lambda x: x + added, [(path, "output", lambda x, m: x + added)])


DECODER_NORMS = {
    "blocks.1.ln1": at(1, "input_layernorm"),
    "blocks.1.ln2": at(1, "post_attention_layernorm"),
    "ln_final": "model.language_model.norm",
}


@pytest.mark.parametrize("name", DECODER_NORMS)
def test_norms_of_qwens_decoder(qwen: Case, name: str) -> None:
    check_norm(qwen, name, DECODER_NORMS[name])


def check_norm(case: Case, name: str, path: str) -> None:
    """A scale twice as large halves what is normalised; what is normalised is weighted afterwards."""
    weight = case.hf.get_submodule(path).weight.detach()
    case.check(f"{name}.hook_scale", lambda x: x * 2, [(path, "output", lambda x, m: x / 2)])
    case.check(f"{name}.hook_normalized", lambda x: x + 1, [(path, "output", lambda x, m: x + weight)])


# -- the vision tower ----------------------------------------------------------------------------


def test_the_stream_within_vision_blocks(case: Case) -> None:
    """What is added between the halves of a block is added to what its heads write."""
    added = case.noise(case.model.cfg.vision.d_model)
    for layer in (0, 1):
        path = f"{case.blocks()}.{layer}." + ("self_attn.out_proj" if case.is_llava else "attn.proj")
        steps: list[Step] = [(path, "output", lambda x, m: x + added)]
        case.check(f"vision_encoder.blocks.{layer}.hook_resid_mid", lambda x: x + added, steps)


def vision_values(case: Case, layer: int, mixed: Callable[[Tensor, Memory], Tensor]) -> list[Step]:
    """What enters the tower's output projection, made anew from the values [… token head·d_head]."""
    if case.is_llava:
        block = f"{CLIP}.{layer}.self_attn"
        values: Step = (f"{block}.v_proj", "output", lambda x, m: m.update(v=x))
        return [values, (f"{block}.out_proj", "input", lambda x, m: mixed(m["v"], m))]
    block = f"{VISUAL}.blocks.{layer}.attn"
    return [
        (block, "keywords", lambda kw, m: m.update(ends=kw["cu_seqlens"])),
        (f"{block}.qkv", "output", lambda x, m: m.update(v=x.chunk(3, dim=-1)[2])),
        (f"{block}.proj", "input", lambda x, m: mixed(m["v"], m)),
    ]


def mean_of_what_is_seen(values: Tensor, memory: Memory) -> Tensor:
    """Every token's mean over its image, or its window, in Hugging Face's order."""
    if "ends" not in memory:
        return values.mean(1, keepdim=True).expand_as(values)
    sizes = memory["ends"].diff().tolist()
    return torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in values.split(sizes)])


@pytest.mark.parametrize("layer", [0, 1])
def test_patterns_of_vision_heads(case: Case, layer: int) -> None:
    """Every token looks at itself alone: heads pass on the values as they are."""
    name = f"vision_encoder.blocks.{layer}.attn.hook_pattern"
    steps = vision_values(case, layer, lambda v, m: v)
    case.check(name, lambda x: torch.eye(x.shape[-1]).expand_as(x).clone(), steps)


@pytest.mark.parametrize("layer", [0, 1])
def test_scores_of_vision_heads(case: Case, layer: int) -> None:
    """Equal scores wherever there is no mask: heads pass on the mean of what they see."""
    name = f"vision_encoder.blocks.{layer}.attn.hook_attn_scores"
    steps = vision_values(case, layer, mean_of_what_is_seen)
    case.check(name, lambda x: torch.where(x.isinf(), x, 0.0), steps)


@pytest.mark.parametrize("letter", ["q", "k"])
def test_rotated_queries_and_keys_of_vision_heads(case: Case, letter: str) -> None:
    """CLIP's tower rotates nothing; Qwen's turns by row and column."""
    cfg = case.model.cfg.vision
    if case.is_llava:
        added = case.noise(3, 17, cfg.n_heads, case.d_vision)
        path = f"{CLIP}.1.self_attn.{letter}_proj"
        steps: list[Step] = [(path, "output", lambda x, m: x + added.flatten(2))]
    else:
        added = case.noise(3, int(case.inputs.image_grid_thw.prod(-1).max()), cfg.n_heads, case.d_vision)
        wanted = case.patches(case.inputs, added)

        def turned_back(x: Tensor, memory: Memory) -> Tensor:
            cos, sin = (part[:, None] for part in memory["angles"])
            parts = list(x.chunk(3, dim=-1))
            parts["qk".index(letter)] += (wanted * cos - rotate_half(wanted) * sin).flatten(1)
            return torch.cat(parts, dim=-1)

        block = f"{VISUAL}.blocks.1.attn"
        steps = [
            (block, "keywords", lambda kw, m: m.update(angles=kw["position_embeddings"])),
            (f"{block}.qkv", "output", turned_back),
        ]
    case.check(f"vision_encoder.blocks.1.attn.hook_rot_{letter}", lambda x: x + added, steps)


def test_the_result_of_one_vision_head(case: Case) -> None:
    added = case.noise(case.model.cfg.vision.d_model)

    def one_head(x: Tensor) -> Tensor:
        x[:, :, 2] += added
        return x

    path = f"{case.blocks()}.0." + ("self_attn.out_proj" if case.is_llava else "attn.proj")
    steps: list[Step] = [(path, "output", lambda x, m: x + added)]
    case.check("vision_encoder.blocks.0.attn.hook_result", one_head, steps)


@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_the_stream_that_one_vision_head_reads(case: Case, letter: str) -> None:
    """By that head's rows of the projection, applied to the norm of the changed stream."""
    d, added = case.d_vision, case.noise(case.model.cfg.vision.d_model)
    block = case.hf.get_submodule(f"{case.blocks()}.0")
    if case.is_llava:
        p, start, norm = block.get_submodule(f"self_attn.{letter}_proj"), d, block.layer_norm1
        path = f"{CLIP}.0.self_attn.{letter}_proj"
    else:
        p, norm, path = block.attn.qkv, block.norm1, f"{VISUAL}.blocks.0.attn.qkv"
        start = "qkv".index(letter) * case.model.cfg.vision.d_model + d
    rows = slice(start, start + d)

    def forked(x: Tensor, memory: Memory) -> Tensor:
        x = x.clone()
        x[..., rows] = torch.nn.functional.linear(norm(memory["pre"] + added), p.weight[rows], p.bias[rows])
        return x

    def one_head(x: Tensor) -> Tensor:
        x[:, :, 1] += added
        return x

    steps: list[Step] = [
        (f"{case.blocks()}.0", "input", lambda x, m: m.update(pre=x)),
        (path, "output", forked),
    ]
    case.check(f"vision_encoder.blocks.0.attn.hook_{letter}_input", one_head, steps)


def test_the_stream_that_enters_clips_blocks() -> None:
    """No layer that is read as features is before the first block here, so it is the block's alone."""
    case = Case("llava")
    added = case.noise(24)
    steps: list[Step] = [(f"{CLIP}.0", "input", lambda x, m: x + added)]
    case.check("vision_encoder.blocks.0.hook_resid_pre", lambda x: x + added, steps)


# -- Qwen's patches, in raster order -------------------------------------------------------------


def test_patches_that_enter_qwens_tower(qwen: Case) -> None:
    longest = int(qwen.inputs.image_grid_thw.prod(-1).max())
    added = qwen.noise(3, longest, qwen.model.cfg.vision.d_model)
    packed = qwen.patches(qwen.inputs, added, windows=False)
    steps: list[Step] = [(f"{VISUAL}.patch_embed", "output", lambda x, m: x + packed)]
    qwen.check("vision_encoder.hook_embed", lambda x: x + added, steps)


def test_both_ends_of_qwens_projector(qwen: Case) -> None:
    order = qwen.token_order(qwen.inputs)
    assert not torch.equal(order, order.sort().values), "there is only one window"
    out, inner = qwen.noise(len(order), 32), qwen.noise(len(order), 4 * qwen.model.cfg.vision.d_model)
    at_end: list[Step] = [(f"{VISUAL}.merger", "output", lambda x, m: x + out[order])]
    for name in ("vision_projector.hook_out", "hook_image_embed"):
        qwen.check(name, lambda x: x + out, at_end)
    at_start: list[Step] = [(f"{VISUAL}.merger.mlp.0", "input", lambda x, m: x + inner[order])]
    qwen.check("vision_projector.hook_in", lambda x: x + inner, at_start)


VISION_NORMS = {
    "vision_encoder.blocks.0.ln1": f"{VISUAL}.blocks.0.norm1",
    "vision_encoder.blocks.1.ln2": f"{VISUAL}.blocks.1.norm2",
    "vision_projector.ln": f"{VISUAL}.merger.ln_q",
}


@pytest.mark.parametrize("name", VISION_NORMS)
def test_norms_of_qwens_tower(qwen: Case, name: str) -> None:
    check_norm(qwen, name, VISION_NORMS[name])


# -- one hook against another --------------------------------------------------------------------


@pytest.fixture(scope="module")
def streams(case: Case) -> Iterator[tuple[Case, list[str]]]:
    vision = len(case.model.vision_encoder.blocks)
    yield case, [f"blocks.{i}" for i in range(3)] + [f"vision_encoder.blocks.{i}" for i in range(vision)]


def same(case: Case, first: str, second: str, size: int) -> float:
    added = case.noise(size)
    runs = [
        case.model.run_with_hooks(case.inputs, fwd_hooks=[(name, lambda x, hook: x + added)])
        for name in (first, second)
    ]
    assert random_llava.largest_difference(runs[0], case.clean, case.inputs) >= 1e-3
    return random_llava.largest_difference(*runs, case.inputs)


@pytest.mark.parametrize("gradients", [False, True])
def test_resid_mid_is_attn_out(streams: tuple[Case, list[str]], gradients: bool) -> None:
    case, blocks = streams
    with torch.set_grad_enabled(gradients):
        for block in blocks:
            size = case.model.cfg.vision.d_model if "vision" in block else 32
            assert same(case, f"{block}.hook_resid_mid", f"{block}.hook_attn_out", size) <= TOLERANCE


@pytest.mark.parametrize("gradients", [False, True])
def test_resid_post_is_the_next_resid_pre(streams: tuple[Case, list[str]], gradients: bool) -> None:
    """But not at the layer that LLaVA reads as features: there only the end of the block is read."""
    case, blocks = streams
    read = {f"vision_encoder.blocks.{i - 1}" for i in case.model.cfg.vision.feature_layers}
    with torch.set_grad_enabled(gradients):
        for block, following in itertools.pairwise(blocks):
            if block.rpartition(".")[0] == following.rpartition(".")[0] and block not in read:
                size = case.model.cfg.vision.d_model if "vision" in block else 32
                assert same(case, f"{block}.hook_resid_post", f"{following}.hook_resid_pre", size) == 0
