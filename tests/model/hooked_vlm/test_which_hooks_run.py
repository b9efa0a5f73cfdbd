"""Hooks and filters from any iterable run; those that can't run raise, whichever way they were added."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import pytest
import torch
from helpers.hooked_pairs import Pair, hf_edited, identity, trainable
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from hones_lens import HookedVLM, VLMInputs

POST = "blocks.1.mlp.hook_post"
HF_POST = "model.language_model.layers.1.mlp.down_proj"
OF_ITERABLES: list[Callable[[list], Iterable]] = [list, tuple, iter, lambda x: (item for item in x)]


def halve(x: Tensor, hook: object) -> Tensor:
    return x / 2


def half_of_hf(pair: Pair) -> Tensor:
    with torch.no_grad(), hf_edited(pair.hf, HF_POST, "input", lambda x: x / 2):
        return pair.hf(**pair.inputs.to_hf()).logits


@pytest.mark.parametrize("of", OF_ITERABLES)
def test_forward_hooks_of_any_iterable(gqa: Pair, of: Callable[[list], Iterable]) -> None:
    expected = half_of_hf(gqa)
    model, inputs = gqa.model, gqa.inputs
    with torch.no_grad():
        run = model.run_with_hooks(inputs, fwd_hooks=of([(POST, halve)]))
        zipped = model.run_with_hooks(inputs, fwd_hooks=zip([POST], [halve], strict=True))
        several = model.run_with_hooks(inputs, fwd_hooks=of([(of([POST]), halve)]))
        with model.hooks(of([(POST, halve)])):
            within = model(inputs)
        bound = model.bind(inputs).run_with_hooks(inputs.input_ids, fwd_hooks=of([(POST, halve)]))
    for actual in (run, zipped, several, within, bound):
        assert gqa.difference(actual, expected) <= 5e-5


def test_lasting_hooks_at_several_names(gqa: Pair) -> None:
    try:
        gqa.model.add_hook((name for name in [POST]), halve)
        assert gqa.difference(gqa.model(gqa.inputs), half_of_hf(gqa)) <= 5e-5
    finally:
        gqa.model.reset_hooks()


@pytest.mark.parametrize("of", OF_ITERABLES)
def test_backward_hooks_of_any_iterable(gqa: Pair, of: Callable[[list], Iterable]) -> None:
    seen: list[Tensor] = []
    with gqa.model.hooks(bwd_hooks=of([(POST, lambda grad, hook: seen.append(grad))])):
        gqa.model(gqa.answered, return_type="loss").backward()
    kept: list[Tensor] = []
    with hf_edited(gqa.hf, HF_POST, "input", lambda x: kept.append(x) or x):
        labels = gqa.answered.input_ids.masked_fill(~gqa.answered.answer_mask, -100)
        (expected,) = torch.autograd.grad(gqa.hf(**gqa.answered.to_hf(), labels=labels).loss, kept)
    gqa.model.zero_grad(set_to_none=True)
    torch.testing.assert_close(seen, [expected], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("of", [*OF_ITERABLES, set, dict.fromkeys])
def test_filters_of_any_iterable(gqa: Pair, of: Callable[[list], Iterable]) -> None:
    model, inputs = gqa.model, gqa.inputs
    names = [POST, "hook_image_embed"]
    _, everything = model.run_with_cache(inputs)
    _, cache = model.run_with_cache(inputs, names_filter=of(names))
    store, fwd_hooks, _ = model.get_caching_hooks(of(names))
    model.run_with_hooks(inputs, fwd_hooks=fwd_hooks)
    try:
        lasting = model.add_caching_hooks(of(names))
        model(inputs)
    finally:
        model.reset_hooks()
    for found in (cache, store, lasting):
        assert set(found) == set(names)
        for name in names:
            torch.testing.assert_close(found[name], everything[name], atol=5e-5, rtol=1e-5)


def test_caching_hooks_refuse_what_does_not_exist(model: HookedVLM) -> None:
    for get in (model.get_caching_hooks, model.add_caching_hooks):
        with pytest.raises(ValueError, match=r"no hook 'blocks\.9\.hook_resid_pre'"):
            get([POST, "blocks.9.hook_resid_pre"])
        with pytest.raises(ValueError, match="matches no hook"):
            get(lambda name: "blocks.9." in name)
        with pytest.raises(ValueError, match="filter is empty"):
            get(iter(()))
    assert not model.list_hooks()


# -- hooks that never ran --------------------------------------------------------------------------


def in_vision(name: str) -> bool:
    return name.startswith("vision")


def cheap_in_vision(name: str) -> bool:
    return name.startswith("vision") and "attn." not in name


def test_a_predicate_whose_hooks_never_ran_raises(model: HookedVLM) -> None:
    text = model.prepare(None, "is it red?")
    because = r"never did: vision_\S+, .* and \d+ more; the inputs have no pictures"
    with pytest.raises(RuntimeError, match=because):
        model.run_with_hooks(text, fwd_hooks=[(in_vision, identity)])
    with pytest.raises(RuntimeError, match=because):
        model.run_with_cache(text, names_filter=cheap_in_vision)
    store, fwd_hooks, _ = model.get_caching_hooks(cheap_in_vision)
    with pytest.raises(RuntimeError, match=because), model.hooks(fwd_hooks):
        model(text)
    assert not store and not model.list_hooks()
    _, cache = model.run_with_cache(text, names_filter=lambda name: name.endswith("attn.hook_z"))
    assert set(cache) == {f"blocks.{layer}.attn.hook_z" for layer in range(3)}  # one that runs is enough


def test_caching_hooks_by_name_that_never_ran_raise(model: HookedVLM) -> None:
    text = model.prepare(None, "is it red?")
    _, fwd_hooks, _ = model.get_caching_hooks([POST, "vision_projector.hook_out"])
    with pytest.raises(RuntimeError, match=r"never did: vision_projector\.hook_out; the inputs have no pict"):
        model.run_with_hooks(text, fwd_hooks=fwd_hooks)
    store, fwd_hooks, _ = model.get_caching_hooks()
    model.run_with_hooks(text, fwd_hooks=fwd_hooks)
    assert POST in store and not any(map(in_vision, store))


def test_backward_hooks_that_never_ran_raise(model: HookedVLM, gqa: Pair) -> None:
    inputs, text = gqa.inputs, model.prepare(None, "is it red?")
    never = r"these backward hooks never did: {}"
    with pytest.raises(RuntimeError, match=never.format(r"vision_projector\.hook_out; the inputs have no p")):
        model.run_with_hooks(text, bwd_hooks=[("vision_projector.hook_out", identity)])
    with pytest.raises(RuntimeError, match=never.format("vision_")):
        model.run_with_hooks(text, bwd_hooks=[(in_vision, identity)])
    with torch.no_grad(), pytest.raises(RuntimeError, match=never.format(rf"{re.escape(POST)}; no gradient")):
        model.run_with_hooks(inputs, bwd_hooks=[(POST, identity)])
    resid = model(inputs, stop_at_layer=1)
    hooks = [("blocks.0.hook_resid_post", identity), (POST, identity)]
    with pytest.raises(
        RuntimeError, match=never.format(r"blocks\.0\.hook_resid_post; only blocks 1 … 2 ran")
    ):
        model.run_with_hooks(resid, start_at_layer=1, inputs=inputs, bwd_hooks=hooks)
    with (
        pytest.raises(RuntimeError, match=never.format(re.escape("blocks.2.hook_mlp_out"))),
        model.hooks(bwd_hooks=[(POST, identity), ("blocks.2.hook_mlp_out", identity)]),
    ):
        model(inputs)  # runs both, but only the first gets a gradient
        model(inputs, stop_at_layer=2).sum().backward()
    model.zero_grad(set_to_none=True)
    assert not model.list_hooks()


def test_backward_hooks_of_a_run_serve_its_backward_pass_after_it(gqa: Pair) -> None:
    seen: list[Tensor] = []
    hooks = [(POST, lambda grad, hook: seen.append(grad))]
    loss = gqa.model.run_with_hooks(gqa.answered, bwd_hooks=hooks, return_type="loss")
    assert not gqa.model.list_hooks()
    loss.backward()
    with trainable(gqa.model.embed.weight):
        gqa.model(gqa.answered, return_type="loss").backward()  # a run without hooks
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["vision_projector.hook_out", "vision_encoder.blocks.0.attn.hook_z"])
def test_vision_hooks_say_that_pictures_were_encoded_before(gqa: Pair, name: str) -> None:
    encoded = gqa.model.with_image_embeds(gqa.inputs)
    because = rf"never did: {name}; the pictures were encoded before \(image_embeds\)"
    with pytest.raises(RuntimeError, match=because):
        gqa.model.run_with_hooks(encoded, fwd_hooks=[(name, identity)])
    gqa.model.run_with_hooks(encoded, fwd_hooks=[("hook_image_embed", identity)])


def test_blocks_that_were_skipped_are_named(model: HookedVLM, inputs: VLMInputs) -> None:
    with pytest.raises(RuntimeError, match=r"never did: blocks\.2\.hook_resid_pre; only blocks 0 … 1 ran"):
        model.run_with_hooks(inputs, stop_at_layer=2, fwd_hooks=[("blocks.2.hook_resid_pre", identity)])


# -- what stays behind, and other modules ----------------------------------------------------------


def test_hooks_that_stay_are_the_users_alone(gqa: Pair) -> None:
    model, inputs = gqa.model, gqa.inputs
    try:
        first = model.run_with_hooks(inputs, fwd_hooks=[(POST, halve)], reset_hooks_end=False)
        kept = model.list_hooks()
        assert {name: [handle.user_hook for handle in handles] for name, handles in kept.items()} == {
            POST: [halve]
        }
        assert torch.equal(model(inputs), first)
        model.run_with_hooks(inputs, fwd_hooks=[("hook_embed", identity)])
        assert torch.equal(model(inputs), first)
    finally:
        model.reset_hooks()
    assert not model.list_hooks()


class Autoencoder(nn.Module):
    """A stand-in for an SAE: another module in a hook point's place, with a hook point of its own."""

    def __init__(self, d: int):
        super().__init__()
        self.encode, self.decode = nn.Linear(d, 5), nn.Linear(5, d)
        self.hook_features = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.hook_features(self.encode(x).relu()))


@pytest.mark.parametrize(
    "place, hf_place, where",
    [
        ("blocks.1.mlp.hook_post", HF_POST, "input"),
        ("blocks.1.attn.hook_z", "model.language_model.layers.1.self_attn.o_proj", "input"),
        ("blocks.2.hook_resid_pre", "model.language_model.layers.2", "input"),
        ("hook_image_embed", "model.multi_modal_projector", "output"),
        ("blocks.0.attn.hook_q", "model.language_model.layers.0.self_attn.q_proj", "output"),
    ],
)
@torch.no_grad()
def test_a_module_in_the_place_of_a_hook_point(place: str, hf_place: str, where: str) -> None:
    pair = Pair("gqa")
    model, inputs = pair.model, pair.inputs
    _, cache = model.run_with_cache(inputs, names_filter=place)
    sae = Autoencoder(cache[place].shape[-1])
    parent, _, last = place.rpartition(".")
    setattr(model.get_submodule(parent), last, sae)

    def in_place_of(x: Tensor) -> Tensor:
        return sae(x.view(*x.shape[:-1], -1, sae.encode.in_features)).view(x.shape)

    with hf_edited(pair.hf, hf_place, where, in_place_of):
        expected = pair.hf(**inputs.to_hf()).logits
    assert pair.difference(model(inputs), expected) <= 1e-4

    with pytest.raises(RuntimeError, match=r"another module is in the place of \S+: .* model\.setup\(\)"):
        model.run_with_hooks(inputs, fwd_hooks=[(place, identity)])
    model.setup()
    features = f"{place}.hook_features"
    _, cache = model.run_with_cache(inputs, names_filter=[features])
    assert cache[features].shape[-1] == 5
    silenced = model.run_with_hooks(inputs, fwd_hooks=[(features, lambda x, hook: 0 * x)])
    sae.encode.weight.zero_()
    sae.encode.bias.zero_()
    assert pair.difference(silenced, model(inputs)) <= 1e-5


def test_attention_scores_and_pattern_by_another_module() -> None:
    """Places that are only computed when somebody is there."""
    pair = Pair("gqa")
    model, inputs = pair.model, pair.inputs
    with torch.no_grad():
        doubled = model.run_with_hooks(
            inputs, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: 2 * x)]
        )
        model.blocks[1].attn.hook_pattern = Doubled()
        assert pair.difference(model(inputs), doubled) <= 5e-5


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


# -- what a hook is given, and what it may return --------------------------------------------------


def test_the_layer_of_a_hook(pair: Pair) -> None:
    layers: dict[str, int] = {}

    def note(x: Tensor, hook: HookPoint) -> None:
        layers[str(hook.name)] = hook.layer()

    pair.model.run_with_hooks(pair.inputs, fwd_hooks=[(lambda name: "blocks." in name, note)])
    assert layers["vision_encoder.blocks.1.attn.hook_z"] == 1 and layers["blocks.0.hook_resid_pre"] == 0
    assert all(layer == int(name.split("blocks.")[1].split(".")[0]) for name, layer in layers.items())
    for name in ("hook_embed", "ln_final.hook_scale", "vision_projector.hook_out"):
        with pytest.raises(ValueError, match=f"{name} belongs to no layer"):
            pair.model.hook_dict[name].layer()


def test_float32_is_cast_in_a_bfloat16_model() -> None:
    pair = Pair("gqa")
    hf, model = pair.hf.to(torch.bfloat16), pair.model.to(torch.bfloat16)
    inputs = model.as_inputs(pair.inputs)
    with torch.no_grad():
        for name in model.hook_dict:
            model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: x.float() * 1.01)])
        actual = model.run_with_hooks(inputs, fwd_hooks=[(POST, lambda x, hook: x.float() / 3)])
        with hf_edited(hf, HF_POST, "input", lambda x: (x.float() / 3).to(x.dtype)):
            expected = hf(**inputs.to_hf()).logits
    assert actual.dtype == torch.float32  # logits alone, whatever the model's type
    assert pair.difference(actual.float(), expected.float()) <= 0.04 * expected.abs().max()


def test_gradients_are_cast_in_a_bfloat16_model() -> None:
    model = Pair("gqa").model.to(torch.bfloat16)
    inputs, grads = model.prepare(None, "is it red?"), []
    hooks = [
        (POST, lambda grad, hook: grad.float() * 0),
        ("blocks.1.mlp.hook_pre", lambda g, hook: grads.append(g)),
    ]
    with model.hooks(bwd_hooks=hooks):
        model(inputs).sum().backward()
    assert grads[0].dtype == torch.bfloat16 and not grads[0].any()


def test_a_hook_that_returns_no_tensor_raises(model: HookedVLM, inputs: VLMInputs) -> None:
    with pytest.raises(
        TypeError, match=rf"the hook at {re.escape(POST)} returned float; valid: a tensor, or None"
    ):
        model.run_with_hooks(inputs, fwd_hooks=[(POST, lambda x, hook: 0.0)])


# -- edits in place where a gradient is kept -------------------------------------------------------


@pytest.mark.exhaustive
def test_an_edit_in_place_and_a_cached_gradient_at_every_point(pair: Pair) -> None:
    """The gradient is that of the same edit made on a copy, which autograd keeps without any hook of ours."""
    model, answered = pair.model, pair.answered
    weight = model.blocks[0].attn.o.weight

    def gradients(name: str, edit: Callable, *bwd: Callable) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []

        def edited(x: Tensor, hook: object) -> Tensor:
            kept.append(edit(x))
            return kept[0]

        with trainable(*model.parameters()), model.hooks([(name, edited)], [(name, hook) for hook in bwd]):
            loss = model(answered, return_type="loss")
            return torch.autograd.grad(loss, (kept[0], weight), allow_unused=True)

    for name in model.hook_dict:
        found: list[Tensor] = []
        expected = gradients(name, lambda x: x * 0.5)
        in_place = gradients(name, lambda x: x.mul_(0.5), lambda grad, hook, found=found: found.append(grad))
        torch.testing.assert_close(found, [expected[0]], atol=1e-5, rtol=1e-3, msg=name)
        torch.testing.assert_close(in_place, expected, atol=1e-5, rtol=1e-3, msg=name)


def test_a_gradient_edit_goes_on_through_the_forward_edit(gqa: Pair) -> None:
    """d(3x)/dx = 3 of a gradient that a backward hook halves, whatever the order of the two hooks."""
    model, answered = gqa.model, gqa.answered
    before: list[Tensor] = []
    watch = ("blocks.1.hook_mlp_out", lambda grad, hook: before.append(grad))
    tripled = ("blocks.1.hook_resid_post", lambda x, hook: x.mul_(3))
    halved = ("blocks.1.hook_resid_post", lambda grad, hook: grad / 2)
    for bwd_hooks in ([watch], [watch, halved]):
        with model.hooks([tripled], bwd_hooks):
            model(answered, return_type="loss").backward()
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(before[1], before[0] / 2)


@pytest.mark.parametrize(
    "changed", [lambda x: x[:1], lambda x: x[:, -1:], lambda x: x.mean(-1, keepdim=True), lambda x: x.sum()]
)
def test_another_shape_is_refused_not_broadcast(gqa: Pair, changed: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=rf"the hook at {re.escape(POST)} returned shape"):
        gqa.model.run_with_hooks(gqa.inputs, fwd_hooks=[(POST, lambda x, hook: changed(x))])
    hooks = [(POST, lambda x, hook: changed(x))]
    refused = pytest.raises(ValueError, match=rf"the hook at {re.escape(POST)} returned shape")
    with refused, gqa.model.hooks(bwd_hooks=hooks):
        gqa.model(gqa.answered, return_type="loss").backward()
