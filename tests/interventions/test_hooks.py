"""Hook factories against plain loops; each refuses what it can't do and leaves its input alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hf_twin import Step, Twin
from helpers.random_llava import make_pair, mixed_batch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hones_lens import VLMInputs
from hones_lens.interventions.hooks import (
    add,
    block_attention,
    by_layer,
    mean_ablate,
    neuron_hook,
    patch,
    replace_with_other_heads_mean,
    scale,
    scale_heads,
    steering_vector,
    zero,
    zero_neurons,
)
from hones_lens.interventions.positions import PromptMask
from hones_lens.interventions.token_groups import Box, token_mask

seeds = st.integers(0, 2**31 - 1)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _run(hook: tuple[str, Callable], x: Tensor) -> Tensor:
    """Run a hook and check that its input stays as it was, and is not handed back."""
    before = x.clone()
    out = hook[1](x, hook=None)
    assert torch.equal(x, before), "changed in place"
    assert out.data_ptr() != x.data_ptr() and out.shape == x.shape and out.dtype == x.dtype
    return out


# -- replace_with_other_heads_mean ---------------------------------------------------------------------


@given(seed=seeds, rows=st.integers(1, 3), pos=st.integers(1, 4), n_heads=st.integers(2, 5), data=st.data())
@settings(max_examples=40)
def test_other_heads_mean_is_the_formula(
    seed: int, rows: int, pos: int, n_heads: int, data: st.DataObject
) -> None:
    z = _random(seed, rows, pos, n_heads, 3)
    heads = data.draw(st.lists(st.integers(0, n_heads - 1), min_size=rows, max_size=rows))
    name, _ = hook = replace_with_other_heads_mean(2, heads)
    assert name == "blocks.2.attn.hook_z"
    out = _run(hook, z)
    for row in range(rows):
        for p in range(pos):
            for h in range(n_heads):
                mean = sum(z[row, p, k] for k in range(n_heads) if k != h) / (n_heads - 1)
                expected = mean if h == heads[row] else z[row, p, h]
                assert torch.allclose(out[row, p, h], expected, atol=1e-5)
                assert h == heads[row] or torch.equal(out[row, p, h], z[row, p, h])


@pytest.mark.parametrize("head", [1, torch.tensor(1), [1, 1, 1], torch.tensor([1, 1, 1])])
def test_one_head_for_all_rows_or_one_for_each(head: object) -> None:
    z = _random(0, 3, 2, 4, 5)
    out = _run(replace_with_other_heads_mean(0, head), z)
    assert torch.allclose(out[:, :, 1], (z.sum(2) - z[:, :, 1]) / 3, atol=1e-5)
    assert torch.equal(out[:, :, [0, 2, 3]], z[:, :, [0, 2, 3]])


def test_two_heads_become_equal_and_the_own_value_does_not_matter() -> None:
    z = _random(0, 1, 3, 2, 4)
    assert torch.equal(_run(replace_with_other_heads_mean(0, 0), z)[:, :, 0], z[:, :, 1])
    z[:, :, 0] = torch.inf
    assert torch.equal(_run(replace_with_other_heads_mean(0, 0), z)[:, :, 0], z[:, :, 1])


def test_other_heads_mean_refuses() -> None:
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.hook_z: with one head"):
        replace_with_other_heads_mean(1, 0)[1](_random(0, 2, 3, 1, 4), hook=None)
    with pytest.raises(ValueError, match="3 heads for a batch of 2"):
        replace_with_other_heads_mean(1, [0, 1, 0])[1](_random(0, 2, 3, 4, 4), hook=None)
    for head in (4, -1, [0, 4]):
        with pytest.raises(ValueError, match="not all in 0"):
            replace_with_other_heads_mean(1, head)[1](_random(0, 2, 3, 4, 4), hook=None)


# -- zero, scale, mean ---------------------------------------------------------------------------------


@given(seed=seeds, axis=st.sampled_from([-1, 1, 2]), data=st.data())
@settings(max_examples=40)
def test_scale_zero_and_mean_touch_the_chosen_entries_only(seed: int, axis: int, data: st.DataObject) -> None:
    x = _random(seed, 2, 3, 4)
    n = x.shape[axis]
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    factors = _random(seed + 1, len(index))
    expected = {"scale": x.clone(), "each": x.clone(), "zero": x.clone(), "mean": x.clone()}
    for k, i in enumerate(index):
        where = [slice(None)] * 3
        where[axis] = i
        expected["scale"][tuple(where)] *= 1.5
        expected["each"][tuple(where)] *= factors[k]
        expected["zero"][tuple(where)] = 0
        expected["mean"][tuple(where)] = 0.25
    hooks_by_kind = {
        "scale": scale("a", index, 1.5, axis),
        "each": scale("a", torch.tensor(index), factors, axis),
        "zero": zero("a", index, axis),
        "mean": mean_ablate("a", torch.tensor(0.25), index, axis),
    }
    for kind, hook in hooks_by_kind.items():
        assert hook[0] == "a"
        assert torch.allclose(_run(hook, x), expected[kind], atol=1e-5), kind


def test_scaling_by_one_is_exact() -> None:
    x = _random(0, 2, 3, 4)
    assert torch.equal(_run(scale("a", [0, 2], 1.0), x), x)


def test_scale_lets_gradients_through_to_its_factors() -> None:
    x, factors = _random(0, 2, 3, 4), torch.ones(2, requires_grad=True)
    scale("a", [1, 3], factors)[1](x, hook=None).sum().backward()
    assert factors.grad is not None
    assert torch.allclose(factors.grad, x[..., [1, 3]].sum((0, 1)), atol=1e-5)


def test_mean_of_each_neuron_and_position() -> None:
    x, mean = _random(0, 2, 3, 4), _random(1, 3, 4)
    out = _run(mean_ablate("a", mean, [1, 3]), x)
    assert torch.equal(out[..., [1, 3]], mean[None, :, [1, 3]].expand(2, -1, -1))
    assert torch.equal(out[..., [0, 2]], x[..., [0, 2]])


def test_scale_zero_and_mean_refuse() -> None:
    for make in (
        lambda: zero("a", []),
        lambda: scale("a", [], 2.0),
        lambda: mean_ablate("a", torch.zeros(()), []),
    ):
        with pytest.raises(ValueError, match="no entries"):
            make()
    with pytest.raises(ValueError, match="3 factors for 2 entries"):
        scale("a", [0, 1], torch.ones(3))
    with pytest.raises(IndexError):
        zero("a", [4])[1](_random(0, 2, 3, 4), hook=None)
    with pytest.raises(IndexError):
        mean_ablate("a", torch.zeros(()), [4])[1](_random(0, 2, 3, 4), hook=None)


# -- patch, add ----------------------------------------------------------------------------------------


@given(seed=seeds, data=st.data())
@settings(max_examples=40)
def test_patch_and_add_act_at_the_chosen_positions(seed: int, data: st.DataObject) -> None:
    x, value, vector = _random(seed, 2, 3, 4, 5), _random(seed + 1, 2, 3, 4, 5), _random(seed + 2, 5)
    cells = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=6))
    positions = torch.zeros(2, 3, dtype=torch.bool)
    for cell in cells:
        positions[cell] = True
    patched, added = _run(patch("a", value, positions), x), _run(add("a", vector, positions), x)
    for row in range(2):
        for p in range(3):
            chosen = bool(positions[row, p])
            assert torch.equal(patched[row, p], value[row, p] if chosen else x[row, p])
            assert torch.equal(added[row, p], x[row, p] + vector if chosen else x[row, p])


def test_patch_and_add_everywhere() -> None:
    x, value = _random(0, 2, 3, 4), _random(1, 2, 3, 4)
    assert torch.equal(_run(patch("a", value), x), value)
    assert torch.equal(_run(add("a", value), x), x + value)
    half = _run(add("a", torch.ones(4, dtype=torch.float64)), x.half())
    assert half.dtype == torch.float16


def test_patch_and_add_refuse() -> None:
    x = _random(0, 2, 3, 4)
    with pytest.raises(ValueError, match=r"a: patch of shape \(2, 3, 5\)"):
        patch("a", _random(0, 2, 3, 5))[1](x, hook=None)
    for hook in (
        patch("a", x, torch.zeros(2, 3, dtype=torch.bool)),
        add("a", x[0, 0], torch.zeros(2, 3).bool()),
    ):
        with pytest.raises(ValueError, match="a: the mask selects no position"):
            hook[1](x, hook=None)
    for hook in (patch("a", x, torch.ones(2, 4).bool()), add("a", x[0, 0], torch.ones(1, 3).bool())):
        with pytest.raises(ValueError, match="a: mask of shape"):
            hook[1](x, hook=None)


# -- block_attention -----------------------------------------------------------------------------------


def test_blocked_edges_are_gone_and_others_stay() -> None:
    scores = _random(0, 2, 3, 4, 4).masked_fill(~torch.ones(4, 4).tril().bool(), -torch.inf)
    queries = torch.tensor([[False, False, True, True], [False, True, False, False]])
    keys = torch.tensor([[True, False, False, False], [True, False, False, False]])
    name, _ = hook = block_attention(1, queries, keys)
    assert name == "blocks.1.attn.hook_attn_scores"
    out = _run(hook, scores)
    for row in range(2):
        for q in range(4):
            for k in range(4):
                cut = bool(queries[row, q] and keys[row, k])
                expected = torch.full((3,), -torch.inf) if cut else scores[row, :, q, k]
                assert torch.equal(out[row, :, q, k], expected)


def test_block_attention_refuses() -> None:
    nonempty, none = torch.tensor([[True, False]]), torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"blocks\.0.*query group is empty"):
        block_attention(0, none, nonempty)
    with pytest.raises(ValueError, match="key group is empty"):
        block_attention(0, nonempty, none)
    scores = _random(0, 1, 3, 2, 2).masked_fill(~torch.ones(2, 2).tril().bool(), -torch.inf)
    with pytest.raises(ValueError, match="without any key"):
        block_attention(0, nonempty, nonempty)[1](scores, hook=None)


# -- neurons, and hooks in a model ---------------------------------------------------------------------


def test_neurons_by_layer() -> None:
    assert by_layer([(1, 5), (0, 2), (1, 3)]) == {1: [5, 3], 0: [2]}
    assert neuron_hook(3) == "blocks.3.mlp.hook_post"
    hooks = zero_neurons([(1, 3), (0, 2), (1, 0)])
    assert sorted(name for name, _ in hooks) == ["blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]
    out = _run(dict((name, (name, fn)) for name, fn in hooks)["blocks.1.mlp.hook_post"], torch.ones(1, 2, 4))
    assert out.tolist() == [[[0, 1, 1, 0]] * 2]
    with pytest.raises(ValueError, match="no components"):
        zero_neurons([])


@torch.no_grad()
def test_hooks_change_what_the_model_says() -> None:
    _, model = make_pair()
    inputs = mixed_batch(model)
    clean = model(inputs)
    groups = inputs.token_groups
    hooks = {
        "mean of the others": replace_with_other_heads_mean(0, [0, 1, 2]),
        "zero": zero(neuron_hook(1), [0, 3]),
        "scale": scale("blocks.0.attn.hook_z", [2], 3.0, axis=2),
        "patch": patch(
            "blocks.1.hook_resid_pre", _random(0, *clean.shape[:2], model.cfg.d_model), groups["last"]
        ),
        "add": add("blocks.1.hook_resid_mid", _random(0, model.cfg.d_model), groups["last"]),
        "block": block_attention(1, groups["last"], groups["image"]),
    }
    for kind, hook in hooks.items():
        changed = (model.run_with_hooks(inputs, fwd_hooks=[hook]) - clean)[:, -1].abs().amax(-1)
        has_image = groups["image"].any(1)
        touched = has_image if kind == "block" else torch.ones_like(has_image)
        assert (changed[touched] > 1e-4).all(), kind
        assert (changed[~touched] < 2e-5).all(), kind
    with pytest.raises(ValueError, match="no hook 'blocks"):
        model.run_with_hooks(inputs, fwd_hooks=[zero(neuron_hook(99), [0])])


# -- positions of a prompt while answers are generated ----------------------------------------------------


def test_a_prompts_mask_at_every_step() -> None:
    mask = torch.tensor([[False, True, False], [True, False, True]])
    for generated, behind in ((None, [False, True]), (True, [True, True]), (False, [False, False])):
        prompt_mask = PromptMask("a", mask, generated)
        with pytest.raises(ValueError, match=r"a: mask of shape \(2, 3\) for 2 rows of 1 positions"):
            prompt_mask.over_visible(2, 1)
        assert torch.equal(prompt_mask.over_visible(2, 3), mask)
        expected = torch.tensor(behind)[:, None]
        assert torch.equal(prompt_mask.over_visible(2, 1), expected), "the newest token alone"
        assert torch.equal(prompt_mask.over_visible(2, 4), torch.cat((mask, expected), 1)), "all of them"
        assert torch.equal(prompt_mask.over_visible(2, 5), torch.cat((mask, expected, expected), 1))
        assert torch.equal(prompt_mask.over_visible(2, 3), mask)
        for rows, n in ((2, 5), (2, 2), (1, 3), (1, 1), (3, 4)):
            with pytest.raises(ValueError, match=f"for {rows} rows of {n} positions"):
                prompt_mask.over_visible(rows, n)


def test_a_prompts_mask_refuses() -> None:
    with pytest.raises(ValueError, match="a: the mask selects no position"):
        PromptMask("a", torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="prompts of one token can't be told from new tokens"):
        PromptMask("a", torch.ones(2, 1, dtype=torch.bool), False)
    assert PromptMask("a", torch.ones(2, 1, dtype=torch.bool)).over_visible(2, 1).all()


def test_spared_queries_keep_themselves_only_where_they_must() -> None:
    scores = _random(0, 1, 2, 3, 3).masked_fill(~torch.ones(3, 3).tril().bool(), -torch.inf)
    queries, keys = torch.tensor([[True, False, True]]), torch.tensor([[True, False, True]])
    out = _run(block_attention(0, queries, keys, spare_self=True), scores)[0, 0]
    alone = [[True, False, False], [True, True, False], [False, True, False]]
    assert torch.equal(out.isfinite(), torch.tensor(alone)), "the first sees itself, the last the second"
    assert torch.equal(out[out.isfinite()], scores[0, 0][out.isfinite()])


# -- steering ------------------------------------------------------------------------------------------------


def _naive_greedy(both: Twin, inputs: VLMInputs, steps: Callable[[int], list[Step]], n: int) -> Tensor:
    """Greedy tokens of Hugging Face's model, the whole sequence anew at each step."""
    new_tokens = inputs.input_ids[:, :0]
    for _ in range(n):
        logits = both.logits(inputs.extended(new_tokens), steps(new_tokens.shape[1]))
        new_tokens = torch.cat((new_tokens, logits[:, -1].argmax(-1, keepdim=True)), 1)
    return new_tokens


def _unending(both: Twin) -> None:
    both.model.cfg = replace(both.model.cfg, eos_token_ids=())


@pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])
@pytest.mark.parametrize(
    ("group", "generated", "goes_on"),
    [
        (None, None, True),
        ("last", None, True),
        ("last", False, False),
        ("image", None, False),
        ("image", True, True),
    ],
)
def test_steered_answers_are_those_of_whole_passes(
    made, group: str | None, generated: bool | None, goes_on: bool
) -> None:
    both = Twin(made)
    _unending(both)
    inputs = both.model.prepare(made.make_images(2)[:2], list(random_llava.QUESTIONS[:2]))
    vector = 3 * _random(5, 2, 32)  # one for each row
    prompt = torch.ones_like(inputs.image_mask) if group is None else inputs.token_groups[group]

    def steps(n: int) -> list[Step]:
        behind = torch.full((2, n), goes_on)
        where = torch.cat((prompt, behind), 1)[..., None]
        return both.edit(1, "hook_resid_post", lambda x: x + where * 2 * vector[:, None])

    expected = _naive_greedy(both, inputs, steps, 5)
    hook = steering_vector(1, vector, group, inputs=inputs, strength=2.0, generated=generated)
    assert hook[0] == "blocks.1.hook_resid_post"
    for use_kv_cache in (True, False, True):
        with both.model.hooks(fwd_hooks=[hook]):
            options = {"max_new_tokens": 5, "return_type": "tokens", "use_kv_cache": use_kv_cache}
            assert torch.equal(both.model.generate(inputs, **options), expected)
    clean = both.model.generate(inputs, max_new_tokens=5, return_type="tokens")
    assert not torch.equal(clean, expected)


@torch.no_grad()
def test_places_in_the_stream_and_kinds_of_groups() -> None:
    both = Twin(random_llava)
    pictures = random_llava.make_images(2, size=(40, 31))
    inputs = both.model.prepare(pictures, list(random_llava.QUESTIONS[:2]))
    vector, box = _random(3, 32), Box(6, 0, 20, 20)
    mask = token_mask(inputs, box)
    run = both.model.run_with_hooks
    for at, name in (("pre", "hook_resid_pre"), ("mid", "hook_resid_mid"), ("post", "hook_resid_post")):
        expected = both.logits(inputs, both.edit(1, name, lambda x: x - mask[..., None] * vector))
        for hook in (
            steering_vector(1, vector, box, inputs=inputs, strength=-1, at=at),
            steering_vector(1, -vector, mask, at=at),
        ):
            assert random_llava.largest_difference(run(inputs, fwd_hooks=[hook]), expected, inputs) < 1e-4
    here, there = steering_vector(0, vector, mask), steering_vector(1, vector, mask, at="pre")
    assert torch.equal(run(inputs, fwd_hooks=[here]), run(inputs, fwd_hooks=[there]))


@torch.no_grad()
def test_steering_refuses() -> None:
    _, model = make_pair()
    inputs = mixed_batch(model)
    ones = torch.ones(32)
    for kwargs, message in (
        ({"at": "top"}, "valid: pre, mid, post"),
        ({"group": "last"}, "to find the group 'last', give inputs="),
        ({"group": torch.ones(3, 4)}, "give booleans"),
        ({"group": "image", "inputs": inputs}, "'image' is empty in row 2"),
        ({"generated": False}, "to leave out new tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            steering_vector(1, ones, **kwargs)
    for vector in (ones[None, None], ones * torch.nan):
        with pytest.raises(ValueError, match="a finite vector"):
            steering_vector(1, vector)
    for vector in (torch.ones(31), torch.ones(2, 32)):
        with pytest.raises(ValueError, match=r"blocks\.1\.hook_resid_post: vector"):
            model.run_with_hooks(inputs, fwd_hooks=[steering_vector(1, vector)])
    hook = steering_vector(1, ones, "last", inputs=inputs)
    with model.hooks(fwd_hooks=[hook]), pytest.raises(ValueError, match="for 1 rows of"):
        model.generate(inputs[:1])


@pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])
@torch.no_grad()
def test_scaled_heads_are_scaled_in_hugging_faces_model_and_at_every_step(made) -> None:
    both = Twin(made, seed=12)
    _unending(both)
    inputs = made.mixed_batch(both.model)
    factors = torch.ones(3, 4)
    factors[0, 2], factors[2, 0], factors[0, 1] = 3.0, -2.0, 0.0

    def steps(_: int) -> list[Step]:
        return [
            step
            for layer in (0, 2)
            for step in both.edit(layer, "attn.hook_z", lambda z, f=factors[layer]: z * f[:, None])
        ]

    hooks = scale_heads([(0, 2), (2, 0), (0, 1)], [3.0, -2.0, 0.0])
    assert [name for name, _ in hooks] == ["blocks.0.attn.hook_z", "blocks.2.attn.hook_z"]
    actual = both.model.run_with_hooks(inputs, fwd_hooks=hooks)
    assert random_llava.largest_difference(actual, both.logits(inputs, steps(0)), inputs) < 2e-5
    with both.model.hooks(fwd_hooks=hooks):
        tokens = both.model.generate(inputs, max_new_tokens=4, return_type="tokens")
    assert torch.equal(tokens, _naive_greedy(both, inputs, steps, 4))
    assert not torch.equal(tokens, both.model.generate(inputs, max_new_tokens=4, return_type="tokens"))
    same = both.model.run_with_hooks(inputs, fwd_hooks=scale_heads([(1, 1), (0, 3)], 1.0))
    assert torch.equal(same, both.model(inputs))


def test_scaling_heads_refuses() -> None:
    with pytest.raises(ValueError, match="no components"):
        scale_heads([], 2.0)
    with pytest.raises(ValueError, match=r"given twice: \[\(0, 1\)\]"):
        scale_heads([(0, 1), (2, 1), (0, 1)], 2.0)
    with pytest.raises(ValueError, match="3 factors for 2 heads"):
        scale_heads([(0, 1), (2, 1)], [1.0, 2.0, 3.0])
