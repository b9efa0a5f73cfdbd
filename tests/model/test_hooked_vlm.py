"""Every hook is causal and does what its name says; caches, filters, and hooks during generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import tiny
import tiny_qwen
import torch
import torch.nn.functional as F
from torch import Tensor

from hones_lens import HookedVLM, VLMInputs

SHAPES = {
    "gqa": {"text": {"num_key_value_heads": 2}, "vision_feature_layer": [1, -2]},
    "mha, head_dim set, class token kept": {
        "text": {"head_dim": 10, "num_hidden_layers": 2},
        "vision_feature_select_strategy": "full",
    },
}
BY_HEAD_PAIR = ("hook_attn_scores", "hook_pattern")
COSTLY = ("hook_result", "hook_q_input", "hook_k_input", "hook_v_input")


QWEN_SHAPES = {
    "qwen, gqa": {"vision": {"window_size": 3 * 14}},
    "qwen, mha, one window": {
        "text": {"num_key_value_heads": 4, "num_hidden_layers": 2},
        "vision": {"window_size": 400, "fullatt_block_indexes": [0, 2]},
    },
}


class Pair:
    def __init__(self, shape: str):
        made = tiny if shape in SHAPES else tiny_qwen
        config = made.make_config(**{**SHAPES, **QWEN_SHAPES}[shape])
        self.hf, self.model = made.make_pair(config, seed=11)
        self.inputs = made.mixed_batch(self.model)
        self.answered = made.mixed_batch(self.model, ["red", "two", "no"])

    def difference(self, a: Tensor, b: Tensor) -> float:
        return tiny.largest_difference(a, b, self.inputs)


@pytest.fixture(scope="module", params=[*SHAPES, *QWEN_SHAPES])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


@pytest.fixture(scope="module", params=SHAPES)
def llava(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


@pytest.fixture(scope="module")
def gqa() -> Pair:
    return Pair("gqa")


@pytest.fixture
def model(gqa: Pair) -> HookedVLM:
    return gqa.model


@pytest.fixture
def inputs(gqa: Pair) -> VLMInputs:
    return gqa.inputs


def noise_hook(size: float = 0.3) -> Callable:
    """Adds the same noise to the same hook at every call."""

    def hook(x: Tensor, hook) -> Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, hook.name)))
        return x + size * torch.randn(x.shape, generator=generator)

    return hook


def identity(x: Tensor, hook) -> Tensor:
    return x


# -- every name in hook_dict ---------------------------------------------------------------------


def test_the_names_of_the_contract_are_there(model: HookedVLM) -> None:
    block = (
        "hook_resid_pre hook_resid_mid hook_resid_post hook_attn_out hook_mlp_out mlp.hook_pre mlp.hook_post"
    )
    block += " ln1.hook_scale ln1.hook_normalized ln2.hook_scale ln2.hook_normalized"
    attn = "q k v z rot_q rot_k attn_scores pattern result q_input k_input v_input"
    in_block = [*block.split(), *(f"attn.hook_{name}" for name in attn.split())]
    top = "hook_text_embed hook_image_embed hook_embed ln_final.hook_scale ln_final.hook_normalized"
    expected = {*top.split(), "vision_projector.hook_in", "vision_projector.hook_out"}
    expected |= {
        f"blocks.{layer}.{name}" for layer in range(3) for name in [*in_block, "mlp.hook_pre_linear"]
    }
    expected |= {f"vision_encoder.blocks.{layer}.{name}" for layer in range(2) for name in in_block}
    assert expected <= set(model.hook_dict)


def test_every_hook_is_causal_with_and_without_gradients(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    with torch.no_grad():
        clean = model(inputs)
    dead, unequal = [], []
    for name in model.hook_dict:
        edited = [(name, noise_hook())]
        with torch.no_grad():
            without = model.run_with_hooks(inputs, fwd_hooks=edited)
        with_gradients = model.run_with_hooks(inputs, fwd_hooks=edited)
        if pair.difference(without, clean) < 1e-3:
            dead.append(name)
        if pair.difference(without, with_gradients) > 1e-5:
            unequal.append(name)
    assert not dead
    assert not unequal


def test_gradients_pass_through_every_hook(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    blocked = []
    for name in model.hook_dict:
        seen: list[Tensor] = []

        def watch(x: Tensor, hook, seen=seen) -> Tensor:
            leaf = x.detach().requires_grad_()
            seen.append(leaf)
            return leaf

        logits = model.run_with_hooks(inputs, fwd_hooks=[(name, watch)])
        (gradient,) = torch.autograd.grad(logits[inputs.attention_mask.bool()].pow(2).sum(), seen)
        if not gradient.isfinite().all() or gradient.abs().max() == 0:
            blocked.append(name)
    assert not blocked


def test_identity_hooks_change_nothing(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    with torch.no_grad():
        clean = model(inputs)
        for name in model.hook_dict:
            found = model.run_with_hooks(inputs, fwd_hooks=[(name, identity)])
            if name.endswith((*BY_HEAD_PAIR, *COSTLY)):  # another kernel, or another order of the sums
                assert pair.difference(found, clean) <= 2e-5, name
            else:
                assert torch.equal(found, clean), name


def test_an_edit_in_place_is_the_same_edit(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs

    def doubled(x: Tensor, hook) -> Tensor:
        return x * 1.5

    def doubled_in_place(x: Tensor, hook) -> Tensor:
        x *= 1.5
        return x

    with torch.no_grad():
        for name in model.hook_dict:
            returned = model.run_with_hooks(inputs, fwd_hooks=[(name, doubled)])
            in_place = model.run_with_hooks(inputs, fwd_hooks=[(name, doubled_in_place)])
            assert pair.difference(returned, in_place) <= 1e-5, name


IN_PLACE = ["attn.hook_q", "attn.hook_v", "attn.hook_z", "mlp.hook_post", "hook_mlp_out", "hook_resid_pre"]


@pytest.mark.parametrize("name", [f"blocks.1.{name}" for name in IN_PLACE] + ["hook_embed"])
def test_gradients_after_an_edit_in_place(gqa: Pair, name: str) -> None:
    """As TransformerLens's users write it: `z[:, :, head] = 0; return z`."""

    def halved(x: Tensor, hook) -> Tensor:
        mask = torch.ones_like(x)
        mask[:, :, 0] = 0.5
        return x * mask

    def halved_in_place(x: Tensor, hook) -> Tensor:
        x[:, :, 0] *= 0.5
        return x

    weights = [gqa.model.blocks[0].attn.o.weight, gqa.model.blocks[2].mlp.up.weight]
    grads = []
    for hook in (halved, halved_in_place):
        logits = gqa.model.run_with_hooks(gqa.inputs, fwd_hooks=[(name, hook)])
        grads.append(torch.autograd.grad(logits[:, -1].pow(2).sum(), weights))
    for returned, in_place in zip(*grads, strict=True):
        torch.testing.assert_close(returned, in_place, atol=1e-4, rtol=1e-4)


def test_an_edit_in_place_leaves_the_callers_tensors_alone(gqa: Pair) -> None:
    def zero(x: Tensor, hook) -> Tensor:
        x.zero_()
        return x

    model = gqa.model
    with torch.no_grad():
        encoded = model.with_image_embeds(gqa.inputs)
        kept = encoded.image_embeds.clone()
        clean = model(encoded)
        model.run_with_hooks(encoded, fwd_hooks=[("hook_image_embed", zero)])
        assert torch.equal(encoded.image_embeds, kept)
        assert torch.equal(model(encoded), clean)
        resid = model(gqa.inputs, stop_at_layer=1)
        before = resid.clone()
        hooks = [("blocks.1.hook_resid_pre", zero)]
        model.run_with_hooks(resid, start_at_layer=1, inputs=gqa.inputs, fwd_hooks=hooks)
        assert torch.equal(resid, before)
        with model.hooks(hooks):
            _, cache = model.run_with_cache(gqa.inputs)
        torch.testing.assert_close(cache["resid_post", 0], before, atol=1e-5, rtol=0)


# -- hooks against each other --------------------------------------------------------------------


def both(model: HookedVLM, inputs: VLMInputs, first: str, second: str, edit: Tensor) -> tuple[Tensor, Tensor]:
    def add(x: Tensor, hook) -> Tensor:
        return x + edit

    with torch.no_grad():
        return tuple(model.run_with_hooks(inputs, fwd_hooks=[(name, add)]) for name in (first, second))


@pytest.mark.parametrize("prefix", ["", "vision_encoder."])
@pytest.mark.parametrize("grad", [False, True])
def test_resid_mid_reaches_the_skip_path(gqa: Pair, prefix: str, grad: bool) -> None:
    d = gqa.model.cfg.vision.d_model if prefix else gqa.model.cfg.d_model
    edit = torch.randn(d)

    def add(x: Tensor, hook) -> Tensor:
        return x + edit

    with nullcontext() if grad else torch.no_grad():
        for layer in range(2):
            block = f"{prefix}blocks.{layer}"
            mid = gqa.model.run_with_hooks(gqa.inputs, fwd_hooks=[(f"{block}.hook_resid_mid", add)])
            out = gqa.model.run_with_hooks(gqa.inputs, fwd_hooks=[(f"{block}.hook_attn_out", add)])
            assert gqa.difference(mid, out) <= 1e-5


def test_resid_post_is_the_next_resid_pre(gqa: Pair) -> None:
    for layer in range(2):
        names = (f"blocks.{layer}.hook_resid_post", f"blocks.{layer + 1}.hook_resid_pre")
        post, pre = both(gqa.model, gqa.inputs, *names, torch.randn(32))
        assert torch.equal(post, pre)
    _, cache = gqa.model.run_with_cache(gqa.inputs)
    for layer in range(2):
        assert torch.equal(cache["resid_post", layer], cache["resid_pre", layer + 1])
    assert torch.equal(cache["hook_embed"], cache["resid_pre", 0])


def test_image_embed_is_the_projectors_output_merged_in(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs
    _, cache = model.run_with_cache(inputs)
    assert torch.equal(cache["hook_image_embed"], cache["vision_projector.hook_out"])
    mask = inputs.image_mask
    assert torch.equal(cache["hook_embed"][mask], cache["hook_image_embed"].flatten(0, 1))
    assert torch.equal(cache["hook_embed"][~mask], cache["hook_text_embed"][~mask])


def test_scores_and_pattern(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    tokens = inputs.attention_mask.bool()
    _, cache = model.run_with_cache(inputs)
    n = inputs.input_ids.shape[1]
    for layer, block in enumerate(model.blocks):
        scores, pattern = cache["attn_scores", layer], cache["pattern", layer]
        groups = model.cfg.n_heads // model.cfg.n_key_value_heads
        for row, head, query, key in [(0, 0, n - 1, n - 2), (1, 3, n - 3, 5), (2, 2, n - 1, n - 5)]:
            q = cache["rot_q", layer][row, query, head]
            k = cache["rot_k", layer][row, key, head // groups]
            allowed = bool(tokens[row, key])
            expected = q @ k / block.attn.d_head**0.5 if allowed else torch.tensor(-torch.inf)
            torch.testing.assert_close(scores[row, head, query, key], expected)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1) | ~tokens[:, None, None]
        where = tokens[:, None, :, None].expand_as(scores)
        assert (scores.isneginf() == hidden.expand_as(scores))[where].all()
        torch.testing.assert_close(scores.softmax(-1), pattern)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:3]))
        values = cache["v", layer].repeat_interleave(groups, dim=2)
        torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, values), cache["z", layer])


def test_an_edited_pattern_is_what_mixes_the_values(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs
    new = torch.rand(3, 4, inputs.input_ids.shape[1], inputs.input_ids.shape[1])
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook) -> None:
        seen[hook.name] = x

    hooks = [
        ("blocks.1.attn.hook_pattern", lambda x, hook: new),
        ("blocks.1.attn.hook_v", keep),
        ("blocks.1.attn.hook_z", keep),
    ]
    model.run_with_hooks(inputs, fwd_hooks=hooks)
    values = seen["blocks.1.attn.hook_v"].repeat_interleave(2, dim=2)
    expected = torch.einsum("bhqk,bkhd->bqhd", new, values)
    torch.testing.assert_close(seen["blocks.1.attn.hook_z"], expected)


def test_an_edited_score_is_an_edited_pattern(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs

    def score(x: Tensor, hook) -> Tensor:
        x[:, 2, :, -8:-4] += 1.5
        return x

    def pattern(x: Tensor, hook) -> Tensor:
        x[:, 2, :, -8:-4] *= torch.tensor(1.5).exp()
        return x / x.sum(-1, keepdim=True)

    with torch.no_grad():
        by_score = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_attn_scores", score)])
        by_pattern = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_pattern", pattern)])
    assert gqa.difference(by_score, by_pattern) <= 1e-5


@pytest.mark.parametrize("prefix", ["", "vision_encoder."])
def test_head_results_sum_to_attn_out(gqa: Pair, prefix: str) -> None:
    names = [f"{prefix}blocks.1.attn.hook_{name}" for name in ("z", "result")]
    out_name = f"{prefix}blocks.1.hook_attn_out"
    _, cache = gqa.model.run_with_cache(gqa.inputs, names_filter=[*names, out_name])
    attn = gqa.model.get_submodule(f"{prefix}blocks.1.attn")
    total = cache[names[1]].sum(-2) + attn.b_O
    torch.testing.assert_close(total, cache[out_name], atol=1e-5, rtol=1e-5)
    weight = attn.o.weight[:, 2 * attn.d_head : 3 * attn.d_head]
    torch.testing.assert_close(cache[names[1]][:, :, 2], cache[names[0]][:, :, 2] @ weight.T)


def test_zeroing_a_heads_result_is_zeroing_its_z(gqa: Pair) -> None:
    def zero(x: Tensor, hook) -> Tensor:
        x = x.clone()
        x[:, :, 1] = 0
        return x

    with torch.no_grad():
        for prefix in ("blocks.0", "vision_encoder.blocks.0"):
            z, result = (
                gqa.model.run_with_hooks(gqa.inputs, fwd_hooks=[(f"{prefix}.attn.hook_{name}", zero)])
                for name in ("z", "result")
            )
            assert gqa.difference(z, result) <= 1e-5


def test_rotated_query_is_the_query_rotated_by_its_position(gqa: Pair) -> None:
    _, cache = gqa.model.run_with_cache(gqa.inputs)
    half = gqa.model.cfg.d_head // 2
    row, n = 2, int(gqa.inputs.attention_mask[2].sum())
    for before, after in (("q", "rot_q"), ("k", "rot_k")):
        x, turned = cache[before, 1][row, -n:], cache[after, 1][row, -n:]
        angles = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        as_complex = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(1)
        expected = torch.cat((as_complex.real, as_complex.imag), dim=-1)
        torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)


# -- split inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_a_split_input_feeds_one_head_alone(gqa: Pair, letter: str) -> None:
    model, inputs = gqa.model, gqa.inputs
    name, edit = f"blocks.1.attn.hook_{letter}_input", torch.randn(32)
    seen: dict[str, Tensor] = {}

    def add(x: Tensor, hook) -> Tensor:
        assert x.shape[2:] == ((4, 32) if letter == "q" else (2, 32))
        x[:, :, 1] += edit
        return x

    def keep(x: Tensor, hook) -> None:
        seen[hook.name] = x

    _, clean = model.run_with_cache(inputs)
    watched = [(f"blocks.1.attn.hook_{other}", keep) for other in "qkv"]
    with torch.no_grad():
        model.run_with_hooks(inputs, fwd_hooks=[(name, add), *watched])
    for other in "qkv":
        before, after = clean[other, 1].clone(), seen[f"blocks.1.attn.hook_{other}"]
        if other == letter:
            resid = clean["resid_pre", 1] + edit
            scale = (resid.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
            weight = getattr(model, f"W_{letter.upper()}")[1, 1]
            before[:, :, 1] = (resid / scale * model.blocks[1].ln1.weight) @ weight
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_split_inputs_change_neither_logits_nor_gradients(gqa: Pair) -> None:
    model = gqa.model
    answered = tiny.mixed_batch(model, ["red", "two", "no"])
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    loss, cache = model.run_with_cache(answered, names_filter=names, incl_bwd=True, return_type="loss")
    split_names = [f"blocks.1.attn.hook_{letter}_input" for letter in "qkv"]
    try:
        model.set_use_split_qkv_input(True)
        assert model.cfg.use_split_qkv_input
        with_split, split = model.run_with_cache(
            answered, names_filter=[*names, *split_names], incl_bwd=True, return_type="loss"
        )
        assert set(split_names) <= set(model.run_with_cache(answered)[1])
    finally:
        model.set_use_split_qkv_input(False)
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(with_split, loss)
    for name in names:
        torch.testing.assert_close(split[f"{name}_grad"], cache[f"{name}_grad"], atol=1e-6, rtol=1e-4)
    # What reaches the block's input flows over the heads' own inputs and the skip path.
    to_heads = sum(split[f"{name}_grad"].sum(2) for name in split_names)
    mid_name = "blocks.1.hook_resid_mid"
    _, mid = model.run_with_cache(answered, names_filter=[mid_name], incl_bwd=True, return_type="loss")
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(
        to_heads + mid[f"{mid_name}_grad"], cache[f"{names[1]}_grad"], atol=1e-6, rtol=1e-4
    )


# -- against forward hooks on Hugging Face's modules ---------------------------------------------

# Our hook → Hugging Face's module, and whether the hook is at its output or its input.
DECODER_SITES = {
    "attn.hook_q": ("self_attn.q_proj", "output"),
    "attn.hook_k": ("self_attn.k_proj", "output"),
    "attn.hook_v": ("self_attn.v_proj", "output"),
    "attn.hook_z": ("self_attn.o_proj", "input"),
    "hook_attn_out": ("self_attn.o_proj", "output"),
    "hook_resid_pre": ("", "input"),
    "hook_resid_post": ("", "output"),
    "mlp.hook_pre": ("mlp.gate_proj", "output"),
    "mlp.hook_pre_linear": ("mlp.up_proj", "output"),
    "mlp.hook_post": ("mlp.down_proj", "input"),
    "hook_mlp_out": ("mlp.down_proj", "output"),
}
VISION_SITES = {
    "attn.hook_q": ("self_attn.q_proj", "output"),
    "attn.hook_k": ("self_attn.k_proj", "output"),
    "attn.hook_v": ("self_attn.v_proj", "output"),
    "attn.hook_z": ("self_attn.out_proj", "input"),
    "hook_attn_out": ("self_attn.out_proj", "output"),
    # Hugging Face keeps hidden states before a hook on the layer sees them; the sum's last term will do.
    "hook_resid_post": ("mlp.fc2", "output"),
    "mlp.hook_pre": ("mlp.fc1", "output"),
    "mlp.hook_post": ("mlp.fc2", "input"),
    "hook_mlp_out": ("mlp.fc2", "output"),
}
OTHER_SITES = {
    "hook_text_embed": ("model.language_model.embed_tokens", "output"),
    "hook_image_embed": ("model.multi_modal_projector", "output"),
    "vision_projector.hook_in": ("model.multi_modal_projector", "input"),
    "vision_projector.hook_out": ("model.multi_modal_projector", "output"),
    "vision_encoder.hook_embed": ("model.vision_tower.pre_layrnorm", "input"),
}


@contextmanager
def hf_edited(hf, path: str, where: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    module = hf.get_submodule(path)

    def at_input(module, args, kwargs):
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    if where == "input":
        handle = module.register_forward_pre_hook(at_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(lambda module, args, out: edit(out))
    try:
        yield
    finally:
        handle.remove()


def check_against_hf(pair: Pair, name: str, path: str, where: str) -> None:
    """The same noise, by our hook and by a hook of Hugging Face's module."""
    noise: dict[str, Tensor] = {}

    def ours(x: Tensor, hook) -> Tensor:
        noise["it"] = 0.5 * torch.randn(x.shape)
        return x + noise["it"]

    with torch.no_grad():
        clean = pair.model(pair.inputs)
        found = pair.model.run_with_hooks(pair.inputs, fwd_hooks=[(name, ours)])
        with hf_edited(pair.hf, path, where, lambda x: x + noise["it"].reshape(x.shape)):
            expected = pair.hf(**pair.inputs.to_hf()).logits
    assert pair.difference(found, expected) <= 5e-5, name
    assert pair.difference(clean, expected) >= 1e-3, name


@pytest.mark.parametrize("name", DECODER_SITES)
def test_decoder_edits_are_those_of_hf(pair: Pair, name: str) -> None:
    path, where = DECODER_SITES[name]
    for layer in range(2):
        module = f"model.language_model.layers.{layer}.{path}".rstrip(".")
        check_against_hf(pair, f"blocks.{layer}.{name}", module, where)


@pytest.mark.parametrize("name", VISION_SITES)
def test_vision_edits_are_those_of_hf(llava: Pair, name: str) -> None:
    path, where = VISION_SITES[name]
    for layer in range(2):
        module = f"model.vision_tower.encoder.layers.{layer}.{path}".rstrip(".")
        check_against_hf(llava, f"vision_encoder.blocks.{layer}.{name}", module, where)


@pytest.mark.parametrize("name", OTHER_SITES)
def test_embedding_edits_are_those_of_hf(llava: Pair, name: str) -> None:
    check_against_hf(llava, name, *OTHER_SITES[name])


NORMS = {
    "blocks.1.ln1": "model.language_model.layers.1.input_layernorm",
    "blocks.1.ln2": "model.language_model.layers.1.post_attention_layernorm",
    "ln_final": "model.language_model.norm",
    "vision_encoder.ln_pre": "model.vision_tower.pre_layrnorm",
    "vision_encoder.blocks.0.ln1": "model.vision_tower.encoder.layers.0.layer_norm1",
    "vision_encoder.blocks.1.ln2": "model.vision_tower.encoder.layers.1.layer_norm2",
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_edits_are_those_of_hf(llava: Pair, name: str) -> None:
    """normalized is before the weight; a scale twice as large halves what is normalised."""
    module = llava.hf.get_submodule(NORMS[name])
    bias = getattr(module, "bias", torch.zeros(()))
    factor = 2.0

    def larger(x: Tensor, hook) -> Tensor:
        return x * factor

    def moved(x: Tensor, hook) -> Tensor:
        return x + 1

    edits = {
        f"{name}.hook_scale": (larger, lambda out: (out - bias) / factor + bias),
        f"{name}.hook_normalized": (moved, lambda out: out + module.weight),
    }
    for hook_name, (ours, theirs) in edits.items():
        with torch.no_grad():
            found = llava.model.run_with_hooks(llava.inputs, fwd_hooks=[(hook_name, ours)])
            with hf_edited(llava.hf, NORMS[name], "output", theirs):
                expected = llava.hf(**llava.inputs.to_hf()).logits
        assert llava.difference(found, expected) <= 5e-5, hook_name


def test_the_pattern_is_that_of_hf(gqa: Pair) -> None:
    gqa.hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            theirs = gqa.hf(**gqa.inputs.to_hf(), output_attentions=True).attentions
    finally:
        gqa.hf.set_attn_implementation("sdpa")
    _, cache = gqa.model.run_with_cache(gqa.inputs)
    tokens = gqa.inputs.attention_mask.bool()
    for layer in range(3):
        difference = (cache["pattern", layer] - theirs[layer]).transpose(1, 2)[tokens]
        assert difference.abs().max() <= 1e-5


# -- names and filters that are wrong ------------------------------------------------------------


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


# -- caches --------------------------------------------------------------------------------------


def test_the_unfiltered_cache_holds_all_but_the_costly(pair: Pair) -> None:
    logits, cache = pair.model.run_with_cache(pair.inputs)
    expected = {name for name in pair.model.hook_dict if not name.endswith(COSTLY)}
    assert set(cache) == expected
    assert not any(value.requires_grad for value in cache.values())
    assert pair.difference(logits, pair.model(pair.inputs)) <= 2e-5


def test_shapes(gqa: Pair) -> None:
    _, cache = gqa.model.run_with_cache(gqa.inputs)
    _, costly = gqa.model.run_with_cache(gqa.inputs, names_filter=lambda name: name.endswith(COSTLY))
    n, images = gqa.inputs.input_ids.shape[1], 3
    decoder = {
        "attn.hook_q": (3, n, 4, 8),
        "attn.hook_k": (3, n, 2, 8),
        "attn.hook_v": (3, n, 2, 8),
        "attn.hook_rot_q": (3, n, 4, 8),
        "attn.hook_rot_k": (3, n, 2, 8),
        "attn.hook_attn_scores": (3, 4, n, n),
        "attn.hook_pattern": (3, 4, n, n),
        "attn.hook_z": (3, n, 4, 8),
        "hook_attn_out": (3, n, 32),
        "hook_resid_mid": (3, n, 32),
        "mlp.hook_pre": (3, n, 40),
        "mlp.hook_pre_linear": (3, n, 40),
        "mlp.hook_post": (3, n, 40),
        "ln1.hook_scale": (3, n, 1),
        "ln2.hook_normalized": (3, n, 32),
    }
    vision = {
        "attn.hook_q": (images, 17, 3, 8),
        "attn.hook_pattern": (images, 3, 17, 17),
        "mlp.hook_post": (images, 17, 36),
        "hook_resid_post": (images, 17, 24),
    }
    assert (
        costly["blocks.2.attn.hook_result"].shape
        == costly["blocks.2.attn.hook_q_input"].shape
        == (3, n, 4, 32)
    )
    assert (
        costly["blocks.2.attn.hook_k_input"].shape
        == costly["blocks.2.attn.hook_v_input"].shape
        == (3, n, 2, 32)
    )
    assert costly["vision_encoder.blocks.1.attn.hook_result"].shape == (images, 17, 3, 24)
    for name, shape in decoder.items():
        assert cache[f"blocks.2.{name}"].shape == shape, name
    for name, shape in vision.items():
        assert cache[f"vision_encoder.blocks.1.{name}"].shape == shape, name
    assert cache["vision_projector.hook_in"].shape == (images, 16, 48)
    assert cache["hook_image_embed"].shape == (images, 16, 32)


def test_filters(model: HookedVLM, inputs: VLMInputs) -> None:
    z = "blocks.1.attn.hook_z"
    _, everything = model.run_with_cache(inputs)
    _, one = model.run_with_cache(inputs, names_filter=z)
    _, two = model.run_with_cache(inputs, names_filter=[z, "hook_image_embed"])
    _, some = model.run_with_cache(inputs, names_filter=lambda name: name.endswith("attn.hook_z"))
    assert set(one) == {z}
    assert set(two) == {z, "hook_image_embed"}
    places = [f"blocks.{i}" for i in range(3)] + [f"vision_encoder.blocks.{i}" for i in range(2)]
    assert set(some) == {f"{place}.attn.hook_z" for place in places}
    for cache in (one, two, some):
        torch.testing.assert_close(cache[z], everything[z], atol=1e-6, rtol=1e-5)
    assert not model.list_hooks()


def test_the_cache_of_text_alone_has_no_vision(model: HookedVLM) -> None:
    _, cache = model.run_with_cache(model.prepare(None, "is it red?"))
    assert not [name for name in cache if "vision" in name or "image" in name]
    assert "blocks.2.hook_resid_post" in cache


def test_nothing_is_computed_that_nobody_asked_for(model: HookedVLM, inputs: VLMInputs) -> None:
    ran: set[str] = set()
    handles = [
        point.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, point in model.hook_dict.items()
    ]
    try:
        model.run_with_cache(inputs, names_filter="blocks.1.attn.hook_pattern")
    finally:
        for handle in handles:
            handle.remove()
    costly = {name for name in ran if name.endswith((*COSTLY, *BY_HEAD_PAIR))}
    assert costly == {"blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"}


@pytest.mark.parametrize("cut", [-1, (2, 9), [0, 3, -2], slice(None, None, 5)])
def test_pos_slice(gqa: Pair, cut) -> None:
    model, inputs = gqa.model, gqa.inputs
    _, whole = model.run_with_cache(inputs)
    _, part = model.run_with_cache(inputs, pos_slice=cut)
    index = [cut] if isinstance(cut, int) else slice(*cut) if isinstance(cut, tuple) else cut
    for name in whole:
        if name.startswith("vision") or name == "hook_image_embed":
            expected = whole[name]
        elif name.endswith(BY_HEAD_PAIR):
            expected = whole[name][:, :, index]
        else:
            expected = whole[name][:, index]
        assert torch.equal(part[name], expected), name


def test_remove_batch_dim(model: HookedVLM, inputs: VLMInputs) -> None:
    one = inputs[0]
    _, with_batch = model.run_with_cache(one)
    _, without = model.run_with_cache(one, remove_batch_dim=True)
    assert with_batch.has_batch_dim and not without.has_batch_dim
    for name in with_batch:
        assert torch.equal(without[name], with_batch[name][0]), name
    with pytest.raises(ValueError, match=r"can't remove the batch axis of \S+: its size is 3"):
        model.run_with_cache(inputs, remove_batch_dim=True)
    assert not model.list_hooks()


def test_remove_batch_dim_of_a_row_with_two_images(model: HookedVLM, inputs: VLMInputs) -> None:
    two = inputs[1]
    _, with_batch = model.run_with_cache(two)
    _, without = model.run_with_cache(two, remove_batch_dim=True)
    for name in with_batch:
        by_image = name.startswith("vision") or name == "hook_image_embed"
        assert torch.equal(without[name], with_batch[name] if by_image else with_batch[name][0]), name


def test_cached_values_are_those_after_the_hooks(model: HookedVLM, inputs: VLMInputs) -> None:
    name = "blocks.1.hook_mlp_out"
    with model.hooks([(name, lambda x, hook: torch.zeros_like(x))]):
        _, cache = model.run_with_cache(inputs)
    assert (cache[name] == 0).all()
    assert torch.equal(cache["resid_post", 1], cache["resid_mid", 1])


def test_cached_gradients_are_those_of_autograd(gqa: Pair) -> None:
    """Against Hugging Face's loss and its modules, by gradients of tensors that autograd keeps."""
    answered = tiny.mixed_batch(gqa.model, ["red", "two", "no"])
    sites = {
        "blocks.0.hook_resid_pre": ("model.language_model.layers.0", "input"),
        "blocks.1.attn.hook_z": ("model.language_model.layers.1.self_attn.o_proj", "input"),
        "blocks.2.mlp.hook_post": ("model.language_model.layers.2.mlp.down_proj", "input"),
        "vision_encoder.blocks.0.mlp.hook_post": ("model.vision_tower.encoder.layers.0.mlp.fc2", "input"),
        "hook_image_embed": ("model.multi_modal_projector", "output"),
    }
    loss, cache = gqa.model.run_with_cache(
        answered, names_filter=list(sites), incl_bwd=True, return_type="loss"
    )
    gqa.model.zero_grad(set_to_none=True)
    labels = answered.input_ids.masked_fill(~answered.answer_mask, -100)
    for name, (path, where) in sites.items():
        kept: list[Tensor] = []

        def keep(x: Tensor, kept=kept) -> Tensor:
            kept.append(x)
            return x

        with hf_edited(gqa.hf, path, where, keep):
            their_loss = gqa.hf(**answered.to_hf(), labels=labels).loss
        torch.testing.assert_close(loss, their_loss)
        (expected,) = torch.autograd.grad(their_loss, kept)
        found = cache[f"{name}_grad"]
        torch.testing.assert_close(found.reshape(expected.shape), expected, atol=1e-6, rtol=1e-3)
        assert expected.abs().max() > 1e-4


def test_every_gradient_can_be_cached(pair: Pair) -> None:
    answered = pair.answered
    _, cache = pair.model.run_with_cache(answered, incl_bwd=True, return_type="loss")
    pair.model.zero_grad(set_to_none=True)
    names = [name for name in cache if not name.endswith("_grad")]
    assert {f"{name}_grad" for name in names} < set(cache)
    for name in names:
        assert cache[f"{name}_grad"].shape == cache[name].shape, name


def test_a_gradient_edited_on_its_way(gqa: Pair) -> None:
    """A backward hook that stops the gradient at one block leaves the embedding without any."""
    answered = tiny.mixed_batch(gqa.model, ["red", "two", "no"])
    grads: list[Tensor] = []
    hooks = [
        ("blocks.1.hook_resid_pre", lambda grad, hook: torch.zeros_like(grad)),
        ("blocks.0.hook_resid_pre", lambda grad, hook: grads.append(grad)),
    ]
    with gqa.model.hooks(bwd_hooks=hooks):
        gqa.model(answered, return_type="loss").backward()
    gqa.model.zero_grad(set_to_none=True)
    assert len(grads) == 1 and (grads[0] == 0).all()
    assert not gqa.model.list_hooks()


# -- generation ----------------------------------------------------------------------------------


def without_head(x: Tensor, hook) -> Tensor:
    x = x.clone()
    x[:, :, 1] = 0
    return x


GENERATION_HOOKS = {
    "head": [("blocks.1.attn.hook_z", without_head)],
    "pattern": [("blocks.0.attn.hook_pattern", lambda x, hook: x.square() * 3)],
    "residual": [("blocks.0.hook_resid_mid", lambda x, hook: x + torch.linspace(-1, 1, 32))],
    "embeddings": [("hook_text_embed", lambda x, hook: x * 1.5), ("hook_embed", lambda x, hook: x.flip(-1))],
    "keys": [("blocks.1.attn.hook_rot_k", lambda x, hook: x.flip(-1))],
    "neurons and image": [
        (lambda name: name.endswith("mlp.hook_post"), lambda x, hook: x * torch.linspace(0, 2, x.shape[-1])),
        ("hook_image_embed", lambda x, hook: x.flip(1)),
    ],
}


@pytest.mark.parametrize("kind", GENERATION_HOOKS)
def test_generation_under_hooks_is_the_naive_loop(gqa: Pair, kind: str) -> None:
    model, inputs, hooks = gqa.model, gqa.inputs, GENERATION_HOOKS[kind]
    n = 5
    free = model.generate(inputs, n, "tokens")
    tokens = inputs.input_ids[:, :0]
    with torch.no_grad():
        for _ in range(n):
            logits = model.run_with_hooks(inputs.extended(tokens), fwd_hooks=hooks)
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    assert not torch.isin(tokens, torch.tensor(model.cfg.eos_token_ids)).any()
    assert not torch.equal(tokens, free), "the hook is too weak to show"
    for use_kv_cache in (True, False):
        with model.hooks(hooks):
            assert torch.equal(model.generate(inputs, n, "tokens", use_kv_cache), tokens)


def test_generation_under_hooks_is_that_of_hf(gqa: Pair) -> None:
    def zeroed(z: Tensor) -> Tensor:
        z = z.clone()
        z[..., 8:16] = 0
        return z

    with hf_edited(gqa.hf, "model.language_model.layers.1.self_attn.o_proj", "input", zeroed):
        expected = gqa.hf.generate(**gqa.inputs.to_hf(), max_new_tokens=6, do_sample=False)
    with gqa.model.hooks([("blocks.1.attn.hook_z", without_head)]):
        found = gqa.model.generate(gqa.inputs, 6, "tokens")
    assert torch.equal(found, expected[:, gqa.inputs.input_ids.shape[1] :])


def test_hooks_are_called_at_every_step(model: HookedVLM, inputs: VLMInputs) -> None:
    widths: list[int] = []
    with model.hooks([("blocks.1.attn.hook_z", lambda x, hook: widths.append(x.shape[1]))]):
        assert model.generate(inputs, 4, "tokens").shape == (3, 4)
    n = inputs.input_ids.shape[1]
    assert widths == [n, 1, 1, 1]
    widths.clear()
    with model.hooks([("blocks.1.attn.hook_z", lambda x, hook: widths.append(x.shape[1]))]):
        model.generate(inputs, 4, "tokens", use_kv_cache=False)
    assert widths == [n, n + 1, n + 2, n + 3]


def test_loss_is_that_of_the_hooked_logits(model: HookedVLM) -> None:
    answered = tiny.mixed_batch(model, ["red", "two", "no"])
    hooks = [("blocks.1.attn.hook_z", without_head)]
    with torch.no_grad():
        logits = model.run_with_hooks(answered, fwd_hooks=hooks)
        loss = model.run_with_hooks(answered, fwd_hooks=hooks, return_type="loss")
    asked = answered.answer_mask[:, 1:]
    expected = F.nll_loss(logits[:, :-1][asked].log_softmax(-1), answered.input_ids[:, 1:][asked])
    torch.testing.assert_close(loss, expected)
