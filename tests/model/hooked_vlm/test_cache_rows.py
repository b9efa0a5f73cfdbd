"""ActivationCache's methods on caches with entries of the vision tower: rows keep their own images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hooked_pairs import BY_HEAD_PAIR, COSTLY, Pair
from torch import Tensor
from transformer_lens import ActivationCache

from hones_lens import HookedVLM, VLMInputs

# Images of each row of the batch: none, one, several, and not as many as rows.
LAYOUTS = {"mixed": (1, 2, 0), "as many as rows": (0, 2), "one each": (1, 1), "first has two": (2, 0, 1, 0)}
FILTERS: dict[str, Any] = {
    "all": None,
    "vision alone": lambda name: (
        name.startswith("vision_encoder") and not name.endswith((*COSTLY, *BY_HEAD_PAIR))
    ),
    "packed alone": ["hook_image_embed", "vision_projector.hook_out"],
    "one of each": ["vision_encoder.blocks.0.hook_resid_post", "blocks.0.hook_resid_post"],
}
ROWS: list[Any] = [0, -1, 1, (0, 1), (1, None), slice(None, None, 2), [1, 0], torch.tensor([1, 1]), None]


def by_image(name: str) -> bool:
    return name.startswith("vision") or name.startswith("hook_image_embed")


class Batch:
    """A batch whose rows have so many images, and its whole cache."""

    def __init__(self, pair: Pair, counts: tuple[int, ...]):
        self.model: HookedVLM = pair.model
        made = random_qwen if hasattr(pair.model, "video_token_id") else random_llava
        pictures = [random_llava.make_images(1, seed=i, size=random_qwen.SIZES[i % 3])[0] for i in range(6)]
        images = [[pictures.pop() for _ in range(n)] or None for n in counts]
        prompts = [f"is it {'red ' * i}?" for i in range(len(counts))]
        self.inputs: VLMInputs = self.model.prepare(images, prompts)
        self.counts = counts
        grids = [r * c for row in self.inputs.grids for r, c in row]
        leading = 0 if made is random_qwen else int(self.model.cfg.vision.keep_class_token)
        self.tokens = [n + leading for n in grids]

    def expected(self, name: str, entry: Tensor, rows: list[int]) -> Tensor:
        """The rows of an entry, sliced by counting the images, or their tokens, row by row."""
        if not by_image(name):
            return torch.stack([entry[row] for row in rows])
        sizes = [1] * sum(self.counts) if len(entry) == sum(self.counts) else self.tokens
        starts = np.cumsum([0, *sizes])
        firsts = np.cumsum([0, *self.counts])
        kept = [
            entry[starts[image] : starts[image + 1]]
            for row in rows
            for image in range(firsts[row], firsts[row + 1])
        ]
        return torch.cat(kept) if kept else entry[:0]


def without_one(name: str, entry: Tensor) -> Tensor:
    """An entry of one row without the batch axis, or without the image axis where it is 1."""
    if by_image(name) and (len(entry) != 1 or entry.ndim == 2):
        return entry
    return entry[0]


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def batch(pair: Pair, layout: str) -> Batch:
    return Batch(pair, LAYOUTS[layout])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def equal(cache: ActivationCache, expected: Any) -> None:
    assert set(cache) == set(expected)
    for name, value in expected.items():
        assert torch.equal(cache[name], value), name


@pytest.mark.parametrize("names", FILTERS)
def test_rows_with_their_images(batch: Batch, names: str) -> None:
    _, cache = batch.model.run_with_cache(batch.inputs, names_filter=FILTERS[names])
    for rows in ROWS:
        taken = cache.apply_slice_to_batch_dim(rows)
        n = len(batch.counts)
        index = slice(*rows) if isinstance(rows, tuple) else slice(None) if rows is None else rows
        numbers = np.arange(n)[np.asarray(index) if isinstance(index, Tensor) else index]
        expected = {name: batch.expected(name, cache[name], list(np.atleast_1d(numbers))) for name in cache}
        if isinstance(rows, int):
            expected = {name: without_one(name, value) for name, value in expected.items()}
        equal(taken, expected)
        assert taken.has_batch_dim == (not isinstance(rows, int))
        assert isinstance(taken, ActivationCache) and taken.model is batch.model


def test_rows_of_rows(batch: Batch) -> None:
    _, cache = batch.model.run_with_cache(batch.inputs)
    twice = cache.apply_slice_to_batch_dim([1, 0, 1]).apply_slice_to_batch_dim([2, 1])
    equal(twice, {name: batch.expected(name, cache[name], [1, 0]) for name in cache})


def test_a_row_is_that_of_its_own_run(pair: Pair) -> None:
    """Against runs of one row alone, up to rounding and up to the padding that a batch brings."""
    batch = Batch(pair, (1, 2, 0))
    _, cache = batch.model.run_with_cache(batch.inputs)
    for row in (0, 1):
        _, own = batch.model.run_with_cache(batch.inputs[row], remove_batch_dim=True)
        taken = cache.apply_slice_to_batch_dim(row)
        assert set(own) <= set(taken)
        real = batch.inputs.attention_mask[row].bool()
        for name in own:
            found, expected = taken[name], own[name]
            if by_image(name):
                found, expected = cut_like(found, expected), cut_like(expected, found)
            elif not name.endswith(BY_HEAD_PAIR):
                found, expected = found[real], expected[real]
            else:
                found, expected = found[:, real], expected[:, real]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=name)


def cut_like(value: Tensor, other: Tensor) -> Tensor:
    """The part that both have: patches behind an image are padding up to the batch's largest."""
    return value[tuple(slice(0, min(sizes)) for sizes in zip(value.shape, other.shape, strict=True))]


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("names", FILTERS)
def test_removing_the_batch_axis(pair: Pair, images: int, names: str) -> None:
    if images == 0 and names != "all":
        return
    one = Batch(pair, (images,))
    _, cache = one.model.run_with_cache(one.inputs, names_filter=FILTERS[names])
    expected = {name: without_one(name, cache[name]) for name in cache}
    assert cache.remove_batch_dim() is cache and not cache.has_batch_dim
    equal(cache, expected)
    _, at_once = one.model.run_with_cache(one.inputs, names_filter=FILTERS[names], remove_batch_dim=True)
    equal(at_once, expected)
    with pytest.raises(ValueError, match="no batch axis"):
        cache.apply_slice_to_batch_dim(0)
    equal(cache.apply_slice_to_batch_dim(None), expected)


def test_a_batch_is_not_removed(batch: Batch, caplog: pytest.LogCaptureFixture) -> None:
    for names in FILTERS.values():  # one image is not one row
        _, cache = batch.model.run_with_cache(batch.inputs, names_filter=names)
        with pytest.raises(ValueError, match=rf"batch axis of a cache of {len(batch.counts)} rows"):
            cache.remove_batch_dim()
        with pytest.raises(ValueError, match="given as 1"):
            cache.remove_batch_dim(batch_size=1)
    row = cache.apply_slice_to_batch_dim(0)
    with caplog.at_level(logging.WARNING):
        assert row.remove_batch_dim() is row
    assert "already" in caplog.text


def test_gradients_follow_their_activations(pair: Pair) -> None:
    with torch.enable_grad():
        _, cache = pair.model.run_with_cache(pair.answered, incl_bwd=True, return_type="loss")
    pair.model.zero_grad(set_to_none=True)
    row = cache.apply_slice_to_batch_dim(1)
    for name in (name for name in cache if not name.endswith("_grad")):
        assert row[f"{name}_grad"].shape == row[name].shape, name


def test_rows_that_do_not_exist(batch: Batch) -> None:
    _, cache = batch.model.run_with_cache(batch.inputs)
    for rows in (7, [0, 7], -9, slice(5, None), slice(1, 1)):
        with pytest.raises(IndexError):
            cache.apply_slice_to_batch_dim(rows)


def test_an_entry_of_another_batch_is_named(batch: Batch) -> None:
    _, cache = batch.model.run_with_cache(batch.inputs, names_filter=FILTERS["one of each"])
    for name in cache:
        other = ActivationCache.to(cache, "cpu")
        other.cache_dict = {**cache.cache_dict, name: torch.zeros(97, 3, 2)}
        with pytest.raises(ValueError, match=f"{name} has 97"):
            other.apply_slice_to_batch_dim(0)


CUTS: list[Any] = [-1, (2, 9), [0, 3, -2], slice(None, None, 5), torch.tensor([4])]


@pytest.mark.parametrize("cut", CUTS)
def test_caching_hooks_cut_the_decoders_positions(pair: Pair, cut: Any) -> None:
    """`get_caching_hooks` and `add_caching_hooks` against slices of every entry, costly ones too."""
    model = pair.model
    _, whole = model.run_with_cache(pair.inputs, names_filter=list(model.hook_dict))
    index = [cut] if isinstance(cut, int) else slice(*cut) if isinstance(cut, tuple) else cut
    store, fwd, bwd = model.get_caching_hooks(names_filter=list(model.hook_dict), pos_slice=cut)
    assert not bwd
    with model.hooks(fwd):
        model(pair.inputs)
    added = model.add_caching_hooks(names_filter=list(model.hook_dict), pos_slice=cut)
    try:
        model(pair.inputs)
    finally:
        model.reset_hooks()
    assert set(store) == set(added) == set(whole)
    for name in whole:
        keys = (slice(None), slice(None), index) if name.endswith(BY_HEAD_PAIR) else (slice(None), index)
        expected = whole[name] if by_image(name) else whole[name][keys]
        assert torch.equal(store[name], expected) and torch.equal(added[name], expected), name


def test_caching_hooks_drop_axes_as_a_run_does(pair: Pair) -> None:
    model, one = pair.model, pair.inputs[1]  # two images
    _, expected = model.run_with_cache(one, remove_batch_dim=True)
    store: dict[str, Tensor] = {}
    same, fwd, _ = model.get_caching_hooks(remove_batch_dim=True, cache=store)
    with model.hooks(fwd):
        model(one)
    assert same is store
    equal(expected, store)
    with model.hooks(fwd), pytest.raises(ValueError, match=r"batch axis of hook_text_embed: its size is 3"):
        model(pair.inputs)


def test_a_dict_in_place_of_the_cache(pair: Pair) -> None:
    _, cache = pair.model.run_with_cache(pair.inputs)
    logits, plain = pair.model.run_with_cache(pair.inputs, return_cache_object=False)
    assert type(plain) is dict and logits.shape[0] == 3
    equal(cache, plain)
    _, bound = pair.model.bind(pair.inputs).run_with_cache(pair.inputs.input_ids, return_cache_object=False)
    equal(cache, bound)


@pytest.mark.parametrize("how", ["by name", "tensor", "text", "mapping", "layer", "bound"])
def test_every_kind_of_input_says_whose_the_images_are(pair: Pair, how: str) -> None:
    model, inputs = pair.model, pair.inputs
    runs: dict[str, Callable[[], Any]] = {
        "by name": lambda: model.run_with_cache(model_input=inputs),
        "tensor": lambda: model.run_with_cache(torch.tensor([[11, 12, 13], [13, 14, 15], [15, 16, 17]])),
        "text": lambda: model.run_with_cache(["is it red?"] * 3),
        "mapping": lambda: model.run_with_cache(inputs.to_hf()),
        "layer": lambda: model.run_with_cache(
            model(inputs, stop_at_layer=1), start_at_layer=1, inputs=inputs.to_hf()
        ),
        "bound": lambda: model.bind(inputs).run_with_cache(inputs.input_ids),
    }
    _, cache = runs[how]()
    row = cache.apply_slice_to_batch_dim(1)
    name = "blocks.1.hook_resid_pre"
    assert torch.equal(row[name], cache[name][1])
    if how in ("by name", "mapping", "bound"):
        assert row["vision_encoder.blocks.0.hook_resid_pre"].shape[0] == 2
        embeds = inputs[1].image_embeds
        expected = model.with_image_embeds(inputs[1]).image_embeds if embeds is None else embeds
        torch.testing.assert_close(row["hook_image_embed"], expected, atol=1e-4, rtol=1e-4)


def test_what_the_run_refuses_is_refused_as_before(pair: Pair) -> None:
    model, inputs = pair.model, pair.inputs
    resid = model(inputs, stop_at_layer=1)
    with pytest.raises(ValueError, match="and inputs="):
        model.run_with_cache(resid, start_at_layer=1)
    with pytest.raises(TypeError):
        model.run_with_cache(inputs, inputs)
    with pytest.raises(TypeError):
        model.run_with_cache()


def test_positions_that_do_not_exist(pair: Pair) -> None:
    for cut in (500, (500, 600), slice(3, 3), [2, 500]):
        with pytest.raises(IndexError):
            pair.model.run_with_cache(pair.inputs, pos_slice=cut)
    assert not pair.model.list_hooks()


def _of_blocks(name: str) -> bool:
    return name.startswith("blocks") and not name.endswith(COSTLY)


@pytest.mark.wrong_types
def test_a_decomposition_without_its_embedding_is_refused(pair: Pair) -> None:
    """Of a filtered cache, and of a run that starts above the embedding."""
    model, inputs = pair.model, pair.inputs
    embeds = model.embed_inputs(model.as_inputs(inputs))
    caches = [
        model.run_with_cache(inputs, names_filter=_of_blocks)[1],
        model.run_with_cache(embeds, start_at_layer=0, inputs=inputs)[1],
    ]
    for cache in caches:
        with pytest.raises(KeyError, match="hook_embed is not in this cache"):
            cache.decompose_resid()
        with pytest.raises(KeyError, match="hook_embed is not in this cache"):
            cache.get_full_resid_decomposition()
        parts = cache.decompose_resid(incl_embeds=False).sum(0)
        last = model.cfg.n_layers - 1
        torch.testing.assert_close(parts + embeds, cache["resid_post", last], atol=1e-4, rtol=1e-4)
        heads = [cache["attn_out", layer] for layer in range(last + 1)]
        assert torch.equal(cache.decompose_resid(mode="attn"), torch.stack(heads))
        with pytest.raises(ValueError, match="unknown mode 'heads'; valid: all, mlp, attn"):
            cache.decompose_resid(mode="heads")
    _, above = model.run_with_cache(model(inputs, stop_at_layer=1), start_at_layer=1, inputs=inputs)
    with pytest.raises(KeyError, match=r"blocks\.0\.hook_attn_out"):
        above.decompose_resid(incl_embeds=False)
    with pytest.raises(KeyError, match=r"blocks\.0\.hook_resid_pre"):
        above.accumulated_resid()


def test_methods_of_other_architectures_are_refused(pair: Pair) -> None:
    _, cache = pair.model.run_with_cache(pair.inputs)
    assert cache.ssm_layers() == []
    for method in (cache.compute_ssm_state, cache.compute_ssm_effective_attention):
        with pytest.raises(RuntimeError, match="No SSM"):
            method()
        with pytest.raises(TypeError, match="Block 0"):
            method(layer=0)
