"""Attribution patching: exact where the model is linear, a derivative elsewhere; integrals add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from helpers import random_gemma, random_llava, random_qwen
from helpers.patching_pairs import (
    D_MLP,
    HEADS,
    KV_HEADS,
    LAYERS,
    cached,
    difference,
    effect,
    model_and_pairs,
    put,
    sides,
)
from torch import Tensor

from hones_lens import HookedVLM, VLMInputs
from hones_lens.analysis.patching.gradient import attribute_patching
from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.analysis.patching.sites import SITES
from hones_lens.results.statistics import mean_interval

FAMILIES = pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])
EITHER_WAY = pytest.mark.parametrize(
    ("made", "direction"),
    [(random_llava, "noise"), (random_qwen, "denoise"), (random_gemma, "noise")],
    ids=["llava-noise", "qwen-denoise", "gemma-noise"],
)
SIZES = {"head": HEADS, "kv_head": KV_HEADS, "neuron": D_MLP, None: 1}


@contextmanager
def linear(model: HookedVLM, inputs: VLMInputs, patterns_above: int = -1) -> Iterator[None]:
    """The model made linear around a run: norm scales, gates and patterns (of layers above one) are held."""

    def held(name: str) -> bool:
        if name.endswith(("attn.hook_pattern", "q_norm.hook_scale", "k_norm.hook_scale")):
            return name.startswith("blocks") and int(name.split(".")[1]) > patterns_above
        return name.startswith(("blocks", "ln_final")) and name.endswith(("hook_scale", "mlp.hook_pre"))

    def hold(value: Tensor) -> Callable:
        return lambda x, hook: value[:, -x.shape[1] :].clone()  # the final norm may see the end alone

    with torch.no_grad():
        cache = model.run_with_cache(inputs, names_filter=held)[1]
    with model.hooks(fwd_hooks=[(name, hold(cache[name])) for name in cache]):
        yield


def index(what: str, component: int) -> tuple:
    """Where a component lies in its activation."""
    whole = slice(None)
    if SITES[what].unit is None:
        return (whole,)
    if what == "neurons":
        return (..., component)
    return (whole, component) if what == "pattern" else (whole, whole, component)


def measured(
    model: HookedVLM, pairs: PatchPairs, what: str, direction: str, layer: int, components: range
) -> Tensor:
    """The effect of patching each component at all positions, [pair component]."""
    name, (base, source) = SITES[what].name(layer), sides(pairs, direction)
    theirs, without = cached(model, source, name), difference(model, pairs, base, [])
    hooks = [put(name, theirs, index(what, i)) for i in components]
    return torch.stack([difference(model, pairs, base, [hook]) - without for hook in hooks], dim=1)


def some_of(what: str) -> range:
    """Components to look at: all, but of neurons every fifth."""
    size = SIZES[SITES[what].unit]
    return range(0, size, 1 if size < D_MLP else 5)


def estimate(model: HookedVLM, pairs: PatchPairs, what: str, by: str = "all", **options) -> Tensor:
    """[pair layer component (group)], by pair, in one batch unless told otherwise."""
    options = {"direction": "noise", "by_pair": True, "progress": False} | options
    found = attribute_patching(model, pairs, what, by, **options)
    return found.values if SITES[what].unit else found.values.unsqueeze(2)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> None:
    """Within a share of the largest value, which is no rounding error."""
    largest = b.abs().max()
    assert largest > 1e-2, "nothing to see"
    assert (a - b).abs().max() < tolerance * largest


# -- exactness on a linear model -----------------------------------------------------------------------


@EITHER_WAY
@pytest.mark.parametrize(
    "what",
    [n for n, s in SITES.items() if n not in ("q", "k", "pattern") and not s.vision and s.layers is None],
)
def test_on_a_linear_model_it_is_the_measured_effect(made: ModuleType, what: str, direction: str) -> None:
    model, pairs = model_and_pairs(made)
    some = some_of(what)
    with linear(model, sides(pairs, direction)[0]):
        found = estimate(model, pairs, what, direction=direction)
        for layer in range(LAYERS):
            close(found[:, layer, some], measured(model, pairs, what, direction, layer, some))


@pytest.mark.exhaustive
@EITHER_WAY
@pytest.mark.parametrize("what", ["q", "k", "pattern"])
def test_where_only_the_softmax_bends_the_recomputed_one_is_exact(
    made: ModuleType, what: str, direction: str
) -> None:
    model, pairs = model_and_pairs(made)
    for layer in range(LAYERS):
        with linear(model, sides(pairs, direction)[0], patterns_above=layer):
            real = measured(model, pairs, what, direction, layer, some_of(what))
            close(estimate(model, pairs, what, direction=direction, layers=[layer])[:, 0], real)
            if what != "pattern":
                plain = estimate(model, pairs, what, direction=direction, layers=[layer], method="atp")[:, 0]
                assert (plain - real).abs().max() > 0.02 * real.abs().max()


@FAMILIES
@pytest.mark.parametrize("what", ["z", "q", "k", "neurons", "resid_mid"])
def test_groups_and_positions_are_patched_alone(made: ModuleType, what: str) -> None:
    model, pairs = model_and_pairs(made)
    one = pairs[[1]]
    layer, name = 1, SITES[what].name(1)
    masks = {"image": one.mask("image"), "rest": ~one.mask("image")}
    n = one.clean.input_ids.shape[1]
    masks |= {str(p): torch.arange(n)[None] == p for p in (4, 9, n - 1)}
    component = 0 if SITES[what].unit is None else 1
    with linear(model, one.clean, patterns_above=layer if what in "qk" else -1):
        theirs, ours = cached(model, one.corrupted, name), cached(model, one.clean, name)
        by_group = estimate(
            model, one, what, by="group", groups={"image": "image", "rest": masks["rest"]}, layers=[layer]
        )
        by_position = estimate(model, one, what, by="position", layers=[layer])
        for number, (place, mask) in enumerate(masks.items()):
            only = torch.where(mask.view(1, n, *[1] * (theirs.ndim - 2)), theirs, ours)
            real = effect(model, one, "noise", [put(name, only, index(what, component))])
            found = by_group[..., number] if number < 2 else by_position[..., int(place)]
            assert torch.allclose(found[:, 0, component], real, atol=2e-4, rtol=2e-3)


# -- a derivative elsewhere ----------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("what", ["z", "q", "k", "v", "pattern", "neurons", "resid_post"])
def test_it_is_the_derivative_towards_the_source(made: ModuleType, what: str) -> None:
    model, pairs = model_and_pairs(made)
    found = estimate(model, pairs, what, method="atp", direction="denoise")
    for layer, component in ((0, 0), (1, 1), (2, 0)):
        component = 0 if SITES[what].unit is None else component
        name, at = SITES[what].name(layer), index(what, component)
        theirs, ours = cached(model, pairs.clean, name), cached(model, pairs.corrupted, name)
        step = 2e-2
        there, back = (
            difference(model, pairs, pairs.corrupted, [put(name, ours + sign * step * (theirs - ours), at)])
            for sign in (1, -1)
        )
        expected = (there - back) / (2 * step)
        assert torch.allclose(found[:, layer, component], expected, atol=2e-3, rtol=2e-2)


@FAMILIES
@pytest.mark.parametrize("what", ["vision_z", "vision_neurons"])
def test_of_the_vision_tower_too(made: ModuleType, what: str) -> None:
    model, pairs = model_and_pairs(made)
    plain = {side: replace(getattr(pairs, side), image_embeds=None) for side in ("clean", "corrupted")}
    found = estimate(model, pairs, what)
    assert found.shape[1] == model.cfg.vision.n_layers
    for layer, component in ((0, 2), (1, 0)):
        name = SITES[what].name(layer)
        theirs, ours = cached(model, plain["corrupted"], name), cached(model, plain["clean"], name)
        step, at = 2e-2, (slice(None), slice(None), component)
        there, back = (
            difference(model, pairs, plain["clean"], [put(name, ours + sign * step * (theirs - ours), at)])
            for sign in (1, -1)
        )
        expected = (there - back) / (2 * step)
        assert expected.abs().max() > 1e-3
        assert torch.allclose(found[:, layer, component], expected, atol=2e-3, rtol=2e-2)
    integral = estimate(model, pairs, what, "group", groups=["image"], method="ig", steps=12, layers=[1])
    theirs = cached(model, plain["corrupted"], SITES[what].name(1))
    patched = [put(SITES[what].name(1), theirs, (slice(None),))]
    real = difference(model, pairs, plain["clean"], patched) - difference(model, pairs, plain["clean"], [])
    close(integral[:, 0, :, 0].sum(1), real, 1e-2)


def test_pairs_that_differ_behind_the_vision_tower() -> None:
    model, pairs = model_and_pairs(random_qwen)
    embeds = pairs.clean.image_embeds
    assert embeds is not None
    blurred = replace(pairs, corrupted=replace(pairs.clean, image_embeds=embeds + 1))
    assert estimate(model, blurred, "z").abs().max() > 1e-2
    with pytest.raises(ValueError, match="vision_z has nothing to patch"):
        estimate(model, blurred, "vision_z")


@pytest.mark.exhaustive
@FAMILIES
@pytest.mark.parametrize("what", ["z", "resid_pre", "k"])
def test_integrated_gradients_add_up_to_the_measured_change_of_a_layer(made: ModuleType, what: str) -> None:
    model, pairs = model_and_pairs(made)
    found = estimate(model, pairs, what, method="ig", steps=24, layers=[0, 2])
    first = estimate(model, pairs, what, method="atp", layers=[0, 2])
    for i, layer in enumerate((0, 2)):
        name = SITES[what].name(layer)
        theirs = cached(model, pairs.corrupted, name)
        real = effect(model, pairs, "noise", [put(name, theirs, (slice(None),))])
        close(found[:, i].sum(1), real, 5e-3)
        assert (first[:, i].sum(1) - real).abs().max() > 0.02 * real.abs().max()


def test_other_metrics_have_their_own_derivatives() -> None:
    model, pairs = model_and_pairs(random_llava)
    name = SITES["z"].name(1)
    theirs, ours = cached(model, pairs.corrupted, name), cached(model, pairs.clean, name)
    logits = [
        model.run_with_hooks(
            pairs.clean, fwd_hooks=[put(name, ours + step * (theirs - ours), (slice(None),))]
        )
        for step in (1e-2, -1e-2)
    ]
    there, back = (x[:, -1].detach().double().log_softmax(-1) for x in logits)
    rows = torch.arange(3)
    expected = (there - back)[rows, pairs.answer] / 2e-2
    found = estimate(model, pairs, "z", metric="log_prob", method="atp")[:, 1].sum(1)
    assert torch.allclose(found, expected, atol=2e-3, rtol=2e-2)
    # KL is at its least in the clean run, where its slope is 0; not so in the corrupted one.
    assert estimate(model, pairs, "z", metric="kl", method="atp").abs().max() < 1e-4
    assert estimate(model, pairs, "z", metric="kl", method="atp", direction="denoise").abs().max() > 1e-2


# -- what is returned ----------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("method", ["atp", "atp*", "ig"])
def test_batches_change_nothing(made: ModuleType, method: str) -> None:
    model, pairs = model_and_pairs(made)
    options = {"method": method, "by": "group", "groups": ["image", "last"], "steps": 2}
    whole = estimate(model, pairs, "k", **options)
    assert torch.allclose(estimate(model, pairs, "k", batch_size=1, **options), whole, atol=1e-4, rtol=1e-3)


def test_means_have_the_intervals_of_the_bootstrap() -> None:
    model, pairs = model_and_pairs(random_qwen)
    options: dict = {"layers": [2, 0], "direction": "noise", "progress": False}
    result = attribute_patching(model, pairs, "neurons", raw=True, **options)
    each = estimate(model, pairs, "neurons", layers=[2, 0])
    assert result.axes == ("layer", "neuron") and result.names("layer") == (2, 0) and result.n == 3
    assert "corrupted into clean" in result.what
    for layer, neuron in ((0, 3), (1, 39)):
        expected = mean_interval(each[:, layer, neuron].numpy())
        assert result.low is not None and result.high is not None
        got = [float(x[layer, neuron]) for x in (result.values, result.low, result.high)]
        assert got == pytest.approx([expected.value, expected.low, expected.high], rel=1e-9, abs=1e-12)
    in_order = estimate(model, pairs, "neurons")
    assert torch.allclose(each, in_order[:, [2, 0]], atol=1e-5)


@FAMILIES
def test_a_share_is_of_what_changing_the_input_changes(made: ModuleType) -> None:
    model, pairs = model_and_pairs(made)
    changes = estimate(model, pairs, "attn_out", direction="denoise", by="group", groups=["last", "image"])
    shares = attribute_patching(model, pairs, "attn_out", "group", groups=["last", "image"], progress=False)
    whole = difference(model, pairs, pairs.clean, []) - difference(model, pairs, pairs.corrupted, [])
    assert shares.axes == ("layer", "group") and shares.names("group") == ("last", "image")
    assert torch.allclose(shares.values, changes[:, :, 0].mean(0) / whole.mean(), rtol=1e-4, atol=1e-5)
    assert "share of logit_diff restored, attn_out, estimated by atp*, clean into corrupted" in shares.what


def test_it_leaves_no_trace() -> None:
    model, pairs = model_and_pairs(random_llava)
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    with torch.no_grad():
        attribute_patching(model, pairs, "z", progress=False)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_it_refuses() -> None:
    model, pairs = model_and_pairs(random_llava)
    wrong = (
        ({"what": "heads"}, "unknown activation 'heads'; valid: resid_pre, resid_mid"),
        ({"direction": "up"}, "unknown direction 'up'"),
        ({"method": "exact"}, "method 'exact'"),
        ({"method": "ig", "steps": 0}, "0 steps"),
        ({"metric": "loss"}, "unknown patching metric 'loss'"),
        ({"by": "token"}, "unknown by 'token'"),
        ({"by": "position"}, "pairs of one length"),
        ({"by": "group", "groups": ["answer"]}, "unknown token group 'answer'"),
        ({"layers": [3]}, "layer 3 is not in 0 … 2"),
        ({"layers": [1, 1]}, "each once"),
        ({"draws": -1, "raw": True}, "draws must not be negative"),
    )
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            attribute_patching(model, pairs, **{"progress": False, **options})
    held = [("blocks.1.attn.hook_pattern", lambda x, hook: x)]
    with model.hooks(fwd_hooks=held), pytest.raises(ValueError, match=r"hooks at blocks\.1\.attn\.hook_pat"):
        attribute_patching(model, pairs, "q", progress=False)
    broken = PatchPairs(pairs.clean, pairs.corrupted, pairs.answer, pairs.foil, pairs.ids)
    with pytest.raises(FloatingPointError, match="pair 'b' is not finite"):
        attribute_patching(model, broken, metric=_nan_for_b, progress=False)


def _nan_for_b(logits: Tensor, pairs: PatchPairs, clean: Tensor) -> Tensor:
    return logits[:, 0] * torch.tensor([1.0, float("nan"), 1.0])
