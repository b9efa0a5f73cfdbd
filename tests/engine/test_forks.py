"""Forked rows against full forward passes under the same hooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.hf_task_loops import D_MLP, N_HEADS, N_LAYERS, pair
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hones_lens import HookedVLM
from hones_lens.engine.arms import Arm, stack_hooks
from hones_lens.engine.forks import fork, walk
from hones_lens.engine.segments import Segment
from hones_lens.engine.sweep import logits_under
from hones_lens.interventions.hooks import (
    Hook,
    add,
    block_attention,
    patch,
    replace_with_other_heads_mean,
    scale,
    zero_head,
    zero_neurons,
)
from hones_lens.model.inputs import VLMInputs

PROMPTS = ("how many?", "what color is the circle?", "Describe the image in one sentence.")
layers, heads = st.integers(0, N_LAYERS - 1), st.integers(0, N_HEADS - 1)


def inputs_of(model: HookedVLM, rows: int, seed: int) -> VLMInputs:
    """Left-padded prompts, pictures of noise; the last row is text alone."""
    generator = torch.Generator().manual_seed(seed)
    images: list = [
        Image.fromarray(torch.randint(0, 256, (56, 56, 3), generator=generator).byte().numpy())
        for _ in range(rows)
    ]
    return model.prepare([*images, None], [*PROMPTS[:rows], "no picture"])


def random_like(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def interventions(draw: st.DrawFn) -> tuple[str, list]:
    """What to do, as a recipe that can be cooked for any model and batch."""
    layer, seed = draw(layers), draw(st.integers(0, 99))
    kind = draw(
        st.sampled_from(
            ["late", "head", "zero", "neurons", "scale", "patch", "add", "edges", "pair", "q", "value"]
        )
    )
    return kind, [layer, seed, draw(heads), draw(layers)]


def cook(recipe: tuple[str, list], model: HookedVLM, inputs: VLMInputs) -> list[Hook]:
    kind, (layer, seed, head, other) = recipe
    batch, length = inputs.input_ids.shape
    stream, neuron = (batch, length, model.cfg.d_model), seed % D_MLP
    stream_hook = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out")[seed % 4]
    last, image, at = inputs.token_groups["last"], inputs.image_mask, f"blocks.{layer}."
    made: dict[str, Callable[[], list[Hook]]] = {
        "late": lambda: [replace_with_other_heads_mean(layer, head, positions="last")],
        "head": lambda: [replace_with_other_heads_mean(layer, head)],
        "zero": lambda: [zero_head(layer, head)],
        "neurons": lambda: zero_neurons([(other, neuron), (layer, neuron), (layer, (neuron + 3) % D_MLP)]),
        "scale": lambda: [scale(f"{at}mlp.hook_post", [neuron, 0, 1], 1.5)],
        "patch": lambda: [patch(at + stream_hook, random_like(stream, seed), image | last)],
        "add": lambda: [add(f"{at}hook_mlp_out", random_like(stream[2:], seed))],
        "edges": lambda: [block_attention(layer, last, inputs.attention_mask.bool())],
        "pair": lambda: [replace_with_other_heads_mean(layer, head), *zero_neurons([(other, neuron)])],
        "q": lambda: [(f"{at}attn.hook_q", lambda x, hook: -x)],
        "value": lambda: [(f"{at}attn.hook_v", lambda x, hook: x.mul_(0.5))],  # in place
    }
    return made[kind]()


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["llava", "qwen"])
@given(
    recipes=st.lists(interventions(), min_size=1, max_size=4), rows=st.integers(1, 3), seed=st.integers(0, 9)
)
@settings(max_examples=40)
def test_forked_rows_equal_full_passes(family: str, recipes: list, rows: int, seed: int) -> None:
    _, model = pair(family)
    inputs = inputs_of(model, rows, seed)
    hooks = []
    for recipe in recipes:
        cooked = cook(recipe, model, inputs)
        if recipe[0] == "edges":
            last = inputs.token_groups["last"]
            cooked = [block_attention(recipe[1][0], last, inputs.attention_mask.bool() & ~last)]
        hooks.append(cooked)
    keep = 1 + seed % 3
    found = dict(logits_under(model, inputs, hooks, keep))
    clean = model(inputs, logits_to_keep=keep)
    for i, each in enumerate(hooks):
        expected = model.run_with_hooks(inputs, fwd_hooks=each, logits_to_keep=keep)
        assert (found[i] - expected).abs().max() < 5e-5
    assert torch.equal(model(inputs, logits_to_keep=keep), clean)


def test_an_arm_starts_at_its_lowest_hook() -> None:

    def nothing(x, hook):
        return None

    up, down = zero_neurons([(2, 1), (0, 4)])
    assert Arm([up, down]).hooks == (down, up)
    assert Arm([up, down]).start == (0, 3) and Arm([up, down]).shortcut is down[1]
    assert Arm([("blocks.10.attn.hook_z", nothing), ("blocks.9.ln1.hook_scale", nothing)]).start == (9, 0)
    assert Arm([("blocks.1.ln2.hook_scale", nothing)]).start == (1, 2)
    assert Arm([("hook_embed", nothing)]).start is None and Arm().start is None
    assert Arm([("blocks.1.attn.hook_z", nothing), ("hook_embed", nothing)]).start is None
    head = replace_with_other_heads_mean(1, 2)
    assert Arm([head]).shortcut is head[1]
    assert Arm([head, ("blocks.1.mlp.hook_post", nothing)]).shortcut is None  # its own layer is not done then
    assert Arm([replace_with_other_heads_mean(1, [0, 1])]).shortcut is None
    assert not Arm([("blocks.1.attn.hook_pattern", nothing)]).is_position_wise


def test_heads_that_a_layer_does_not_have_are_refused_in_forks_too() -> None:
    _, model = pair()
    segment = Segment.of(model, inputs_of(model, 1, 0), 1)
    steps = next(iter(walk(model, [segment])))
    for head in (-1, N_HEADS):
        with pytest.raises(ValueError, match="not all in 0"):
            fork(model, [segment], steps, [Arm([replace_with_other_heads_mean(0, head)])])


def test_stacked_hooks_see_their_own_rows_alone() -> None:
    seen: list[Tensor] = []

    def look(x: Tensor, hook: object) -> None:
        seen.append(x)

    def double(x: Tensor, hook: object) -> Tensor:
        return 2 * x

    hooks = stack_hooks([(1, [("a", look)]), (2, []), (1, [("a", double), ("b", look), ("a", double)])])
    assert [name for name, _ in hooks] == ["a", "b"]
    x = torch.arange(8.0).view(4, 2)
    assert torch.equal(hooks[0][1](x, HookPoint()), torch.cat((x[:3], 4 * x[3:])))
    assert torch.equal(seen[0], x[:1])
    assert torch.equal(hooks[1][1](x, HookPoint()), x) and torch.equal(seen[1], x[3:])
